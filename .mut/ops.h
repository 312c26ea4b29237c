// The operators as C++ functions, for decoder_stack.cpp, which calls them one after another. Each is documented in its own
// file.
//
// Milestone: M4. vLLM counterpart: csrc/ops.h.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "attention_plan.h"
#include "prefetch.h"

namespace folovllm {

at::Tensor linear_packed(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                         int64_t out_features, const UpcomingReads& upcoming = {});
at::Tensor linear_silu_packed(const at::Tensor& x, const at::Tensor& packed, int64_t out_features,
                              const UpcomingReads& upcoming = {});

struct Int4Weight {
  const at::Tensor &levels, &scales, &zeros, &perm, &bias;
};

at::Tensor linear_int4(const at::Tensor& x, const Int4Weight& weight, int64_t out_features, bool gated, PrefetchQueue* queue);
at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight, double eps);
void prepare_qkv(const at::Tensor& qkv, const at::Tensor& query_norm, const at::Tensor& key_norm, double eps,
                 const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& kv_cache, const at::Tensor& slots,
                 const AttentionPlan& plan);
// The plan of a step's attention for `num_heads` query heads of `head_size`. The tensors are AttentionMetadata's, which must
// outlive the plan.
AttentionPlan make_plan(const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& block_table,
                        const at::Tensor& kv_cache, int64_t num_heads, int64_t head_size);

// Causal attention of query [num_tokens, num_heads, head_size] over the pages, into `out` of the same shape. `fetched`
// says that K and V are in cache (PrefetchQueue).
void paged_attention(const at::Tensor& out, const at::Tensor& query, const at::Tensor& kv_cache, const AttentionPlan& plan,
                     const at::Tensor& block_table, double scale, bool fetched = false);

// The pages of a KV cache, after a check of its shape.
template <typename T>
Pages<T> pages_of(const at::Tensor& kv_cache, int64_t head_size) {
  TORCH_CHECK(kv_cache.dim() == 4 && kv_cache.size(2) == 2 && kv_cache.is_contiguous(),
              "kv_cache must be a contiguous [num_blocks, num_kv_heads, 2, block_size * head_size]");
  TORCH_CHECK(head_size % 16 == 0 && head_size <= kMaxHeadSize && kv_cache.size(3) % head_size == 0,
              "head_size must be a multiple of 16 up to ", kMaxHeadSize, " that divides a page, not ", head_size);
  return {kv_cache.mutable_data_ptr<T>(), kv_cache.size(0), kv_cache.size(1), kv_cache.size(3) / head_size, head_size};
}

}  // namespace folovllm
