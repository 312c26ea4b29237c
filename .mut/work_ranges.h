// Numbered pieces of work, of which each thread has a range. A thread that has finished its range takes over from
// others.
//
// Milestone: M4. vLLM counterpart: none (its CPU kernels let OpenMP divide the work).
//
//   thread 0    0  1  2  3  4        first its own pieces; if they are done, those that thread 1 has not begun
//   thread 1    5  6  7  8  9
//
// A thread has the same range each time, because each core has a cache of its own: what the thread read, wrote or
// prefetched in the last step is still there. On a processor of several chips the cores do not even share an L3 cache,
// and a virtual machine may find its cores on different chips. A thread takes over from others, because with fixed
// halves each thread would wait for the other whenever the system takes some of its time.

#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "thread_team.h"

namespace folovllm {

class WorkRanges {
 public:
  static constexpr int64_t kNone = -1;

  // `total` pieces in equal ranges.
  WorkRanges(int64_t total, int64_t num_threads) : ranges_(num_threads) {
    for (int64_t i = 0; i < num_threads; ++i) {
      ranges_[i].next = total * i / num_threads;
      ranges_[i].end = total * (i + 1) / num_threads;
    }
  }
  // Thread i has the pieces from ends[i - 1], or 0, to ends[i].
  explicit WorkRanges(const std::vector<int64_t>& ends) : ranges_(ends.size()) {
    for (size_t i = 0; i < ends.size(); ++i) {
      ranges_[i].next = i == 0 ? 0 : ends[i - 1];
      ranges_[i].end = ends[i];
    }
  }

  // Calls f(thread, piece, next) in parallel until all pieces are done. `next` is the piece that the thread will probably
  // do afterwards, or kNone, so that `f` can prefetch for it. A thread takes one piece at a time: the pieces of a thread
  // that loses its core have to wait for it.
  template <typename F>
  void for_each(const F& f) {
    ThreadTeam::run(num_threads(), [&](int64_t thread) {
      for (int64_t piece = take(thread); piece != kNone; piece = take(thread)) {
        f(thread, piece, next(thread));
      }
    });
  }

 private:
  struct alignas(64) Range {  // a line of its own: no thread waits for another's counter
    std::atomic<int64_t> next;
    int64_t end;
  };

  int64_t num_threads() const {
    return static_cast<int64_t>(ranges_.size());
  }
  // The range from which a thread takes its next piece: its own, or else the first one that has pieces left, or null.
  Range* range_for(int64_t thread) {
    for (int64_t i = 0; i < num_threads(); ++i) {
      Range& range = ranges_[(thread + i) % num_threads()];
      if (range.next.load(std::memory_order_relaxed) < range.end) {
        return &range;
      }
    }
    return nullptr;
  }
  int64_t next(int64_t thread) {
    const Range* range = range_for(thread);
    const int64_t piece = range == nullptr ? kNone : range->next.load(std::memory_order_relaxed);
    return range == nullptr || piece >= range->end ? kNone : piece;  // another thread may just have taken the last one
  }
  int64_t take(int64_t thread) {
    while (Range* range = range_for(thread)) {
      const int64_t piece = range->next++;
      if (piece < range->end) {
        return piece;
      }
    }
    return kNone;
  }

  std::vector<Range> ranges_;
};

}  // namespace folovllm
