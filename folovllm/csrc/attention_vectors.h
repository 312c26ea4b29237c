// The vectors of the attention kernel: fp32, of the width of the CPU's registers, from and to memory of any type.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/cpu_attn_vec.hpp (after v0.11.0). Portable through at::vec, which picks
// its vectors by macro. (The other kernels use simd.h, whose vectors are 16 wide on every CPU.)

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

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu_features.h"

namespace folovllm {
namespace {

// Marks a kernel that stays a function of its own. If several of them were inlined into one function, GCC would run out
// of registers and keep their sums in memory.
#define FOLOVLLM_ALONE __attribute__((noinline))

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kWidth = Vec::size();  // 16 with AVX-512, 8 with AVX2
constexpr int64_t kRowsAtOnce = 4;       // 4 rows x 4 sums, 4 operands and a broadcast fit 32 registers
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// Keeps a vector in its register. Without this, GCC loads it from memory again for every row, and a core can do fewer
// loads than products at a time.
inline void keep(Vec& v) {
#if FOLOVLLM_BF16_DOT
  __m512 kept = v;
  asm("" : "+v"(kept));
  v = kept;
#endif
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

// Calls f(R, first row) for blocks of 4 rows, and for the rest. R, the number of rows, is a compile-time constant.
template <typename F>
void for_each_row_block(int64_t rows, const F& f) {
  for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
    switch (rows - r) {
      case 1: f(std::integral_constant<int, 1>(), r); break;
      case 2: f(std::integral_constant<int, 2>(), r); break;
      case 3: f(std::integral_constant<int, 3>(), r); break;
      default: f(std::integral_constant<int, 4>(), r);
    }
  }
}

}  // namespace
}  // namespace folovllm
