// The threads that compute: a job is cut into parts, and each thread does one of them.
//
// Milestone: M4. vLLM counterpart: none (its CPU kernels open OpenMP regions, whose threads all have to arrive and all
// have to finish).
//
// The thread that calls `run` leads: it offers a part to each worker, does its own part, and then takes back every part
// that no worker has begun. So a worker that the operating system does not let run costs no time, but it does not help
// either. The leader waits only for parts that have been begun.
//
//   leader      offers part 1 | does part 0 ........ | part 1 is begun: waits        | next job
//   worker 1                    | does part 1 ........................ |
//
//   leader      offers part 1 | does part 0 ........ | takes part 1 back, does it .. | next job
//   worker 1                    (another program runs on its core)
//
// How a job is cut must depend on `size()` alone and never on who takes part, so that the results do not depend on it.

#pragma once

#include <algorithm>
#include <cstdint>

namespace folovllm {

class ThreadTeam {
 public:
  // The number of threads that a job is planned for: that of torch, which the engine argument cpu_threads sets.
  static int64_t size();

  // 0 on the leader, 1 .. size() - 1 on the workers. A leader does the parts of others too, so this is not the part.
  static int64_t thread_index();

  // Calls f(part) for each part from 0 to num_parts, in parallel, and returns when all calls have returned. The first
  // exception is thrown again. If the team is at work already (for another caller, or because `f` calls `run`), this
  // thread does all parts itself.
  template <typename F>
  static void run(int64_t num_parts, const F& f) {
    if (num_parts == 1) {
      return f(0);
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

  struct Job {
    int64_t num_parts;
    const void* f;
    void (*call)(const void* f, int64_t part);
  };

 private:
  static void run_job(const Job& job);
};

}  // namespace folovllm
