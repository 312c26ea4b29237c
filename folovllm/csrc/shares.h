// Work in numbered pieces, a range of them for each thread; a thread that has none left takes over from the others.
//
// Milestone: M4. vLLM counterpart: none (its CPU kernels let OpenMP divide the work).
//
// Always the same range for a thread, because each core has a cache of its own: what it read or wrote in the last step, or
// asked for a moment ago, lies there. On a processor of several chips even the L3 cache is not shared by all cores, and
// a virtual machine may find its cores on different ones. Taking over, because halves fixed for good would make each
// thread wait for the other whenever the system, or another machine on the same processor, takes some of its time.

#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "team.h"

namespace folovllm {

class Shares {
 public:
  static constexpr int64_t kNone = -1;

  // `total` pieces in equal ranges.
  Shares(int64_t total, int64_t num_threads) : ranges_(num_threads) {
    for (int64_t i = 0; i < num_threads; ++i) {
      ranges_[i].next = total * i / num_threads;
      ranges_[i].end = total * (i + 1) / num_threads;
    }
  }
  // Thread i has the pieces from ends[i - 1], or 0, to ends[i].
  explicit Shares(const std::vector<int64_t>& ends) : ranges_(ends.size()) {
    for (size_t i = 0; i < ends.size(); ++i) {
      ranges_[i].next = i == 0 ? 0 : ends[i - 1];
      ranges_[i].end = ends[i];
    }
  }

  // Calls f(thread, piece, after) until all pieces are done. `after`, or kNone, is what the thread does next: it is taken
  // early, so that it can be fetched.
  template <typename F>
  void run(const F& f) {
    Team::run(num_threads(), [&](int64_t thread) {
      for (int64_t piece = take(thread), after; piece != kNone; piece = after) {
        after = take(thread);
        f(thread, piece, after);
      }
    });
  }

 private:
  int64_t num_threads() const {
    return static_cast<int64_t>(ranges_.size());
  }
  // The next piece for a thread, or kNone.
  int64_t take(int64_t thread) {
    for (int64_t i = 0; i < num_threads(); ++i) {
      Range& range = ranges_[(thread + i) % num_threads()];
      if (range.next.load(std::memory_order_relaxed) < range.end) {
        const int64_t piece = range.next++;
        if (piece < range.end) {
          return piece;
        }
      }
    }
    return kNone;
  }

  struct alignas(64) Range {  // a line of its own: no thread waits for another's counter
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges_;
};

}  // namespace folovllm
