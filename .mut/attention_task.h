// A task of attention: some rows of queries of a sequence over a range of its keys, tile by tile.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_attn_impl.hpp (after v0.11.0). Like the headers that it includes, this one
// knows no tensors, only pointers and sizes, so that it compiles for any CPU without torch's library.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention_plan.h"
#include "attention_scores.h"
#include "attention_softmax.h"
#include "attention_values.h"
#include "kv_tile.h"

namespace folovllm {
namespace {

template <typename T>
struct Batch {
  const AttentionPlan& plan;
  Pages<T> pages;
  const T* query;  // [num_tokens, num_heads, head_size], strides below
  T* out;          // [num_tokens, num_heads, head_size], contiguous
  int64_t token_stride, head_stride;
  const int32_t* block_table;
  int64_t table_stride;
  float scale;
  bool fetched;    // whether K and V are already in the caches of the cores that will read them

  const int32_t* table(const Task& task) const {
    return block_table + task.sequence * table_stride;
  }
};

template <typename T>
void finish_row(const Batch<T>& batch, const Task& task, int64_t row, const float* sum, float total) {
  const int64_t place = batch.plan.token(task, row) * batch.plan.num_heads() + batch.plan.head(task, row);
  const int64_t head_size = batch.pages.head_size;
  store_sums(sum, 1.0f / total, batch.out + place * head_size, head_size);
}

// Queries as `score` takes them: words of two bf16 numbers if pairs are multiplied, else fp32 numbers.
template <typename T>
void load_queries(const Batch<T>& batch, const Task& task, float* query) {
  const int64_t head_size = batch.pages.head_size;
  for (int64_t r = 0; r < batch.plan.rows(task); ++r) {
    const T* source = batch.query + batch.plan.token(task, r) * batch.token_stride +
                      batch.plan.head(task, r) * batch.head_stride;
    if constexpr (kDotPairs<T>) {
      std::memcpy(query + r * head_size / 2, source, head_size * sizeof(T));
    } else {
      std::transform(source, source + head_size, query + r * head_size, [](T x) { return static_cast<float>(x); });
    }
  }
}

template <typename T>
struct alignas(64) Scratch {
  float query[kMaxRows * kMaxHeadSize];   // [rows, words] or [rows, head_size]
  float key[kTileKeys * kMaxHeadSize];    // [group][word][16]: groups that had to be collected token by token
  T value[kTileKeys * kMaxHeadSize];      // [group][16][head_size]: the same of values
  float widened[std::is_same_v<T, c10::Half> ? kTileKeys * kMaxHeadSize : 1];  // fp16 keys in fp32
  float scores[kRowsAtOnce * kTileKeys];  // [rows computed together, keys of the tile], then the weights
  float sum[kMaxRows * kMaxHeadSize];     // [rows, padded head_size]: weighted sum of values
  float max[kMaxRows];
  Vec total[kMaxRows];                    // of the weights, lane by lane
};

template <typename T>
void locate_in(const Batch<T>& batch, const Task& task, int64_t first, KvTile<T>& tile) {
  const int64_t count = std::clamp<int64_t>(task.end_key - first, 0, kTileKeys);
  locate(batch.pages, batch.table(task), task.kv_head, first, count, tile);
}

// One tile for all rows of a task. `first` is its first key.
template <typename T>
void run_tile(const Batch<T>& batch, const Task& task, int64_t first, const KvTile<T>& tile,
              const TilePrefetcher<T>& prefetcher, Scratch<T>& scratch) {
  const int64_t rows = batch.plan.rows(task), head_size = batch.pages.head_size, width = padded(head_size);
  const int64_t words = kWidened<T> ? head_size : batch.pages.words();
  for_each_row_block(rows, [&](auto R, int64_t r) {
    int64_t seen[R];  // the number of the tile's keys that each row may see
    for (int i = 0; i < R; ++i) {
      const int64_t query = task.first_query + (r + i) / batch.plan.queries_per_kv();
      seen[i] = std::clamp<int64_t>(batch.plan.visible(task.sequence, query) - first, 0, tile.count);
    }
    // Rows that are computed together share what the last of them sees.
    const int64_t count = seen[R - 1], scored = (count + kKeysPerGroup - 1) / kKeysPerGroup * kKeysPerGroup;
    const bool is_first = r == 0, is_last = r + R == rows;
    score<T, R>(scratch.query + r * words * KeyWords<T>::kQueriesPerWord, words, tile.key,
                prefetcher.during_scores(is_first, is_last), scored, scratch.scores);
    for (int i = 0; i < R && is_last; ++i) {
      prefetcher.fetch_during_softmax(i);
    }
    float rescale[R];
    softmax_rows<T, R>(scratch.scores, scored, seen, batch.scale, scratch.max + r, scratch.total + r, rescale);
    add_tile<T, R>(scratch.scores, tile.value, prefetcher.during_values(is_last), count, rescale,
                   scratch.sum + r * width, head_size);
  });
}

// `next_task` is the one that this thread does afterwards, or null. Its first tile is prefetched while the last tile of
// this task is computed.
template <typename T>
void run_task(const Batch<T>& batch, const Task& task, const Task* next_task, Scratch<T>& scratch, float* parts) {
  const int64_t rows = batch.plan.rows(task), width = padded(batch.pages.head_size);
  const bool once = batch.fetched || task.num_queries > 1;
  KvTile<T> tiles[2];
  load_queries(batch, task, scratch.query);
  std::fill(scratch.sum, scratch.sum + rows * width, 0.0f);
  std::fill(scratch.total, scratch.total + rows, Vec{});
  std::fill(scratch.max, scratch.max + rows, kMinusInf);

  locate_in(batch, task, task.first_key, tiles[0]);
  for (int64_t first = task.first_key, i = 0; first < task.end_key; first += kTileKeys, ++i) {
    KvTile<T>&tile = tiles[i % 2], &next = tiles[(i + 1) % 2];
    collect<T>(batch.pages, batch.table(task), task.kv_head, first, scratch.key, scratch.value, scratch.widened, tile);
    next.count = 0;
    if (first + kTileKeys < task.end_key) {
      locate_in(batch, task, first + kTileKeys, next);
    } else if (next_task != nullptr) {
      locate_in(batch, *next_task, next_task->first_key, next);
    }
    const TilePrefetcher<T> prefetcher(tile, next, batch.pages.head_size, once);
    run_tile(batch, task, first, tile, prefetcher, scratch);
    prefetcher.fetch_rest();
  }
  if (task.part < 0) {
    for (int64_t r = 0; r < rows; ++r) {
      finish_row(batch, task, r, scratch.sum + r * width, reduce_add(scratch.total[r]));
    }
    return;
  }
  float* part = parts + task.part;  // sums [rows, width], maximum [rows], total [rows]
  std::copy_n(scratch.sum, rows * width, part);
  std::copy_n(scratch.max, rows, part + rows * width);
  std::transform(scratch.total, scratch.total + rows, part + rows * width + rows, reduce_add);
}

// Merges the parts of an output: brings their sums to a common maximum, adds them, and divides.
template <typename T>
void merge(const Batch<T>& batch, const Output& output, const float* parts) {
  const int64_t rows = batch.plan.rows(output.whole), width = padded(batch.pages.head_size);
  const int64_t stride = batch.plan.part_size(output.whole);
  for (int64_t r = 0; r < rows; ++r) {
    const float* sums = parts + output.whole.part + r * width;
    const float* maxima = parts + output.whole.part + rows * width + r;
    float highest = kMinusInf, total = 0.0f, sum[kMaxHeadSize] = {};
    for (int64_t i = 0; i < output.num_parts; ++i) {
      highest = std::max(highest, maxima[i * stride]);
    }
    for (int64_t i = 0; i < output.num_parts; ++i) {
      const float factor = std::exp(batch.scale * (maxima[i * stride] - highest));  // 0 for a part in which this row saw nothing
      total += factor * maxima[i * stride + rows];
      for (int64_t d = 0; d < width; ++d) {
        sum[d] += factor * sums[i * stride + d];
      }
    }
    finish_row(batch, output.whole, r, sum, total);
  }
}

}  // namespace
}  // namespace folovllm
