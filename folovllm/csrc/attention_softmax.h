// Online softmax: the weights of one tile's keys, and the correction of what earlier tiles have added up.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_attn_vec.hpp (after v0.11.0). Source: Milakov & Gimelshein 2018.

#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attention_vectors.h"

namespace folovllm {
namespace {

// The larger of two scores, in one instruction. at::vec::maximum takes four, so that a NaN wins. Here only an unwritten
// slot can hold a NaN, and its score is masked before.
inline Vec larger(const Vec& a, const Vec& b) {
  return at::vec::clamp_min(a, b);
}

// Turns `count` scores of one row into weights: exp(score - max) for keys below `valid`, 0 for the others. Updates the
// row's `max` and `total`. The sums so far must be multiplied by `rescale`, because the maximum may have grown.
template <typename T>
void softmax_row(float* scores, int64_t count, int64_t valid, float& max, float& total, float& rescale) {
  Vec highest(max);
  for (int64_t j = 0; j < count; j += kWidth) {
    Vec x = Vec::loadu(scores + j);
    if (j + kWidth > valid) {  // set and not added: an unwritten slot may hold NaN, and NaN - inf is NaN
      x = Vec::set(Vec(kMinusInf), x, std::max<int64_t>(0, valid - j));
      x.store(scores + j);
    }
    highest = larger(highest, x);
  }
  const float new_max = at::vec::vec_reduce_all<float>(larger, highest);
  if (new_max == kMinusInf) {  // this row has seen no key yet: -inf - -inf would be NaN
    std::fill(scores, scores + count, 0.0f);
    rescale = 1.0f;
    return;
  }
  Vec added(0.0f);
  for (int64_t j = 0; j < count; j += kWidth) {
    const Vec x = Vec::loadu(scores + j) - Vec(new_max);
    const Vec weight = std::is_same_v<T, float> ? x.exp() : x.exp_u20();
    weight.store(scores + j);
    added = added + weight;
  }
  // Most rows have seen their maximum early. A call of exp for each row would cost as much as the row.
  rescale = max == new_max ? 1.0f : max == kMinusInf ? 0.0f : std::exp(max - new_max);
  total = total * rescale + at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, added);
  max = new_max;
}

}  // namespace
}  // namespace folovllm
