// What is fetched from memory, and when: all prefetching of the kernels lives in this header and in int4_prefetch.h.
//
// Milestone: M4. vLLM counterpart: none in one place (its CPU kernels prefetch inside their loops).
//
// A prefetch instruction asks the memory for one line (64 bytes) and does not wait for it. If the line is read a little
// later, it is already in the cache. No result depends on it: with -DFOLOVLLM_NO_PREFETCH every `prefetch` below
// compiles to nothing, and the kernels compute the same numbers more slowly.
//
//   while this is computed                  this is fetched                                          by
//   attention: a tile of 256 keys           the next tile's K and V                                  TilePrefetcher
//   linear: a unit of weights               the unit that the thread multiplies with next            WeightPrefetcher
//   linear: its last unit                   the first unit of the next linear layer                  UpcomingReads
//   linear with 9 to 64 rows                the KV pages that the next layer's attention reads       PrefetchQueue
//   int4 linear: a group of inputs          a group further on, or one of the next unit              Int4Prefetcher

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kv_tile.h"
#include "thread_team.h"

namespace folovllm {

// To GCC, a function that only prefetches has no effect. Unless such a function is inlined at once, GCC drops the call
// of it together with the prefetches. Every function below that only prefetches is therefore always inlined.
#define FOLOVLLM_ALWAYS_INLINE inline __attribute__((always_inline))

// Into L2 and not L1: a core can wait for some 24 lines at once on their way to L1, and 24 x 64 bytes per 110 ns are
// 14 GB/s. More lines may be on their way to L2: 18 GB/s per core were measured with L2, 11 with L1.
enum CacheLevel { kIntoL2 = 2, kIntoL1 = 3 };

template <CacheLevel kLevel = kIntoL2>
FOLOVLLM_ALWAYS_INLINE void prefetch([[maybe_unused]] const void* line) {
#ifndef FOLOVLLM_NO_PREFETCH
  __builtin_prefetch(line, /*write=*/0, /*locality=*/kLevel);
#endif
}

// ---- Linear layers: the KV pages of the next layer, and the weights of the next linear layer

// A stretch of memory that will be read soon.
struct PrefetchPiece {
  int64_t offset;  // bytes
  int64_t lines;   // of 64 bytes
};

// Pieces that wait to be fetched, one list for each thread, because a piece must arrive in the cache of the core that
// will read it. A linear layer of 9 to 64 rows computes for longer than its weights take to arrive, so memory has time
// to spare: each tile of such a layer takes one piece from the queue and fetches it beside its weights.
class PrefetchQueue {
 public:
  explicit PrefetchQueue(int64_t num_threads) : lists_(num_threads) {}

  // `thread` will read the piece.
  void add(int64_t thread, PrefetchPiece piece) {
    lists_[thread].pieces.push_back(piece);
  }
  // Begins again: the offsets now count from `base`, and no piece has been taken. A thread is expected to call `take`
  // as often as it did since the last start, and its pieces are spread evenly over these calls. Fetched all at once,
  // they would delay the weights.
  void start(const void* base) {
    base_ = static_cast<const char*>(base);
    for (List& list : lists_) {
      list.expected_calls = std::max({size_t{1}, list.pieces.size(), list.calls});
      list.calls = 0;
    }
  }
  // Whether pieces have been taken since the start.
  bool fetched() const {
    return std::any_of(lists_.begin(), lists_.end(), [](const List& l) { return l.calls > 0 && !l.pieces.empty(); });
  }
  const char* data(const PrefetchPiece& piece) const {
    return base_ + piece.offset;
  }
  // A piece for the calling thread, or null.
  const PrefetchPiece* take() {
#ifdef FOLOVLLM_NO_PREFETCH
    return nullptr;
#endif
    const size_t thread = ThreadTeam::thread_index();
    if (thread >= lists_.size()) {
      return nullptr;
    }
    List& list = lists_[thread];
    const size_t call = list.calls++, count = list.pieces.size();
    const size_t piece = call * count / list.expected_calls;
    const bool due = call < list.expected_calls && piece < (call + 1) * count / list.expected_calls;
    return due ? &list.pieces[piece] : nullptr;
  }

 private:
  struct alignas(64) List {  // a line of its own: no thread waits for another's counter
    std::vector<PrefetchPiece> pieces;
    size_t calls = 0, expected_calls = 1;
  };
  const char* base_ = nullptr;
  std::vector<List> lists_;
};

constexpr int64_t kMaxPieceLines = 192;      // about one for each step that a tile computes (linear_kernel.h)
constexpr int64_t kMaxPageLines = 4096;      // a larger page holds more unused slots than the batch has keys
constexpr int64_t kMaxPrefetchTokens = 64;   // with more, each page is read for many rows, and waiting for it costs little

// Where the keys and values of a batch lie: for each sequence, the numbers of its pages.
struct BatchPages {
  int64_t page_bytes, block_size;  // block_size: tokens of a page
  int64_t num_seqs;
  const int32_t* seq_lens;     // [num_seqs]
  const int32_t* block_table;  // [num_seqs, ...], rows table_stride apart
  int64_t table_stride;
};

// Fills `queue` with the pages from which attention will read the K and V of every sequence, each cut into equal pieces.
// owner(sequence) is the thread that computes the sequence.
template <typename Owner>
void list_pages(PrefetchQueue& queue, const BatchPages& batch, int64_t num_tokens, const Owner& owner) {
  const int64_t lines = batch.page_bytes / 64, cuts = (lines + kMaxPieceLines - 1) / kMaxPieceLines;
  if (lines == 0 || lines > kMaxPageLines || num_tokens > kMaxPrefetchTokens) {
    return;
  }
  for (int64_t s = 0; s < batch.num_seqs; ++s) {
    const int32_t* table = batch.block_table + s * batch.table_stride;
    const int64_t num_pages = (batch.seq_lens[s] + batch.block_size - 1) / batch.block_size;
    for (int64_t i = 0; i < num_pages * cuts; ++i) {
      const int64_t first = lines * (i % cuts) / cuts, end = lines * (i % cuts + 1) / cuts;
      queue.add(owner(s), {table[i / cuts] * batch.page_bytes + first * 64, end - first});
    }
  }
}

// What a linear layer should fetch for the operators after it. Null stands for nothing.
struct UpcomingReads {
  PrefetchQueue* queue = nullptr;
  const char* packed = nullptr;  // the next linear layer's packed weight: num_blocks of block_bytes
  int64_t num_blocks = 0, block_bytes = 0;

  // Where `thread` will begin to read the next linear layer's weight. If that layer is not known, `otherwise`. (The
  // thread's unit of a gated layer, which is two blocks, may begin one block later.)
  const char* first_weight(int64_t thread, int64_t num_threads, const char* otherwise) const {
    return packed == nullptr ? otherwise : packed + num_blocks * thread / num_threads * block_bytes;
  }
};

namespace {

// ---- Linear layers: the weights of the next unit

constexpr int64_t kStepBytes = 128;       // the weights of 32 outputs for a step: two bf16 inputs, or one of fp32
constexpr int64_t kLinesPerStep = kStepBytes / 64;
constexpr int64_t kLeadSteps = 24;        // 3 KiB: the lead with which one thread's reads were fastest
constexpr int64_t kMaxSharers = 8;        // tiles that share the fetching of a unit
constexpr int64_t kStepsPerPiece = 256;   // steps computed while one piece of a PrefetchQueue is fetched

// A unit of weights is used by one or more tiles, each of which multiplies it with some rows of x.
//   kFetchAhead    A single tile reads each weight once. It fetches its own unit, 3 KiB before it needs it. At the
//                  unit's end it fetches the beginning of the next one.
//   kFetchShare    If only the first of a few tiles fetched, it would wait for memory, and memory would rest during the
//                  others. So each of the tiles fetches its share of the next unit, evenly over its time, and besides
//                  that pieces of the PrefetchQueue.
//   kFetchNothing  Of many tiles, the first two fetch the next unit. The others leave the load ports to the arithmetic.
enum WeightFetch { kFetchNothing, kFetchShare, kFetchAhead };

// What one tile fetches.
struct WeightFetchPlan {
  WeightFetch mode;
  const char* begin;
  int64_t pace;  // lines for each step computed, times 65,536: a division at each step would be slow
};

// For tile `index` of `num_tiles`. `next` is the unit that this thread multiplies with afterwards, of `steps` steps.
inline WeightFetchPlan plan_weight_fetch(int64_t index, int64_t num_tiles, const char* next, int64_t steps) {
  if (num_tiles == 1) {
    return {kFetchAhead, next, 0};
  }
  const int64_t sharers = num_tiles <= kMaxSharers ? num_tiles : 2;
  const int64_t first_line = kLinesPerStep * steps * index / sharers;
  const WeightFetch mode = index < sharers ? kFetchShare : kFetchNothing;
  return {mode, next + first_line * 64, kLinesPerStep * 65536 / sharers};
}

template <WeightFetch kMode>
struct WeightPrefetcher {
  const char* begin;  // of WeightFetchPlan
  int64_t pace;

  // Calls multiply(begin, end, fetch) for stretches of the steps 0 .. steps of a unit's part (a gated unit has two), and
  // `multiply` calls fetch(i) when it computes step begin + i. `weight` are this part's weights.
  template <typename Multiply>
  FOLOVLLM_ALWAYS_INLINE void for_each_stretch(const char* weight, int64_t steps, int64_t part, int64_t num_parts,
                                               const UpcomingReads& upcoming, const Multiply& multiply) const {
    if constexpr (kMode == kFetchAhead) {
      const auto both_lines_from = [](const char* ahead) {
        return [=](int64_t i) __attribute__((always_inline)) {
          prefetch(ahead + i * kStepBytes);
          prefetch(ahead + i * kStepBytes + 64);
        };
      };
      const int64_t lead = part + 1 < num_parts ? 0 : std::min(kLeadSteps, steps);
      multiply(0, steps - lead, both_lines_from(weight + kLeadSteps * kStepBytes));
      multiply(steps - lead, steps, both_lines_from(begin));
    } else if constexpr (kMode == kFetchShare) {
      const int64_t stretches = std::max<int64_t>(1, steps / kStepsPerPiece);
      for (int64_t i = 0; i < stretches; ++i) {
        const int64_t first = steps * i / stretches, end = steps * (i + 1) / stretches;
        const char* ahead = begin + ((part * steps + first) * pace >> 16) * 64;
        const PrefetchPiece* piece = upcoming.queue != nullptr ? upcoming.queue->take() : nullptr;
        const char* beside = piece != nullptr ? upcoming.queue->data(*piece) : ahead;
        const int64_t beside_pace = piece != nullptr ? piece->lines * 65536 / (end - first) : 0;
        multiply(first, end, [ahead, beside, beside_pace, pace = pace](int64_t step) __attribute__((always_inline)) {
          prefetch(ahead + (step * pace >> 16) * 64);
          prefetch(beside + (step * beside_pace >> 16) * 64);
        });
      }
    } else {
      multiply(0, steps, [](int64_t) {});
    }
  }
};

// ---- Attention: the next tile of keys and values
//
// Pages lie anywhere in memory, and the CPU's own prefetcher starts anew in each. So a tile fetches the next one, group
// by group: a line for each line that is computed with. Each line is fetched twice, a tile ahead and half a tile ahead.
// Measured, once is not enough; we believe that a core with too many fetches under way drops the next ones.
//
//   while this tile's keys are scored      the next tile's keys, and this tile's values a second time
//   while a row's softmax is computed      some of the next tile's values: nothing else keeps memory busy then
//   while this tile's values are added     the next tile's values, and the next tile's keys a second time
//
// With `once`, only the first time of each is left. A second time would only cost time if all is in the core's cache
// already, or if many rows are computed with each tile.

template <typename T>
constexpr int64_t kPerLine = 64 / sizeof(T);  // numbers in a line of the cache

// While keys are scored. Null: nothing.
template <typename T>
struct ScorePrefetcher {
  const float* const* next_keys;  // [groups of a tile]
  const T* const* own_values;     // [groups of a tile]

  // Where the lines for V vectors of keys begin.
  template <int V>
  struct Lines {
    ScorePrefetcher source;
    const float* keys[V];
    const T* values[V];

    FOLOVLLM_ALWAYS_INLINE explicit Lines(ScorePrefetcher source) : source(source) {}

    // The keys of vector v are in this group of the tile.
    FOLOVLLM_ALWAYS_INLINE void begin(int v, int64_t group) {
      keys[v] = source.next_keys != nullptr ? source.next_keys[group] : nullptr;
      values[v] = source.own_values != nullptr ? source.own_values[group] : nullptr;
    }
    // Of vector v, the lines beside a word of its keys.
    FOLOVLLM_ALWAYS_INLINE void fetch(int v, int64_t word) const {
      if (source.next_keys != nullptr) {
        prefetch(keys[v] + word * kKeysPerGroup);
      }
      if (source.own_values != nullptr) {
        prefetch(values[v] + word * kPerLine<T>);
      }
    }
  };
};

// While values are added. Null: nothing.
template <typename T>
struct ValuePrefetcher {
  const T* const* next_values;    // [groups of a tile]
  const float* const* next_keys;  // [groups of a tile]

  // Where the lines begin for the numbers of a group from number d on.
  struct Lines {
    const T *values, *keys;
    const ValuePrefetcher& source;

    FOLOVLLM_ALWAYS_INLINE Lines(const ValuePrefetcher& source, int64_t group, int64_t d)
        : values(source.next_values != nullptr ? source.next_values[group] + d : nullptr),
          keys(source.next_keys != nullptr ? reinterpret_cast<const T*>(source.next_keys[group]) + d : nullptr),
          source(source) {}

    // The lines that begin in `count` numbers from number `place` on. If the numbers are less than a line, the kernel
    // visits the same line again for the next ones.
    FOLOVLLM_ALWAYS_INLINE void fetch(int64_t place, int64_t count) const {
      for (int64_t i = 0; i < count; i += kPerLine<T>) {
        if (source.next_values != nullptr) {
          prefetch(values + place + i);
        }
        if (source.next_keys != nullptr) {
          prefetch(keys + place + i);
        }
      }
    }
  };
};

template <typename T>
class TilePrefetcher {
  static constexpr int64_t kGroupsPerSoftmax = 3;  // 6 KiB with a head of 64 in bf16: what arrives during a softmax

 public:
  // `now` is computed, then `next`, which may have no keys. If `next` has fewer groups than `now`, its first group is
  // fetched again in place of those that it lacks, so that the loops need not count. If it has more, `fetch_rest`
  // fetches the additional ones.
  TilePrefetcher(const KvTile<T>& now, KvTile<T>& next, int64_t head_size, bool once)
      : now_(now), next_(next), lines_(kKeysPerGroup * head_size / kPerLine<T>), once_(once) {
    for (int64_t g = next.groups(); next.count > 0 && g < now.groups(); ++g) {
      next.key[g] = next.key[0];
      next.value[g] = next.value[0];
    }
  }
  // Of the rows of a task only the last ones, which see all keys, fetch the next tile: `is_last`. The first ones fetch
  // the tile's own values: `is_first`.
  ScorePrefetcher<T> during_scores(bool is_first, bool is_last) const {
    return {is_last ? keys() : nullptr, is_first && !once_ ? now_.value : nullptr};
  }
  ValuePrefetcher<T> during_values(bool is_last) const {
    return {is_last && next_.count > 0 ? next_.value : nullptr, is_last && !once_ ? keys() : nullptr};
  }
  // For row r of the last ones.
  void fetch_during_softmax(int64_t r) const {
    const int64_t end = once_ ? 0 : std::min((r + 1) * kGroupsPerSoftmax, next_.groups());
    for (int64_t g = r * kGroupsPerSoftmax; g < end; ++g) {
      fetch(next_.value[g]);
    }
  }
  void fetch_rest() const {
    for (int64_t g = now_.groups(); !once_ && g < next_.groups(); ++g) {
      fetch(next_.key[g]);
      fetch(next_.value[g]);
    }
  }

 private:
  const KvTile<T>& now_;
  KvTile<T>& next_;
  int64_t lines_;  // of a group's keys, and of its values
  bool once_;

  const float* const* keys() const {
    return next_.count > 0 ? next_.key : nullptr;
  }
  void fetch(const void* group) const {
    asm volatile("");  // too long to be inlined at once: this keeps GCC from dropping the call, see above
    for (int64_t i = 0; i < lines_; ++i) {
      prefetch(static_cast<const char*>(group) + 64 * i);
    }
  }
};

}  // namespace
}  // namespace folovllm
