// A worker of ThreadTeam: how it gets its part of a job, how it waits, and when it sits out.
//
// Milestone: M4. vLLM counterpart: none. Like thread_team.cpp it knows nothing of torch, so that a small program can test
// both (tests/m4/thread_team_driver.cpp).
//
// The leader and a worker tell each other everything through one word, the worker's state. It lies in a cache line with
// the job and its outcome. The line travels from core to core and back once per job.
//
//   from              to         by      when
//   ready, asleep     offered    leader  there is a part for the worker; the leader wakes it if it is asleep
//   offered           begun      worker  it takes the part
//   offered           ready      leader  it takes the part back, because it has no other work left
//   begun             awaited    leader  it has waited for long, and sleeps until the part is done
//   begun, awaited    ready      worker  the part is done; the worker wakes the leader if that is asleep
//   ready             asleep     worker  nothing was offered for long
//
// The leader also decides whether a worker sits out: for some time it then offers nothing, and the worker sleeps.
//
// A thread waits in a loop first: the next job usually follows within microseconds, and to wake a sleeping thread
// takes as long as a job (milestones/m4/results/threads_cpu.json). Then it sleeps, because another program may need the
// core.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "thread_attendance.h"
#include "thread_team.h"

namespace folovllm {
namespace {

constexpr nanoseconds kWorkerLoop = 200us;  // longer than what a step does between two jobs
constexpr nanoseconds kLeaderLoop = 50us;   // longer than most pieces of work

thread_local int64_t this_thread_index = 0;
std::atomic<int64_t> num_forks{0};  // that lie between the first process and this one

inline std::exception_ptr call(const Job& job, int64_t part) {
  try {
    job.call(job.f, part);
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();  // the core's other hardware thread may go on, and leaving the loop costs less
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Whether is_true() became true within `limit`.
template <typename F>
bool loop_until(nanoseconds limit, const F& is_true) {
  Clock::time_point begin{};
  do {
    for (int i = 0; i < 32; ++i) {  // to read the clock takes as long as a pause
      if (is_true()) {
        return true;
      }
      pause_briefly();
    }
    begin = begin == Clock::time_point{} ? Clock::now() : begin;
  } while (Clock::now() - begin < limit);
  return false;
}

// For tests and measurements, see ThreadTeam::disturb.
std::atomic<uint64_t> disturbance{0};

// True once in `n` times, if there is a disturbance.
inline bool is_disturbed(uint64_t n) {
  if (disturbance.load(std::memory_order_relaxed) == 0) {
    return false;
  }
  uint64_t x = disturbance += 0x9e3779b97f4a7c15;  // splitmix64
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return (x ^ x >> 31) % n == 0;
}

inline void delay_if_disturbed() {
  while (is_disturbed(2)) {
    loop_until(2us, [] { return false; });
  }
}

class alignas(64) Worker {
 public:
  explicit Worker(int64_t index) : index_(index), thread_([this] { work(); }) {}

  // ---- called by the leader

  // Offers part number `index` of a job, unless the worker sits out. Returns whether it did.
  bool offer(const Job& job) {
    has_offer_ = !(attendance_.sits_out() && workers_may_sit_out) && !is_disturbed(4);
    if (has_offer_) {
      job_ = job;
      forks_ = num_forks;
      if (state_.exchange(kOffered) == kAsleep) {
        state_.notify_one();
      }
    }
    return has_offer_;
  }
  // Whether the leader has to do the part, because the worker has not begun it. From now on the worker cannot begin it.
  bool take_back() {
    has_begun_ = false;
    if (has_offer_) {
      State expected = kOffered;
      has_begun_ = !state_.compare_exchange_strong(expected, kReady);
      attendance_.took_offer(has_begun_);
    }
    return !has_begun_;
  }
  // Waits until the worker has no part, unless it does not exist in this process. `others` is the number of the other
  // threads in the job, which all wait. Returns how long the leader has slept.
  nanoseconds wait(int64_t others) {
    if (!has_begun_) {
      return 0ns;
    }
    if (num_forks != forks_) {
      error_ = std::make_exception_ptr(std::runtime_error(
          "the process was forked within a parallel job: the child has none of the other threads to finish their parts"));
      return 0ns;
    }
    const nanoseconds slept = wait_for_part();
    attendance_.settle(spent_.computed, others * std::min(slept, spent_.lost));
    return slept;
  }
  // The leader has lost its core, which has cost the team this time. Returns whether this worker was charged for it.
  bool charge(nanoseconds cost) {
    if (has_offer_) {
      attendance_.settle(0ns, cost);
    }
    return has_offer_;
  }
  // The exception of the part that the worker has done, or null.
  std::exception_ptr take_error() {
    return std::exchange(error_, nullptr);
  }
  // Ends the thread, which has no part.
  void end() {
    state_.store(kEnd);
    state_.notify_one();
    thread_.join();
  }

 private:
  enum State : int { kAsleep, kReady, kOffered, kBegun, kAwaited, kEnd };

  std::atomic<State> state_{kReady};
  bool has_offer_ = false, has_begun_ = false;  // in the leader's job
  Job job_{};
  int64_t forks_ = 0;  // num_forks when the job was offered
  std::exception_ptr error_;
  Spent spent_{};  // in the last part

  alignas(64) Attendance attendance_;  // only the leader writes to this line

  alignas(64) CoreTime core_time_;  // and only the worker to this one
  const int64_t index_;
  std::thread thread_;  // the last member, because it uses the others

  nanoseconds wait_for_part() {
    const auto is_done = [&] { return state_.load() != kBegun; };
    State expected = kBegun;
    if (loop_until(kLeaderLoop, is_done) || !state_.compare_exchange_strong(expected, kAwaited)) {
      return 0ns;
    }
    const Clock::time_point begin = Clock::now();
    state_.wait(kAwaited);
    return Clock::now() - begin;
  }

  // ---- the worker's own thread

  void work() {
    this_thread_index = index_;
    name_this_thread("folovllm-" + std::to_string(index_));
    while (wait_for_offer() != kEnd) {
      delay_if_disturbed();
      State expected = kOffered;
      if (state_.compare_exchange_strong(expected, kBegun)) {
        do_part();
      }
    }
  }

  void do_part() {
    core_time_.begin();
    error_ = call(job_, index_);
    if (num_forks != forks_) {
      std::fputs("folovllm: a part of a parallel job forked the process; the child has no thread to return to\n", stderr);
      std::abort();
    }
    delay_if_disturbed();
    spent_ = core_time_.end();
    if (state_.exchange(kReady) == kAwaited) {
      state_.notify_one();
    }
  }

  // Returns kOffered or kEnd. (The leader may have taken an offer back meanwhile.)
  State wait_for_offer() {
    const auto changed = [&] { return state_.load() != kReady; };
    while (!loop_until(kWorkerLoop, changed)) {
      State expected = kReady;
      if (state_.compare_exchange_strong(expected, kAsleep)) {
        state_.wait(kAsleep);
      }
    }
    return state_.load();
  }

  static void name_this_thread(const std::string& name) {
#if defined(__APPLE__)
    pthread_setname_np(name.c_str());
#else
    pthread_setname_np(pthread_self(), name.c_str());
#endif
  }
};

}  // namespace
}  // namespace folovllm
