// Scores: the products of queries with the keys of a tile.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_attn_vec.hpp (after v0.11.0).
//
// K lies on its side (kv_pages.h): a vector holds one word of the keys of neighbouring tokens, so each lane adds up the
// score of its own token. R rows are computed at once, so that each vector of K is loaded once for R rows.

#pragma once

#include <algorithm>

#include "attention_rows.h"
#include "prefetch.h"

namespace folovllm {
namespace {

// scores[r][j] = q[r] . k[j] for the keys of V vectors, from key `first` of a tile on.
//
//   query  [R, words * kQueriesPerWord]       group  [groups of the tile], each [words][16 tokens]
//   scores [R, kTileKeys]
template <typename T, int R, int V>
FOLOVLLM_ALONE void score_vectors(const float* query, int64_t words, const float* const* group,
                                  ScorePrefetcher<T> prefetcher, int64_t first, float* scores) {
  using Keys = KeyWords<T>;
  const float* column[V];
  typename ScorePrefetcher<T>::template Lines<V> lines(prefetcher);
  Vec sum[R][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int64_t key = first + v * kWidth;
    column[v] = group[key / kKeysPerGroup] + key % kKeysPerGroup;
    lines.begin(v, key / kKeysPerGroup);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sum[r][v] = Vec{};
    }
  }
  for (int64_t p = 0; p < words; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v += std::max<int64_t>(1, kKeysPerGroup / kWidth)) {  // one line holds a word of a group
      lines.fetch(v, p);
    }
#pragma GCC unroll 2
    for (int i = 0; i < Keys::kQueriesPerWord; ++i) {
      Vec k[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        k[v] = Keys::factor(load_words(column[v] + p * kKeysPerGroup), i);
        keep(k[v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec q = broadcast(query[(r * words + p) * Keys::kQueriesPerWord + i]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          sum[r][v] = add_product<T>(sum[r][v], k[v], q);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store_vec(scores + r * kTileKeys + first + v * kWidth, sum[r][v]);
    }
  }
}

// The same for the first `count` keys of a tile, a multiple of 16.
template <typename T, int R>
void score(const float* query, int64_t words, const float* const* group, ScorePrefetcher<T> prefetcher, int64_t count,
           float* scores) {
  constexpr int V = kVectorsAtOnce;
  int64_t first = 0;
  for (; first + V * kWidth <= count; first += V * kWidth) {
    score_vectors<T, R, V>(query, words, group, prefetcher, first, scores);
  }
  if constexpr (V * kWidth > kKeysPerGroup) {  // with 16 lanes, up to three vectors are left
    switch ((count - first) / kWidth) {
      case 1: score_vectors<T, R, 1>(query, words, group, prefetcher, first, scores); break;
      case 2: score_vectors<T, R, 2>(query, words, group, prefetcher, first, scores); break;
      case 3: score_vectors<T, R, 3>(query, words, group, prefetcher, first, scores); break;
      default: break;
    }
  }
}

}  // namespace
}  // namespace folovllm
