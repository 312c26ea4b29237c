// Vectors of sixteen fp32 numbers, loaded from and stored to fp32 or bf16 memory.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_types_x86.hpp, _arm.hpp, ..., one per kind of CPU. Here one file serves
// all of them: GCC and Clang lower their vector types to what the CPU has (one AVX-512 register, two of AVX2, four of
// NEON). Intrinsics are used only for instructions that no vector type has. Left out: fp16.

#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#include "cpu_features.h"

#if FOLOVLLM_BF16_DOT
#include <immintrin.h>
#endif

namespace folovllm {

constexpr int64_t kLanes = 16;

typedef float Floats __attribute__((vector_size(64)));    // [16]
typedef uint32_t Bits __attribute__((vector_size(64)));   // [16]
typedef int32_t Ints __attribute__((vector_size(64)));    // [16]
typedef uint16_t Halves __attribute__((vector_size(32))); // [16], the bits of bf16 numbers

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// A bf16 is the upper half of an fp32.
inline Floats load(const c10::BFloat16* p) {
  Halves v;
  std::memcpy(&v, p, sizeof(v));
  return (Floats)(__builtin_convertvector(v, Bits) << 16);
}

inline void store(float* p, Floats v) {
  std::memcpy(p, &v, sizeof(v));
}

// Rounds to nearest, ties to even. Without the instruction: adds just under half of the last bit that is kept, or half
// if that bit is odd.
inline void store(c10::BFloat16* p, Floats v) {
#if FOLOVLLM_BF16_DOT
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
#else
  const Bits bits = (Bits)v;
  const Bits sum = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Halves rounded = __builtin_convertvector((v == v ? sum : bits) >> 16, Halves); // a NaN must not overflow
#endif
  std::memcpy(p, &rounded, sizeof(rounded));
}

// v as `load` would read it after `store` has rounded it to T.
template <typename T>
inline Floats rounded(Floats v) {
  T memory[kLanes];
  store(memory, v);
  return load(memory);
}

// The last `count` < 16 numbers of a row. They pass through a buffer, so that nothing beyond the row is touched.
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

// e^x to about 2 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, a Taylor polynomial for e^r, and n added to the exponent's
// bits. Because 2^n must be a normal number, the result is e^-87 below -87 and infinite above 88. A NaN stays NaN.
inline Floats exp(Floats x) {
  const Floats infinity = Floats{} + __builtin_inff();
  const auto overflows = x > 88.0f;
  x = x < -87.0f ? Floats{} - 87.0f : x;
  x = overflows ? Floats{} + 88.0f : x;
  const float magic = 12582912.0f; // 1.5 * 2^23: adding it leaves an integer in the low bits
  const Floats shifted = x * 1.44269504f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f; // ln 2 in two parts, the first exact in n * part
  Floats y = Floats{} + 1.0f / 5040.0f;
  y = y * r + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  y = (Floats)((Bits)y + ((Bits)shifted << 23));
  return overflows ? infinity : y;
}

} // namespace folovllm
