// Linear layers over weights of 4 bits. They are unpacked in registers, a line of the cache at a time, and multiplied
// as integers.
//
// Milestone: M7. vLLM counterpart: csrc/cpu/cpu_wna16.cpp (after v0.11.0) and, on GPUs, Marlin. Left out: AMX.
// Sources: GPTQ (Frantar et al. 2022); integer dot products with a scale per group of x as in llama.cpp, but with 16
// bits instead of 8.
//
//   y = sum over groups of scale * (sum of (level - 8) * x  -  (zero - 8) * sum of x)          see int4_layout.h
//
// For one token, memory delivers a line of 128 weights in about 8 cycles. To turn each level into a bf16 number would
// take longer; bytes can be multiplied as they are. So each x becomes an integer, once per call: 16 bits times a power
// of two, which the largest x of the group decides. bf16 has 8 significant bits, so an x down to 1/128 of the largest
// is exact, and a smaller one is off by at most 1/32,768 of the largest. The 16 bits are two bytes, high * 256 + low.
// The two sums of their products are exact integers, and so is the group's sum. No weight is rounded, and scales are
// applied in fp32.
//
// If x is fp32, or if the CPU lacks these instructions, the levels become floats, and x stays as it is.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "int4_inputs.h"
#include "ops.h"
#include "work_ranges.h"

namespace folovllm {
namespace {

constexpr int kMaxTileRows = 6;           // rows at a time: 24 sums hide the latency of `dot`, and fit 32 registers
constexpr int64_t kPanelRows = 96;        // rows whose inputs stay in L2 for all units
constexpr int64_t kGrainBytes = 1 << 14;  // of levels; fewer are done before another thread wakes up

// ---- Tiles

// Rows row .. row + R of one unit: a block, or with kGated the gate's and, right behind it, the up projection's.
template <typename T, bool kGated, int R, typename Rows>
void tile(const Int4Problem& p, const Rows& x, T* out, int64_t unit, int64_t row, const Int4Prefetcher& prefetcher) {
  constexpr int kParts = kGated ? 2 : 1;
  Floats total[kParts][R][2];
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    const int64_t block = unit * kParts + part;
    const float* scales = p.scales + block * p.groups * kInt4Block;
    Floats y[R][2];  // this part's own sums, so that they stay in registers
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < 2; ++half) {
        y[r][half] = p.bias != nullptr ? load(p.bias + block * kInt4Block + half * kLanes) : Floats{};
      }
    }
    for (int64_t group = 0; group < p.groups; ++group, scales += kInt4Block) {
      const int64_t at = block * p.groups + group;
      const int8_t* zeros = p.zeros == nullptr ? nullptr : p.zeros + at * kInt4Block;
      if constexpr (R > 3) {
        asm volatile("" : "+m"(y));  // moves y into memory: the sums of `dot` need the registers
      }
      Floats sums[R][2];
      const uint8_t* ahead = prefetcher.during(part * p.groups + group);
      x.template dot<R>(p.levels + at * p.group_bytes(), zeros, row, group, ahead, sums);
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

// One unit for the rows of one panel. `next` is the unit that this thread computes afterwards.
template <typename T, bool kGated, typename Rows>
void multiply_unit(const Int4Problem& p, const Rows& x, T* out, int64_t panel, int64_t unit, int64_t next) {
  static constexpr auto tile_of = all_tiles<T, kGated, Rows>(std::make_integer_sequence<int, kMaxTileRows>{});
  const int64_t groups = (kGated ? 2 : 1) * p.groups, unit_bytes = groups * p.group_bytes();
  const int64_t rows = std::min(kPanelRows, p.rows - panel * kPanelRows);
  const int64_t tiles = (rows + kMaxTileRows - 1) / kMaxTileRows;
  for (int64_t index = 0; index < tiles; ++index) {
    const int64_t first = rows * index / tiles, last = rows * (index + 1) / tiles;  // e.g. 7 rows are 3 and 4
    const Int4Prefetcher prefetcher(p.levels + unit * unit_bytes, p.levels + next * unit_bytes, groups, p.group_bytes(),
                                    index, tiles);
    tile_of[last - first - 1](p, x, out, unit, panel * kPanelRows + first, prefetcher);
  }
}

// All panels and units, as in linear.cpp.
template <typename T, bool kGated, typename Rows>
void multiply_all(const Int4Problem& p, const Rows& x, T* out, int64_t units) {
  const int64_t total = (p.rows + kPanelRows - 1) / kPanelRows * units;
  const int64_t bytes = units * (kGated ? 2 : 1) * p.groups * p.group_bytes();
  const int64_t workers = std::clamp<int64_t>(bytes / kGrainBytes, 1, ThreadTeam::size());
  WorkRanges(total, workers).for_each([&](int64_t /*thread*/, int64_t i, int64_t next) {
    multiply_unit<T, kGated>(p, x, out, i / units, i % units, next == WorkRanges::kNone ? 0 : next % units);
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
  ThreadTeam::run_ranges(x.size(0), /*grain=*/16, [&](int64_t begin, int64_t end) {
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
      multiply_all<T, kGated>(p, IntegerInputs(rows, p), out.mutable_data_ptr<T>(), units);
      return out;
    }
  }
#endif
  multiply_all<T, kGated>(p, FloatInputs<T>(rows, p), out.mutable_data_ptr<T>(), units);
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

// x [..., in] times a weight of 4 bits, plus bias -> [..., out], rounded once. If `gated`: silu(x gate^T) * (x up^T),
// with a weight in which the blocks of gate and up take turns. An empty tensor means that there is none. native=false
// takes the path of a CPU without dot products of bytes, as in linear_packed.
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

at::Tensor linear_int4_op(const at::Tensor& x, const at::Tensor& levels, const at::Tensor& scales,
                          const at::Tensor& zeros, const at::Tensor& perm, const at::Tensor& bias, int64_t out_features,
                          bool gated, bool native) {
  // A caller's mistake can come in only here, so perm is checked here and not in each layer of a step.
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
