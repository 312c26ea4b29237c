// ThreadTeam: the leader's side of a job, and the life of the team in its process.
//
// Milestone: M4. vLLM counterpart: none. The workers' side is in thread_worker.h.

#include "thread_team.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <system_error>
#include <vector>

#include "thread_worker.h"

namespace folovllm {
namespace {

constexpr int64_t kMaxWorkers = 1023;

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
      lead(progress);
      is_led_.store(false);
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
  int64_t max_workers_ = kMaxWorkers;
  LeaderLosses losses_;
  std::atomic<int64_t> jobs_{0}, offers_{0}, parts_by_workers_{0}, waits_{0};  // of Stats

  void lead(Progress& progress) {
    const int64_t num_parts = progress.job.num_parts, helpers = start_workers(num_parts - 1);
    losses_.job_begins();
    for (int64_t i = 0; i < helpers; ++i) {
      offers_ += workers_[i]->offer(progress.job);
    }
    progress.do_parts(0, 1);
    progress.do_parts(1 + helpers, num_parts);
    for (int64_t i = 0; i < helpers; ++i) {
      if (workers_[i]->take_back()) {
        progress.do_parts(1 + i, 2 + i);
      } else {
        ++parts_by_workers_;
      }
    }
    int64_t num_waits = 0;
    for (int64_t i = 0; i < helpers; ++i) {
      num_waits += workers_[i]->wait();
      progress.add(workers_[i]->take_error());
    }
    if (losses_.job_ends(num_waits > 0)) {
      for (int64_t i = 0; i < helpers; ++i) {
        workers_[i]->add_strike();
      }
    }
    waits_ += num_waits;
    ++jobs_;
  }

  // Returns how many of the wanted workers there are: missing ones are started, but the system may refuse a thread.
  int64_t start_workers(int64_t wanted) {
    while (static_cast<int64_t>(workers_.size()) < std::min(wanted, max_workers_)) {
      try {
        workers_.push_back(std::make_unique<Worker>(workers_.size() + 1));
      } catch (const std::system_error&) {
        max_workers_ = workers_.size();
      }
    }
    return std::min(wanted, max_workers_);
  }
};

// Never destroyed, because a thread may call `run` while the process exits.
Team* team = new Team;

// A child that was forked has none of the threads, so it begins with a new team.
[[maybe_unused]] const bool handlers_are_set = [] {
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

ThreadTeam::Stats ThreadTeam::stats() {
  return team->stats();
}

void ThreadTeam::disturb(uint64_t seed, bool may_sit_out) {
  disturbance = seed;
  workers_may_sit_out = may_sit_out;
}

}  // namespace folovllm
