// What connects ThreadTeam with torch: the number of threads, and two operators that look at the team. (thread_team.cpp and
// thread_worker.h know nothing of torch.)
//
// Milestone: M4. vLLM counterpart: none.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <string>

#include "thread_team.h"

namespace folovllm {
namespace {

c10::Dict<std::string, int64_t> thread_team_stats() {
  const ThreadTeam::Stats stats = ThreadTeam::stats();
  c10::Dict<std::string, int64_t> by_name;
  by_name.insert("jobs", stats.jobs);
  by_name.insert("offers", stats.offers);
  by_name.insert("parts_by_workers", stats.parts_by_workers);
  by_name.insert("waits", stats.waits);
  by_name.insert("absences", stats.absences);
  return by_name;
}

void disturb_thread_team(int64_t seed, bool may_sit_out) {
  ThreadTeam::disturb(seed, may_sit_out);
}

}  // namespace

int64_t ThreadTeam::size() {
  return at::get_num_threads();
}

}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def("thread_team_stats() -> Dict(str, int)", &folovllm::thread_team_stats);
  m.def("disturb_thread_team(int seed, bool may_sit_out=True) -> ()", &folovllm::disturb_thread_team);
}
