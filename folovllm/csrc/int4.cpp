// Linear layers over weights of 4 bits: unpacked in registers, a line of the cache at a time, and multiplied as they are.
//
// Milestone: M7. vLLM counterpart: csrc/cpu/cpu_wna16.cpp and, on GPUs, Marlin. Left out: AMX. Sources: GPTQ, Frantar et
// al. 2022; integer dot products with a scale per group of activations as in llama.cpp, but with 16 bits instead of 8.
//
//   y = sum over groups of scale * (sum of (level - 8) * x  -  (zero - 8) * sum of x)          levels: see int4.h
//
// With one token memory would deliver a line of 128 weights in about 8 cycles, and turning each level into a bf16 number
// takes longer than that. Bytes multiply as they are. So each x becomes an integer, once per call: a power of two times 16
// bits, the power from the largest of its group. bf16 has 8 significant bits, so an x down to 1/128 of the largest is
// exact and a smaller one is off by 1/65,536 of the largest. The 16 bits are two bytes, high * 256 + low, the two sums
// of their products are exact integers, and so is the group's. No weight is rounded, and scales are applied in fp32.
//
// fp32, or a CPU without these instructions: the levels become floats, and x stays what it is.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "int4.h"
#include "ops.h"

#if FOLOVLLM_BF16_DOT && defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define FOLOVLLM_INT4_DOT 1
#else
#define FOLOVLLM_INT4_DOT 0
#endif

namespace folovllm {
namespace {

constexpr int kMaxTile = 6;            // rows at a time: 24 sums hide the latency of dot, and fit 32 registers
constexpr int64_t kPanelRows = 96;     // rows whose inputs stay in L2 while blocks pass by
constexpr int64_t kAheadBytes = 8192; // what a tile alone asks for before it needs it
constexpr int64_t kGrainBytes = 1 << 14;  // of levels; less is not worth waking a thread: 4 times as much work a byte

typedef int32_t Ints __attribute__((vector_size(64)));   // [16]
typedef int8_t Bytes __attribute__((vector_size(16)));   // [16]

Floats to_floats(Ints v) {
  return __builtin_convertvector(v, Floats);
}

Ints load_bytes(const int8_t* p) {
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

// What a tile asks of memory while it computes with group `i` of its unit: the group `lead` further on, beyond the unit's
// end of the unit that begins at `next`. lead 0 asks for nothing new, lead = all groups for the whole next unit.
struct Fetch {
  const uint8_t *unit, *next;
  int64_t lead, groups, group_bytes;

  const uint8_t* during(int64_t i) const {
    i += lead;
    return i < groups ? unit + i * group_bytes : next + (i - groups) * group_bytes;
  }
};

// ---- x as floats

template <typename T>
class FloatRows {
 public:
  FloatRows(const at::Tensor& x, const Int4Problem& p)
      : x_(x.const_data_ptr<T>()), stride_(x.stride(0)), groups_(p.groups), group_size_(p.chunks * kInt4Chunk) {
    if (p.zeros != nullptr) {
      sums_.resize(p.rows * groups_);
      at::parallel_for(0, p.rows, /*grain_size=*/16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * groups_; i < end * groups_; ++i) {
          sums_[i] = sum_of(x_ + i / groups_ * stride_ + i % groups_ * group_size_);
        }
      });
    }
  }

  // R rows times one group of one block: sums of (level - zero) * x, without the scales. -> [R][2 halves of 16 outputs]
  template <int R>
  void dot(const uint8_t* levels, const int8_t* zeros, int64_t row, int64_t group, const uint8_t* ahead,
           Floats (&sums)[R][2]) const {
    const T* x = x_ + row * stride_ + group * group_size_;
    Floats s[R][2] = {};
    for (int64_t i = 0; i < group_size_; i += kInt4Chunk, levels += kInt4Line, ahead += kInt4Line) {
      __builtin_prefetch(ahead, /*write=*/0, R == 1 ? 3 : 2);  // for one row into L1: faster, and only then
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
  std::vector<float> sums_;  // [rows, groups]; only for zeros
};

// ---- x as integers

#if FOLOVLLM_INT4_DOT
class IntegerRows {
 public:
  IntegerRows(const at::Tensor& x, const Int4Problem& p)
      : groups_(p.groups), group_size_(p.chunks * kInt4Chunk), stride_(2 * groups_ * group_size_),
        digits_(new int8_t[p.rows * stride_]), scales_(new Scale[p.rows * groups_]) {
    const at::BFloat16* rows = x.const_data_ptr<at::BFloat16>();
    at::parallel_for(0, p.rows, /*grain_size=*/16, [&](int64_t begin, int64_t end) {
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
      __builtin_prefetch(ahead, /*write=*/0, R == 1 ? 3 : 2);  // for one row into L1: faster, and only then
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

  // _mm512_dpbusd_epi32, for which GCC 12 copies every sum to another register and, with many rows, to memory.
  static void add_products(__m512i& sums, __m512i levels, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(levels), "v"(x));
  }

  static __m512i four(const int8_t* x) {
    int digits;
    std::memcpy(&digits, x, sizeof(digits));
    return _mm512_set1_epi32(digits);
  }

  // A group of x -> for each 4 inputs their 4 high bytes and their 4 low ones.
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
      // 32,640 alone, the largest that a bf16 becomes, has no two such bytes: 127 * 256 + 127 is 32,639.
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

// ---- Tiles

// Rows row .. row + R of one unit: a block, or with kGated the gate's and, right behind it, the up projection's.
template <typename T, bool kGated, int R, typename Rows>
void tile(const Int4Problem& p, const Rows& x, T* out, int64_t unit, int64_t row, const Fetch& fetch) {
  constexpr int kParts = kGated ? 2 : 1;
  Floats total[kParts][R][2];
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    const int64_t block = unit * kParts + part;
    const float* scales = p.scales + block * p.groups * kInt4Block;
    Floats y[R][2];  // of its own, so that it stays in registers
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < 2; ++half) {
        y[r][half] = p.bias != nullptr ? load(p.bias + block * kInt4Block + half * kLanes) : Floats{};
      }
    }
    for (int64_t group = 0; group < p.groups; ++group, scales += kInt4Block) {
      const int64_t at = block * p.groups + group;
      const int8_t* zeros = p.zeros == nullptr ? nullptr : p.zeros + at * kInt4Block;
      if constexpr (R > 3) {
        asm volatile("" : "+m"(y));  // into memory: the registers are for the sums of dot
      }
      Floats sums[R][2];
      x.template dot<R>(p.levels + at * p.group_bytes(), zeros, row, group, fetch.during(part * p.groups + group), sums);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        y[r][0] += sums[r][0] * load(scales);
        y[r][1] += sums[r][1] * load(scales + kLanes);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      total[part][r][0] = y[r][0];
      total[part][r][1] = y[r][1];
    }
  }
  const int64_t first = unit * kInt4Block, count = p.out_features - first;
  for (int r = 0; r < R; ++r) {
    T* to = out + (row + r) * p.out_features + first;
    for (int half = 0; half < 2; ++half) {
      Floats y = total[0][r][half];
      if constexpr (kGated) {
        y = y / (1.0f + exp(-y)) * total[1][r][half];
      }
      if (count >= kInt4Block) {
        store(to + half * kLanes, y);
      } else {
        store(to + half * kLanes, y, std::clamp<int64_t>(count - half * kLanes, 0, kLanes));
      }
    }
  }
}

template <typename T, bool kGated, typename Rows, int... R>
constexpr auto all_tiles(std::integer_sequence<int, R...>) {
  return std::array{tile<T, kGated, R + 1, Rows>...};
}

// One unit for the rows of one panel; `next` is the one that this thread computes afterwards.
template <typename T, bool kGated, typename Rows>
void run(const Int4Problem& p, const Rows& x, T* out, int64_t panel, int64_t unit, int64_t next) {
  static constexpr auto tile_of = all_tiles<T, kGated, Rows>(std::make_integer_sequence<int, kMaxTile>{});
  const int64_t groups = (kGated ? 2 : 1) * p.groups, unit_bytes = groups * p.group_bytes();
  const int64_t rows = std::min(kPanelRows, p.rows - panel * kPanelRows), tiles = (rows + kMaxTile - 1) / kMaxTile;
  const int64_t a_little = std::clamp<int64_t>(kAheadBytes / p.group_bytes(), 1, groups);
  for (int64_t index = 0; index < tiles; ++index) {
    const int64_t first = rows * index / tiles, last = rows * (index + 1) / tiles;  // e.g. 7 rows are 3 and 4
    // A tile alone asks for what it needs a little later; of several the first asks for all of the next unit.
    const int64_t lead = tiles == 1 ? a_little : index == 0 ? groups : 0;
    const Fetch fetch{p.levels + unit * unit_bytes, p.levels + next * unit_bytes, lead, groups, p.group_bytes()};
    tile_of[last - first - 1](p, x, out, unit, panel * kPanelRows + first, fetch);
  }
}

// All panels and units; threads take the next when they are free, as in linear.cpp.
template <typename T, bool kGated, typename Rows>
void run_all(const Int4Problem& p, const Rows& x, T* out, int64_t units) {
  const int64_t total = (p.rows + kPanelRows - 1) / kPanelRows * units;
  const int64_t bytes = units * (kGated ? 2 : 1) * p.groups * p.group_bytes();
  const int64_t workers = std::clamp<int64_t>(bytes / kGrainBytes, 1, at::get_num_threads());
  std::atomic<int64_t> taken{0};
  at::parallel_for(0, workers, /*grain_size=*/1, [&](int64_t, int64_t) {
    for (int64_t i = taken++, after; i < total; i = after) {
      after = taken++;
      run<T, kGated>(p, x, out, i / units, i % units, after % units);
    }
  });
}

// ---- The operator

// x [rows, in] with its columns in the order of `perm` [width]; -1 is a column of zeros.
template <typename T>
at::Tensor permuted(const at::Tensor& x, const at::Tensor& perm) {
  const int64_t width = perm.numel();
  at::Tensor out = at::empty({x.size(0), width}, x.options());
  const int32_t* source = perm.const_data_ptr<int32_t>();
  const T* from = x.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  at::parallel_for(0, x.size(0), /*grain_size=*/16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < width; ++i) {
        to[row * width + i] = source[i] < 0 ? T(0.0f) : from[row * x.stride(0) + source[i]];
      }
    }
  });
  return out;
}

template <typename T, bool kGated>
at::Tensor multiply(const at::Tensor& x, const Int4Weight& w, int64_t out_features, bool native) {
  const at::Tensor rows = w.perm.numel() != 0 ? permuted<T>(x, w.perm) : x;
  at::Tensor out = at::empty({x.size(0), out_features}, x.options());
  const Int4Problem p{
      w.levels.const_data_ptr<uint8_t>(), w.scales.const_data_ptr<float>(),
      w.zeros.numel() != 0 ? w.zeros.const_data_ptr<int8_t>() : nullptr,
      w.bias.numel() != 0 ? w.bias.const_data_ptr<float>() : nullptr, rows.size(0), w.levels.size(1), w.levels.size(2),
      out_features};
  const int64_t units = w.levels.size(0) / (kGated ? 2 : 1);
#if FOLOVLLM_INT4_DOT
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    if (native) {
      run_all<T, kGated>(p, IntegerRows(rows, p), out.mutable_data_ptr<T>(), units);
      return out;
    }
  }
#endif
  run_all<T, kGated>(p, FloatRows<T>(rows, p), out.mutable_data_ptr<T>(), units);
  return out;
}

void check(const at::Tensor& x, const Int4Weight& w, int64_t out_features, bool gated) {
  const at::Tensor& levels = w.levels;
  TORCH_CHECK(levels.dim() == 4 && levels.size(3) == kInt4Line && levels.scalar_type() == at::kByte &&
              levels.is_contiguous() && levels.size(2) * kInt4Chunk <= kMaxInt4Group,
              "linear_int4: levels must be a contiguous uint8 [blocks, groups, chunks, 64], groups of up to ",
              kMaxInt4Group, " inputs; got ", levels.sizes());
  const int64_t blocks = levels.size(0), groups = levels.size(1), width = groups * levels.size(2) * kInt4Chunk;
  TORCH_CHECK(w.scales.numel() == blocks * groups * kInt4Block && w.scales.scalar_type() == at::kFloat &&
              w.scales.is_contiguous(), "linear_int4: scales must be a contiguous float32 [blocks, groups, 32]");
  TORCH_CHECK(w.zeros.numel() == 0 || (w.zeros.numel() == blocks * groups * kInt4Block &&
              w.zeros.scalar_type() == at::kChar && w.zeros.is_contiguous()),
              "linear_int4: zeros must be a contiguous int8 [blocks, groups, 32]");
  TORCH_CHECK(w.bias.numel() == 0 || (!gated && w.bias.numel() == blocks * kInt4Block &&
              w.bias.scalar_type() == at::kFloat && w.bias.is_contiguous()),
              "linear_int4: the bias must be float32 and padded to whole blocks of ", kInt4Block,
              "; a gated layer has none");
  TORCH_CHECK(w.perm.numel() == 0 ? x.size(-1) == width : w.perm.numel() == width && w.perm.is_contiguous() &&
              w.perm.scalar_type() == at::kInt, "linear_int4: x ", x.sizes(), " does not fit levels ", levels.sizes());
  const int64_t units = (out_features + kInt4Block - 1) / kInt4Block;
  TORCH_CHECK(blocks == (gated ? 2 : 1) * units, "linear_int4: ", out_features, " outputs do not fit levels ",
              levels.sizes());
}

}  // namespace

// x [..., in] times a weight of 4 bits, plus bias -> [..., out], rounded once. `gated`: silu(x gate^T) * (x up^T), where
// the blocks of gate and up take turns. Empty tensors: none. `native` = false: as in linear_packed.
at::Tensor linear_int4(const at::Tensor& x, const Int4Weight& weight, int64_t out_features, bool gated, bool native) {
  check(x, weight, out_features, gated);
  at::Tensor rows = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
  rows = rows.stride(1) == 1 ? rows : rows.contiguous();
  at::Tensor out;
  if (x.scalar_type() == at::kBFloat16) {
    out = gated ? multiply<at::BFloat16, true>(rows, weight, out_features, native)
                : multiply<at::BFloat16, false>(rows, weight, out_features, native);
  } else {
    TORCH_CHECK(x.scalar_type() == at::kFloat, "linear_int4 knows float32 and bfloat16, not ", x.scalar_type());
    out = gated ? multiply<float, true>(rows, weight, out_features, native)
                : multiply<float, false>(rows, weight, out_features, native);
  }
  if (x.dim() == 2) {
    return out;
  }
  auto shape = x.sizes().vec();
  shape.back() = out_features;
  return out.view(shape);
}

namespace {

at::Tensor linear_int4_op(const at::Tensor& x, const at::Tensor& levels, const at::Tensor& scales, const at::Tensor& zeros,
                          const at::Tensor& perm, const at::Tensor& bias, int64_t out_features, bool gated, bool native) {
  // Only here, where a caller's mistake can come from; a checked perm is read for every row.
  if (perm.numel() != 0 && perm.scalar_type() == at::kInt && perm.is_contiguous()) {
    const int32_t* source = perm.const_data_ptr<int32_t>();
    TORCH_CHECK(*std::max_element(source, source + perm.numel()) < x.size(-1), "linear_int4: perm is beyond x");
  }
  return linear_int4(x, {levels, scales, zeros, perm, bias}, out_features, gated, native);
}

}  // namespace
}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def(
      "linear_int4(Tensor x, Tensor levels, Tensor scales, Tensor zeros, Tensor perm, Tensor bias, int out_features, "
      "bool gated=False, bool native=True) -> Tensor");
}

TORCH_LIBRARY_IMPL(folovllm, CPU, m) {
  m.impl("linear_int4", &folovllm::linear_int4_op);
}
