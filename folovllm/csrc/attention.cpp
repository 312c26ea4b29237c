// Paged attention on the CPU, for any mix of query lengths.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_attn.cpp (after v0.11.0). Left out: AMX, sliding windows, ALiBi, an
// fp8 cache. Sources: online softmax, Milakov & Gimelshein 2018; tiles, FlashAttention-2 (Dao 2023); split KV,
// Flash-Decoding.
//
// To read it, begin with reference_attention.cpp, which computes the same in plain loops. Then:
//   attention_plan.h      cuts the batch into tasks for the threads
//   kv_pages.h, kv_tile.h where keys and values lie, and how a tile of 512 of them is found
//   attention_task.h      computes a task, tile by tile (run_task), and merges the parts of long sequences (merge)
//   attention_scores.h, attention_softmax.h, attention_values.h      the arithmetic of one tile
//   attention_rows.h      what these three share
//   prefetch.h            what is fetched from memory meanwhile
//   this file             the operator: checks its tensors, and hands the tasks to the threads

#include "attention_task.h"
#include "ops.h"
#include "work_ranges.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <vector>

namespace folovllm {
namespace {

template <typename T>
void attend(const Batch<T>& batch) {
  const AttentionPlan& plan = batch.plan;
  std::vector<float> parts(plan.buffer_size);
  WorkRanges(plan.ends).for_each([&](int64_t /*thread*/, int64_t i, int64_t next) {
    static thread_local Scratch<T> scratch;  // about a MiB, of which a head of 64 touches a quarter
    const Task* next_task = next == WorkRanges::kNone ? nullptr : &plan.tasks[next];
    run_task(batch, plan.tasks[i], next_task, scratch, parts.data());
  });
  for (const Output& output : plan.outputs) {
    if (output.num_parts > 1) {
      merge(batch, output, parts.data());
    }
  }
}

}  // namespace

AttentionPlan make_plan(const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& block_table,
                        const at::Tensor& kv_cache, int64_t num_heads, int64_t head_size) {
  for (const at::Tensor* tensor : {&query_start_loc, &seq_lens, &block_table}) {
    TORCH_CHECK(tensor->scalar_type() == at::kInt && tensor->stride(-1) == 1, "metadata must be contiguous int32");
  }
  const int32_t* start = query_start_loc.const_data_ptr<int32_t>();
  const int32_t* lens = seq_lens.const_data_ptr<int32_t>();
  const int64_t num_reqs = seq_lens.size(0), num_kv_heads = kv_cache.size(1), block_size = kv_cache.size(3) / head_size;
  TORCH_CHECK(num_heads % num_kv_heads == 0 && num_heads / num_kv_heads <= kMaxRows, num_heads, " query heads for ",
              num_kv_heads, " KV heads; at most ", kMaxRows, " may share one");
  TORCH_CHECK(query_start_loc.size(0) == num_reqs + 1 && block_table.size(0) == num_reqs && start[0] == 0,
              "metadata of different batches");
  for (int64_t s = 0; s < num_reqs; ++s) {
    const int64_t q_len = start[s + 1] - start[s];
    TORCH_CHECK(q_len >= 0 && q_len <= lens[s] && lens[s] <= block_table.size(1) * block_size, "sequence ", s, " has ",
                q_len, " queries, ", lens[s], " keys and ", block_table.size(1), " blocks of ", block_size);
  }
  return AttentionPlan({start, lens, num_reqs, num_heads, num_kv_heads, head_size}, ThreadTeam::size());
}

// The queries of a sequence are its last positions, as in AttentionMetadata. reference_attention.cpp computes the same in
// plain loops.
void paged_attention(const at::Tensor& out, const at::Tensor& query, const at::Tensor& kv_cache, const AttentionPlan& plan,
                     const at::Tensor& block_table, double scale, bool fetched) {
  TORCH_CHECK(query.dim() == 3 && query.stride(2) == 1 && out.is_contiguous() && out.sizes() == query.sizes() &&
              out.scalar_type() == query.scalar_type(), "paged_attention: out and query do not fit");
  TORCH_CHECK(query.size(0) == plan.num_tokens() && query.size(1) == plan.num_heads(), "a plan for another batch");
  TORCH_CHECK(scale > 0, "paged_attention: the scale must be positive, not ", scale);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, query.scalar_type(), "paged_attention", [&] {
    if constexpr (!std::is_same_v<scalar_t, double>) {
      attend(Batch<scalar_t>{
          plan, pages_of<scalar_t>(kv_cache, query.size(2)), query.const_data_ptr<scalar_t>(),
          out.mutable_data_ptr<scalar_t>(), query.stride(0), query.stride(1), block_table.const_data_ptr<int32_t>(),
          block_table.stride(0), static_cast<float>(scale), fetched});
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
      "Tensor block_table, float scale) -> ()",
      [](const Tensor& out, const Tensor& query, const Tensor& kv_cache, const Tensor& query_start_loc,
         const Tensor& seq_lens, const Tensor& block_table, double scale) {
        TORCH_CHECK(query.dim() == 3 && kv_cache.dim() == 4, "paged_attention wants query [tokens, heads, head_size]");
        const folovllm::AttentionPlan plan =
            folovllm::make_plan(query_start_loc, seq_lens, block_table, kv_cache, query.size(1), query.size(2));
        folovllm::paged_attention(out, query, kv_cache, plan, block_table, scale);
      });
}
