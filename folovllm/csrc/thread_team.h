// A team of threads that stays together from one parallel operator to the next.
//
// Milestone: M4. vLLM counterpart: none (each of its CPU kernels opens an OpenMP region of its own).
//
// To open and close a parallel region takes 0.9 us if the cores are near each other, and 1.7 us if they are far apart.
// A decoder layer would open four to eight regions, one for each parallel operator. In a team, all operators share one
// region: thread 0 leads and runs the program, and the other threads wait in a loop for its next job. A job costs one
// word's way from core to core and back, 0.05 to 0.3 us.
//
//   thread 0   norm | start a job: qkv, its own part | wait for the others | start a job: rotary ...
//   thread 1   wait |                  its part      | report, wait        |              its part ...

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

namespace folovllm {

class ThreadTeam {
 public:
  // Calls f(thread) for each thread from 0 to num_threads, in parallel, and returns when all calls have returned.
  // Within `in_one_region` the team's threads do it; otherwise it opens a parallel region.
  template <typename F>
  static void run(int64_t num_threads, const F& f) {
    if (current() != nullptr && num_threads > 1) {
      return current()->run_job(num_threads, f);
    }
    at::parallel_for(0, num_threads, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        f(thread);
      }
    });
  }

  // Calls f(begin, end) for equal parts of 0 .. count: one for each thread, or fewer if a part would be smaller than
  // `grain`.
  template <typename F>
  static void run_ranges(int64_t count, int64_t grain, const F& f) {
    const int64_t parts = std::clamp<int64_t>((count + grain - 1) / grain, 1, at::get_num_threads());
    run(parts, [&](int64_t part) { f(count * part / parts, count * (part + 1) / parts); });
  }

  // Calls program() on this thread, which becomes the leader of a team. Until `program` returns, its calls of `run`
  // find the other threads waiting.
  template <typename F>
  static void in_one_region(const F& program) {
    const int64_t num_threads = at::get_num_threads();
    if (num_threads == 1 || at::in_parallel_region()) {
      return program();
    }
    ThreadTeam team(num_threads);
    at::parallel_for(0, num_threads, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
      if (begin > 0) {
        return team.follow(begin, end);
      }
      const Leadership leadership(team, end);
      program();
    });
  }

 private:
  static constexpr int64_t kEnd = -1;       // the number of the last job: followers leave
  static constexpr int kMaxSpins = 1 << 14; // some 0.2 ms; after that another program may need the core more

  struct alignas(64) Job {  // one line of the cache, which travels at once
    std::atomic<int64_t> number{0};
    int64_t num_threads = 0;
    const void* f = nullptr;
    void (*call)(const void* f, int64_t thread) = nullptr;
  };
  struct alignas(64) Report {  // of one follower
    std::atomic<int64_t> number{0};  // of the job that it has finished
    std::exception_ptr error;
  };
  struct Leadership {  // its destructor sends the followers home, also if the program throws
    ThreadTeam& team;
    Leadership(ThreadTeam& led, int64_t leader_end) : team(led) {
      team.leader_end_ = leader_end;
      current() = &team;
    }
    ~Leadership() {
      current() = nullptr;
      team.job_.number.store(kEnd, std::memory_order_release);
    }
  };

  Job job_;
  std::vector<Report> reports_;
  int64_t leader_end_ = 1;  // the leader does parts 0 .. leader_end_: OpenMP may give fewer threads than asked for

  explicit ThreadTeam(int64_t num_threads) : reports_(num_threads) {}

  static ThreadTeam*& current() {
    static thread_local ThreadTeam* team = nullptr;
    return team;
  }

  template <typename F>
  void run_job(int64_t num_threads, const F& f) {
    job_.num_threads = num_threads;
    job_.f = &f;
    job_.call = [](const void* body, int64_t thread) { (*static_cast<const F*>(body))(thread); };
    const int64_t number = job_.number.load(std::memory_order_relaxed) + 1;
    job_.number.store(number, std::memory_order_release);
    const int64_t size = static_cast<int64_t>(reports_.size());
    std::exception_ptr error = run_parts(0, std::min(leader_end_, num_threads));
    // A job has more parts than the team has threads only if OpenMP is set to use more threads inside a region.
    error = error ? error : run_parts(size, num_threads);
    for (int64_t thread = leader_end_; thread < size; ++thread) {
      Report& report = reports_[thread];
      spin_until([&] { return report.number.load(std::memory_order_acquire) == number; });
      error = error ? error : std::exchange(report.error, nullptr);
    }
    if (error) {
      std::rethrow_exception(error);
    }
  }

  // Does the parts begin .. end of every job, until the leader ends the team.
  void follow(int64_t begin, int64_t end) {
    for (int64_t last = 0, number = 0;; last = number) {
      spin_until([&] { return (number = job_.number.load(std::memory_order_acquire)) != last; });
      if (number == kEnd) {
        return;
      }
      reports_[begin].error = run_parts(begin, std::min(end, job_.num_threads));
      for (int64_t thread = begin; thread < end; ++thread) {
        reports_[thread].number.store(number, std::memory_order_release);
      }
    }
  }

  std::exception_ptr run_parts(int64_t begin, int64_t end) const {
    try {
      for (int64_t thread = begin; thread < end; ++thread) {
        job_.call(job_.f, thread);
      }
    } catch (...) {
      return std::current_exception();
    }
    return nullptr;
  }

  template <typename F>
  static void spin_until(const F& is_true) {
    for (int spins = 0; !is_true(); ++spins) {
      if (spins >= kMaxSpins) {
        std::this_thread::yield();
      }
#if defined(__x86_64__)
      __builtin_ia32_pause();  // the core's other hardware thread may go on, and leaving the loop costs less
#endif
    }
  }
};

}  // namespace folovllm
