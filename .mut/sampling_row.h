// A row of logits and probabilities, and the passes over it that several steps of sampling need.
//
// Milestone: M4. vLLM counterpart: none.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "simd.h"

namespace folovllm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

using IntVec = VectorOf<int32_t, kWidth>::type;  // also the result of a comparison: -1 in lanes where it is true

inline IntVec lane_ids() {
  constexpr int32_t ids[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  IntVec lanes;
  std::memcpy(&lanes, ids, sizeof(lanes));
  return lanes;
}

// The memory for one row. It is padded to whole vectors. The padding has logit -inf and probability 0, like
// a removed token, so no step needs to treat it differently.
struct Row {
  int64_t size, padded;
  at::Tensor logits, probs; // [padded] fp32
  float *x, *p;             // their numbers

  explicit Row(int64_t size)
      : size(size),
        padded((size + kWidth - 1) / kWidth * kWidth),
        logits(at::empty({padded}, at::kFloat)),
        probs(at::empty({padded}, at::kFloat)),
        x(logits.mutable_data_ptr<float>()),
        p(probs.mutable_data_ptr<float>()) {
    std::fill(x + size, x + padded, -kInfinity);
    std::fill(p, p + padded, 0.0f);
  }

  // The same kernel, and so the same bits, as `logits.softmax(-1)`.
  void softmax() {
    at::Tensor out = probs.narrow(0, 0, size).unsqueeze(0); // [1, size]
    at::_softmax_out(out, logits.narrow(0, 0, size).unsqueeze(0), -1, false);
  }

  template <typename Keep>
  void keep_where(const Keep& keep) {
    for (int64_t i = 0; i < padded; i += kWidth) {
      const Vec v = load_vec(x + i), q = load_vec(p + i);
      const IntVec kept = keep(i, v, q);
      store_vec(x + i, kept ? v : broadcast(-kInfinity));
      store_vec(p + i, kept ? q : Vec{});
    }
  }
};

inline bool any(IntVec mask) {
#if FOLOVLLM_AVX512
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif FOLOVLLM_AVX2
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int64_t halves[2];
  std::memcpy(halves, &mask, sizeof(mask));
  return (halves[0] | halves[1]) != 0;
#endif
}

inline int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float largest(const float* values, int64_t padded) {
  Vec highest = load_vec(values);
  for (int64_t i = kWidth; i < padded; i += kWidth) {
    highest = maximum(load_vec(values + i), highest);
  }
  return reduce_max(highest);
}

// x = logits / temperature. Returns whether the row has probabilities: there are none with a NaN or an infinite logit.
bool fill_row(const float* logits, float temperature, Row& row) {
  const int64_t whole = row.size / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) {
    store_vec(row.x + i, load_vec(logits + i) / temperature);
  }
  for (int64_t i = whole; i < row.size; ++i) {
    row.x[i] = logits[i] / temperature;
  }
  IntVec not_finite = {};
  for (int64_t i = 0; i < row.padded; i += kWidth) {
    not_finite |= ~(load_vec(row.x + i) < kInfinity);
  }
  return !any(not_finite) && largest(row.x, row.padded) > -kInfinity;
}

}  // namespace
}  // namespace folovllm
