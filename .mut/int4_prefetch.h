// What an int4 linear layer fetches from memory while it computes: weights, and the KV pages of the next layer.
//
// Milestone: M7. vLLM counterpart: none. prefetch.h explains prefetching.

#pragma once

#include <algorithm>
#include <cstdint>

#include "int4_layout.h"
#include "prefetch.h"

namespace folovllm {

constexpr int64_t kInt4LeadBytes = 8192;  // what a single tile fetches before it needs it
constexpr int64_t kInputsPerPiece = 512;  // inputs computed with while one piece of a PrefetchQueue is fetched

// What a tile fetches while it computes with group `i` of its unit: the group `lead` further on. Beyond the unit's end
// those are the groups of the unit that begins at `next`. A lead of 0 fetches nothing new, a lead of all groups the
// whole next unit.
struct Int4Prefetcher {
  const uint8_t *unit, *next;
  int64_t lead, groups, group_bytes;

  // For tile `index` of `num_tiles`: a single tile fetches what it needs a little later. Of several tiles, the first
  // fetches all of the next unit.
  Int4Prefetcher(const uint8_t* unit, const uint8_t* next, int64_t groups, int64_t group_bytes, int64_t index,
                 int64_t num_tiles)
      : unit(unit),
        next(next),
        lead(num_tiles == 1 ? std::clamp<int64_t>(kInt4LeadBytes / group_bytes, 1, groups) : index == 0 ? groups : 0),
        groups(groups),
        group_bytes(group_bytes) {}

  const uint8_t* during(int64_t i) const {
    i += lead;
    return i < groups ? unit + i * group_bytes : next + (i - groups) * group_bytes;
  }
};

// One line of those, at the place where the kernel computes with the same line of its own group. For a single row into
// L1: that is faster there, and only there.
template <int kRows>
FOLOVLLM_ALWAYS_INLINE void prefetch_int4_line(const uint8_t* line) {
  prefetch<kRows == 1 ? kIntoL1 : kIntoL2>(line);
}

// The KV pages that the next layer's attention reads: a tile takes pieces of the queue, and fetches them evenly beside
// its groups. `queue` may be null.
class Int4PiecePrefetcher {
 public:
  Int4PiecePrefetcher(PrefetchQueue* queue, int64_t groups, int64_t group_size)
      : queue_(queue), groups_per_piece_(groups / std::max<int64_t>(1, groups * group_size / kInputsPerPiece)) {}

  // While group `i` of one block is computed with.
  FOLOVLLM_ALWAYS_INLINE void fetch_during(int64_t i) {
    if (queue_ == nullptr) {
      return;
    }
    const int64_t step = i % groups_per_piece_;
    if (step == 0) {
      piece_ = queue_->take();
    }
    if (piece_ != nullptr) {
      const int64_t end = piece_->lines * (step + 1) / groups_per_piece_;
      for (int64_t line = piece_->lines * step / groups_per_piece_; line < end; ++line) {
        prefetch(queue_->data(*piece_) + line * 64);
      }
    }
  }

 private:
  PrefetchQueue* queue_;
  int64_t groups_per_piece_;
  const PrefetchPiece* piece_ = nullptr;
};

}  // namespace folovllm
