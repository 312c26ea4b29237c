// What it costs to hand a job to another thread: to a worker of ThreadTeam that looks for work, to one that sleeps, and to
// the threads of OpenMP. measure_threads.py compiles and runs it.
//
// A job ends when both threads have arrived in it, so its time is the way of the message there and back. Prints the
// median of each in nanoseconds, as JSON.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "thread_team.h"

namespace {

using Clock = std::chrono::steady_clock;
using folovllm::ThreadTeam;

constexpr int kJobs = 2000, kJobsOfSleepers = 200;

void wait_in_a_loop(std::chrono::nanoseconds duration) {
  for (const auto end = Clock::now() + duration; Clock::now() < end;) {
  }
}

// The median time of run(f), where f() is called by two threads. Between two jobs the caller computes for `pause`.
template <typename Run>
double median_ns(int jobs, std::chrono::nanoseconds pause, const Run& run) {
  std::vector<double> times;
  for (int job = 0; job < jobs; ++job) {
    wait_in_a_loop(pause);
    std::atomic<int> arrived{0};
    const auto meet = [&] {
      for (++arrived; arrived < 2;) {
      }
    };
    const auto begin = Clock::now();
    run(meet);
    times.push_back(std::chrono::duration<double, std::nano>(Clock::now() - begin).count());
  }
  std::nth_element(times.begin(), times.begin() + jobs / 2, times.end());
  return times[jobs / 2];
}

}  // namespace

int64_t ThreadTeam::size() {
  return 2;
}

int main() {
  using namespace std::chrono_literals;
  const auto team = [](const auto& f) { ThreadTeam::run(2, [&](int64_t) { f(); }); };
  const auto openmp = [](const auto& f) {
#pragma omp parallel num_threads(2)
    f();
  };
  std::printf("{\"team_looking_for_work_ns\": %.0f, ", median_ns(kJobs, 1us, team));
  std::printf("\"team_asleep_ns\": %.0f, ", median_ns(kJobsOfSleepers, 2ms, team));
  std::printf("\"openmp_looking_for_work_ns\": %.0f, ", median_ns(kJobs, 1us, openmp));
  std::printf("\"openmp_asleep_ns\": %.0f}\n", median_ns(kJobsOfSleepers, 20ms, openmp));
}
