// Operations on one row of numbers: RMSNorm, SiLU-mul, rotary embedding and argmax. The operators call them for each of
// their rows.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/{layernorm,activation,pos_encoding}.cpp. Left out: fp16.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "simd.h"

namespace folovllm {
namespace {

// Calls visit(first, count) for each kWidth numbers of a row of `size`. Only the last count can be less than kWidth. The
// compiler sees the count of a full vector as a constant, and so drops the buffers of the partial loads and stores.
template <typename Visit>
inline void for_each_vector(int64_t size, const Visit& visit) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    visit(i, int64_t{kWidth});
  }
  if (i < size) {
    visit(i, size - i);
  }
}

template <typename T>
inline Vec load_some(const T* p, int64_t count) {
  return count == kWidth ? load_vec(p) : load_vec(p, count);
}

template <typename T>
inline void store_some(T* p, Vec v, int64_t count) {
  count == kWidth ? store_vec(p, v) : store_vec(p, v, count);
}

// The numbers of a row in fp32.
template <typename T>
void convert_row(const T* x, float* out, int64_t size) {
  for_each_vector(size, [&](int64_t i, int64_t count) { store_some(out + i, load_some(x + i, count), count); });
}

// norm(x) * weight for one row. With a residual: first residual += x, and then norm(residual) * weight.
template <typename T>
void rms_norm_row(const T* x, T* residual, const T* weight, T* out, int64_t size, float eps) {
  Vec squares[2] = {};  // two sums, so that an addition need not wait for the one before
  for_each_vector(size, [&](int64_t i, int64_t count) {
    Vec v = load_some(x + i, count);
    if (residual != nullptr) {
      v = rounded<T>(v + load_some(residual + i, count));  // the norm of what later layers will read
      store_some(residual + i, v, count);
    }
    squares[i / kWidth % 2] += v * v;
  });
  const float scale = 1.0f / std::sqrt(reduce_add(squares[0] + squares[1]) / static_cast<float>(size) + eps);
  const T* source = residual != nullptr ? residual : x;
  for_each_vector(size, [&](int64_t i, int64_t count) {
    store_some(out + i, load_some(source + i, count) * scale * load_some(weight + i, count), count);
  });
}

// silu(gate) * up for one row.
template <typename T>
void silu_and_mul_row(const T* gate, const T* up, T* out, int64_t size) {
  for_each_vector(size, [&](int64_t i, int64_t count) {
    const Vec g = load_some(gate + i, count);
    store_some(out + i, g / (1.0f + exp(-g)) * load_some(up + i, count), count);
  });
}

// Rotates a head x [2 * half] in place. The first half of the table's sin is negated, so that for both halves of x the
// result is x * cos + (the other half) * sin.
template <typename T>
void rotate_row(T* x, const T* cos, const T* sin, int64_t half) {
  for_each_vector(half, [&](int64_t i, int64_t count) {
    const Vec a = load_some(x + i, count), b = load_some(x + half + i, count);
    store_some(x + i, a * load_some(cos + i, count) + b * load_some(sin + i, count), count);
    store_some(x + half + i, b * load_some(cos + half + i, count) + a * load_some(sin + half + i, count), count);
  });
}

// The place of the largest of `size` numbers, the first among equals. A NaN counts as the largest. The row is passed
// over in runs of 1,024 numbers, of which only the maxima are compared; then only the winning run is searched.
template <typename T>
int64_t first_argmax(const T* row, int64_t size) {
  constexpr int64_t kRun = 1024;
  float best = -std::numeric_limits<float>::infinity();
  int64_t winner = 0;
  for (int64_t first = 0; first < size; first += kRun) {
    const T* run = row + first;
    Vec highest = broadcast(best);
    Words is_nan = {};
    for_each_vector(std::min(kRun, size - first), [&](int64_t i, int64_t count) {
      // A partial vector must be filled up with numbers that do not win. The best so far cannot.
      const Vec v = count == kWidth ? load_vec(run + i) : load_vec(run + i, count, best);
      highest = maximum(v, highest);
      is_nan |= (Words)(v != v);
    });
    for (int lane = 0; lane < kWidth; ++lane) {
      if (is_nan[lane] != 0) {
        return std::find_if(row + first, row + size, [](T x) { return x != x; }) - row;
      }
      if (highest[lane] > best) {
        best = highest[lane];
        winner = first;
      }
    }
  }
  return std::find_if(row + winner, row + size, [best](T x) { return static_cast<float>(x) == best; }) - row;
}

}  // namespace
}  // namespace folovllm
