// Operations on one row of numbers: RMSNorm and rotary embedding. The operators call them for each of their rows.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/{layernorm,pos_encoding}.cpp. Left out: fp16.

#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace folovllm {
namespace {

// Calls visit(first, count) for each 16 numbers of a row of `size`. Only the last count can be less than 16. The
// compiler sees the count of a full vector as a constant, and so drops the buffers of the partial loads and stores.
template <typename Visit>
inline void for_each_vector(int64_t size, const Visit& visit) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    visit(i, kLanes);
  }
  if (i < size) {
    visit(i, size - i);
  }
}

template <typename T>
inline Floats load_some(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load(p, count);
}

template <typename T>
inline void store_some(T* p, Floats v, int64_t count) {
  count == kLanes ? store(p, v) : store(p, v, count);
}

template <typename T>
void rms_norm_row(const T* x, T* residual, const T* weight, T* out, int64_t size, float eps) {
  Floats squares[2] = {};  // two sums, so that an addition need not wait for the one before
  for_each_vector(size, [&](int64_t i, int64_t count) {
    Floats v = load_some(x + i, count);
    if (residual != nullptr) {
      v = rounded<T>(v + load_some(residual + i, count));  // the norm of what later layers will read
      store_some(residual + i, v, count);
    }
    squares[i / kLanes % 2] += v * v;
  });
  const float scale = 1.0f / std::sqrt(sum(squares[0] + squares[1]) / static_cast<float>(size) + eps);
  const T* source = residual != nullptr ? residual : x;
  for_each_vector(size, [&](int64_t i, int64_t count) {
    store_some(out + i, load_some(source + i, count) * scale * load_some(weight + i, count), count);
  });
}

// Checks a table of cos or sin [tokens, 1, head_size] for rotating x [tokens, heads, head_size].
inline void check_table(const at::Tensor& table, const at::Tensor& x) {
  TORCH_CHECK(table.size(0) == x.size(0) && table.numel() == x.size(0) * x.size(2) && table.stride(-1) == 1 &&
              table.scalar_type() == x.scalar_type(), "cos and sin must be [tokens, 1, head_size]");
}

// Rotates a head x [2 * half] in place. The first half of the table's sin is negated, so that for both halves of x the
// result is x * cos + (the other half) * sin.
template <typename T>
void rotate_row(T* x, const T* cos, const T* sin, int64_t half) {
  for_each_vector(half, [&](int64_t i, int64_t count) {
    const Floats a = load_some(x + i, count), b = load_some(x + half + i, count);
    store_some(x + i, a * load_some(cos + i, count) + b * load_some(sin + i, count), count);
    store_some(x + half + i, b * load_some(cos + half + i, count) + a * load_some(sin + half + i, count), count);
  });
}

// Calls body(T{}) with T = float or BFloat16.
template <typename Body>
void dispatch_float_or_bf16(at::ScalarType type, const char* name, const Body& body) {
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, name, " knows float32 and bfloat16, not ", type);
  type == at::kFloat ? body(float{}) : body(at::BFloat16{});
}

} // namespace
} // namespace folovllm
