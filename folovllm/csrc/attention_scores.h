// Scores: the products of queries with the keys of a tile.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_attn_vec.hpp (after v0.11.0).
//
// K lies on its side (kv_pages.h): a vector holds one word of 16 tokens' keys, so each lane adds up the score of its
// own token. R rows are computed at once, so that each vector of K is loaded once for R rows.

#pragma once

#include <algorithm>

#include "attention_vectors.h"
#include "prefetch.h"

namespace folovllm {
namespace {

// sum + k * q in every lane. With kDot a word holds two bf16 numbers, and both products are added.
template <bool kDot>
inline Vec dot(Vec sum, Vec k, float q) {
#if FOLOVLLM_BF16_DOT
  if constexpr (kDot) {
    return _mm512_dpbf16_ps(sum, (__m512bh)(__m512)k, (__m512bh)_mm512_set1_ps(q));
  }
#endif
  return at::vec::fmadd(k, Vec(q), sum);
}

// scores[r][j] = scale * q[r] . k[j] for the keys of V vectors, from key `first` of a tile on.
//
//   query  [R, words]           group  [groups of the tile], each [words][16 tokens]           scores  [R, kTileKeys]
template <typename T, bool kDot, int R, int V>
FOLOVLLM_ALONE void score_vectors(const float* query, int64_t words, const float* const* group,
                                  ScorePrefetcher<T> prefetcher, float scale, int64_t first, float* scores) {
  const float* column[V];
  typename ScorePrefetcher<T>::template Lines<V> lines(prefetcher);
  Vec sum[R][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int64_t key = first + v * kWidth;
    column[v] = group[key / kKeysPerGroup] + key % kKeysPerGroup;
    lines.begin(v, key / kKeysPerGroup);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      sum[r][v] = Vec(0.0f);
    }
  }
  for (int64_t p = 0; p < words; ++p) {
    Vec k[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      k[v] = Vec::loadu(column[v] + p * kKeysPerGroup);
      keep(k[v]);
      lines.fetch(v, p);
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
      (sum[r][v] * Vec(scale)).store(scores + r * kTileKeys + first + v * kWidth);
    }
  }
}

// The same for the first `count` keys of a tile, a multiple of 16.
template <typename T, bool kDot, int R>
void score(const float* query, int64_t words, const float* const* group, ScorePrefetcher<T> prefetcher, float scale,
           int64_t count, float* scores) {
  for (int64_t first = 0; first < count; first += 4 * kWidth) {
    switch (std::min<int64_t>(4, (count - first) / kWidth)) {
      case 1: score_vectors<T, kDot, R, 1>(query, words, group, prefetcher, scale, first, scores); break;
      case 2: score_vectors<T, kDot, R, 2>(query, words, group, prefetcher, scale, first, scores); break;
      case 3: score_vectors<T, kDot, R, 3>(query, words, group, prefetcher, scale, first, scores); break;
      default: score_vectors<T, kDot, R, 4>(query, words, group, prefetcher, scale, first, scores);
    }
  }
}

}  // namespace
}  // namespace folovllm
