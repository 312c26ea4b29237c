// When a worker of ThreadTeam sits out: what it computes for the team, against what it costs the team.
//
// Milestone: M4. vLLM counterpart: none. Like thread_team.cpp it knows nothing of torch. A program with clocks of its own
// tests these rules in simulated time (tests/m4/thread_policy_driver.cpp).

#pragma once

#include <sys/resource.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>

namespace folovllm {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using std::chrono::nanoseconds;

// What became of a thread's time in a part or in a job.
struct Spent {
  nanoseconds computed;
  nanoseconds lost;  // the thread was ready to run, and another program had its core
};

// Measures one thread: `begin` and `end` are called by that thread alone. What it does before `begin` does not count, so a
// thread may sleep or compute between two jobs.
//
// The lost time is the time by the clock minus the thread's CPU time. To read the CPU time takes about 1 us, so `begin`
// reads it once in a millisecond and `end` only after a long job. What the thread has computed between that reading and
// `begin` makes the lost time appear shorter by at most a millisecond, and never longer.
class CoreTime {
 public:
  void begin() {
    begin_ = Clock::now();
    if (begin_ - read_at_ > kReadAgain) {
      read_cpu_time();
    }
  }
  // `slept`: for how long the thread has slept since `begin`.
  Spent end(nanoseconds slept = 0ns) {
    const nanoseconds awake = Clock::now() - begin_ - slept;
    const nanoseconds lost = awake > kLongLoss ? lost_of(awake) : 0ns;
    return {awake - lost, lost};
  }

 private:
  static constexpr nanoseconds kReadAgain = 1ms;
  static constexpr nanoseconds kLongLoss = 500us;  // a program that computes keeps a core for longer
  Clock::time_point begin_{}, read_at_{};
  nanoseconds cpu_time_{};
  int64_t sleeps_ = 0, preemptions_ = 0;

  nanoseconds lost_of(nanoseconds awake) {
    const nanoseconds before = cpu_time_;
    read_cpu_time();
    const nanoseconds lost = awake - (cpu_time_ - before);
    return lost > kLongLoss && was_preempted() ? lost : 0ns;
  }
  void read_cpu_time() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    cpu_time_ = std::chrono::seconds(now.tv_sec) + nanoseconds(now.tv_nsec);
    read_at_ = Clock::now();
  }
  // False if the thread has slept since the last call, as it does when a page comes from a disk, and if the system has not
  // taken its core. Systems that count neither answer true.
  bool was_preempted() {
#ifdef RUSAGE_THREAD
    rusage usage{};
    getrusage(RUSAGE_THREAD, &usage);
    const bool slept = usage.ru_nvcsw != sleeps_, preempted = usage.ru_nivcsw != preemptions_;
    sleeps_ = usage.ru_nvcsw;
    preemptions_ = usage.ru_nivcsw;
    return preempted || !slept;
#else
    return true;
#endif
  }
};

std::atomic<int64_t> num_absences{0};         // of ThreadTeam::Stats
std::atomic<bool> workers_may_sit_out{true};  // see ThreadTeam::disturb

// Whether a worker sits out. All is counted in time of threads: if three threads wait for 1 ms, that costs 3 ms. What the
// others lose is added to the worker's debt, and what it computes for them is taken off. Without the worker they would
// have to compute that themselves. So the debt of a worker that helps returns to 0 again and again, and the debt of a
// worker that costs more than it helps grows, whether its losses are short and frequent or long and rare.
//
// If a worker is in debt again soon after its return, it sits out for twice as long, because what disturbs it is there to
// stay.
class Attendance {
 public:
  // The worker has computed for the team, and the others have lost `cost` because of it.
  void settle(nanoseconds computed, nanoseconds cost) {
    debt_ = std::max(0ns, debt_ + cost - computed);
    num_costs_ = debt_ == 0ns ? 0 : num_costs_ + (cost > 0ns);
    if (debt_ > kMaxDebt && num_costs_ >= kMinCosts) {
      leave();
    }
  }
  // An offer has ended: the worker took it, or it was not there to take it. A worker that is hardly ever there does not
  // help, and what it costs the leader may be shorter than any loss that CoreTime sees.
  void took_offer(bool took) {
    num_taken_ += took;
    if (++num_offers_ == window_) {
      const bool is_of_use = num_taken_ >= window_ / 8;
      num_offers_ = num_taken_ = 0;
      window_ = kOffers;
      if (!is_of_use) {
        leave();
      }
    }
  }
  bool sits_out() {
    sits_out_ = sits_out_ && Clock::now() < return_;
    return sits_out_;
  }

 private:
  static constexpr nanoseconds kMaxDebt = 10ms;
  static constexpr int kMinCosts = 3;  // every system has a long disturbance now and then
  static constexpr int kOffers = 1024;  // about 0.1 s of a step's jobs: longer than what a system's scheduler takes away
  static constexpr int kTrialOffers = 128;  // after an absence: enough to see that nothing has changed
  static constexpr nanoseconds kTrial = 1s, kShortest = 100ms, kLongest = 4s;
  nanoseconds debt_{};
  int num_costs_ = 0, num_offers_ = 0, num_taken_ = 0, window_ = kOffers;
  bool sits_out_ = false;
  Clock::time_point return_{};
  nanoseconds absence_{};

  void leave() {
    debt_ = 0ns;
    num_costs_ = num_offers_ = num_taken_ = 0;
    if (workers_may_sit_out) {
      const Clock::time_point now = Clock::now();
      window_ = kTrialOffers;
      absence_ = now - return_ < kTrial ? std::min(2 * absence_, kLongest) : kShortest;
      return_ = now + absence_;
      sits_out_ = true;
      ++num_absences;
    }
  }
};

}  // namespace
}  // namespace folovllm
