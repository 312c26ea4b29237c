// The arithmetic of attention on one tile: scores, online softmax, weighted sums of values.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_attn_vec.hpp. Portable through at::vec, which picks its vectors by
// macro; with AVX-512 bf16 dot products where the CPU has them.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#endif

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "attention_plan.h"
#include "pages.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
#define FOLOVLLM_BF16_DOT 1
#else
#define FOLOVLLM_BF16_DOT 0
#endif

namespace folovllm {
namespace {

// A function by itself: inlined next to others, GCC would run out of registers and keep their sums in memory.
#define FOLOVLLM_ALONE __attribute__((noinline))

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kWidth = Vec::size();  // 16 with AVX-512, 8 with AVX2
constexpr int64_t kRegRows = 4;          // rows at once: 4 x 4 sums, 4 operands and a broadcast fit 32 registers
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// ---- The two products. R rows at once, so that each vector of K or V is loaded once for R rows.

// sum + k * q in every lane; with kDot a word holds two bf16, whose products are both added.
template <bool kDot>
inline Vec dot(Vec sum, Vec k, float q) {
#if FOLOVLLM_BF16_DOT
  if constexpr (kDot) {
    return _mm512_dpbf16_ps(sum, (__m512bh)(__m512)k, (__m512bh)_mm512_set1_ps(q));
  }
#endif
  return at::vec::fmadd(k, Vec(q), sum);
}

// Keep a vector in its register. GCC would otherwise load it from memory again for every row, and loads are scarcer than
// products.
inline void keep(Vec& v) {
#if FOLOVLLM_BF16_DOT
  __m512 kept = v;
  asm("" : "+v"(kept));
  v = kept;
#endif
}

// scores[r][j] = scale * q[r] . k[j] for the keys of V vectors, from key `first` of a tile on. Line by line it asks for
// `next`, the keys of the tile that comes after, and for `values` of this one; either may be null (Ahead in pages.h).
template <typename T, bool kDot, int R, int V>
FOLOVLLM_ALONE void score_vectors(const float* query, int64_t words, const float* const* group,
                                  const float* const* next, const T* const* values, float scale, int64_t first,
                                  float* scores) {
  const float* column[V];
  const float* ahead[V];
  const T* beside[V];
  Vec sum[R][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int64_t key = first + v * kWidth;
    column[v] = group[key / kGroup] + key % kGroup;
    ahead[v] = next != nullptr ? next[key / kGroup] : nullptr;
    beside[v] = values != nullptr ? values[key / kGroup] : nullptr;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      sum[r][v] = Vec(0.0f);
    }
  }
  for (int64_t p = 0; p < words; ++p) {
    Vec k[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      k[v] = Vec::loadu(column[v] + p * kGroup);
      keep(k[v]);
      if (next != nullptr) {
        prefetch(ahead[v] + p * kGroup);
      }
      if (values != nullptr) {
        prefetch(beside[v] + p * kPerLine<T>);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float q = query[r * words + p];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sum[r][v] = dot<kDot>(sum[r][v], k[v], q);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      (sum[r][v] * Vec(scale)).store(scores + r * kTile + first + v * kWidth);
    }
  }
}

// The first `count` keys of a tile, a multiple of 16.
template <typename T, bool kDot, int R>
void score(const float* query, int64_t words, const float* const* group, const float* const* next,
           const T* const* values, float scale, int64_t count, float* scores) {
  for (int64_t first = 0; first < count; first += 4 * kWidth) {
    switch (std::min<int64_t>(4, (count - first) / kWidth)) {
      case 1: score_vectors<T, kDot, R, 1>(query, words, group, next, values, scale, first, scores); break;
      case 2: score_vectors<T, kDot, R, 2>(query, words, group, next, values, scale, first, scores); break;
      case 3: score_vectors<T, kDot, R, 3>(query, words, group, next, values, scale, first, scores); break;
      default: score_vectors<T, kDot, R, 4>(query, words, group, next, values, scale, first, scores);
    }
  }
}

template <typename T>
inline Vec load_vec(const T* data) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(data);
  } else {
    Vec out;
    at::vec::load_to_float<T>(data, out);
    return out;
  }
}

template <typename T>
inline void store_vec(T* data, const Vec& v) {
  if constexpr (std::is_same_v<T, float>) {
    v.store(data);
  } else {
    at::vec::convert_from_float<T>(v, Vec(0.0f)).store(data, kWidth);
  }
}

// sum[r] = sum[r] * rescale[r] + weights[r] . values, for V vectors of the head from number d on. `next` are the next
// tile's values, `keys` its keys; both as in `score`.
template <typename T, int R, int V>
FOLOVLLM_ALONE void add_values(const float* weights, const T* const* value, const T* const* next,
                               const float* const* keys, int64_t count, int64_t d, const float* rescale, float* sums,
                               int64_t head_size) {
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
    const int64_t place = j % kGroup * head_size + d;
    const T* values = value[j / kGroup] + place;
    Vec x[V];
    for (int64_t i = 0; i < V * kWidth; i += kPerLine<T>) {
      if (next != nullptr) {
        prefetch(next[j / kGroup] + place + i);
      }
      if (keys != nullptr) {
        prefetch(reinterpret_cast<const T*>(keys[j / kGroup]) + place + i);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      x[v] = load_vec(values + v * kWidth);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec weight(weights[r * kTile + j]);
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
// are pairs of bf16. To pair the numbers of two keys in one 32-bit lane, unpack takes 4 numbers from every 8, so that
// the sums stand in another order, the same for all tiles; `in_order` puts them right at the end.
//
//   key j    a0 a1 .. a31        sums  0-15: a0 b0 | a1 b1 | a2 b2 | a3 b3 | a8 b8 | ...     numbers 0-3, 8-11, ...
//   key j+1  b0 b1 .. b31        sums 16-31: a4 b4 | a5 b5 | ...                             numbers 4-7, 12-15, ...
template <int R, int V>
FOLOVLLM_ALONE void add_value_pairs(const float* weights, const at::BFloat16* const* value,
                                    const at::BFloat16* const* next, const float* const* keys, int64_t count,
                                    int64_t d, const float* rescale, float* sums, int64_t head_size) {
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
  for (int64_t first = 0; first < count; first += kGroup) {
    const at::BFloat16* values = value[first / kGroup] + d;
    const at::BFloat16* ahead = next != nullptr ? next[first / kGroup] + d : nullptr;
    const auto* beside = keys != nullptr ? reinterpret_cast<const at::BFloat16*>(keys[first / kGroup]) + d : nullptr;
    const int64_t end = std::min(kGroup, count - first);
    for (int64_t j = 0; j < end; j += 2, values += 2 * head_size) {
      __m512 pair[2 * V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const __m512i a = _mm512_maskz_loadu_epi16(inside, values + v * 32);
        const __m512i b = j + 1 < end ? _mm512_maskz_loadu_epi16(inside, values + head_size + v * 32)
                                      : _mm512_setzero_si512();  // not ours to read: it may be NaN
        pair[2 * v] = (__m512)_mm512_unpacklo_epi16(a, b);
        pair[2 * v + 1] = (__m512)_mm512_unpackhi_epi16(a, b);
        if (next != nullptr) {
          prefetch(ahead + j * head_size + v * 32);
          prefetch(ahead + (j + 1) * head_size + v * 32);
        }
        if (keys != nullptr) {
          prefetch(beside + j * head_size + v * 32);
          prefetch(beside + (j + 1) * head_size + v * 32);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512bh weight = (__m512bh)_mm512_set1_ps(weights[r * kTile + (first + j) / 2]);
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

// fp32 weights -> bf16 in the first half of their memory.
void round_weights(float* weights, int64_t count) {
  for (int64_t j = 0; j < count; j += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(weights + j));
    std::memcpy(weights + j / 2, &rounded, sizeof(rounded));
  }
}

// Undo the order of `add_value_pairs`, 32 sums at a time.
void in_order(float* sums, int64_t width) {
  for (int64_t d = 0; d < width; d += 32) {
    const __m512 a = _mm512_loadu_ps(sums + d), b = _mm512_loadu_ps(sums + d + 16);
    // Number i is sum i / 4 % 2 * 16 + i / 8 * 4 + i % 4; from 16 on those of b.
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    _mm512_storeu_ps(sums + d, _mm512_permutex2var_ps(a, low, b));
    _mm512_storeu_ps(sums + d + 16, _mm512_permutex2var_ps(a, high, b));
  }
}
#endif

// Add the values of a tile to the sums of R rows, in whatever way this CPU and this type allow.
template <typename T, bool kDot, int R>
void add_tile(float* weights, const T* const* value, const T* const* next, const float* const* keys, int64_t count,
              const float* rescale, float* sums, int64_t head_size) {
  int64_t d = 0;
#if FOLOVLLM_BF16_DOT
  if constexpr (kDot) {
    for (int r = 0; r < R; ++r) {
      round_weights(weights + r * kTile, count);
    }
    for (; d + 64 <= head_size; d += 64) {
      add_value_pairs<R, 2>(weights, value, next, keys, count, d, rescale, sums, head_size);
    }
    for (; d < head_size; d += 32) {
      add_value_pairs<R, 1>(weights, value, next, keys, count, d, rescale, sums, head_size);
    }
    return;
  }
#endif
  for (; d + 4 * kWidth <= head_size; d += 4 * kWidth) {
    add_values<T, R, 4>(weights, value, next, keys, count, d, rescale, sums, head_size);
  }
  for (; d < head_size; d += kWidth) {
    add_values<T, R, 1>(weights, value, next, keys, count, d, rescale, sums, head_size);
  }
}

// Call f with 4, 4, ..., and the rest: the number of rows as a constant of the compiler's, and the first row.
template <typename F>
void in_row_blocks(int64_t rows, const F& f) {
  for (int64_t r = 0; r < rows; r += kRegRows) {
    switch (rows - r) {
      case 1: f(std::integral_constant<int, 1>(), r); break;
      case 2: f(std::integral_constant<int, 2>(), r); break;
      case 3: f(std::integral_constant<int, 3>(), r); break;
      default: f(std::integral_constant<int, 4>(), r);
    }
  }
}

// ---- Online softmax

// The larger of two scores: one instruction, where at::vec::maximum takes four to let a NaN win. Only slots that nobody
// has written may hold one, and those are masked before.
inline Vec larger(const Vec& a, const Vec& b) {
  return at::vec::clamp_min(a, b);
}

// `count` scores of one row -> weights exp(score - max), for keys below `valid`; 0 for the others. Updates max and total, and
// says by how much the sums so far must shrink because the maximum grew.
template <typename T>
void softmax_row(float* scores, int64_t count, int64_t valid, float& max, float& total, float& rescale) {
  Vec highest(max);
  for (int64_t j = 0; j < count; j += kWidth) {
    Vec x = Vec::loadu(scores + j);
    if (j + kWidth > valid) {  // not by adding -inf: what lies in a slot that nobody has written may be NaN
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
  // A call of exp per row would cost as much as the row; most rows have seen their maximum early.
  rescale = max == new_max ? 1.0f : max == kMinusInf ? 0.0f : std::exp(max - new_max);
  total = total * rescale + at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, added);
  max = new_max;
}

}  // namespace
}  // namespace folovllm
