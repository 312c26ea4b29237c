// The inputs of an int4 linear layer, in two forms: FloatInputs serve fp32, IntegerInputs serve bf16. int4_kernel.h says
// why integers.
//
// Milestone: M7. vLLM counterpart: none. Both classes multiply R of their rows with one group of one block
// (`add_group`), and the kernel in int4_kernel.h is the same for both.

#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>

#include "int4_layout.h"
#include "int4_pairs.h"
#include "int4_prefetch.h"
#include "simd.h"

namespace folovllm {

constexpr int kLineVecs = kInt4Lanes / kWidth;  // registers that hold a line
constexpr int kBlockVecs = 2 * kLineVecs;       // registers with a number for each output of a block

// The weights of one group of one block, and a place in memory.
struct Int4Group {
  const uint8_t* levels;  // [chunks, 64]
  const float* scales;    // [32]
  const int8_t* zeros;    // [32] or null
  const uint8_t* ahead;   // what Int4Prefetcher wants to be fetched meanwhile, line by line
};

inline SignedWords load_bytes(const int8_t* p) {
  VectorOf<int8_t, kWidth>::type v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, SignedWords);
}

inline Vec to_floats(SignedWords v) {
  return __builtin_convertvector(v, Vec);
}

// ---- x as floats

class FloatInputs {
 public:
  static constexpr int kMaxRows = kWidth == 16 ? 6 : 4;  // at a time: their sums fit 32 registers, or 16

  // x [rows, groups * group_size], rows `stride` apart.
  FloatInputs(const float* x, int64_t stride, const Int4Problem& p)
      : x_(x), stride_(stride), groups_(p.groups), group_size_(p.group_size()) {
    if (p.zeros != nullptr) {
      sums_.reset(new float[p.rows * groups_]);
    }
  }

  // Must be called for every row before `add_group` is.
  void prepare_row(int64_t row) {
    for (int64_t group = 0; sums_ != nullptr && group < groups_; ++group) {
      sums_[row * groups_ + group] = sum_of(x_ + row * stride_ + group * group_size_);
    }
  }

  // Adds the products of R rows with a group: scale * (the sum of (level - 8) * x - (zero - 8) * the sum of x).
  template <int R>
  void add_group(const Int4Group& w, int64_t row, int64_t group, Vec (&y)[R][kBlockVecs]) const {
    const float* x = x_ + row * stride_ + group * group_size_;
#pragma GCC unroll 4
    for (int part = 0; part < kLineVecs; ++part) {
      Vec sums[R][2] = {};
      const uint8_t* levels = w.levels + part * sizeof(Words);
      for (int64_t i = 0; i < group_size_; i += kInt4Chunk, levels += kInt4Line) {
        if (part == 0) {
          prefetch_int4_line<R>(w.ahead + i / kInt4Chunk * kInt4Line);
        }
        const Words line = load_words(levels);
#pragma GCC unroll 4
        for (int input = 0; input < kInt4Chunk; ++input) {
          const Vec low = to_floats((SignedWords)((line >> (8 * input)) & 15u) - 8);
          const Vec high = to_floats((SignedWords)((line >> (8 * input + 4)) & 15u) - 8);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const Vec xr = broadcast(x[r * stride_ + i + input]);
            sums[r][0] = fmadd(low, xr, sums[r][0]);
            sums[r][1] = fmadd(high, xr, sums[r][1]);
          }
        }
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int v = half * kLineVecs + part;
        const Vec scale = load_vec(w.scales + v * kWidth);
        const Vec zero = w.zeros != nullptr ? to_floats(load_bytes(w.zeros + v * kWidth)) : Vec{};
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          if (w.zeros != nullptr) {
            sums[r][half] -= zero * sums_[(row + r) * groups_ + group];
          }
          y[r][v] = fmadd(sums[r][half], scale, y[r][v]);
        }
      }
    }
  }

 private:
  float sum_of(const float* x) const {
    Vec total = {};
    int64_t i = 0;
    for (; i + kWidth <= group_size_; i += kWidth) {
      total += load_vec(x + i);
    }
    return reduce_add(i < group_size_ ? total + load_vec(x + i, group_size_ - i) : total);
  }

  const float* x_;
  int64_t stride_, groups_, group_size_;
  std::unique_ptr<float[]> sums_;  // of x, [rows, groups]; null if there are no zeros
};

// ---- x as integers

class IntegerInputs {
 public:
  static constexpr int kMaxRows = kWidth == 16 ? 8 : 4;  // at a time, as above


  IntegerInputs(const c10::BFloat16* x, int64_t stride, const Int4Problem& p)
      : x_(x), stride_(stride), groups_(p.groups), group_size_(p.group_size()), width_(groups_ * group_size_),
        integers_(new int16_t[p.rows * width_]), scales_(new Scale[p.rows * groups_]) {}

  void prepare_row(int64_t row) {
    for (int64_t group = 0; group < groups_; ++group) {
      const int64_t first = group * group_size_;
      scales_[row * groups_ + group] = to_integers(x_ + row * stride_ + first, integers_.get() + row * width_ + first);
    }
  }

  template <int R>
  void add_group(const Int4Group& w, int64_t row, int64_t group, Vec (&y)[R][kBlockVecs]) const {
    constexpr int kChains = R == 1 ? 2 : 1;  // a single row's sums would wait for each other
    const int16_t* x = integers_.get() + row * width_ + group * group_size_;
    const Scale* scales = scales_.get() + row * groups_ + group;
    const Words mask = broadcast(0x000f000fu);
#pragma GCC unroll 4
    for (int part = 0; part < kLineVecs; ++part) {
      PairSums sums[R][2][kChains] = {};
      const uint8_t* levels = w.levels + part * sizeof(Words);
      for (int64_t i = 0; i < group_size_; i += kInt4Chunk, levels += kInt4Line) {
        if (part == 0) {
          prefetch_int4_line<R>(w.ahead + i / kInt4Chunk * kInt4Line);
        }
        const Words line = load_words(levels);
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; ++pair) {  // inputs 0 and 2, then 1 and 3
          const Words low = line >> (8 * pair) & mask, high = line >> (8 * pair + 4) & mask;
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const Words xr = broadcast(load_pair(x + r * width_ + i + 2 * pair));
            sums[r][0][pair % kChains].add(low, xr);
            sums[r][1][pair % kChains].add(high, xr);
          }
        }
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int v = half * kLineVecs + part;
        const Vec scale = load_vec(w.scales + v * kWidth);
        const SignedWords zero = w.zeros != nullptr ? load_bytes(w.zeros + v * kWidth) + 8 : SignedWords{} + 8;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          SignedWords total = sums[r][half][0].total();
          if constexpr (kChains == 2) {
            total += sums[r][half][1].total();
          }
          total -= zero * scales[r * groups_].sum;
          y[r][v] = fmadd(to_floats(total), scale * scales[r * groups_].unit, y[r][v]);
        }
      }
    }
  }

 private:
  struct Scale {
    float unit;   // x is this times its integer
    int32_t sum;  // of the integers
  };

  static uint32_t load_pair(const int16_t* x) {
    uint32_t pair;
    std::memcpy(&pair, x, sizeof(pair));
    return pair;
  }

  // Turns a group of x into integers of 16 bits, each 4 of them in the order 0, 2, 1, 3.
  Scale to_integers(const c10::BFloat16* x, int16_t* integers) const {
    Vec largest = {};
    for (int64_t i = 0; i < group_size_; i += kWidth) {
      // Bits of positive numbers compare as the numbers do, and those of a NaN are larger than all.
      const Words magnitude = (Words)load_some(x + i, group_size_ - i) & 0x7fffffffu;
      largest = (Vec)(magnitude > (Words)largest ? magnitude : (Words)largest);
    }
    uint32_t bits = 0;
    for (int lane = 0; lane < kWidth; ++lane) {
      bits = std::max(bits, ((Words)largest)[lane]);
    }
    // All are less than 2^(exponent - 126), and so less than 2^15 times this unit.
    const uint32_t exponent = std::max(bits >> 23, 15u);
    const float unit = exponent == 255 ? std::numeric_limits<float>::quiet_NaN() : power_of_two(exponent - 14);
    const float inverse = exponent == 255 ? 0.0f : power_of_two(268 - exponent);
    SignedWords total = {};
    for (int64_t i = 0; i < group_size_; i += kWidth) {
      const SignedWords rounded = round_to_integers(load_some(x + i, group_size_ - i) * inverse);
      total += rounded;
      store_pairs(integers + i, rounded, std::min<int64_t>(kWidth, group_size_ - i));
    }
    int32_t sum = 0;
    for (int lane = 0; lane < kWidth; ++lane) {
      sum += total[lane];
    }
    return {unit, sum};
  }

  static Vec load_some(const c10::BFloat16* x, int64_t count) {
    return count >= kWidth ? load_vec(x) : load_vec(x, count);
  }

  static float power_of_two(uint32_t biased_exponent) {
    return std::bit_cast<float>(biased_exponent << 23);
  }

  const c10::BFloat16* x_;
  int64_t stride_, groups_, group_size_, width_;
  std::unique_ptr<int16_t[]> integers_;  // [rows, groups, chunks, 4]
  std::unique_ptr<Scale[]> scales_;      // [rows, groups]
};

}  // namespace folovllm
