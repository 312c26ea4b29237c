// Linear layers: the product of some rows of x with one unit of packed weights. linear.cpp hands out the units.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/ (its CPU build multiplies through oneDNN and, for AMX, sgl-kernels).
// Left out: AMX tiles, int8, transposed layouts. Source of the register blocking: Goto & van de Geijn 2008.
//
// To read it, begin with reference_linear.cpp, which computes the same in plain loops.
//
// For one token, every weight is read once and used once, so nothing but the order of the bytes matters. If the weight
// were stored row by row, the lanes of a vector would hold inputs of *one* output, and would have to be summed across.
// Packed, they hold the same inputs of *different* outputs. Each lane adds up its own output, and no sum across lanes is
// needed. A step takes 128 bytes of weights, in bf16 two inputs of 32 outputs, in fp32 one:
//
//   bf16  packed[block][pair][lane][2]    block = output / 32,  lane = output % 32,  pair = input / 2
//
//            outputs 0 .. 31 (2 vectors with AVX-512, 4 with AVX2)
//   pair 0   w[0][0] w[0][1] | w[1][0] w[1][1] | ... | w[31][0] w[31][1]      x (x[0], x[1]) broadcast to all lanes
//   pair 1   w[0][2] w[0][3] | w[1][2] w[1][3] | ... | w[31][2] w[31][3]      x (x[2], x[3])
//
//   fp32  packed[block][input][lane]
//
// With more tokens, each vector of weights is used for some 6 to 12 rows while it is in a register. What is fetched from
// memory meanwhile: WeightPrefetcher in prefetch.h.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "prefetch.h"
#include "row_pairs.h"
#include "simd.h"

namespace folovllm {
namespace {

constexpr int64_t kBlock = 32;  // outputs of a block

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// ---- The shape of a tile: R rows by V vectors of outputs, whose sums stay in registers

constexpr int kBlockVectors = kBlock / kWidth;
#if FOLOVLLM_AVX512  // 32 registers
constexpr int kTileRows = 8;      // rows at a time: 16 sums hide the latency of a product
constexpr int kMaxTileRows = 12;  // for up to 24 rows: with 8, a third tile would read the weights once more
constexpr int kTileVectors = 2;
#elif FOLOVLLM_NEON  // 32 registers
constexpr int kTileRows = 6, kMaxTileRows = 6;
constexpr int kTileVectors = 4;
#else                // 16 registers: 12 sums, 2 vectors of weights and one of x
constexpr int kTileRows = 6, kMaxTileRows = 6;
constexpr int kTileVectors = 2;
#endif

// A single row uses each weight once. It takes a whole block at a time, so that memory is read from end to end.
constexpr int tile_vectors(int rows) {
  return rows == 1 ? kBlockVectors : kTileVectors;
}

inline int64_t num_tiles(int64_t rows) {
  return 2 * kTileRows < rows && rows <= 2 * kMaxTileRows ? 2 : ceil_div(rows, kTileRows);
}

// ---- The arithmetic of a step, by type of weights
//
// A step consists of kPhases products of every weight vector with one number of x. `Input` is the type in which the
// kernel reads x.

template <typename T>
struct Arithmetic;

template <>
struct Arithmetic<float> {
  using Input = float;
  using Weights = Vec;
  static constexpr int kStepInputs = 1, kPhases = 1;

  static Vec weight(Words words, int) {
    return (Vec)words;
  }
  static Vec input(const float* x, int) {
    return broadcast(*x);
  }
  static Vec add_product(Vec sum, Vec w, Vec x) {
    return fmadd(w, x, sum);
  }
};

#if FOLOVLLM_BF16_DOT || FOLOVLLM_NEON_BF16
// Both products of a pair in one instruction.
template <>
struct Arithmetic<c10::BFloat16> {
  using Input = c10::BFloat16;
  using Weights = Words;
  static constexpr int kStepInputs = 2, kPhases = 1;

  static Words weight(Words words, int) {
    return words;
  }
  static Words input(const c10::BFloat16* x, int) {
    uint32_t pair;
    std::memcpy(&pair, x, sizeof(pair));  // x may begin at an odd element
    return broadcast(pair);
  }
  static Vec add_product(Vec sum, Words w, Words x) {
    return add_pairs(sum, w, x);
  }
};
#else
// The first inputs of the pairs, and then the second ones. x was converted to fp32 once; the weights stay bf16 in
// memory, and become fp32 in registers.
template <>
struct Arithmetic<c10::BFloat16> {
  using Input = float;
  using Weights = Vec;
  static constexpr int kStepInputs = 2, kPhases = 2;

  static Vec weight(Words words, int phase) {
    return phase == 0 ? even_halves(words) : odd_halves(words);
  }
  static Vec input(const float* x, int phase) {
    return broadcast(x[phase]);
  }
  static Vec add_product(Vec sum, Vec w, Vec x) {
    return fmadd(w, x, sum);
  }
};
#endif

// ---- Tiles

template <typename T>
struct LinearProblem {
  using Input = typename Arithmetic<T>::Input;
  // Rows whose inputs (288 KiB if there are 1,536) stay in L2 while they are multiplied with all units.
  static constexpr int64_t kPanelRows = 192 / sizeof(Input);

  const Input* x;      // [rows, steps * kStepInputs], rows x_stride apart
  const T* packed;     // [units * (1 or 2)] blocks of `steps` steps
  const float* bias;   // [units * 32] or null
  T* out;              // [rows, out_features]
  int64_t rows, steps, x_stride, out_features;
  UpcomingReads upcoming;

  int64_t num_panels() const {
    return ceil_div(rows, kPanelRows);
  }
};

// Rows row .. row + R of one unit, and V vectors of its outputs from output `first` on. A unit is one block of weights, or
// with kGated two: the gate's and, right behind it, the up projection's of the same outputs.
template <typename T, bool kGated, WeightFetch kMode, int R>
void tile(const LinearProblem<T>& p, int64_t unit, int64_t first, int64_t row, const char* fetch_begin, int64_t pace) {
  using A = Arithmetic<T>;
  constexpr int V = tile_vectors(R), kParts = kGated ? 2 : 1;
  const auto* x = p.x + row * p.x_stride;
  const char* weight = reinterpret_cast<const char*>(p.packed) + unit * kParts * p.steps * kStepBytes;
  const WeightPrefetcher<kMode> prefetcher{fetch_begin, pace};
  // Where pairs of rows are multiplied, an odd last row is one of a pair with itself.
  constexpr bool kInRowPairs = kRowPairs<T> && R > 1;
  constexpr int kSums = kInRowPairs ? R + R % 2 : R;
  Vec sum[kParts][kSums][V];
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part, weight += p.steps * kStepBytes) {
    Vec s[kSums][V];  // this part's own sums, so that they stay in registers
    for (int r = 0; r < kSums; ++r) {
      for (int v = 0; v < V; ++v) {
        s[r][v] = p.bias != nullptr ? load_vec(p.bias + unit * kBlock + first + v * kWidth) : Vec{};
      }
    }
    const auto add = [&](int64_t begin, int64_t end, const auto& fetch) __attribute__((always_inline)) {
#if FOLOVLLM_NEON_BF16
      if constexpr (kInRowPairs) {
        return add_row_pairs<R, V>(s, begin, end, weight + first * 4, kStepBytes, x, p.x_stride, fetch);
      }
#endif
      for (int64_t step = begin; step < end; ++step) {
        fetch(step - begin);
        const char* words = weight + step * kStepBytes + first * 4;
#pragma GCC unroll 2
        for (int phase = 0; phase < A::kPhases; ++phase) {
          typename A::Weights w[V];
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) {
            w[v] = A::weight(load_words(words + v * sizeof(Words)), phase);
          }
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const auto xr = A::input(x + r * p.x_stride + step * A::kStepInputs, phase);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
              s[r][v] = A::add_product(s[r][v], w[v], xr);
            }
          }
        }
      }
    };
    exchange_halves<kInRowPairs>(s);
    prefetcher.for_each_stretch(weight, p.steps, part, kParts, p.upcoming, add);
    exchange_halves<kInRowPairs>(s);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        sum[part][r][v] = s[r][v];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      Vec y = sum[0][r][v];
      if constexpr (kGated) {
        y = y / (1.0f + exp(-y)) * sum[1][r][v];
      }
      const int64_t place = unit * kBlock + first + v * kWidth, count = p.out_features - place;
      T* out = p.out + (row + r) * p.out_features + place;
      count >= kWidth ? store_vec(out, y) : store_vec(out, y, std::max<int64_t>(0, count));
    }
  }
}

template <typename T>
using TileFunction = void (*)(const LinearProblem<T>&, int64_t, int64_t, int64_t, const char*, int64_t);

template <typename T, bool kGated, WeightFetch kMode, int... R>
constexpr std::array<TileFunction<T>, sizeof...(R)> all_tiles(std::integer_sequence<int, R...>) {
  return {tile<T, kGated, kMode, R + 1>...};
}

// One unit for the rows of one panel; `next_weights` are those of the thread's next unit.
template <typename T, bool kGated>
void multiply_unit(const LinearProblem<T>& p, int64_t panel, int64_t unit, const char* next_weights) {
  constexpr auto kHeights = std::make_integer_sequence<int, kMaxTileRows>{};
  static constexpr std::array<std::array<TileFunction<T>, kMaxTileRows>, 3> tile_of = {  // by mode, and by rows less 1
      all_tiles<T, kGated, kFetchNothing>(kHeights), all_tiles<T, kGated, kFetchShare>(kHeights),
      all_tiles<T, kGated, kFetchAhead>(kHeights)};
  const int64_t begin = panel * p.kPanelRows, rows = std::min(p.kPanelRows, p.rows - begin);
  const int64_t heights = num_tiles(rows), widths = kBlockVectors / tile_vectors(static_cast<int>(rows));
  for (int64_t index = 0; index < widths * heights; ++index) {
    // E.g. 9 rows are cut into 4 and 5. Cut into 8 and 1, the last tile would read the weights for a single row.
    const int64_t top = rows * (index % heights) / heights, bottom = rows * (index % heights + 1) / heights;
    const WeightFetchPlan fetch = plan_weight_fetch(index, widths * heights, next_weights, (kGated ? 2 : 1) * p.steps);
    tile_of[fetch.mode][bottom - top - 1](p, unit, index / heights * kBlock / widths, begin + top, fetch.begin, fetch.pace);
  }
}

}  // namespace
}  // namespace folovllm
