// Linear layers over weights of 4 bits. They are unpacked in registers, a line of the cache at a time, and multiplied
// as integers.
//
// Milestone: M7. vLLM counterpart: csrc/cpu/cpu_wna16.cpp (after v0.11.0) and, on GPUs, Marlin. Left out: AMX.
// Sources: GPTQ (Frantar et al. 2022); integer dot products with a scale per group of x as in llama.cpp, but with 16
// bits instead of 8.
//
//   y = sum over groups of scale * (sum of (level - 8) * x  -  (zero - 8) * sum of x)          see int4_layout.h
//
// For one token, memory delivers a line of 128 weights in about 8 cycles. To turn each level into a floating-point number
// would take longer; an AND and a shift turn it into an integer. So each x becomes an integer, too, once per call: 16
// bits times a power of two, which the largest x of the group decides. bf16 has 8 significant bits, so an x down to 1/128
// of the largest is exact, and a smaller one is off by at most 1/32,768 of the largest. The sums of products are exact.
// No weight is rounded, and scales are applied in fp32.
//
// If x is fp32, the levels become floats, and x stays as it is.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "int4_inputs.h"
#include "int4_layout.h"
#include "int4_prefetch.h"
#include "simd.h"

namespace folovllm {

constexpr int64_t kInt4PanelRows = 96;  // rows whose inputs stay in L2 for all units

// Rows row .. row + R of one unit: a block, or with kGated the gate's and, right behind it, the up projection's.
template <typename T, bool kGated, int R, typename Rows>
void int4_tile(const Int4Problem& p, const Rows& x, T* out, int64_t unit, int64_t row,
               const Int4Prefetcher& prefetcher,
               PrefetchQueue* queue) {
  constexpr int kParts = kGated ? 2 : 1;
  Vec total[kParts][R][kBlockVecs];
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    const int64_t block = unit * kParts + part;
    Vec y[R][kBlockVecs];  // this part's own sums, so that few of them stay in registers
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kBlockVecs; ++v) {
        y[r][v] = p.bias != nullptr ? load_vec(p.bias + block * kInt4Block + v * kWidth) : Vec{};
      }
    }
    Int4PiecePrefetcher pieces(queue, p.groups, p.group_size());
    for (int64_t group = 0; group < p.groups; ++group) {
      pieces.fetch_during(group);
      const int64_t at = block * p.groups + group;
      const Int4Group weights{p.levels + at * p.group_bytes(), p.scales + at * kInt4Block,
                              p.zeros == nullptr ? nullptr : p.zeros + at * kInt4Block,
                              prefetcher.during(part * p.groups + group)};
      if constexpr (R * kBlockVecs > 6) {
        asm volatile("" : "+m"(y));  // moves y into memory: the sums of `add_group` need the registers
      }
      x.template add_group<R>(weights, row, group, y);
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kBlockVecs; ++v) {
        total[part][r][v] = y[r][v];
      }
    }
  }
  const int64_t first = unit * kInt4Block, count = p.out_features - first;
  for (int r = 0; r < R; ++r) {
    T* to = out + (row + r) * p.out_features + first;
    for (int v = 0; v < kBlockVecs; ++v) {
      Vec y = total[0][r][v];
      if constexpr (kGated) {
        y = y / (1.0f + exp(-y)) * total[1][r][v];
      }
      if (count >= kInt4Block) {
        store_vec(to + v * kWidth, y);
      } else if (v * kWidth < count) {
        store_vec(to + v * kWidth, y, std::min<int64_t>(count - v * kWidth, kWidth));
      }
    }
  }
}

template <typename T, bool kGated, typename Rows, int... R>
constexpr auto all_int4_tiles(std::integer_sequence<int, R...>) {
  return std::array{int4_tile<T, kGated, R + 1, Rows>...};
}

// One unit for the rows of one panel. `next` is the unit that this thread computes afterwards. A single tile waits for
// its weights and leaves `queue` alone.
template <bool kGated, typename T, typename Rows>
void multiply_int4_unit(const Int4Problem& p, const Rows& x, T* out, int64_t panel, int64_t unit, int64_t next,
                        PrefetchQueue* queue) {
  static constexpr auto tile_of = all_int4_tiles<T, kGated, Rows>(std::make_integer_sequence<int, Rows::kMaxRows>{});
  const int64_t groups = (kGated ? 2 : 1) * p.groups, unit_bytes = groups * p.group_bytes();
  const int64_t rows = std::min(kInt4PanelRows, p.rows - panel * kInt4PanelRows);
  const int64_t tiles = (rows + Rows::kMaxRows - 1) / Rows::kMaxRows;
  for (int64_t index = 0; index < tiles; ++index) {
    const int64_t first = rows * index / tiles, last = rows * (index + 1) / tiles;  // e.g. 7 rows are 3 and 4
    const Int4Prefetcher prefetcher(p.levels + unit * unit_bytes, p.levels + next * unit_bytes, groups, p.group_bytes(),
                                    index, tiles);
    tile_of[last - first - 1](p, x, out, unit, panel * kInt4PanelRows + first, prefetcher, tiles > 1 ? queue : nullptr);
  }
}

}  // namespace folovllm
