// Linear layers over weights of 4 bits: unpacked in registers, a vector at a time, and multiplied as they are.
//
// Milestone: M7. vLLM counterpart: csrc/cpu/ (its CPU build multiplies GPTQ and AWQ weights of 4 bits) and, on GPUs,
// Marlin. Left out: activations of 8 bits, AMX. Source of the method: GPTQ, Frantar et al. 2022.
//
// A weight is scale * (level - zero), with a scale and a zero per output and group of inputs. Levels are 0 .. 15; stored
// as level - 8 they are -8 .. 7, which bf16 holds exactly. So the products with x are summed over a group as they are, in
// fp32, and each group's sum is scaled once:
//
//   y = sum over groups of scale * (sum of (level - 8) * x  -  (zero - 8) * sum of x)
//
// In a symmetric checkpoint zero is 8 and the second half is not there. No weight is ever rounded to bf16.
//
//   levels[block][group][chunk][64]   block = 32 outputs as in linear.cpp, chunk = 4 inputs: 64 bytes, a line of the cache
//
//   A chunk is 32 words of 16 bits: word 2 * lane + parity. Its four nibbles are four vectors of 32 bf16 numbers to be:
//   nibble 0: inputs 0, 1 of outputs 0 .. 15;  1: of outputs 16 .. 31;  2: inputs 2, 3 of outputs 0 .. 15;  3: of 16 .. 31
//
// One load, three shifts and four table look-ups (vpermw) make of a line what linear.cpp would read in four.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops.h"
#include "vectors.h"

#if FOLOVLLM_BF16_DOT && defined(__AVX512BW__)
#define FOLOVLLM_INT4_DOT 1
#else
#define FOLOVLLM_INT4_DOT 0
#endif

namespace folovllm {
namespace {

constexpr int64_t kBlock = 2 * kLanes;  // outputs of a block
constexpr int64_t kChunk = 4;           // inputs of a chunk
constexpr int64_t kChunkBytes = kBlock * kChunk / 2;
constexpr int kMaxTile = 8;             // rows at a time
constexpr int64_t kPanelRows = 96;      // rows whose inputs stay in L2 while blocks pass by
constexpr int64_t kAhead = 48;          // chunks, 3 KiB: as in linear.cpp
constexpr int64_t kGrain = 1 << 14;     // bytes of levels; less is not worth waking a thread: 4 times as much work a byte

typedef int8_t Bytes __attribute__((vector_size(16)));  // [16]

template <typename T>
struct Int4Problem {
  const T* x;             // [rows, groups * chunks * 4], rows x_stride apart
  const uint8_t* levels;  // [blocks, groups, chunks, 64]
  const float* scales;    // [blocks, groups, 32]
  const int8_t* zeros;    // the same shape, zero - 8; null: all are 0
  const float* sums;      // [rows, groups]: sums of x; null without zeros
  const float* bias;      // [blocks * 32] or null
  T* out;                 // [rows, out_features]
  int64_t rows, groups, chunks, x_stride, out_features;
};

// ---- One vector of weights: two inputs each of 16 outputs

#if FOLOVLLM_INT4_DOT
// -8 .. 7 in bf16, twice: the look-up takes five bits, of which the fifth belongs to the next nibble.
alignas(64) constexpr uint16_t kLevels[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

struct NativeWeights {
  __m512i pairs;

  template <int nibble>
  static NativeWeights expand(Bits chunk) {
    const __m512i index = nibble == 0 ? (__m512i)chunk : _mm512_srli_epi16((__m512i)chunk, 4 * nibble);
    return {_mm512_permutexvar_epi16(index, _mm512_load_si512(kLevels))};
  }
  Floats dot(Floats sum, const at::BFloat16* x) const {
    int pair;
    std::memcpy(&pair, x, sizeof(pair));
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(pair));
  }
};
#endif

// For any CPU, and for fp32: the two levels of each lane as floats.
struct PlainWeights {
  Floats even, odd;

  template <int nibble>
  static PlainWeights expand(Bits chunk) {
    typedef int32_t Ints __attribute__((vector_size(64)));
    const Bits low = (chunk >> (4 * nibble)) & 15u, high = (chunk >> (16 + 4 * nibble)) & 15u;
    return {__builtin_convertvector((Ints)low - 8, Floats), __builtin_convertvector((Ints)high - 8, Floats)};
  }
  template <typename T>
  Floats dot(Floats sum, const T* x) const {
    sum += even * static_cast<float>(x[0]);
    return sum + odd * static_cast<float>(x[1]);
  }
};

template <typename T, bool native>
struct Choose {
  using Weights = PlainWeights;
};
#if FOLOVLLM_INT4_DOT
template <>
struct Choose<at::BFloat16, true> {
  using Weights = NativeWeights;
};
#endif

// ---- Tiles

// Rows row .. row + R of one unit: a block, or with kGated the gate's and, right behind it, the up projection's.
template <typename T, bool native, bool kGated, int R>
void tile(const Int4Problem<T>& p, int64_t unit, int64_t row, int64_t ahead) {
  using Weights = typename Choose<T, native>::Weights;
  constexpr int kParts = kGated ? 2 : 1;
  constexpr int kChains = R <= 4 ? 2 : 1;  // sums of even and odd pairs apart: a few rows alone do not hide dot's latency
  const T* rows = p.x + row * p.x_stride;
  Floats total[kParts][R][2];
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    const int64_t block = unit * kParts + part;
    const uint8_t* levels = p.levels + block * p.groups * p.chunks * kChunkBytes;
    const float* scales = p.scales + block * p.groups * kBlock;
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < 2; ++half) {
        total[part][r][half] = p.bias != nullptr ? load(p.bias + block * kBlock + half * kLanes) : Floats{};
      }
    }
    const T* x = rows;
    for (int64_t group = 0; group < p.groups; ++group, scales += kBlock) {
      Floats s[kChains][R][2] = {};
      for (int64_t chunk = 0; chunk < p.chunks; ++chunk, levels += kChunkBytes, x += kChunk) {
        if (ahead >= 0) {
          __builtin_prefetch(levels + ahead, /*write=*/0, /*locality=*/2);
        }
        Bits words;
        std::memcpy(&words, levels, sizeof(words));
        const Weights w00 = Weights::template expand<0>(words), w01 = Weights::template expand<1>(words);
        const Weights w10 = Weights::template expand<2>(words), w11 = Weights::template expand<3>(words);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          s[0][r][0] = w00.dot(s[0][r][0], x + r * p.x_stride);
          s[0][r][1] = w01.dot(s[0][r][1], x + r * p.x_stride);
          s[kChains - 1][r][0] = w10.dot(s[kChains - 1][r][0], x + r * p.x_stride + 2);
          s[kChains - 1][r][1] = w11.dot(s[kChains - 1][r][1], x + r * p.x_stride + 2);
        }
      }
      const Floats scale[2] = {load(scales), load(scales + kLanes)};
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        for (int half = 0; half < 2; ++half) {
          Floats sum = s[0][r][half];
          if constexpr (kChains == 2) {
            sum += s[1][r][half];
          }
          if (p.zeros != nullptr) {
            Bytes zero;
            std::memcpy(&zero, p.zeros + (block * p.groups + group) * kBlock + half * kLanes, sizeof(zero));
            sum -= __builtin_convertvector(zero, Floats) * p.sums[(row + r) * p.groups + group];
          }
          total[part][r][half] += sum * scale[half];
        }
      }
    }
  }
  const int64_t first = unit * kBlock;
  for (int r = 0; r < R; ++r) {
    for (int half = 0; half < 2; ++half) {
      Floats y = total[0][r][half];
      if constexpr (kGated) {
        y = y / (1.0f + exp(-y)) * total[1][r][half];
      }
      T* out = p.out + (row + r) * p.out_features + first + half * kLanes;
      const int64_t count = p.out_features - first - half * kLanes;
      if (count >= kLanes) {
        store(out, y);
      } else if (count > 0) {
        store(out, y, count);
      }
    }
  }
}

template <typename T, bool native, bool kGated, int... R>
constexpr auto all_tiles(std::integer_sequence<int, R...>) {
  return std::array{tile<T, native, kGated, R + 1>...};
}

template <typename T, bool native, bool kGated>
void run(const Int4Problem<T>& p, int64_t begin, int64_t end) {
  static constexpr auto tiles_of = all_tiles<T, native, kGated>(std::make_integer_sequence<int, kMaxTile>{});
  const int64_t unit_bytes = (kGated ? 2 : 1) * p.groups * p.chunks * kChunkBytes;
  for (int64_t panel = 0; panel < p.rows; panel += kPanelRows) {
    const int64_t rows = std::min(kPanelRows, p.rows - panel), tiles = (rows + kMaxTile - 1) / kMaxTile;
    for (int64_t unit = begin; unit < end; ++unit) {
      for (int64_t index = 0; index < tiles; ++index) {
        const int64_t first = rows * index / tiles, last = rows * (index + 1) / tiles;
        // A tile alone asks for what it needs a little later; of several the first asks for all of the next unit.
        const int64_t ahead = tiles == 1 ? kAhead * kChunkBytes : index == 0 ? unit_bytes : -1;
        tiles_of[last - first - 1](p, unit, panel + first, ahead);
      }
    }
  }
}

// ---- Inputs

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

template <typename T>
std::vector<float> group_sums(const Int4Problem<T>& p) {
  const int64_t size = p.chunks * kChunk;
  std::vector<float> sums(p.rows * p.groups);
  at::parallel_for(0, p.rows, /*grain_size=*/16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * p.groups; i < end * p.groups; ++i) {
      const T* x = p.x + i / p.groups * p.x_stride + i % p.groups * size;
      Floats total = {};
      int64_t j = 0;
      for (; j + kLanes <= size; j += kLanes) {
        total += load(x + j);
      }
      sums[i] = sum(j < size ? total + load(x + j, size - j) : total);
    }
  });
  return sums;
}

template <typename T, bool kGated>
at::Tensor multiply(const at::Tensor& x, const Int4Weight& w, int64_t out_features, bool native) {
  const bool is_permuted = w.perm.numel() != 0, asymmetric = w.zeros.numel() != 0;
  const at::Tensor rows = is_permuted ? permuted<T>(x, w.perm) : x;
  at::Tensor out = at::empty({x.size(0), out_features}, x.options());
  Int4Problem<T> p{
      rows.const_data_ptr<T>(), w.levels.const_data_ptr<uint8_t>(), w.scales.const_data_ptr<float>(),
      asymmetric ? w.zeros.const_data_ptr<int8_t>() : nullptr, nullptr,
      w.bias.numel() != 0 ? w.bias.const_data_ptr<float>() : nullptr, out.mutable_data_ptr<T>(), rows.size(0),
      w.levels.size(1), w.levels.size(2), rows.stride(0), out_features};
  std::vector<float> sums;
  if (asymmetric) {
    sums = group_sums(p);
    p.sums = sums.data();
  }
  const int64_t units = w.levels.size(0) / (kGated ? 2 : 1);
  const int64_t unit_bytes = (kGated ? 2 : 1) * p.groups * p.chunks * kChunkBytes;
  at::parallel_for(0, units, (kGrain + unit_bytes - 1) / unit_bytes, [&](int64_t begin, int64_t end) {
    native ? run<T, true, kGated>(p, begin, end) : run<T, false, kGated>(p, begin, end);
  });
  return out;
}

void check(const at::Tensor& x, const Int4Weight& w, int64_t out_features, bool gated) {
  const at::Tensor& levels = w.levels;
  TORCH_CHECK(levels.dim() == 4 && levels.size(3) == kChunkBytes && levels.scalar_type() == at::kByte &&
              levels.is_contiguous(), "linear_int4: levels must be a contiguous uint8 [blocks, groups, chunks, 64]");
  const int64_t blocks = levels.size(0), groups = levels.size(1), width = groups * levels.size(2) * kChunk;
  TORCH_CHECK(w.scales.numel() == blocks * groups * kBlock && w.scales.scalar_type() == at::kFloat &&
              w.scales.is_contiguous(), "linear_int4: scales must be a contiguous float32 [blocks, groups, 32]");
  TORCH_CHECK(w.zeros.numel() == 0 || (w.zeros.numel() == blocks * groups * kBlock &&
              w.zeros.scalar_type() == at::kChar && w.zeros.is_contiguous()),
              "linear_int4: zeros must be a contiguous int8 [blocks, groups, 32]");
  TORCH_CHECK(w.bias.numel() == 0 || (!gated && w.bias.numel() == blocks * kBlock &&
              w.bias.scalar_type() == at::kFloat && w.bias.is_contiguous()),
              "linear_int4: the bias must be float32 and padded to whole blocks of ", kBlock, "; a gated layer has none");
  TORCH_CHECK(w.perm.numel() == 0 ? x.size(-1) == width : w.perm.numel() == width && w.perm.is_contiguous() &&
              w.perm.scalar_type() == at::kInt, "linear_int4: x ", x.sizes(), " does not fit levels ", levels.sizes());
  const int64_t units = (out_features + kBlock - 1) / kBlock;
  TORCH_CHECK(blocks == (gated ? 2 : 1) * units, "linear_int4: ", out_features, " outputs do not fit levels ",
              levels.sizes());
}

}  // namespace

// x [..., in] times a weight of 4 bits, plus bias -> [..., out], rounded once. `gated`: silu(x gate^T) * (x up^T), where
// the blocks of gate and up take turns. perm [groups * chunks * 4]: which input each place of the levels is for, -1 for
// none; empty where they lie as x does. Other empty tensors: none. `native` = false: as in linear_packed.
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
