// Sums of values: the weights of the softmax times the values of a tile.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_attn_vec.hpp (after v0.11.0).
//
// V is stored as it comes, so a vector holds numbers of one token's value, and each lane adds up its own number of the
// output. R rows are computed at once, so that each vector of V is loaded once for R rows.

#pragma once

#include <algorithm>
#include <cstring>

#include "attention_plan.h"
#include "attention_vectors.h"
#include "prefetch.h"

namespace folovllm {
namespace {

// sum[r] = sum[r] * rescale[r] + weights[r] . values, for V vectors of the head from number d on.
//
//   weights [R, kTileKeys]    value [groups of the tile], each [16 tokens][head_size]    sums [R, padded head_size]
template <typename T, int R, int V>
FOLOVLLM_ALONE void add_values(const float* weights, const T* const* value, ValuePrefetcher<T> prefetcher, int64_t count,
                               int64_t d, const float* rescale, float* sums, int64_t head_size) {
  const int64_t width = padded(head_size);
  Vec sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sum[r][v] = Vec::loadu(sums + r * width + d + v * kWidth) * Vec(rescale[r]);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    const int64_t place = j % kKeysPerGroup * head_size + d;
    const T* values = value[j / kKeysPerGroup] + place;
    Vec x[V];
    prefetcher.fetch(j / kKeysPerGroup, place, V * kWidth);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      x[v] = load_vec(values + v * kWidth);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec weight(weights[r * kTileKeys + j]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sum[r][v] = at::vec::fmadd(x[v], weight, sum[r][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sum[r][v].store(sums + r * width + d + v * kWidth);
    }
  }
}

#if FOLOVLLM_BF16_DOT
// The same with bf16 dot products, two keys at a time, for the 32 * V numbers of the head from number d on. `weights`
// are pairs of bf16. The unpack instruction, which brings the numbers of two keys into one 32-bit lane, takes 4 numbers
// from every 8. The sums therefore stand in another order, the same for all tiles, and `restore_order` sorts them at
// the end.
//
//   key j    a0 a1 .. a31        sums  0-15: a0 b0 | a1 b1 | a2 b2 | a3 b3 | a8 b8 | ...     numbers 0-3, 8-11, ...
//   key j+1  b0 b1 .. b31        sums 16-31: a4 b4 | a5 b5 | ...                             numbers 4-7, 12-15, ...
template <int R, int V>
FOLOVLLM_ALONE void add_value_pairs(const float* weights, const at::BFloat16* const* value,
                                    ValuePrefetcher<at::BFloat16> prefetcher, int64_t count, int64_t d,
                                    const float* rescale, float* sums, int64_t head_size) {
  const int64_t width = padded(head_size);
  const __mmask32 inside = head_size - d >= 32 ? ~0u : 0xffffu;  // a head of 80 ends with half a vector
  __m512 sum[R][2 * V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 2 * V; ++v) {
      sum[r][v] = _mm512_mul_ps(_mm512_loadu_ps(sums + r * width + d + v * 16), _mm512_set1_ps(rescale[r]));
    }
  }
  for (int64_t first = 0; first < count; first += kKeysPerGroup) {
    const at::BFloat16* values = value[first / kKeysPerGroup] + d;
    const ValuePrefetcher<at::BFloat16>::Lines lines(prefetcher, first / kKeysPerGroup, d);
    const int64_t end = std::min(kKeysPerGroup, count - first);
    for (int64_t j = 0; j < end; j += 2, values += 2 * head_size) {
      __m512 pair[2 * V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const __m512i a = _mm512_maskz_loadu_epi16(inside, values + v * 32);
        const __m512i b = j + 1 < end ? _mm512_maskz_loadu_epi16(inside, values + head_size + v * 32)
                                      : _mm512_setzero_si512();  // beyond the keys that the rows may see: perhaps NaN
        pair[2 * v] = (__m512)_mm512_unpacklo_epi16(a, b);
        pair[2 * v + 1] = (__m512)_mm512_unpackhi_epi16(a, b);
        lines.fetch(j * head_size + v * 32, (j + 1) * head_size + v * 32);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512bh weight = (__m512bh)_mm512_set1_ps(weights[r * kTileKeys + (first + j) / 2]);
#pragma GCC unroll 4
        for (int v = 0; v < 2 * V; ++v) {
          sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)pair[v], weight);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 2 * V; ++v) {
      _mm512_storeu_ps(sums + r * width + d + v * 16, sum[r][v]);
    }
  }
}

// Rounds fp32 weights to bf16, into the first half of their memory.
void round_weights(float* weights, int64_t count) {
  for (int64_t j = 0; j < count; j += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(weights + j));
    std::memcpy(weights + j / 2, &rounded, sizeof(rounded));
  }
}

// Undoes the order of `add_value_pairs`, 32 sums at a time.
void restore_order(float* sums, int64_t width) {
  for (int64_t d = 0; d < width; d += 32) {
    const __m512 a = _mm512_loadu_ps(sums + d), b = _mm512_loadu_ps(sums + d + 16);
    // Number i is sum i / 4 % 2 * 16 + i / 8 * 4 + i % 4. The sums from 16 on are those of b.
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    _mm512_storeu_ps(sums + d, _mm512_permutex2var_ps(a, low, b));
    _mm512_storeu_ps(sums + d + 16, _mm512_permutex2var_ps(a, high, b));
  }
}
#endif

// Adds the values of a tile to the sums of R rows, with bf16 dot products if the CPU and the type allow it.
template <typename T, bool kDot, int R>
void add_tile(float* weights, const T* const* value, ValuePrefetcher<T> prefetcher, int64_t count, const float* rescale,
              float* sums, int64_t head_size) {
  int64_t d = 0;
#if FOLOVLLM_BF16_DOT
  if constexpr (kDot) {
    for (int r = 0; r < R; ++r) {
      round_weights(weights + r * kTileKeys, count);
    }
    for (; d + 64 <= head_size; d += 64) {
      add_value_pairs<R, 2>(weights, value, prefetcher, count, d, rescale, sums, head_size);
    }
    for (; d < head_size; d += 32) {
      add_value_pairs<R, 1>(weights, value, prefetcher, count, d, rescale, sums, head_size);
    }
    return;
  }
#endif
  for (; d + 4 * kWidth <= head_size; d += 4 * kWidth) {
    add_values<T, R, 4>(weights, value, prefetcher, count, d, rescale, sums, head_size);
  }
  for (; d < head_size; d += kWidth) {
    add_values<T, R, 1>(weights, value, prefetcher, count, d, rescale, sums, head_size);
  }
}

}  // namespace
}  // namespace folovllm
