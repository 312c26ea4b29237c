// The threads that compute: a job is cut into parts, and each thread does one of them.
//
// Milestone: M4. vLLM counterpart: none (its CPU kernels open OpenMP regions, in which all threads have to arrive and all
// have to finish).
//
// The thread that calls `run` leads: it offers a part to each worker, does its own part, and then takes back every part
// that no worker has begun. So a worker that the operating system does not let run does not delay the job. The leader
// waits only for parts that have been begun.
//
//   leader      offers part 1 | does part 0 ........ | waits for part 1             | next job
//   worker 1                    | begins part 1 .................................. |
//
//   leader      offers part 1 | does part 0 ........ | takes part 1 back and does it | next job
//   worker 1                    (another program runs on its core)
//
// A worker can also lose its core in the middle of a part, and then the leader does wait. If that costs more time than the
// worker saves, the worker sits out for a while (thread_attendance.h). If the leader itself keeps losing its core, the
// workers sit out one after the other. How a job is cut depends on `size()` alone and never on who takes part, so that the
// results do not depend on it.
//
// A part must not fork the process and go on: the child has none of the other threads. In the child, `run` throws if a
// part of another thread was unfinished.

#pragma once

#include <algorithm>
#include <cstdint>

namespace folovllm {

// A function of a part's number, called for all parts from 0 to num_parts.
struct Job {
  int64_t num_parts;
  const void* f;
  void (*call)(const void* f, int64_t part);
};

class ThreadTeam {
 public:
  // The number of threads that a job is planned for: torch.get_num_threads(), which the engine argument cpu_threads sets.
  static int64_t size();

  // 0 on the leader, 1 .. size() - 1 on the workers. The leader also does parts of others: this is not a part's number.
  static int64_t thread_index();

  // Calls f(part) for each part from 0 to num_parts, in parallel, and returns when all calls have returned. Throws the
  // first exception of `f`. If the team is at work already (for another caller, or because `f` calls `run`), the calling
  // thread does all parts itself.
  template <typename F>
  static void run(int64_t num_parts, const F& f) {
    if (num_parts <= 1) {
      return num_parts == 1 ? f(0) : void();
    }
    run_job({num_parts, &f, [](const void* body, int64_t part) { (*static_cast<const F*>(body))(part); }});
  }

  // Calls f(begin, end) for equal parts of 0 .. count: one for each thread, or fewer if a part would be smaller than
  // `grain`.
  template <typename F>
  static void run_ranges(int64_t count, int64_t grain, const F& f) {
    const int64_t parts = std::clamp<int64_t>((count + grain - 1) / grain, 1, size());
    run(parts, [&](int64_t part) { f(count * part / parts, count * (part + 1) / parts); });
  }

  // What has happened since the library was loaded.
  struct Stats {
    int64_t jobs;              // with more than one part
    int64_t offers;            // of parts to workers that did not sit out
    int64_t parts_by_workers;  // that they took; the leaders have done all other parts
    int64_t waits;             // jobs in which the leader slept until a part was done
    int64_t absences;          // times a worker began to sit out
  };
  static Stats stats();

  // For tests and measurements. With a seed other than 0, threads from now on come late, pause and stay away at random.
  // With may_sit_out = false, workers take part even if they keep losing their core.
  static void disturb(uint64_t seed, bool may_sit_out = true);

 private:
  static void run_job(const Job& job);
};

}  // namespace folovllm
