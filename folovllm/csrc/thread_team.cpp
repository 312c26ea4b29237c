// The workers of ThreadTeam: how they get their parts, how they wait, and how they end.
//
// Milestone: M4. vLLM counterpart: none. Knows nothing of torch, so that a small program can test it (tests/m4).
//
// All that a leader and a worker tell each other is the worker's state, one word in a cache line of its own:
//
//   asleep   ready   -> offered             the leader has a part for the worker, and wakes it if it slept
//   offered          -> begun               the worker takes the part
//   offered          -> ready               the leader takes it back, because it has nothing else to do
//   begun            -> awaited             the leader has waited for long, and sleeps until the part is done
//   begun   awaited  -> ready               the part is done
//   ready            -> asleep              nothing was offered for long
//
// A worker waits in a loop first, because the next job usually follows within microseconds and to wake a sleeping thread
// takes about as long as a job. Then it sleeps, because another program may need the core.

#include "thread_team.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <exception>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace folovllm {
namespace {

using std::chrono::microseconds;
using Clock = std::chrono::steady_clock;

constexpr microseconds kWorkerSpins{200};  // Python's work between two calls of a step takes less
constexpr microseconds kLeaderSpins{50};   // most parts take less

constexpr int64_t kMaxWorkers = 1023;

thread_local int64_t this_thread_index = 0;

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();  // the core's other hardware thread may go on, and leaving the loop costs less
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Whether is_true() became true within `limit`.
template <typename F>
bool spin_until(microseconds limit, const F& is_true) {
  const auto deadline = Clock::now() + limit;
  do {
    for (int i = 0; i < 32; ++i) {  // looking at the clock takes as long as a pause
      if (is_true()) {
        return true;
      }
      pause_briefly();
    }
  } while (Clock::now() < deadline);
  return false;
}

std::exception_ptr do_part(const ThreadTeam::Job& job, int64_t part) {
  try {
    job.call(job.f, part);
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

void name_this_thread(const std::string& name) {
#if defined(__APPLE__)
  pthread_setname_np(name.c_str());
#else
  pthread_setname_np(pthread_self(), name.c_str());
#endif
}

class alignas(64) Worker {
 public:
  explicit Worker(int64_t index) : index_(index), thread_([this] { work(); }) {}

  // ---- called by the leader

  void offer(const ThreadTeam::Job& job) {
    job_ = job;
    if (state_.exchange(kOffered, std::memory_order_acq_rel) == kAsleep) {
      state_.notify_one();
    }
  }
  bool take_back() {
    int expected = kOffered;
    return state_.compare_exchange_strong(expected, kReady, std::memory_order_acq_rel);
  }
  // Waits until the part that the worker has begun is done.
  std::exception_ptr wait() {
    const auto is_done = [&] { return state_.load(std::memory_order_acquire) != kBegun; };
    int expected = kBegun;
    if (!spin_until(kLeaderSpins, is_done) && state_.compare_exchange_strong(expected, kAwaited)) {
      state_.wait(kAwaited, std::memory_order_acquire);
    }
    return std::exchange(error_, nullptr);
  }
  void end() {
    state_.store(kEnd, std::memory_order_release);
    state_.notify_one();
    thread_.join();
  }

 private:
  enum State : int { kAsleep, kReady, kOffered, kBegun, kAwaited, kEnd };

  std::atomic<int> state_{kReady};
  ThreadTeam::Job job_{};
  std::exception_ptr error_;
  const int64_t index_;
  std::thread thread_;  // the last member: it uses the others

  void work() {
    this_thread_index = index_;
    name_this_thread("folovllm-" + std::to_string(index_));
    while (wait_for_offer() != kEnd) {
      int expected = kOffered;
      if (!state_.compare_exchange_strong(expected, kBegun, std::memory_order_acq_rel)) {
        continue;  // taken back, or the end
      }
      error_ = do_part(job_, index_);
      if (state_.exchange(kReady, std::memory_order_acq_rel) == kAwaited) {
        state_.notify_one();
      }
    }
  }

  int wait_for_offer() {
    int state = kReady;
    const auto changed = [&] { return (state = state_.load(std::memory_order_acquire)) != kReady; };
    if (!spin_until(kWorkerSpins, changed) && state_.compare_exchange_strong(state, kAsleep)) {
      state_.wait(kAsleep, std::memory_order_acquire);
      state = state_.load(std::memory_order_acquire);
    }
    return state;
  }
};

class Team {
 public:
  void run(const ThreadTeam::Job& job) {
    Outcome outcome;
    if (is_led_.exchange(true, std::memory_order_acquire)) {  // by another caller, or by the one that calls from within
      outcome.do_parts(job, 0, job.num_parts);
    } else {
      lead(job, outcome);
      is_led_.store(false, std::memory_order_release);
    }
    if (outcome.error) {
      std::rethrow_exception(outcome.error);
    }
  }

  // Ends the workers when the process exits. If another thread leads them at this moment, they end with the process.
  // From now on every caller works alone.
  void end() {
    if (!is_led_.exchange(true, std::memory_order_acquire)) {
      for (const auto& worker : workers_) {
        worker->end();
      }
    }
  }

 private:
  struct Outcome {
    std::exception_ptr error;  // the first one

    void add(std::exception_ptr raised) {
      error = error ? error : raised;
    }
    void do_parts(const ThreadTeam::Job& job, int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        add(do_part(job, part));
      }
    }
  };

  void lead(const ThreadTeam::Job& job, Outcome& outcome) {
    const int64_t helpers = start_workers(job.num_parts - 1);
    for (int64_t i = 0; i < helpers; ++i) {
      workers_[i]->offer(job);
    }
    outcome.do_parts(job, 0, 1);
    outcome.do_parts(job, 1 + helpers, job.num_parts);
    for (int64_t i = 0; i < helpers; ++i) {
      if (workers_[i]->take_back()) {
        outcome.do_parts(job, 1 + i, 2 + i);
      }
    }
    for (int64_t i = 0; i < helpers; ++i) {
      outcome.add(workers_[i]->wait());
    }
  }

  // Starts the workers that are missing. Returns how many of the wanted ones there are: the system may refuse a thread.
  int64_t start_workers(int64_t wanted) {
    while (static_cast<int64_t>(workers_.size()) < std::min(wanted, limit_)) {
      try {
        workers_.push_back(std::make_unique<Worker>(workers_.size() + 1));
      } catch (const std::system_error&) {
        limit_ = workers_.size();
      }
    }
    return std::min(wanted, limit_);
  }

  std::atomic<bool> is_led_{false};
  std::vector<std::unique_ptr<Worker>> workers_;
  int64_t limit_ = kMaxWorkers;
};

// Never destroyed: a thread may still call `run` while the process exits. A child that was forked has none of the
// threads, so it begins with a new team.
Team* team = new Team;

const bool handlers_are_set = [] {
  std::atexit([] { team->end(); });
  pthread_atfork(nullptr, nullptr, [] { team = new Team; });
  return true;
}();

}  // namespace

int64_t ThreadTeam::thread_index() {
  return this_thread_index;
}

void ThreadTeam::run_job(const Job& job) {
  team->run(job);
}

}  // namespace folovllm
