// The inputs of an int4 linear layer, in two forms. FloatInputs serve fp32 and any CPU; IntegerInputs serve bf16 on
// CPUs that multiply bytes with AVX-512. int4.cpp says why integers.
//
// Milestone: M7. vLLM counterpart: none. Both classes multiply R of their rows with one group of one block (`dot`), and
// the kernel in int4.cpp is the same for both.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cpu_features.h"
#include "int4_layout.h"
#include "prefetch.h"
#include "thread_team.h"

#if FOLOVLLM_INT4_DOT
#include <immintrin.h>
#endif

namespace folovllm {

typedef int8_t Bytes __attribute__((vector_size(16)));   // [16]

inline Floats to_floats(Ints v) {
  return __builtin_convertvector(v, Floats);
}

inline Ints load_bytes(const int8_t* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Ints);
}

struct Int4Problem {
  const uint8_t* levels;  // [blocks, groups, chunks, 64]
  const float* scales;    // [blocks, groups, 32]
  const int8_t* zeros;    // the same shape, zero - 8; null: all are 0
  const float* bias;      // [blocks * 32] or null
  int64_t rows, groups, chunks, out_features;

  int64_t group_bytes() const {
    return chunks * kInt4Line;
  }
};

// ---- x as floats

template <typename T>
class FloatInputs {
 public:
  FloatInputs(const at::Tensor& x, const Int4Problem& p)
      : x_(x.const_data_ptr<T>()), stride_(x.stride(0)), groups_(p.groups), group_size_(p.chunks * kInt4Chunk) {
    if (p.zeros != nullptr) {
      sums_.resize(p.rows * groups_);
      ThreadTeam::run_ranges(p.rows, /*grain=*/16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * groups_; i < end * groups_; ++i) {
          sums_[i] = sum_of(x_ + i / groups_ * stride_ + i % groups_ * group_size_);
        }
      });
    }
  }

  // R rows times one group of one block: the sums of (level - zero) * x, without the scales. sums [R][2 halves of 16
  // outputs]. `ahead` is what Int4Prefetcher wants to be fetched meanwhile, line by line.
  template <int R>
  void dot(const uint8_t* levels, const int8_t* zeros, int64_t row, int64_t group, const uint8_t* ahead,
           Floats (&sums)[R][2]) const {
    const T* x = x_ + row * stride_ + group * group_size_;
    Floats s[R][2] = {};
    for (int64_t i = 0; i < group_size_; i += kInt4Chunk, levels += kInt4Line, ahead += kInt4Line) {
      prefetch_int4_line<R>(ahead);
      Bits line;
      std::memcpy(&line, levels, sizeof(line));
#pragma GCC unroll 4
      for (int input = 0; input < kInt4Chunk; ++input) {
        const Floats low = to_floats((Ints)((line >> (8 * input)) & 15u) - 8);
        const Floats high = to_floats((Ints)((line >> (8 * input + 4)) & 15u) - 8);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const float xr = static_cast<float>(x[r * stride_ + i + input]);
          s[r][0] += low * xr;
          s[r][1] += high * xr;
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < 2; ++half) {
        sums[r][half] = s[r][half];
        if (zeros != nullptr) {
          sums[r][half] -= to_floats(load_bytes(zeros + half * kLanes)) * sums_[(row + r) * groups_ + group];
        }
      }
    }
  }

 private:
  float sum_of(const T* x) const {
    Floats total = {};
    int64_t i = 0;
    for (; i + kLanes <= group_size_; i += kLanes) {
      total += load(x + i);
    }
    return sum(i < group_size_ ? total + load(x + i, group_size_ - i) : total);
  }

  const T* x_;
  int64_t stride_, groups_, group_size_;
  std::vector<float> sums_;  // of x, [rows, groups]; only if there are zeros
};

// ---- x as integers

#if FOLOVLLM_INT4_DOT
class IntegerInputs {
 public:
  IntegerInputs(const at::Tensor& x, const Int4Problem& p)
      : groups_(p.groups), group_size_(p.chunks * kInt4Chunk), stride_(2 * groups_ * group_size_),
        digits_(new int8_t[p.rows * stride_]), scales_(new Scale[p.rows * groups_]) {
    const at::BFloat16* rows = x.const_data_ptr<at::BFloat16>();
    ThreadTeam::run_ranges(p.rows, /*grain=*/16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * groups_; i < end * groups_; ++i) {
        const at::BFloat16* group = rows + i / groups_ * x.stride(0) + i % groups_ * group_size_;
        scales_[i] = to_integers(group, digits_.get() + i * 2 * group_size_);
      }
    });
  }

  template <int R>
  void dot(const uint8_t* levels, const int8_t* zeros, int64_t row, int64_t group, const uint8_t* ahead,
           Floats (&sums)[R][2]) const {
    const int8_t* x = digits_.get() + row * stride_ + group * 2 * group_size_;
    const Scale* scales = scales_.get() + row * groups_ + group;
    __m512i high[R][2], low[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      high[r][0] = high[r][1] = _mm512_setzero_si512();
      low[r][0] = low[r][1] = _mm512_set1_epi32(-8 * scales[r * groups_].sum);
    }
    const __m512i nibble = _mm512_set1_epi8(15);
    for (const uint8_t* end = levels + group_size_ / kInt4Chunk * kInt4Line; levels != end;
         levels += kInt4Line, ahead += kInt4Line, x += 2 * kInt4Chunk) {
      prefetch_int4_line<R>(ahead);
      const __m512i line = _mm512_loadu_si512(levels);
      const __m512i w[2] = {_mm512_and_si512(line, nibble), _mm512_and_si512(_mm512_srli_epi16(line, 4), nibble)};
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512i x_high = four(x + r * stride_), x_low = four(x + r * stride_ + kInt4Chunk);
        add_products(high[r][0], w[0], x_high);
        add_products(high[r][1], w[1], x_high);
        add_products(low[r][0], w[0], x_low);
        add_products(low[r][1], w[1], x_low);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Scale scale = scales[r * groups_];
        Ints total = ((Ints)high[r][half] << 8) + (Ints)low[r][half];
        if (zeros != nullptr) {
          total -= load_bytes(zeros + half * kLanes) * scale.sum;
        }
        sums[r][half] = to_floats(total) * scale.unit;
      }
    }
  }

 private:
  struct Scale {
    float unit;   // x is this times its integer
    int32_t sum;  // of the integers
  };

  // As _mm512_dpbusd_epi32. For that intrinsic, GCC 12 copies every sum to another register and, with many rows, to
  // memory.
  static void add_products(__m512i& sums, __m512i levels, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(levels), "v"(x));
  }

  static __m512i four(const int8_t* x) {
    int digits;
    std::memcpy(&digits, x, sizeof(digits));
    return _mm512_set1_epi32(digits);
  }

  // Turns a group of x into integers: for each 4 inputs, their 4 high bytes and then their 4 low bytes.
  Scale to_integers(const at::BFloat16* x, int8_t* digits) const {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < group_size_; i += kLanes) {
      largest = _mm512_max_epu32(largest, _mm512_and_si512((__m512i)load_some(x + i, group_size_ - i), magnitude));
    }
    // All are less than 2^(exponent - 126), and so less than 2^15 times this unit.
    const uint32_t exponent = std::max(_mm512_reduce_max_epu32(largest) >> 23, 15u);
    const float unit = exponent == 255 ? std::numeric_limits<float>::quiet_NaN() : power_of_two(exponent - 14);
    const __m512 inverse = _mm512_set1_ps(exponent == 255 ? 0.0f : power_of_two(268 - exponent));
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < group_size_; i += kLanes) {
      const __m512i rounded = _mm512_cvtps_epi32((__m512)load_some(x + i, group_size_ - i) * inverse);
      // The largest integer of a bf16 is 32,640, and it alone has no two such bytes: 127 * 256 + 127 is 32,639.
      const __m512i integer = _mm512_min_epi32(rounded, _mm512_set1_epi32(32639));
      total = _mm512_add_epi32(total, integer);
      const __m512i up = _mm512_add_epi32(integer, _mm512_set1_epi32(128));  // low bytes are -128 .. 127
      const __m128i high = _mm512_cvtepi32_epi8(_mm512_srai_epi32(up, 8)), low = _mm512_cvtepi32_epi8(integer);
      const __m128i both[2] = {_mm_unpacklo_epi32(high, low), _mm_unpackhi_epi32(high, low)};
      std::memcpy(digits + 2 * i, both, 2 * std::min(kLanes, group_size_ - i));
    }
    return {unit, _mm512_reduce_add_epi32(total)};
  }

  static Floats load_some(const at::BFloat16* x, int64_t count) {
    return count >= kLanes ? load(x) : load(x, count);
  }

  static float power_of_two(uint32_t biased_exponent) {
    return std::bit_cast<float>(biased_exponent << 23);
  }

  int64_t groups_, group_size_, stride_;
  std::unique_ptr<int8_t[]> digits_;  // [rows, groups, chunks, (high, low), 4]
  std::unique_ptr<Scale[]> scales_;   // [rows, groups]
};
#endif

}  // namespace folovllm
