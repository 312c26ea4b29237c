// Sums of values: the weights of the softmax times the values of a tile.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_attn_vec.hpp (after v0.11.0).
//
// V is stored as it comes, so a vector holds numbers of one token's value, and each lane adds up its own number of the
// output. R rows are computed at once, so that each vector of V is loaded once for R rows.
//
// fp32 and fp16 numbers are loaded one per lane. bf16 numbers are loaded in words of two. Where the CPU has no product
// of pairs, a word is split into its even and its odd number. Where it has one, the words of two keys a and b are
// rearranged into pairs of the same number:
//
//   key j      a0 a1 | a2 a3 | a4 a5 | ...       even: a0 b0 | a2 b2 | a4 b4 | ...
//   key j + 1  b0 b1 | b2 b3 | b4 b5 | ...       odd:  a1 b1 | a3 b3 | a5 b5 | ...
//
// In both cases a vector of sums belongs to the even numbers of a stretch of the head, and the next one to the odd
// numbers. `store_sums` brings them into order.

#pragma once

#include <algorithm>
#include <cstring>

#include "attention_plan.h"
#include "attention_rows.h"
#include "prefetch.h"

namespace folovllm {
namespace {

// The words of a value from number d of the head on, 0 beyond the head: a head of 80 numbers ends with half a vector of
// 16 words.
inline Words load_value_words(const c10::BFloat16* value, [[maybe_unused]] int64_t numbers) {
#if FOLOVLLM_AVX512
  return (Words)_mm512_maskz_loadu_epi32(numbers < 2 * kWidth ? 0xff : 0xffff, value);
#else
  return load_words(value);
#endif
}

// N vectors of values, and how they are multiplied with a weight.
template <typename T>
struct ValueVectors {
  static constexpr bool kInWords = std::is_same_v<T, c10::BFloat16>;
  static constexpr int kKeysPerStep = kDotPairs<T> ? 2 : 1;

  // The numbers of a key, or with kKeysPerStep == 2 those of two keys, of which the second may be missing. `left` is
  // how many numbers the head has from here on.
  template <int N>
  static void load(const T* value, int64_t head_size, bool has_second, int64_t left, Vec* x) {
    if constexpr (!kInWords) {
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        x[v] = load_vec(value + v * kWidth);
      }
    } else {
#pragma GCC unroll 2
      for (int v = 0; v < N; v += 2) {
        const Words a = load_value_words(value + v * kWidth, left - v * kWidth);
        if constexpr (kKeysPerStep == 1) {
          x[v] = even_halves(a);
          x[v + 1] = odd_halves(a);
        } else {
          const Words b = has_second ? load_value_words(value + head_size + v * kWidth, left - v * kWidth) : Words{};
          x[v] = (Vec)((a & 0xffffu) | b << 16);
          x[v + 1] = (Vec)(a >> 16 | (b & 0xffff0000u));
        }
      }
    }
  }
};

// sum[r] = sum[r] * rescale[r] + weights[r] . values, for N vectors of sums from number d of the head on.
//
//   weights [R, kTileKeys]    value [groups of the tile], each [16 tokens][head_size]    sums [R, padded head_size]
template <typename T, int R, int N>
FOLOVLLM_ALONE void add_values(const float* weights, const T* const* value, ValuePrefetcher<T> prefetcher, int64_t count,
                               int64_t d, const float* rescale, float* sums, int64_t head_size) {
  using Values = ValueVectors<T>;
  const int64_t width = padded(head_size);
  Vec sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      sum[r][v] = load_vec(sums + r * width + d + v * kWidth) * rescale[r];
    }
  }
  for (int64_t first = 0; first < count; first += kKeysPerGroup) {
    const T* values = value[first / kKeysPerGroup] + d;
    const typename ValuePrefetcher<T>::Lines lines(prefetcher, first / kKeysPerGroup, d);
    const int64_t end = std::min(kKeysPerGroup, count - first);
    for (int64_t j = 0; j < end; j += Values::kKeysPerStep, values += Values::kKeysPerStep * head_size) {
      Vec x[N];
      Values::template load<N>(values, head_size, j + 1 < end, head_size - d, x);
      lines.fetch(j * head_size, N * kWidth);
      if constexpr (Values::kKeysPerStep == 2) {
        lines.fetch((j + 1) * head_size, N * kWidth);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec weight = broadcast(weights[r * kTileKeys + (first + j) / Values::kKeysPerStep]);
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) {
          sum[r][v] = add_product<T>(sum[r][v], x[v], weight);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      store_vec(sums + r * width + d + v * kWidth, sum[r][v]);
    }
  }
}

// Adds the values of a tile to the sums of R rows.
template <typename T, int R>
void add_tile(const float* weights, const T* const* value, ValuePrefetcher<T> prefetcher, int64_t count,
              const float* rescale, float* sums, int64_t head_size) {
  constexpr int N = kVectorsAtOnce;
  int64_t d = 0;
  for (; d + N * kWidth <= head_size; d += N * kWidth) {
    add_values<T, R, N>(weights, value, prefetcher, count, d, rescale, sums, head_size);
  }
  if constexpr (N * kWidth > 16) {  // heads are multiples of 16 numbers
    constexpr int kRest = ValueVectors<T>::kInWords ? 2 : 1;
    for (; d < head_size; d += kRest * kWidth) {
      add_values<T, R, kRest>(weights, value, prefetcher, count, d, rescale, sums, head_size);
    }
  }
}

// out = sums * factor for one row, in the order of the head's numbers.
template <typename T>
void store_sums(const float* sums, float factor, T* out, int64_t head_size) {
  if constexpr (!ValueVectors<T>::kInWords) {
    for (int64_t d = 0; d < head_size; d += kWidth) {
      store_vec(out + d, load_vec(sums + d) * factor);
    }
  } else {
    for (int64_t d = 0; d < head_size; d += 2 * kWidth) {
      const HalfWords even = to_bf16(load_vec(sums + d) * factor), odd = to_bf16(load_vec(sums + d + kWidth) * factor);
      const Words words = __builtin_convertvector(even, Words) | __builtin_convertvector(odd, Words) << 16;
      std::memcpy(out + d, &words, std::min<int64_t>(2 * kWidth, head_size - d) * sizeof(T));
    }
  }
}

}  // namespace
}  // namespace folovllm
