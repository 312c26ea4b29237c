// Paged attention on the CPU, for any mix of query lengths.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_attn.cpp (after v0.11.0). Left out: AMX, sliding windows, ALiBi, an
// fp8 cache. Sources: online softmax, Milakov & Gimelshein 2018; tiles, FlashAttention-2 (Dao 2023); split KV,
// Flash-Decoding.
//
// To read it, begin with reference_attention.cpp, which computes the same in plain loops. Then:
//   attention_plan.h      cuts the batch into tasks for the threads
//   kv_pages.h, kv_tile.h where keys and values lie, and how a tile of 256 of them is found
//   this file             computes a task, tile by tile (run_task), and merges the parts of long sequences (merge)
//   attention_scores.h, attention_softmax.h, attention_values.h      the arithmetic of one tile
//   prefetch.h            what is fetched from memory meanwhile

#include "attention_vectors.h"  // the first: it chooses the vectors of at::vec
#include "attention_scores.h"
#include "attention_softmax.h"
#include "attention_values.h"
#include "ops.h"
#include "work_ranges.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <vector>

namespace folovllm {
namespace {

// ---- Tasks

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
  T* out = batch.out + place * batch.pages.head_size;
  const Vec factor(1.0f / total);
  for (int64_t d = 0; d < batch.pages.head_size; d += kWidth) {
    store_vec(out + d, Vec::loadu(sum + d) * factor);
  }
}

template <typename T, bool kWords>
void load_queries(const Batch<T>& batch, const Task& task, float* query) {
  const int64_t head_size = batch.pages.head_size;
  for (int64_t r = 0; r < batch.plan.rows(task); ++r) {
    const T* source = batch.query + batch.plan.token(task, r) * batch.token_stride +
                      batch.plan.head(task, r) * batch.head_stride;
    if constexpr (kWords) {
      std::memcpy(query + r * batch.pages.words(), source, head_size * sizeof(T));
    } else {
      std::transform(source, source + head_size, query + r * head_size, [](T x) { return static_cast<float>(x); });
    }
  }
}

template <typename T>
struct alignas(64) Scratch {
  float query[kMaxRows * kMaxHeadSize];   // [rows, words]
  float key[kTileKeys * kMaxHeadSize];    // [group][word][16]: groups that had to be collected token by token
  T value[kTileKeys * kMaxHeadSize];      // [group][16][head_size]: the same of values
  float widened[kTileKeys * kMaxHeadSize];  // keys in fp32, if the CPU cannot multiply 16-bit words
  float scores[kRowsAtOnce * kTileKeys];  // [rows computed together, keys of the tile], then the weights
  float sum[kMaxRows * kMaxHeadSize];     // [rows, padded head_size]: weighted sum of values
  float max[kMaxRows], total[kMaxRows];
};

template <typename T>
void locate_in(const Batch<T>& batch, const Task& task, int64_t first, KvTile<T>& tile) {
  const int64_t count = std::clamp<int64_t>(task.end_key - first, 0, kTileKeys);
  locate(batch.pages, batch.table(task), task.kv_head, first, count, tile);
}

// `next_task` is the one that this thread does afterwards, or null. Its first tile is prefetched while the last tile of
// this task is computed. With kDot, words of two bf16 numbers are multiplied as they are; other 16-bit numbers are
// widened to fp32 first.
template <typename T, bool kDot>
void run_task(const Batch<T>& batch, const Task& task, const Task* next_task, Scratch<T>& scratch, float* parts) {
  constexpr bool kWords = kDot || std::is_same_v<T, float>;
  const int64_t rows = batch.plan.rows(task), head_size = batch.pages.head_size, width = padded(head_size);
  const int64_t queries_per_kv = batch.plan.queries_per_kv(), words = kWords ? batch.pages.words() : head_size;
  const bool once = batch.fetched || task.num_queries > 1;
  KvTile<T> tiles[2];
  load_queries<T, kWords>(batch, task, scratch.query);
  std::fill(scratch.sum, scratch.sum + rows * width, 0.0f);
  std::fill(scratch.total, scratch.total + rows, 0.0f);
  std::fill(scratch.max, scratch.max + rows, kMinusInf);

  locate_in(batch, task, task.first_key, tiles[0]);
  for (int64_t first = task.first_key, i = 0; first < task.end_key; first += kTileKeys, ++i) {
    KvTile<T>&tile = tiles[i % 2], &next = tiles[(i + 1) % 2];
    collect<T, kWords>(batch.pages, batch.table(task), task.kv_head, first, scratch.key, scratch.value, scratch.widened,
                       tile);
    next.count = 0;
    if (first + kTileKeys < task.end_key) {
      locate_in(batch, task, first + kTileKeys, next);
    } else if (next_task != nullptr) {
      locate_in(batch, *next_task, next_task->first_key, next);
    }
    const TilePrefetcher<T> prefetcher(tile, next, head_size, once);
    // The number of the tile's keys that row r may see. Rows that are computed together share that of the last of them.
    const auto seen = [&](int64_t r) {
      const int64_t visible = batch.plan.visible(task.sequence, task.first_query + r / queries_per_kv);
      return std::clamp<int64_t>(visible - first, 0, tile.count);
    };
    for_each_row_block(rows, [&](auto R, int64_t r) {
      const int64_t count = seen(r + R - 1), scored = (count + kKeysPerGroup - 1) / kKeysPerGroup * kKeysPerGroup;
      const bool is_first = r == 0, is_last = r + R == rows;
      score<T, kDot, R>(scratch.query + r * words, words, tile.key, prefetcher.during_scores(is_first, is_last),
                        batch.scale, scored, scratch.scores);
      float rescale[R];
      for (int i = 0; i < R; ++i) {
        if (is_last) {
          prefetcher.fetch_during_softmax(i);
        }
        softmax_row<T>(scratch.scores + i * kTileKeys, scored, seen(r + i), scratch.max[r + i], scratch.total[r + i],
                       rescale[i]);
      }
      add_tile<T, kDot, R>(scratch.scores, tile.value, prefetcher.during_values(is_last), count, rescale,
                           scratch.sum + r * width, head_size);
    });
    prefetcher.fetch_rest();
  }
#if FOLOVLLM_BF16_DOT
  if constexpr (kDot) {
    restore_order(scratch.sum, rows * width);
  }
#endif
  if (task.part < 0) {
    for (int64_t r = 0; r < rows; ++r) {
      finish_row(batch, task, r, scratch.sum + r * width, scratch.total[r]);
    }
    return;
  }
  float* part = parts + task.part;  // sums [rows, width], maximum [rows], total [rows]
  std::copy_n(scratch.sum, rows * width, part);
  std::copy_n(scratch.max, rows, part + rows * width);
  std::copy_n(scratch.total, rows, part + rows * width + rows);
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
      const float factor = std::exp(maxima[i * stride] - highest);  // 0 for a part in which this row saw nothing
      total += factor * maxima[i * stride + rows];
      for (int64_t d = 0; d < width; ++d) {
        sum[d] += factor * sums[i * stride + d];
      }
    }
    finish_row(batch, output.whole, r, sum, total);
  }
}

template <typename T, bool kDot>
void attend(const Batch<T>& batch) {
  const AttentionPlan& plan = batch.plan;
  std::vector<float> parts(plan.buffer_size);
  WorkRanges(plan.ends).for_each([&](int64_t /*thread*/, int64_t i, int64_t next) {
    static thread_local Scratch<T> scratch;  // about a MiB, of which a head of 64 touches a quarter
    const Task* next_task = next == WorkRanges::kNone ? nullptr : &plan.tasks[next];
    run_task<T, kDot>(batch, plan.tasks[i], next_task, scratch, parts.data());
  });
  for (const Output& output : plan.outputs) {
    if (output.num_parts > 1) {
      merge(batch, output, parts.data());
    }
  }
}

}  // namespace

// Causal attention of query [num_tokens, num_heads, head_size] over the pages, into `out` of the same shape. The
// queries of a sequence are its last positions, as in AttentionMetadata. native=false takes the path of a CPU without
// bf16 dot products, so that it can be tested on one that has them. `fetched` says that K and V are in cache
// (PrefetchQueue). reference_attention.cpp computes the same in plain loops.
void paged_attention(const at::Tensor& out, const at::Tensor& query, const at::Tensor& kv_cache, const AttentionPlan& plan,
                     const at::Tensor& block_table, double scale, bool native, bool fetched) {
  TORCH_CHECK(query.dim() == 3 && query.stride(2) == 1 && out.is_contiguous() && out.sizes() == query.sizes() &&
              out.scalar_type() == query.scalar_type(), "paged_attention: out and query do not fit");
  TORCH_CHECK(query.size(0) == plan.num_tokens() && query.size(1) == plan.num_heads(), "a plan for another batch");
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, query.scalar_type(), "paged_attention", [&] {
    if constexpr (!std::is_same_v<scalar_t, double>) {
      const Batch<scalar_t> batch{
          plan, pages_of<scalar_t>(kv_cache, query.size(2)), query.const_data_ptr<scalar_t>(),
          out.mutable_data_ptr<scalar_t>(), query.stride(0), query.stride(1), block_table.const_data_ptr<int32_t>(),
          block_table.stride(0), static_cast<float>(scale), fetched};
      constexpr bool kCanDot = FOLOVLLM_BF16_DOT && std::is_same_v<scalar_t, at::BFloat16>;
      kCanDot && native ? attend<scalar_t, kCanDot>(batch) : attend<scalar_t, false>(batch);
    } else {
      TORCH_CHECK(false, "paged_attention: no fp64");
    }
  });
}

}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  using at::Tensor;
  m.def(
      "paged_attention(Tensor(a!) out, Tensor query, Tensor kv_cache, Tensor query_start_loc, Tensor seq_lens, "
      "Tensor block_table, float scale, bool native=True) -> ()",
      [](const Tensor& out, const Tensor& query, const Tensor& kv_cache, const Tensor& query_start_loc,
         const Tensor& seq_lens, const Tensor& block_table, double scale, bool native) {
        TORCH_CHECK(query.dim() == 3 && kv_cache.dim() == 4, "paged_attention wants query [tokens, heads, head_size]");
        const folovllm::AttentionPlan plan(query_start_loc, seq_lens, block_table, kv_cache, query.size(1),
                                           query.size(2));
        folovllm::paged_attention(out, query, kv_cache, plan, block_table, scale, native);
      });
}
