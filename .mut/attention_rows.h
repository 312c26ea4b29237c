// What the attention kernel's loops share: how many rows and vectors they compute at once, and how they multiply with
// keys and values of each type.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_attn_vec.hpp (after v0.11.0).

#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace folovllm {
namespace {

// Marks a kernel that stays a function of its own. If several of them were inlined into one function, GCC would run out
// of registers and keep their sums in memory.
#define FOLOVLLM_ALONE __attribute__((noinline))

// 6 rows x 4 sums, 4 operands and a broadcast fit 32 registers. With 16, 6 rows x 2 sums, 2 operands and a broadcast would
// just fit, but GCC needs one more.
constexpr bool kManyRegisters = FOLOVLLM_AVX512 || FOLOVLLM_NEON;  // 32, else 16
constexpr int kRowsAtOnce = kManyRegisters ? 6 : 5;
constexpr int kVectorsAtOnce = kManyRegisters ? 4 : 2;
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// ---- How numbers are multiplied

// Whether numbers of type T are multiplied as pairs of bf16.
template <typename T>
constexpr bool kDotPairs = (FOLOVLLM_BF16_DOT || FOLOVLLM_NEON_BF16) && std::is_same_v<T, c10::BFloat16>;

// Whether a word holds one number in fp32. (fp16 keys are widened before, see kv_tile.h.)
template <typename T>
constexpr bool kWholeWords = !std::is_same_v<T, c10::BFloat16>;

// A vector of words, each of a key of its own, times numbers of a query in every lane.
template <typename T>
struct KeyWords {
  // Numbers in fp32 that stand for a word's part of a query.
  static constexpr int kQueriesPerWord = kWholeWords<T> || kDotPairs<T> ? 1 : 2;

  // What is multiplied with the i-th of them.
  static Vec factor(Words words, int i) {
    if constexpr (kQueriesPerWord == 1) {
      return (Vec)words;
    } else {
      return i == 0 ? even_halves(words) : odd_halves(words);
    }
  }
};

// sum + x * y in every lane, or the sum of two products where numbers of type T are multiplied as pairs.
template <typename T>
inline Vec add_product(Vec sum, Vec x, Vec y) {
  if constexpr (kDotPairs<T>) {
    return add_pairs(sum, (Words)x, (Words)y);
  }
  return fmadd(x, y, sum);
}

// Calls f(R, first row) for blocks of up to kRowsAtOnce rows. R, the number of rows, is a compile-time constant. E.g. 7 rows are
// computed as 4 and 3: with a block of 1 row, each load would serve a single product.
template <typename F>
void for_each_row_block(int64_t rows, const F& f) {
  const int64_t blocks = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  for (int64_t block = 0, r = 0; block < blocks; ++block) {
    const int64_t end = (block + 1) * rows / blocks;
    switch (end - r) {
      case 1: f(std::integral_constant<int, 1>(), r); break;
      case 2: f(std::integral_constant<int, 2>(), r); break;
      case 3: f(std::integral_constant<int, 3>(), r); break;
      case 4: f(std::integral_constant<int, 4>(), r); break;
      case 5: f(std::integral_constant<int, 5>(), r); break;
      default: f(std::integral_constant<int, kRowsAtOnce>(), r);
    }
    r = end;
  }
}

}  // namespace
}  // namespace folovllm
