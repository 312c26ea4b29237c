// Online softmax: the weights of one tile's keys, and the correction of what earlier tiles have added up.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_attn_vec.hpp (after v0.11.0). Source: Milakov & Gimelshein 2018.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention_rows.h"

namespace folovllm {
namespace {

// 2^x for x <= 0, with an error of at most 1e-4 of it: a bf16 number has 4e-3. 2^0 is 1.
inline Vec exp2_coarse(Vec x) {
#if FOLOVLLM_AVX512
  const Vec r = (Vec)_mm512_reduce_ps((__m512)x, 8 + _MM_FROUND_TO_NEG_INF);  // x - floor(x); of -inf it is 0
  const Vec y = ((r * 0.0770670548f + 0.227644980f) * r + 0.695116818f) * r + 1.0f;
  return (Vec)_mm512_scalef_ps((__m512)y, (__m512)x);  // y * 2^floor(x)
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const Vec shifted = x + magic;
  const Vec r = x - (shifted - magic);
  const Vec y = ((r * 0.0550089329f + 0.242210969f) * r + 0.693282902f) * r + 1.0f;
  const Vec result = (Vec)((Words)y + ((Words)shifted << 23));
  return x < -126.0f ? Vec{} : result;  // it would not be a normal number
#endif
}

// exp(scale * (score - max)). The weights of bf16 values need not be more exact than these.
template <typename T>
inline Vec weight_of(Vec score, float max, float scale) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const float factor = scale * 1.44269504f;  // log2(e)
    return exp2_coarse(score * factor - max * factor);
  } else {
    const Vec x = (score - max) * scale;
    return std::is_same_v<T, float> ? exp(x) : exp_fast(x);
  }
}

// Sets scores or weights from `valid` to `count` to a value.
inline void fill_rest(float* row, int64_t valid, int64_t count, float value) {
  std::fill(row + std::min(valid, count), row + count, value);
}

// Turns `count` scores of one row, of which `valid` are of keys that the row may see, into weights, 0 for the others.
// `max` is the largest score so far, and not -inf. Returns their sum.
template <typename T>
Vec weigh(float* scores, int64_t count, int64_t valid, float max, float scale) {
  Vec added = {};
  for (int64_t j = 0; j < count; j += kWidth) {
    const Vec weight = weight_of<T>(load_vec(scores + j), max, scale);
    added = added + weight;
    if constexpr (kDotPairs<T>) {  // rounded, into the first half of their memory
      store_vec(reinterpret_cast<c10::BFloat16*>(scores) + j, weight);
    } else {
      store_vec(scores + j, weight);
    }
  }
  return added;
}

// Turns the `count` scores of R rows into weights: exp(scale * (score - max)) for the row's first `valid` keys, 0 for the
// others. Updates the rows' `max` and `total`, the latter lane by lane. The sums so far must be multiplied by `rescale`,
// because the maximum may have grown.
template <typename T, int R>
void softmax_rows(float* scores, int64_t count, const int64_t* valid, float scale, float* max, Vec* total,
                  float* rescale) {
  Vec highest[R];
  for (int r = 0; r < R; ++r) {
    // Set and not added: an unwritten slot may hold NaN, and NaN - inf is NaN.
    fill_rest(scores + r * kTileKeys, valid[r], count, kMinusInf);
    highest[r] = broadcast(max[r]);
  }
  for (int64_t j = 0; j < count; j += kWidth) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      highest[r] = maximum(load_vec(scores + r * kTileKeys + j), highest[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float before = max[r];
    max[r] = reduce_max(highest[r]);
    // Most rows have seen their maximum early. A call of exp for each row would cost as much as the row.
    rescale[r] = before == max[r] ? 1.0f : std::exp(scale * (before - max[r]));
  }
  for (int r = 0; r < R; ++r) {
    // A row that has seen no key yet has no maximum: -inf - -inf would be NaN.
    const float shift = max[r] == kMinusInf ? 0.0f : max[r];
    total[r] = total[r] * rescale[r] + weigh<T>(scores + r * kTileKeys, count, valid[r], shift, scale);
  }
}

}  // namespace
}  // namespace folovllm
