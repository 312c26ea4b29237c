// Vectors of fp32 numbers, loaded from and stored to fp32, bf16 or fp16 memory.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_types_x86.hpp, _arm.hpp, ..., one per kind of CPU. Here one file serves
// all of them: GCC and Clang lower vector types and their operators to what the CPU has. Intrinsics are used only for
// instructions that no vector type has.
//
//   Vec     [kWidth]  one register of the CPU: 16 lanes with AVX-512, 8 with AVX2, 4 with SSE2 and NEON
//   Floats  [16]      the same 16 numbers on every CPU, for memory whose layout counts in sixteens
//
// Hot loops use Vec. If a vector is wider than a register, GCC keeps it in memory and copies its parts back and forth.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#include "cpu_features.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif FOLOVLLM_NEON
#include <arm_neon.h>
#endif

namespace folovllm {

// A vector of N numbers of type T.
template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};

// ---- Vec

#if FOLOVLLM_AVX512
constexpr int kWidth = 16;
#elif FOLOVLLM_AVX2
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using Vec = VectorOf<float, kWidth>::type;
using Words = VectorOf<uint32_t, kWidth>::type;      // e.g. pairs of bf16 numbers
using HalfWords = VectorOf<uint16_t, kWidth>::type;  // e.g. bf16 numbers

// x in every lane. (0 + x would cost an addition, because it turns -0 into 0.)
inline Vec broadcast(float x) {
  return x - Vec{};
}
inline Words broadcast(uint32_t x) {
  return x - Words{};
}

inline Vec load_vec(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Words load_words(const void* p) {
  Words v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
// A bf16 is the upper half of an fp32.
inline Vec load_vec(const c10::BFloat16* p) {
#if FOLOVLLM_AVX512  // GCC would convert one half after the other
  return (Vec)((Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
#elif FOLOVLLM_AVX2
  return (Vec)((Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 16);
#else
  HalfWords v;
  std::memcpy(&v, p, sizeof(v));
  return (Vec)(__builtin_convertvector(v, Words) << 16);
#endif
}
inline Vec load_vec(const c10::Half* p) {
#if FOLOVLLM_AVX512
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif FOLOVLLM_AVX2
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif FOLOVLLM_NEON
  float16x4_t v;
  std::memcpy(&v, p, sizeof(v));
  return (Vec)vcvt_f32_f16(v);
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) {
    v[i] = static_cast<float>(p[i]);
  }
  return v;
#endif
}

// The bits of v rounded to bf16: to nearest, ties to even. Without the instruction: adds just under half of the last bit
// that is kept, or half if that bit is odd.
inline HalfWords to_bf16(Vec v) {
#if FOLOVLLM_BF16_DOT
  return (HalfWords)_mm512_cvtneps_pbh((__m512)v);
#elif FOLOVLLM_NEON_BF16
  return (HalfWords)vcvt_bf16_f32((float32x4_t)v);
#else
  const Words bits = (Words)v;
  const Words sum = bits + 0x7fffu + ((bits >> 16) & 1u);
  return __builtin_convertvector((v == v ? sum : bits) >> 16, HalfWords);  // a NaN must not overflow
#endif
}

inline void store_vec(float* p, Vec v) {
  std::memcpy(p, &v, sizeof(v));
}
inline void store_vec(c10::BFloat16* p, Vec v) {
  const HalfWords rounded = to_bf16(v);
  std::memcpy(p, &rounded, sizeof(rounded));
}
inline void store_vec(c10::Half* p, Vec v) {
#if FOLOVLLM_AVX512
  const __m256i rounded = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &rounded, sizeof(rounded));
#elif FOLOVLLM_AVX2
  const __m128i rounded = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &rounded, sizeof(rounded));
#elif FOLOVLLM_NEON
  const float16x4_t rounded = vcvt_f16_f32((float32x4_t)v);
  std::memcpy(p, &rounded, sizeof(rounded));
#else
  for (int i = 0; i < kWidth; ++i) {
    p[i] = v[i];
  }
#endif
}

// The last `count` < kWidth numbers of a row. They pass through a buffer, so that nothing beyond the row is touched. A
// load fills the other lanes with `otherwise`.
template <typename T>
inline Vec load_vec(const T* p, int64_t count, float otherwise = 0.0f) {
  T buffer[kWidth];
  for (T& x : buffer) {
    x = static_cast<T>(otherwise);
  }
  std::memcpy(buffer, p, count * sizeof(T));
  return load_vec(buffer);
}
template <typename T>
inline void store_vec(T* p, Vec v, int64_t count) {
  T buffer[kWidth];
  store_vec(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
}

// v as `load_vec` would read it after `store_vec` has rounded it to T.
template <typename T>
inline Vec rounded(Vec v) {
  T memory[kWidth];
  store_vec(memory, v);
  return load_vec(memory);
}

// The bf16 numbers in the low halves of words, and those in the high halves. In memory the low half comes first.
inline Vec even_halves(Words words) {
  return (Vec)(words << 16);
}
inline Vec odd_halves(Words words) {
  return (Vec)(words & 0xffff0000u);
}

// a * b + c, rounded once where the CPU has the instruction.
inline Vec fmadd(Vec a, Vec b, Vec c) {
  return a * b + c;
}

// sum + w.even * x.even + w.odd * x.odd in every lane, for words of two bf16 numbers. If the CPU has an instruction for it,
// that instruction may round differently from two products and additions.
inline Vec add_pairs(Vec sum, Words w, Words x) {
#if FOLOVLLM_BF16_DOT
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
#elif FOLOVLLM_NEON_BF16
  return (Vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)w, (bfloat16x8_t)x);
#else
  return fmadd(odd_halves(w), odd_halves(x), fmadd(even_halves(w), even_halves(x), sum));
#endif
}

// The larger number of each lane. If one of them is NaN, the result is b.
inline Vec maximum(Vec a, Vec b) {
#if FOLOVLLM_AVX512
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif FOLOVLLM_AVX2
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Keeps a vector in its register. Without this, GCC loads it from memory again wherever it is used, and a core can do
// fewer loads than products at a time.
inline void keep(Vec& v) {
#if FOLOVLLM_AVX512
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif FOLOVLLM_NEON
  asm("" : "+w"(v));
#endif
}

inline float reduce_add(Vec v) {
#if FOLOVLLM_AVX512
  return _mm512_reduce_add_ps((__m512)v);
#elif FOLOVLLM_AVX2
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// The largest number; which one if some are NaN is not defined.
inline float reduce_max(Vec v) {
#if FOLOVLLM_AVX512
  return _mm512_reduce_max_ps((__m512)v);
#elif FOLOVLLM_AVX2
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
  const float even = v[0] > v[2] ? v[0] : v[2], odd = v[1] > v[3] ? v[1] : v[3];
  return even > odd ? even : odd;
#endif
}

// ---- Floats

constexpr int64_t kLanes = 16;

using Floats = VectorOf<float, kLanes>::type;
using Bits = VectorOf<uint32_t, kLanes>::type;
using Ints = VectorOf<int32_t, kLanes>::type;

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Sixteen numbers from memory of any type, in as many registers as it takes.
template <typename T>
inline Floats load(const T* p) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; i += kWidth) {
    store_vec(lanes + i, load_vec(p + i));
  }
  return load(lanes);
}

template <typename T>
inline void store(T* p, Floats v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int i = 0; i < kLanes; i += kWidth) {
    store_vec(p + i, load_vec(lanes + i));
  }
}

// The last `count` < 16 numbers of a row, as above.
template <typename T>
inline Floats load(const T* p, int64_t count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}
template <typename T>
inline void store(T* p, Floats v, int64_t count) {
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
}

inline float sum(Floats v) {
  float total = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) {
    total += v[i];
  }
  return total;
}

// ---- e^x, for both
//
// x = n ln 2 + r with |r| <= ln 2 / 2; a polynomial gives e^r, and n is added to the exponent's bits. 2^n must be a
// normal number, so the result is 0 below -87. A NaN stays NaN.

// To 1 ulp (a Taylor polynomial), and infinite above 88.
template <typename V>
  requires(sizeof(V) >= 16)  // a vector: exp(float) is another function
inline V exp(V x) {
  using BitsOfV = typename VectorOf<uint32_t, sizeof(V) / 4>::type;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const V shifted = x * 1.44269504f + magic;
  const V n = shifted - magic;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in n * part
  V y = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  y = (V)((BitsOfV)y + ((BitsOfV)shifted << 23));
  y = x > 88.0f ? __builtin_inff() - V{} : y;
  return x < -87.0f ? V{} : y;
}

// To some 30 ulp (60 without fused multiply-add) and only for x <= 88: enough for weights of attention that are rounded
// to bf16. (The polynomial of least relative error of those with which e^0 is 1.)
template <typename V>
  requires(sizeof(V) >= 16)
inline V exp_fast(V x) {
  using BitsOfV = typename VectorOf<uint32_t, sizeof(V) / 4>::type;
  const float magic = 12582912.0f;
  const V shifted = x * 1.44269504f + magic;
  const V r = x - (shifted - magic) * 0.693147181f;
  V y = r * 0.0415138453f + 0.167874739f;
  y = y * r + 0.500030160f;
  y = y * r + 0.999966860f;
  y = y * r + 1.0f;
  y = (V)((BitsOfV)y + ((BitsOfV)shifted << 23));
  return x < -87.0f ? V{} : y;
}

}  // namespace folovllm
