// What ThreadTeam has of torch: the number of its threads. (thread_team.cpp itself knows nothing of torch.)
//
// Milestone: M4. vLLM counterpart: none.

#include <ATen/Parallel.h>

#include "thread_team.h"

namespace folovllm {

int64_t ThreadTeam::size() {
  return at::get_num_threads();
}

}  // namespace folovllm
