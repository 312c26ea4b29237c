// The last step of sampling: the draw of one token from a row of probabilities.
//
// Milestone: M4. vLLM counterpart: random_sample (vllm/v1/sample/ops/topk_topp_sampler.py), as passes over one row.
//
// Every token has a random number q, and the token with the largest p / q wins. A token then wins with its probability.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "sampling_row.h"

namespace folovllm {
namespace {

constexpr int64_t kUndecided = -1;     // the answer for a row whose token rounding would decide
constexpr double kRaceMargin = 3e-6;   // relative; torch's log1p and divisions are each off by less than 2^-21

inline Words xor_shift(Words v, int shift) {
  return v ^ (v >> shift);
}

// The hash and the uniform number v of ops/noise.py, with the same bits. The noise is q = -log1p(-v).
inline Vec uniform(Words token_ids, uint64_t key) {
  Words h = token_ids + static_cast<uint32_t>(key);
  h = xor_shift(h, 17) * 0xed5ad4bbu;
  h = xor_shift(h, 11) + static_cast<uint32_t>(key >> 32);
  h = xor_shift(h * 0xac4c1b51u, 15) * 0x31848babu;
  h = xor_shift(h, 14) & 0x7fffffffu;
  const Vec v = (__builtin_convertvector((IntVec)h, Vec) + 0.5f) * 0x1p-31f;
  constexpr float below_one = 1.0f - 0x1p-24f;
  return v > below_one ? broadcast(below_one) : v;
}

// The token with the largest p / q. Because q >= v, a token whose p / v is below the best so far cannot win, which
// saves nearly all logarithms. Returns kUndecided if the second is too close.
int64_t draw(const Row& row, uint64_t key) {
  double best = 0.0, second = 0.0;
  int64_t winner = kUndecided;
  for (int64_t i = 0; i < row.padded; i += kWidth) {
    const Vec p = load_vec(row.p + i);
    if (!any(p > 0.0f)) {
      continue;
    }
    const Vec v = uniform((Words)lane_ids() + static_cast<uint32_t>(i), key);
    const IntVec may_win = p / v >= static_cast<float>(best * (1.0 - 2 * kRaceMargin));
    for (int64_t lane = 0; any(may_win) && lane < kWidth; ++lane) {
      const double ratio = may_win[lane] == 0 ? 0.0 : -p[lane] / std::log1p(-static_cast<double>(v[lane]));
      if (ratio > best) {
        second = best;
        best = ratio;
        winner = i + lane;
      } else {
        second = std::max(second, ratio);
      }
    }
  }
  return second < best * (1.0 - kRaceMargin) ? winner : kUndecided;
}

}  // namespace
}  // namespace folovllm
