// What several operators ask of their tensors.
//
// Milestone: M4. vLLM counterpart: the macros of csrc/dispatch_utils.h. The kernels' own headers know no tensors, only
// pointers and sizes.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace folovllm {
namespace {

// Checks a table of cos or sin [tokens, 1, head_size] for rotating x [tokens, heads, head_size].
inline void check_table(const at::Tensor& table, const at::Tensor& x) {
  TORCH_CHECK(table.size(0) == x.size(0) && table.numel() == x.size(0) * x.size(2) && table.stride(-1) == 1 &&
              table.scalar_type() == x.scalar_type(), "cos and sin must be [tokens, 1, head_size]");
}

// Calls body(T{}) with T = float or BFloat16.
template <typename Body>
void dispatch_float_or_bf16(at::ScalarType type, const char* name, const Body& body) {
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, name, " knows float32 and bfloat16, not ", type);
  type == at::kFloat ? body(float{}) : body(at::BFloat16{});
}

}  // namespace
}  // namespace folovllm
