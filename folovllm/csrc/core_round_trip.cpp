// Measures how far two cores are from each other, which explains much of the variation between measurements.
//
// Milestone: M4. vLLM counterpart: none.
//
// A word that one core writes and another reads travels between their caches: about 50 ns there and back if the cores
// share an L3 cache, several times as long if they do not. On a virtual machine this can change from one minute to the
// next.

#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace folovllm {
namespace {

// The nanoseconds that a word takes to another thread and back, on average over `milliseconds`. Infinite if it never
// came back, as on a machine with one core.
double core_round_trip_ns(int64_t milliseconds) {
  using Clock = std::chrono::steady_clock;
  alignas(64) std::atomic<int64_t> word{0};  // odd: on its way there; even: back
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      const int64_t seen = word.load(std::memory_order_acquire);
      if (seen % 2 == 1) {
        word.store(seen + 1, std::memory_order_release);
      }
    }
  });
  const auto start = Clock::now();
  const auto deadline = start + std::chrono::milliseconds(milliseconds);
  int64_t trips = 0;
  for (bool in_time = true; in_time;) {
    word.store(2 * trips + 1, std::memory_order_release);
    for (int64_t tries = 1; in_time && word.load(std::memory_order_acquire) != 2 * trips + 2; ++tries) {
      in_time = tries % 4096 != 0 || Clock::now() < deadline;
    }
    trips += in_time;
    in_time = in_time && (trips % 64 != 0 || Clock::now() < deadline);
  }
  const std::chrono::duration<double, std::nano> elapsed = Clock::now() - start;
  stop = true;
  other.join();
  return elapsed.count() / static_cast<double>(trips);
}

}  // namespace
}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def("core_round_trip_ns(int milliseconds=20) -> float", &folovllm::core_round_trip_ns);
}
