// Vectors of pairs of 16-bit integers: their dot products, and how floats become such pairs.
//
// Milestone: M7. vLLM counterpart: none. Each word of 32 bits is a pair, so a vector of kWidth words is kWidth dot
// products of two numbers each, which are added in 32 bits:
//
//   AVX-512 or AVX with VNNI   vpdpwssd: products and sum in one instruction
//   x86 otherwise              (v)pmaddwd: a product of a pair, then an addition
//   Arm                        smlal: the two products of a pair are added to sums of their own

#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace folovllm {

using SignedWords = VectorOf<int32_t, kWidth>::type;
using SignedHalfWords = VectorOf<int16_t, kWidth>::type;

#if FOLOVLLM_NEON
struct PairSums {
  int32x4_t low, high;  // of words 0 and 1, and of words 2 and 3

  void add(Words levels, Words x) {
    const int16x8_t w = vreinterpretq_s16_u32(levels), v = vreinterpretq_s16_u32(x);
    low = vmlal_s16(low, vget_low_s16(w), vget_low_s16(v));
    high = vmlal_high_s16(high, w, v);
  }
  SignedWords total() const {
    return (SignedWords)vpaddq_s32(low, high);
  }
};
#else
struct PairSums {
  SignedWords sums;

  void add(Words levels, Words x) {
#if FOLOVLLM_INT16_DOT && FOLOVLLM_AVX512
    // Not _mm512_dpwssd_epi32: for that GCC 12 copies every sum to another register and, with many rows, to memory.
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(levels), "v"(x));
#elif FOLOVLLM_INT16_DOT
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(levels), "x"(x));
#elif FOLOVLLM_AVX512
    sums += (SignedWords)_mm512_madd_epi16((__m512i)levels, (__m512i)x);
#elif FOLOVLLM_AVX2
    SignedWords products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(levels), "x"(x));
#elif defined(__x86_64__)
    sums += (SignedWords)_mm_madd_epi16((__m128i)levels, (__m128i)x);
#else
    sums += ((SignedWords)(levels << 16) >> 16) * ((SignedWords)(x << 16) >> 16) + ((SignedWords)levels >> 16) * ((SignedWords)x >> 16);
#endif
  }
  SignedWords total() const {
    return sums;
  }
};
#endif

// For numbers of less than 2^22: adding 1.5 * 2^23 leaves the nearest integer in the low bits.
inline SignedWords round_to_integers(Vec x) {
  const Vec magic = broadcast(12582912.0f);
  return (SignedWords)(x + magic) - (SignedWords)magic;
}

// Stores `count` integers as 16 bits, each 4 of them in the order 0, 2, 1, 3. `count` is a multiple of 4.
inline void store_pairs(int16_t* p, SignedWords v, int64_t count) {
  const SignedHalfWords narrow = __builtin_convertvector(v, SignedHalfWords);
#if FOLOVLLM_AVX512
  const SignedHalfWords pairs = __builtin_shufflevector(narrow, narrow, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
#elif FOLOVLLM_AVX2
  const SignedHalfWords pairs = __builtin_shufflevector(narrow, narrow, 0, 2, 1, 3, 4, 6, 5, 7);
#else
  const SignedHalfWords pairs = __builtin_shufflevector(narrow, narrow, 0, 2, 1, 3);
#endif
  std::memcpy(p, &pairs, count * sizeof(int16_t));
}

}  // namespace folovllm
