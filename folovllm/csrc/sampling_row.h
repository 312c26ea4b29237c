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

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace folovllm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr Ints kLaneIds = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The memory for one row. It is padded to a multiple of 16 numbers. The padding has logit -inf and probability 0, like
// a removed token, so no step needs to treat it differently.
struct Row {
  int64_t size, padded;
  at::Tensor logits, probs; // [padded] fp32
  float *x, *p;             // their numbers

  explicit Row(int64_t size)
      : size(size),
        padded((size + kLanes - 1) / kLanes * kLanes),
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
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Floats v = load(x + i), q = load(p + i);
      const Ints kept = keep(i, v, q);
      store(x + i, kept ? v : Floats{} - kInfinity);
      store(p + i, kept ? q : Floats{});
    }
  }
};

inline bool any(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int64_t parts[8], all = 0;
  std::memcpy(parts, &mask, sizeof(mask));
  for (const int64_t part : parts) {
    all |= part;
  }
  return all != 0;
#endif
}

inline int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float largest(Floats v) {
  float best = v[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    best = std::max(best, v[lane]);
  }
  return best;
}

float largest(const float* values, int64_t padded) {
  Floats highest = load(values);
  for (int64_t i = kLanes; i < padded; i += kLanes) {
    const Floats v = load(values + i);
    highest = v > highest ? v : highest;
  }
  return largest(highest);
}

// x = logits / temperature. Returns whether the row has probabilities: there are none with a NaN or an infinite logit.
bool fill_row(const float* logits, float temperature, Row& row) {
  const int64_t whole = row.size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    store(row.x + i, load(logits + i) / temperature);
  }
  for (int64_t i = whole; i < row.size; ++i) {
    row.x[i] = logits[i] / temperature;
  }
  Ints not_finite = {};
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    not_finite |= ~(load(row.x + i) < kInfinity);
  }
  return !any(not_finite) && largest(row.x, row.padded) > -kInfinity;
}

}  // namespace
}  // namespace folovllm
