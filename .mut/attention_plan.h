// The attention of a step, cut into tasks for the threads. All layers of a step share this plan.
//
// Milestone: M4. vLLM counterpart: AttentionScheduler in csrc/cpu/cpu_attn_impl.hpp (after v0.11.0).
// Source of the cut along the keys: Flash-Decoding (Dao et al. 2023).
//
// A task is (sequence, KV head, up to 64 rows, a range of keys). A row is one query of one head. All query heads that
// share a KV head are rows of one task, which reads K and V once for all of them. If the range of keys is not the whole
// sequence, the task's sums are only a part, which is merged with the other parts afterwards.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "thread_team.h"

namespace folovllm {

constexpr int64_t kMaxRows = 64;        // of a task, whose scores, queries and sums then stay in L2
constexpr int64_t kMinPartKeys = 256;   // to merge a shorter part costs more than the second thread saves
constexpr int64_t kPartMultiple = 64;   // parts begin at multiples of so many keys
constexpr int64_t kTasksPerThread = 4;  // with fewer, the other threads wait long for the last task to end
constexpr int64_t kSerialWork = 2048;   // rows x keys; one thread finishes less than this before another one wakes up

// Each row of sums is padded to a multiple of 32 numbers. E.g. with a head of 80, the rows are 96 numbers apart.
constexpr int64_t padded(int64_t head_size) {
  return (head_size + 31) / 32 * 32;
}

struct Task {
  int64_t sequence, kv_head;
  int64_t first_query, num_queries;  // within the sequence's new tokens
  int64_t first_key, end_key;
  int64_t part;                      // where its sums go in the buffer; -1 if it sees every key and writes the output
};

// Some rows of the output, which one task or several parts compute.
struct Output {
  Task whole;
  int64_t num_parts;
};

// What a step's attention is about: sequence s has seq_lens[s] keys, of which the last belong to its queries, the tokens
// query_start_loc[s] .. query_start_loc[s + 1] of the batch.
struct AttentionShape {
  const int32_t* query_start_loc;  // [num_reqs + 1]
  const int32_t* seq_lens;         // [num_reqs]
  int64_t num_reqs, num_heads, num_kv_heads, head_size;
};

class AttentionPlan {
 public:
  std::vector<Output> outputs;
  std::vector<Task> tasks;    // of all outputs, sorted by thread
  std::vector<int64_t> ends;  // where each thread's tasks end
  int64_t buffer_size = 0;    // numbers in the buffer for all parts

  AttentionPlan(const AttentionShape& shape, int64_t num_threads)
      : shape_(shape), part_row_(padded(shape.head_size) + 2) {
    const int64_t work = list_outputs();
    assign_owners(work < kSerialWork ? 1 : num_threads);
    for (Output& output : outputs) {
      const int64_t share = work / (num_threads * kTasksPerThread * rows(output.whole));
      const int64_t part = (std::max(share, kMinPartKeys) + kPartMultiple - 1) / kPartMultiple * kPartMultiple;
      output.num_parts = num_threads == 1 ? 1 : (output.whole.end_key + part - 1) / part;  // one gains nothing from parts
      list_tasks(output);
    }
    // Each thread does its longest task first, so that the others wait only for a short one at the end.
    std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) {
      const auto key = [&](const Task& t) { return std::pair(owner(t.sequence), -rows(t) * (t.end_key - t.first_key)); };
      return key(a) < key(b);
    });
    for (const Task& task : tasks) {
      std::for_each(ends.begin() + owner(task.sequence), ends.end(), [](int64_t& end) { ++end; });
    }
  }

  int64_t num_threads() const {
    return static_cast<int64_t>(ends.size());
  }
  // The thread that should read a sequence's keys and values.
  int64_t owner(int64_t sequence) const {
    return owners_[sequence];
  }
  int64_t num_tokens() const {
    return shape_.query_start_loc[shape_.num_reqs];
  }
  int64_t num_reqs() const {
    return shape_.num_reqs;
  }
  int64_t first_token(int64_t sequence) const {
    return shape_.query_start_loc[sequence];
  }
  int64_t num_heads() const {
    return shape_.num_heads;
  }
  int64_t queries_per_kv() const {  // query heads that share a KV head
    return shape_.num_heads / shape_.num_kv_heads;
  }
  int64_t rows(const Task& task) const {
    return task.num_queries * queries_per_kv();
  }
  int64_t part_size(const Task& task) const {
    return rows(task) * part_row_;  // sums, maximum, total
  }
  // Row r is head r % group of query r / group.
  int64_t token(const Task& task, int64_t row) const {
    return shape_.query_start_loc[task.sequence] + task.first_query + row / queries_per_kv();
  }
  int64_t head(const Task& task, int64_t row) const {
    return task.kv_head * queries_per_kv() + row % queries_per_kv();
  }
  // The number of keys that a query may see: those up to its own position.
  int64_t visible(int64_t sequence, int64_t query) const {
    const int64_t q_len = shape_.query_start_loc[sequence + 1] - shape_.query_start_loc[sequence];
    return shape_.seq_lens[sequence] - q_len + query + 1;
  }

 private:
  AttentionShape shape_;
  int64_t part_row_;
  std::vector<int64_t> owners_;

  // Lists one output for each (sequence, KV head, up to 64 rows). Returns the work of all of them together, rows x
  // keys.
  int64_t list_outputs() {
    const int64_t step = kMaxRows / queries_per_kv();
    int64_t work = 0;
    for (int64_t s = 0; s < shape_.num_reqs; ++s) {
      const int64_t q_len = shape_.query_start_loc[s + 1] - shape_.query_start_loc[s];
      for (int64_t first = 0; first < q_len; first += step) {
        const int64_t count = std::min(step, q_len - first), keys = visible(s, first + count - 1);
        work += count * queries_per_kv() * keys * shape_.num_kv_heads;
        for (int64_t head = 0; head < shape_.num_kv_heads; ++head) {
          outputs.push_back({{s, head, first, count, 0, keys, -1}, 1});
        }
      }
    }
    return work;
  }

  // Gives each sequence, the longest first, to the thread that has least to do. All tasks of a sequence belong to one
  // thread, so that what is prefetched for them (PrefetchQueue) arrives in the cache of the core that reads it.
  void assign_owners(int64_t num_threads) {
    const auto work = [&](int64_t s) {
      return static_cast<int64_t>(shape_.query_start_loc[s + 1] - shape_.query_start_loc[s]) * shape_.seq_lens[s];
    };
    std::vector<int64_t> order(shape_.num_reqs), load(num_threads, 0);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work(a) > work(b); });
    ends.assign(num_threads, 0);
    owners_.resize(shape_.num_reqs);
    for (const int64_t s : order) {
      owners_[s] = std::min_element(load.begin(), load.end()) - load.begin();
      load[owners_[s]] += work(s);
    }
  }

  // Cuts an output into parts if it is more than its share of the work. E.g. with two threads and one sequence of 8,192
  // keys, 3 KV heads make 3 outputs of 3 parts each.
  void list_tasks(Output& output) {
    if (output.num_parts == 1) {
      tasks.push_back(output.whole);
      return;
    }
    output.whole.part = buffer_size;
    const int64_t keys = output.whole.end_key, cuts = (keys + kPartMultiple - 1) / kPartMultiple;
    for (int64_t i = 0; i < output.num_parts; ++i) {
      Task task = output.whole;
      task.first_key = cuts * i / output.num_parts * kPartMultiple;
      task.end_key = std::min(keys, cuts * (i + 1) / output.num_parts * kPartMultiple);
      task.part = buffer_size;
      buffer_size += part_size(task);
      tasks.push_back(task);
    }
  }
};

}  // namespace folovllm
