// A worker of ThreadTeam: how it gets its part of a job, how it waits, and when it sits out.
//
// Milestone: M4. vLLM counterpart: none. Like thread_team.cpp it knows nothing of torch, so that a small program can test
// both (tests/m4/thread_team_driver.cpp).
//
// The leader and a worker tell each other everything through one word, the worker's state. It and the job lie in a cache
// line of their own, which travels from core to core and back once per job.
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
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <string>
#include <thread>
#include <utility>

#include "thread_team.h"

namespace folovllm {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using std::chrono::nanoseconds;

constexpr nanoseconds kWorkerLoop = 200us;  // longer than what a step does between two jobs
constexpr nanoseconds kLeaderLoop = 50us;   // longer than most pieces of work

thread_local int64_t this_thread_index = 0;

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
std::atomic<bool> workers_may_sit_out{true};

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

// How long the calling thread was ready to run and did not run, because another program had its core.
class LostTime {
 public:
  // Counts from now on; the thread has not slept until `take` is called.
  void start() {
    wall_ = Clock::now();
    cpu_ = cpu_time();
  }
  // The time lost since the start, or since the last call.
  nanoseconds take() {
    const LostTime before = *this;
    start();
    return (wall_ - before.wall_) - (cpu_ - before.cpu_);
  }

 private:
  Clock::time_point wall_;
  nanoseconds cpu_{};

  static nanoseconds cpu_time() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return std::chrono::seconds(now.tv_sec) + nanoseconds(now.tv_nsec);
  }
};

std::atomic<int64_t> num_absences{0};  // of ThreadTeam::Stats

constexpr nanoseconds kLongLoss = 1ms;  // a program that computes keeps a core for longer

// Whether a worker sits out. The leader counts strikes against it: delays of a job by a worker that had lost its core,
// long rows of offers that the worker was not there to take, and losses of the leader's own core (LeaderLosses). After a
// few strikes in close succession it sits out. If that happens again soon after its return, it sits out for twice as
// long, because what disturbs it is there to stay.
class Attendance {
 public:
  void add_strike() {
    const Clock::time_point now = Clock::now();
    strikes_ = now - last_strike_ < kMemory ? strikes_ + 1 : 1;
    last_strike_ = now;
    if (strikes_ == kMaxStrikes) {
      absence_ = now - return_ < kTrial ? std::min(2 * absence_, kLongest) : kShortest;
      return_ = now + absence_;
      sits_out_ = true;
      strikes_ = 0;
      ++num_absences;
    }
  }
  bool sits_out() {
    sits_out_ = sits_out_ && Clock::now() < return_;
    return sits_out_;
  }

 private:
  // A program that computes beside the worker costs a strike every 8 ms or so: each of the two gets the core for 4 ms at a
  // time, if the system's timer ticks 250 times a second. Short disturbances, which every system has, come one by one.
  static constexpr int kMaxStrikes = 4;
  static constexpr nanoseconds kMemory = 20ms;  // strikes that are further apart do not count together
  static constexpr nanoseconds kTrial = 300ms, kShortest = 100ms, kLongest = 4s;
  bool sits_out_ = false;
  int strikes_ = 0;
  Clock::time_point last_strike_{}, return_{};
  nanoseconds absence_{};
};

// Whether the leader keeps losing its core. If it does, more threads are ready to run than there are cores, and every
// worker that computes takes time from the leader or waits for it. Reading a thread's CPU time takes as long as a small
// piece of work, so a loss is looked for once in kWindow jobs.
class LeaderLosses {
 public:
  void job_begins() {
    if (Clock::now() - last_end_ > kGap) {
      restart();  // the leader may have slept since the last job
    }
  }
  // Returns whether the leader has lost its core for long since the window began. `slept`: it slept in this job.
  bool job_ends(bool slept) {
    last_end_ = Clock::now();
    if (slept) {
      restart();
      return false;
    }
    if (++num_jobs_ < kWindow) {
      return false;
    }
    num_jobs_ = 0;
    return lost_time_.take() > kLongLoss;
  }

 private:
  static constexpr int kWindow = 8;
  static constexpr nanoseconds kGap = 500us;  // longer than what a step does between two jobs
  int num_jobs_ = 0;
  Clock::time_point last_end_{};
  LostTime lost_time_;

  void restart() {
    num_jobs_ = 0;
    lost_time_.start();
  }
};

class alignas(64) Worker {
 public:
  explicit Worker(int64_t index) : index_(index), thread_([this] { work(); }) {}

  // ---- called by the leader

  // Offers part number `index` of a job, unless the worker sits out. Returns whether it did.
  bool offer(const Job& job) {
    has_offer_ = !(attendance_.sits_out() && workers_may_sit_out) && !is_disturbed(4);
    if (has_offer_) {
      job_ = job;
      if (state_.exchange(kOffered) == kAsleep) {
        state_.notify_one();
      }
    }
    return has_offer_;
  }
  // Whether the leader has to do the part, because the worker has not begun it. From now on the worker cannot begin it.
  bool take_back() {
    if (!has_offer_) {
      return true;
    }
    State expected = kOffered;
    const bool is_late = state_.compare_exchange_strong(expected, kReady);
    late_in_a_row_ = is_late ? late_in_a_row_ + 1 : 0;
    if (late_in_a_row_ == kMaxLate) {
      late_in_a_row_ = 0;
      attendance_.add_strike();
    }
    return is_late;
  }
  // Waits until the worker has no part. Returns whether the leader had to sleep.
  bool wait() {
    const auto is_done = [&] { return state_.load() != kBegun; };
    State expected = kBegun;
    if (loop_until(kLeaderLoop, is_done) || !state_.compare_exchange_strong(expected, kAwaited)) {
      return false;
    }
    state_.wait(kAwaited);
    if (lost_ > kLongLoss) {
      attendance_.add_strike();
    }
    return true;
  }
  // The leader has lost its core for long.
  void add_strike() {
    if (has_offer_) {
      attendance_.add_strike();
    }
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
  static constexpr int kMaxLate = 32;  // offers; a worker that has to wake up first misses a few

  std::atomic<State> state_{kReady};
  bool has_offer_ = false;
  Job job_{};
  std::exception_ptr error_;
  nanoseconds lost_{};  // by the worker before the end of a part that the leader slept for
  const int64_t index_;
  int late_in_a_row_ = 0;
  Attendance attendance_;
  LostTime lost_time_;
  std::thread thread_;  // the last member, because it uses the others

  // ---- the worker's own thread

  void work() {
    this_thread_index = index_;
    name_this_thread("folovllm-" + std::to_string(index_));
    lost_time_.start();
    while (wait_for_offer() != kEnd) {
      delay_if_disturbed();
      State expected = kOffered;
      if (state_.compare_exchange_strong(expected, kBegun)) {
        do_part();
      }
    }
  }

  void do_part() {
    error_ = call(job_, index_);
    delay_if_disturbed();
    lost_ = state_.load() == kAwaited ? lost_time_.take() : 0ns;
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
        lost_time_.start();
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
