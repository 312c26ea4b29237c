// Paged attention on the CPU, for any mix of query lengths, and the writing of K and V into their pages.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_attn.cpp. Left out: AMX, sliding windows, ALiBi, an fp8 cache.
// Sources: online softmax, Milakov & Gimelshein 2018; tiles, FlashAttention-2 (Dao 2023); split KV, Flash-Decoding.
//
// Work is cut into tasks of (sequence, KV head, up to 64 rows, a range of keys). A row is one query of one head: all
// heads that share a KV head are rows of one task, which reads K and V once for all. Threads take the next task when
// they are free. Where a range of keys is not the whole sequence, `merge` joins the parts. Layout: pages.h.
// Arithmetic: attention_math.h.

#include "attention_math.h"
#include "ops.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <vector>

namespace folovllm {
namespace {

constexpr int64_t kMaxRows = 64;         // of a task: its scores, queries and sums stay in L2
constexpr int64_t kMinSplit = 256;       // keys; a shorter part is not worth merging
constexpr int64_t kTasksPerThread = 4;   // enough that the last task to end does not keep the others waiting for long
constexpr int64_t kSerialWork = 2048;    // rows x keys; less than this is done before another thread wakes up

// Ask for the lines that a token's K will be written to. A key lies in as many lines as it has words, each 64 bytes for
// the 16 tokens of its group: waiting for them one after another would take longer than all the rest of the write.
template <typename T>
void fetch_slot(const Pages<T>& pages, int64_t slot) {
  const int64_t block = slot / pages.block_size, offset = slot % pages.block_size;
  const int64_t stride = pages.width(offset) * Pages<T>::kPerWord;
  for (int64_t head = 0; head < pages.num_kv_heads; ++head) {
    const T* lane = pages.lane(block, head, offset);
    for (int64_t p = 0; p < pages.words(); ++p) {
      __builtin_prefetch(lane + p * stride, /*write=*/1);
    }
  }
}

template <typename T>
void write_tokens(const Pages<T>& pages, const at::Tensor& key, const at::Tensor& value, const int64_t* slots) {
  constexpr int64_t kPerWord = Pages<T>::kPerWord;
  const T* keys = key.const_data_ptr<T>();
  const T* values = value.const_data_ptr<T>();
  for (int64_t token = 0; token < key.size(0); ++token) {
    TORCH_CHECK(slots[token] >= 0 && slots[token] < pages.num_blocks * pages.block_size, "slot ", slots[token],
                " is outside the cache");
  }
  at::parallel_for(0, key.size(0), /*grain_size=*/16, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      if (token + 1 < end) {
        fetch_slot(pages, slots[token + 1]);
      }
      const int64_t block = slots[token] / pages.block_size, offset = slots[token] % pages.block_size;
      const int64_t stride = pages.width(offset) * kPerWord;
      for (int64_t head = 0; head < pages.num_kv_heads; ++head) {
        const T* source = keys + token * key.stride(0) + head * key.stride(1);
        T* lane = pages.lane(block, head, offset);
        for (int64_t p = 0; p < pages.words(); ++p) {
          std::memcpy(lane + p * stride, source + p * kPerWord, 4);
        }
        std::memcpy(pages.value(block, head, offset), values + token * value.stride(0) + head * value.stride(1),
                    pages.head_size * sizeof(T));
      }
    }
  });
}

// ---- Tasks

struct Task {
  int64_t sequence, kv_head;
  int64_t first_query, num_queries;  // within the sequence's new tokens
  int64_t first_key, end_key;
  int64_t part;                      // where its unfinished sums go; -1: it sees every key and writes the output
};

struct Item {  // tasks that together make some rows of the output
  Task whole;
  int64_t num_parts;
};

template <typename T>
struct Batch {
  Pages<T> pages;
  const T* query;  // [num_tokens, num_heads, head_size], strides below
  T* out;          // [num_tokens, num_heads, head_size], contiguous
  int64_t token_stride, head_stride, num_heads, group;  // group: query heads per KV head
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t num_reqs, table_stride;
  float scale;

  int64_t rows(const Task& task) const {
    return task.num_queries * group;
  }
  int64_t part_size(const Task& task) const {
    return rows(task) * (padded(pages.head_size) + 2);  // sums, maximum, total
  }
  // Row r is head r % group of query r / group.
  int64_t token(const Task& task, int64_t row) const {
    return query_start_loc[task.sequence] + task.first_query + row / group;
  }
  int64_t head(const Task& task, int64_t row) const {
    return task.kv_head * group + row % group;
  }
  // How many keys a query may see: those up to its own position.
  int64_t visible(int64_t sequence, int64_t query) const {
    const int64_t q_len = query_start_loc[sequence + 1] - query_start_loc[sequence];
    return seq_lens[sequence] - q_len + query + 1;
  }
};

// One item per (sequence, KV head, up to 64 rows), cut into parts where it is more than its share of the work: with two
// threads and one sequence of 8,192 keys, 3 heads make 3 items of 3 parts.
template <typename T>
std::vector<Item> plan(const Batch<T>& batch, int64_t num_threads, int64_t& work) {
  std::vector<Item> items;
  const int64_t step = kMaxRows / batch.group;
  work = 0;
  for (int64_t s = 0; s < batch.num_reqs; ++s) {
    const int64_t q_len = batch.query_start_loc[s + 1] - batch.query_start_loc[s];
    for (int64_t first = 0; first < q_len; first += step) {
      const int64_t count = std::min(step, q_len - first), keys = batch.visible(s, first + count - 1);
      work += count * batch.group * keys * batch.pages.num_kv_heads;
      for (int64_t head = 0; head < batch.pages.num_kv_heads; ++head) {
        items.push_back({{s, head, first, count, 0, keys, -1}, 1});
      }
    }
  }
  for (Item& item : items) {
    const int64_t share = work / (num_threads * kTasksPerThread * batch.rows(item.whole));
    const int64_t part = (std::max(share, kMinSplit) + kTile - 1) / kTile * kTile;
    item.num_parts = num_threads == 1 ? 1 : (item.whole.end_key + part - 1) / part;
  }
  return items;
}

template <typename T>
std::vector<Task> tasks_of(const Batch<T>& batch, std::vector<Item>& items, int64_t& buffer_size) {
  std::vector<Task> tasks;
  buffer_size = 0;
  for (Item& item : items) {
    if (item.num_parts == 1) {
      tasks.push_back(item.whole);
      continue;
    }
    item.whole.part = buffer_size;
    const int64_t keys = item.whole.end_key, tiles = (keys + kTile - 1) / kTile;
    for (int64_t i = 0; i < item.num_parts; ++i) {
      Task task = item.whole;
      task.first_key = tiles * i / item.num_parts * kTile;
      task.end_key = std::min(keys, tiles * (i + 1) / item.num_parts * kTile);
      task.part = buffer_size;
      buffer_size += batch.part_size(task);
      tasks.push_back(task);
    }
  }
  // The longest first: whoever is free last then waits for a short one.
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) {
    return batch.rows(a) * (a.end_key - a.first_key) > batch.rows(b) * (b.end_key - b.first_key);
  });
  return tasks;
}

template <typename T>
void finish_row(const Batch<T>& batch, const Task& task, int64_t row, const float* sum, float total) {
  T* out = batch.out + (batch.token(task, row) * batch.num_heads + batch.head(task, row)) * batch.pages.head_size;
  for (int64_t d = 0; d < batch.pages.head_size; ++d) {
    out[d] = static_cast<T>(sum[d] / total);
  }
}

template <typename T, bool kWords>
void load_queries(const Batch<T>& batch, const Task& task, float* query) {
  const int64_t head_size = batch.pages.head_size;
  for (int64_t r = 0; r < batch.rows(task); ++r) {
    const T* source = batch.query + batch.token(task, r) * batch.token_stride + batch.head(task, r) * batch.head_stride;
    if constexpr (kWords) {
      std::memcpy(query + r * batch.pages.words(), source, head_size * sizeof(T));
    } else {
      std::transform(source, source + head_size, query + r * head_size, [](T x) { return static_cast<float>(x); });
    }
  }
}

struct alignas(64) Scratch {
  float query[kMaxRows * kMaxHeadSize];   // [rows, words]
  float key[kTile * kMaxHeadSize];        // [group][word][16]: groups that had to be collected token by token
  float widened[kTile * kMaxHeadSize];    // the same in fp32, where the CPU cannot multiply 16-bit words
  float scores[kMaxRows * kTile];         // [rows, keys of the tile], then the weights
  float sum[kMaxRows * kMaxHeadSize];     // [rows, padded head_size]: weighted sum of values
  float max[kMaxRows], total[kMaxRows], rescale[kMaxRows];
};

template <typename T>
int64_t locate_in(const Batch<T>& batch, const Task& task, int64_t first, Tile<T>& tile) {
  const int64_t count = std::clamp<int64_t>(task.end_key - first, 0, kTile);
  locate(batch.pages, batch.block_table + task.sequence * batch.table_stride, task.kv_head, first, count, tile);
  return count;
}

// `after` is the task that this thread does next, if any: its first tile is asked for while we compute our last.
// kDot: words of two bf16 are multiplied as they are. Other 16-bit numbers are widened to fp32 first.
template <typename T, bool kDot>
void run_task(const Batch<T>& batch, const Task& task, const Task* after, float* parts) {
  constexpr bool kWords = kDot || std::is_same_v<T, float>;
  const int64_t rows = batch.rows(task), head_size = batch.pages.head_size, width = padded(head_size);
  const int64_t words = kWords ? batch.pages.words() : head_size;
  const int32_t* table = batch.block_table + task.sequence * batch.table_stride;
  Scratch scratch;  // about 300 KiB of stack, of which a head of 64 touches a quarter
  Tile<T> tiles[2];
  load_queries<T, kWords>(batch, task, scratch.query);
  std::fill(scratch.sum, scratch.sum + rows * width, 0.0f);
  std::fill(scratch.total, scratch.total + rows, 0.0f);
  std::fill(scratch.max, scratch.max + rows, kMinusInf);

  locate_in(batch, task, task.first_key, tiles[0]);
  for (int64_t first = task.first_key, i = 0; first < task.end_key; first += kTile, ++i) {
    Tile<T>&tile = tiles[i % 2], &next = tiles[(i + 1) % 2];
    const int64_t count = std::min(kTile, task.end_key - first), scored = (count + kGroup - 1) / kGroup * kGroup;
    collect<T, kWords>(batch.pages, table, task.kv_head, first, count, scratch.key, scratch.widened, tile);
    int64_t next_count = 0;
    if (first + kTile < task.end_key) {
      next_count = locate_in(batch, task, first + kTile, next);
    } else if (after != nullptr) {
      next_count = locate_in(batch, *after, after->first_key, next);
    }
    Ahead<T> ahead(next, next_count);
    in_row_blocks(rows, [&](auto R, int64_t r) {
      score<kDot, R>(scratch.query + r * words, words, tile.group, r == 0 ? ahead.keys() : nullptr, batch.scale,
                     scored, scratch.scores + r * kTile);
    });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t valid = batch.visible(task.sequence, task.first_query + r / batch.group) - first;
      softmax_row<T>(scratch.scores + r * kTile, scored, std::clamp<int64_t>(valid, 0, count), scratch.max[r],
                     scratch.total[r], scratch.rescale[r]);
    }
    in_row_blocks(rows, [&](auto R, int64_t r) {
      add_tile<T, kDot, R>(scratch.scores + r * kTile, tile.value, r == 0 ? ahead.values() : nullptr, count,
                           scratch.rescale + r, scratch.sum + r * width, head_size);
    });
    ahead.fetch_values(count, next_count, head_size);  // those that this tile, if it is a short one, did not ask for
  }
#if FOLOVLLM_BF16_DOT
  if constexpr (kDot) {
    in_order(scratch.sum, rows * width);
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

// Join the parts of an item: bring their sums to one common maximum, add, divide.
template <typename T>
void merge(const Batch<T>& batch, const Item& item, const float* parts) {
  const int64_t rows = batch.rows(item.whole), width = padded(batch.pages.head_size);
  const int64_t stride = batch.part_size(item.whole);
  for (int64_t r = 0; r < rows; ++r) {
    const float* sums = parts + item.whole.part + r * width;
    const float* maxima = parts + item.whole.part + rows * width + r;
    float highest = kMinusInf, total = 0.0f, sum[kMaxHeadSize] = {};
    for (int64_t i = 0; i < item.num_parts; ++i) {
      highest = std::max(highest, maxima[i * stride]);
    }
    for (int64_t i = 0; i < item.num_parts; ++i) {
      const float factor = std::exp(maxima[i * stride] - highest);  // 0 for a part in which this row saw nothing
      total += factor * maxima[i * stride + rows];
      for (int64_t d = 0; d < width; ++d) {
        sum[d] += factor * sums[i * stride + d];
      }
    }
    finish_row(batch, item.whole, r, sum, total);
  }
}

template <typename T, bool kDot>
void attend(const Batch<T>& batch) {
  int64_t work = 0, buffer_size = 0;
  const int64_t num_threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  std::vector<Item> items = plan(batch, num_threads, work);
  const std::vector<Task> tasks = tasks_of(batch, items, buffer_size);
  std::vector<float> parts(buffer_size);
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  const int64_t workers = work < kSerialWork ? 1 : std::min(num_threads, num_tasks);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++, after; i < num_tasks; i = after) {
      after = next++;
      run_task<T, kDot>(batch, tasks[i], after < num_tasks ? &tasks[after] : nullptr, parts.data());
    }
  });
  for (const Item& item : items) {
    if (item.num_parts > 1) {
      merge(batch, item, parts.data());
    }
  }
}

void check_metadata(const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& block_table,
                    int64_t num_tokens, int64_t block_size) {
  for (const at::Tensor* tensor : {&query_start_loc, &seq_lens, &block_table}) {
    TORCH_CHECK(tensor->scalar_type() == at::kInt && tensor->stride(-1) == 1, "metadata must be contiguous int32");
  }
  const int32_t* start = query_start_loc.const_data_ptr<int32_t>();
  const int32_t* lens = seq_lens.const_data_ptr<int32_t>();
  const int64_t num_reqs = seq_lens.size(0);
  TORCH_CHECK(query_start_loc.size(0) == num_reqs + 1 && block_table.size(0) == num_reqs &&
              start[0] == 0 && start[num_reqs] == num_tokens, "metadata of different batches");
  for (int64_t s = 0; s < num_reqs; ++s) {
    const int64_t q_len = start[s + 1] - start[s];
    TORCH_CHECK(q_len >= 0 && q_len <= lens[s] && lens[s] <= block_table.size(1) * block_size, "sequence ", s, " has ",
                q_len, " queries, ", lens[s], " keys and ", block_table.size(1), " blocks of ", block_size);
  }
}

}  // namespace

// key, value [num_tokens, num_kv_heads, head_size] into the slots [num_tokens]; a slot is block * block_size + offset.
void write_kv(const at::Tensor& key, const at::Tensor& value, const at::Tensor& kv_cache, const at::Tensor& slots) {
  TORCH_CHECK(key.dim() == 3 && key.sizes() == value.sizes() && key.stride(2) == 1 && value.stride(2) == 1 &&
              key.size(0) == slots.size(0) && key.size(1) == kv_cache.size(1) && slots.is_contiguous(),
              "write_kv: shapes do not fit: ", key.sizes(), value.sizes(), kv_cache.sizes(), slots.sizes());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, kv_cache.scalar_type(), "write_kv", [&] {
    if constexpr (!std::is_same_v<scalar_t, double>) {
      write_tokens(pages_of<scalar_t>(kv_cache, key.size(2)), key, value, slots.const_data_ptr<int64_t>());
    } else {
      TORCH_CHECK(false, "write_kv: no fp64");
    }
  });
}

// Causal attention of query [num_tokens, num_heads, head_size] over the pages, into `out` of the same shape. The last
// rows of sequence s are its queries, as in AttentionMetadata. `native` = false takes the path of a CPU without bf16
// dot products, so that it can be tested on one that has them.
void paged_attention(const at::Tensor& out, const at::Tensor& query, const at::Tensor& kv_cache,
                     const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& block_table,
                     double scale, bool native) {
  TORCH_CHECK(query.dim() == 3 && query.stride(2) == 1 && out.is_contiguous() && out.sizes() == query.sizes() &&
              out.scalar_type() == query.scalar_type(), "paged_attention: out and query do not fit");
  const int64_t num_heads = query.size(1), head_size = query.size(2), num_kv_heads = kv_cache.size(1);
  TORCH_CHECK(num_heads % num_kv_heads == 0 && num_heads / num_kv_heads <= kMaxRows, num_heads, " query heads for ",
              num_kv_heads, " KV heads; at most ", kMaxRows, " may share one");
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, query.scalar_type(), "paged_attention", [&] {
    if constexpr (!std::is_same_v<scalar_t, double>) {
      const Pages<scalar_t> pages = pages_of<scalar_t>(kv_cache, head_size);
      check_metadata(query_start_loc, seq_lens, block_table, query.size(0), pages.block_size);
      const Batch<scalar_t> batch{
          pages, query.const_data_ptr<scalar_t>(), out.mutable_data_ptr<scalar_t>(), query.stride(0), query.stride(1),
          num_heads, num_heads / num_kv_heads, query_start_loc.const_data_ptr<int32_t>(),
          seq_lens.const_data_ptr<int32_t>(), block_table.const_data_ptr<int32_t>(), seq_lens.size(0),
          block_table.stride(0), static_cast<float>(scale)};
      constexpr bool kCanDot = FOLOVLLM_BF16_DOT && std::is_same_v<scalar_t, at::BFloat16>;
      kCanDot && native ? attend<scalar_t, kCanDot>(batch) : attend<scalar_t, false>(batch);
    } else {
      TORCH_CHECK(false, "paged_attention: no fp64");
    }
  });
}

}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def("write_kv(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()", &folovllm::write_kv);
  m.def(
      "paged_attention(Tensor(a!) out, Tensor query, Tensor kv_cache, Tensor query_start_loc, Tensor seq_lens, "
      "Tensor block_table, float scale, bool native=True) -> ()",
      &folovllm::paged_attention);
}
