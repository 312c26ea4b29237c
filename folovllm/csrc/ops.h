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
                         int64_t out_features, bool native = true, const UpcomingReads& upcoming = {});
at::Tensor linear_silu_packed(const at::Tensor& x, const at::Tensor& packed, int64_t out_features, bool native = true,
                              const UpcomingReads& upcoming = {});

struct Int4Weight {
  const at::Tensor &levels, &scales, &zeros, &perm, &bias;
};

at::Tensor linear_int4(const at::Tensor& x, const Int4Weight& weight, int64_t out_features, bool gated, PrefetchQueue* queue);
at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight, double eps);
void prepare_qkv(const at::Tensor& qkv, const at::Tensor& query_norm, const at::Tensor& key_norm, double eps,
                 const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& kv_cache, const at::Tensor& slots,
                 const AttentionPlan& plan);
void paged_attention(const at::Tensor& out, const at::Tensor& query, const at::Tensor& kv_cache, const AttentionPlan& plan,
                     const at::Tensor& block_table, double scale, bool native = true, bool fetched = false);

}  // namespace folovllm
