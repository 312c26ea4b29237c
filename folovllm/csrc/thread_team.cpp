// ThreadTeam: the leader's side of a job, and the life of the team in its process.
//
// Milestone: M4. vLLM counterpart: none. The workers' side is in thread_worker.h.

#include "thread_team.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <vector>

#include "thread_worker.h"

namespace folovllm {
namespace {

constexpr int64_t kMaxWorkers = 1023;
constexpr nanoseconds kRetry = 1s;  // after the system has refused a thread

thread_local CoreTime leader_time;  // of each thread that leads: two engines in one process have a thread each

// Does parts of a job and keeps the first exception.
struct Progress {
  const Job& job;
  std::exception_ptr error;

  void do_parts(int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      add(call(job, part));
    }
  }
  void add(std::exception_ptr raised) {
    error = error ? error : raised;
  }
};

class Team {
 public:
  void run(const Job& job) {
    Progress progress{job, nullptr};
    if (is_led_.exchange(true)) {  // by another caller, or by this one, whose part of a job calls `run`
      progress.do_parts(0, job.num_parts);
    } else {
      const Release release{is_led_};
      lead(progress);
    }
    if (progress.error) {
      std::rethrow_exception(progress.error);
    }
  }

  // Ends the workers, and from then on every caller works alone. If a caller leads them at this moment, they go on.
  void end() {
    if (!is_led_.exchange(true)) {
      for (const auto& worker : workers_) {
        worker->end();
      }
    }
  }

  ThreadTeam::Stats stats() const {
    return {jobs_, offers_, parts_by_workers_, waits_, num_absences};
  }

 private:
  std::atomic<bool> is_led_{false};
  std::vector<std::unique_ptr<Worker>> workers_;  // worker i does part i + 1
  Clock::time_point next_start_{};
  std::atomic<int64_t> jobs_{0}, offers_{0}, parts_by_workers_{0}, waits_{0};  // of Stats

  struct Release {
    std::atomic<bool>& is_led;
    ~Release() {
      is_led.store(false);
    }
  };

  void lead(Progress& progress) {
    const int64_t num_parts = progress.job.num_parts, helpers = start_workers(num_parts - 1);
    leader_time.begin();
    for (int64_t i = 0; i < helpers; ++i) {
      offers_ += workers_[i]->offer(progress.job);
    }
    progress.do_parts(0, 1);
    progress.do_parts(1 + helpers, num_parts);
    int64_t num_begun = 0;
    for (int64_t i = 0; i < helpers; ++i) {
      if (workers_[i]->take_back()) {
        progress.do_parts(1 + i, 2 + i);
      } else {
        ++num_begun;
      }
    }
    nanoseconds slept{};
    for (int64_t i = 0; i < helpers; ++i) {
      slept += workers_[i]->wait(num_begun);
      progress.add(workers_[i]->take_error());
    }
    waits_ += slept > 0ns;
    charge(helpers, std::max<int64_t>(num_begun, 1) * leader_time.end(slept).lost);
    parts_by_workers_ += num_begun;
    ++jobs_;
  }

  // The leader has lost its core, perhaps because there are more threads than cores. The last worker that takes part is
  // charged for it: if it sits out, there is one thread less.
  void charge(int64_t helpers, nanoseconds cost) {
    for (int64_t i = helpers; cost > 0ns && i > 0 && !workers_[i - 1]->charge(cost);) {
      --i;
    }
  }

  // Returns how many of the wanted workers there are, and starts those that are missing. If the system refuses a thread
  // or its memory, the leader does that part itself, and the team tries again later.
  int64_t start_workers(int64_t wanted) {
    wanted = std::min(wanted, kMaxWorkers);
    if (num_workers() < wanted && Clock::now() >= next_start_) {
      try {
        workers_.reserve(wanted);
        while (num_workers() < wanted) {
          workers_.push_back(std::make_unique<Worker>(num_workers() + 1));
        }
      } catch (const std::exception& error) {
        const char* text = "folovllm: thread %lld of the C++ kernels did not start (%s); they go on with fewer threads\n";
        std::fprintf(stderr, text, static_cast<long long>(num_workers() + 1), error.what());
        next_start_ = Clock::now() + kRetry;
      }
    }
    return std::min(wanted, num_workers());
  }
  int64_t num_workers() const {
    return static_cast<int64_t>(workers_.size());
  }
};

// Never destroyed, because a thread may call `run` while the process exits.
Team* team = new Team;

// A child that was forked has none of the threads, so it begins with a new team.
[[maybe_unused]] const bool handlers_are_set = [] {
  std::atexit([] { team->end(); });
  pthread_atfork(nullptr, nullptr, [] {
    ++num_forks;
    team = new Team;
  });
  return true;
}();

}  // namespace

int64_t ThreadTeam::thread_index() {
  return this_thread_index;
}

void ThreadTeam::run_job(const Job& job) {
  team->run(job);
}

ThreadTeam::Stats ThreadTeam::stats() {
  return team->stats();
}

void ThreadTeam::disturb(uint64_t seed, bool may_sit_out) {
  disturbance = seed;
  workers_may_sit_out = may_sit_out;
}

}  // namespace folovllm
