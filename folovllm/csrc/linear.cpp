// bf16 linear layers over weights that are packed once: one kernel for a single token, which runs at memory speed, and
// for many.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/ (its CPU build multiplies through oneDNN and, for AMX, sgl-kernels).
// Left out: AMX tiles, int8, transposed layouts. Source of the register blocking: Goto & van de Geijn 2008.
//
// To read it, begin with reference_linear.cpp, which computes the same in plain loops.
//
// For one token, every weight is read once and used once, so nothing but the order of the bytes matters. If the weight
// were stored row by row, the 16 lanes of a vector would hold 16 inputs of *one* output, and would have to be summed
// across. Packed, they hold one pair of inputs of 16 *different* outputs. Each lane adds up its own output, and no sum
// across lanes is needed:
//
//   packed[block][pair][lane][2]      block = output / 32,  lane = output % 32,  pair = input / 2
//
//            outputs 0 .. 31 (2 vectors of 16 lanes)
//   pair 0   w[0][0] w[0][1] | w[1][0] w[1][1] | ... | w[31][0] w[31][1]      x (x[0], x[1]) broadcast to all lanes
//   pair 1   w[0][2] w[0][3] | w[1][2] w[1][3] | ... | w[31][2] w[31][3]      x (x[2], x[3])
//
// With more tokens, each pair of weight vectors is used for some 8 rows while it is in registers. What is fetched from
// memory meanwhile: WeightPrefetcher in prefetch.h.

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <utility>

#include "ops.h"
#include "work_ranges.h"
#include "simd.h"

namespace folovllm {
namespace {

constexpr int64_t kBlock = 2 * kLanes;    // outputs of a block: two vectors, which share each broadcast of x
constexpr int kTileRows = 8;              // rows at a time: 16 sums hide the latency of `dot`, and fit 32 registers
constexpr int kMaxTileRows = 12;          // for up to 24 rows: with 8, a third tile would read the weights once more
constexpr int64_t kPanelRows = 96;        // rows whose inputs (96 x 1,536 x 2 bytes) stay in L2 for all units
constexpr int64_t kGrainBytes = 1 << 16;  // of weights; fewer are done before another thread wakes up

using Pairs = Bits; // [16], each two bf16: the even input in the low half

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline uint32_t load_pair(const at::BFloat16* x) {
  uint32_t pair;
  std::memcpy(&pair, x, sizeof(pair)); // x may begin at an odd element
  return pair;
}

// sum + w.even * x.even + w.odd * x.odd in every lane.
template <bool native>
inline Floats dot(Floats sum, Pairs w, uint32_t x) {
#if FOLOVLLM_BF16_DOT
  if constexpr (native) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)));
  }
#endif
  // A bf16 is the upper half of an fp32. The compiler lowers these vectors to whatever the CPU has.
  const Pairs pair = Pairs{} + x;
  const Pairs high = Pairs{} + 0xffff0000u;
  sum += (Floats)(w << 16) * (Floats)(pair << 16);
  return sum + (Floats)(w & high) * (Floats)(pair & high);
}

struct LinearProblem {
  const at::BFloat16* x;       // [rows, 2 * pairs], rows x_stride apart
  const at::BFloat16* packed;  // [units * (1 or 2), pairs, 32, 2]
  const float* bias;           // [units * 32] or null
  at::BFloat16* out;           // [rows, out_features]
  int64_t rows, pairs, x_stride, out_features;
  UpcomingReads upcoming;
};

// Rows row .. row + R of one unit. A unit is one block of weights, or with kGated two: the gate's and, right behind it,
// the up projection's of the same outputs.
template <bool native, bool kGated, WeightFetch kMode, int R>
void tile(const LinearProblem& p, int64_t unit, int64_t row, const at::BFloat16* fetch_begin, int64_t pace) {
  constexpr int64_t kParts = kGated ? 2 : 1;
  const at::BFloat16* x = p.x + row * p.x_stride;
  const at::BFloat16* weight = p.packed + unit * kParts * p.pairs * kBlock * 2;
  const WeightPrefetcher<kMode> prefetcher{fetch_begin, pace};
  Floats sum[kParts][R][2];
#pragma GCC unroll 2
  for (int64_t part = 0; part < kParts; ++part, weight += p.pairs * kBlock * 2) {
    Floats s[R][2];  // this part's own sums, so that they stay in registers
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < 2; ++half) {
        s[r][half] = p.bias != nullptr ? load(p.bias + unit * kBlock + half * kLanes) : Floats{};
      }
    }
    const auto add = [&](int64_t begin, int64_t end, const auto& fetch) __attribute__((always_inline)) {
      for (int64_t pair = begin; pair < end; ++pair) {
        fetch(pair - begin);
        Pairs w0, w1;
        std::memcpy(&w0, weight + pair * 2 * kBlock, sizeof(w0));
        std::memcpy(&w1, weight + pair * 2 * kBlock + 2 * kLanes, sizeof(w1));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const uint32_t xr = load_pair(x + r * p.x_stride + 2 * pair);
          s[r][0] = dot<native>(s[r][0], w0, xr);
          s[r][1] = dot<native>(s[r][1], w1, xr);
        }
      }
    };
    prefetcher.for_each_stretch(weight, p.pairs, part, kParts, p.upcoming, add);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      sum[part][r][0] = s[r][0];
      sum[part][r][1] = s[r][1];
    }
  }
  const int64_t first = unit * kBlock, count = p.out_features - first;
  for (int r = 0; r < R; ++r) {
    at::BFloat16* out = p.out + (row + r) * p.out_features + first;
    for (int half = 0; half < 2; ++half) {
      Floats y = sum[0][r][half];
      if constexpr (kGated) {
        y = y / (1.0f + exp(-y)) * sum[1][r][half];
      }
      if (count >= kBlock) {
        store(out + half * kLanes, y);
      } else {
        store(out + half * kLanes, y, std::clamp<int64_t>(count - half * kLanes, 0, kLanes));
      }
    }
  }
}

using TileFunction = void (*)(const LinearProblem&, int64_t, int64_t, const at::BFloat16*, int64_t);

template <bool native, bool kGated, WeightFetch kMode, int... R>
constexpr std::array<TileFunction, sizeof...(R)> all_tiles(std::integer_sequence<int, R...>) {
  return {tile<native, kGated, kMode, R + 1>...};
}

int64_t num_tiles(int64_t rows) {
  return 2 * kTileRows < rows && rows <= 2 * kMaxTileRows ? 2 : ceil_div(rows, kTileRows);
}

// One unit for the rows of one panel; `next_weights` are those of the thread's next unit.
template <bool native, bool kGated>
void multiply_unit(const LinearProblem& p, int64_t panel, int64_t unit, const at::BFloat16* next_weights) {
  constexpr auto kHeights = std::make_integer_sequence<int, kMaxTileRows>{};
  static constexpr std::array<std::array<TileFunction, kMaxTileRows>, 3> tile_of = { // by mode, and by rows less 1
      all_tiles<native, kGated, kFetchNothing>(kHeights), all_tiles<native, kGated, kFetchShare>(kHeights),
      all_tiles<native, kGated, kFetchAhead>(kHeights)};
  const int64_t rows = std::min(kPanelRows, p.rows - panel * kPanelRows), tiles = num_tiles(rows);
  for (int64_t index = 0; index < tiles; ++index) {
    // E.g. 9 rows are cut into 4 and 5. Cut into 8 and 1, the last tile would read the weights for a single row.
    const int64_t first = rows * index / tiles, last = rows * (index + 1) / tiles;
    const WeightFetchPlan fetch = plan_weight_fetch(index, tiles, next_weights, kGated ? 2 * p.pairs : p.pairs);
    tile_of[fetch.mode][last - first - 1](p, unit, panel * kPanelRows + first, fetch.begin, fetch.pace);
  }
}

// All panels and units.
template <bool native, bool kGated>
void multiply_all(const LinearProblem& p, int64_t units) {
  const int64_t size = (kGated ? 2 : 1) * p.pairs * kBlock * 2, total = ceil_div(p.rows, kPanelRows) * units;
  const int64_t workers = std::clamp<int64_t>(units * size * 2 / kGrainBytes, 1, ThreadTeam::size());
  WorkRanges(total, workers).for_each([&](int64_t thread, int64_t piece, int64_t next) {
    const at::BFloat16* next_weights = next != WorkRanges::kNone
                                           ? p.packed + next % units * size
                                           : p.upcoming.first_weight(thread, workers, p.packed);
    multiply_unit<native, kGated>(p, piece / units, piece % units, next_weights);
  });
}

// The product that both operators compute: x [..., in] times the packed weight -> [..., out].
template <bool kGated>
at::Tensor multiply(const at::Tensor& x, const at::Tensor& packed, const float* bias, int64_t out_features, bool native,
                    const UpcomingReads& upcoming) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && packed.scalar_type() == at::kBFloat16, "linear_packed wants bf16");
  constexpr int64_t kParts = kGated ? 2 : 1;
  const int64_t units = packed.size(0) / kParts, pairs = packed.size(1), in_features = x.size(-1);
  TORCH_CHECK(ceil_div(in_features, 2) == pairs && ceil_div(out_features, kBlock) == units, "linear_packed: x ",
              x.sizes(), " and ", out_features, " outputs do not fit the packed weight ", packed.sizes());
  auto shape = x.sizes().vec();
  shape.back() = out_features;
  at::Tensor rows = x.dim() == 2 ? x : x.reshape({-1, in_features});
  if (in_features % 2 != 0) {
    rows = at::constant_pad_nd(rows, {0, 1});
  }
  if (rows.stride(1) != 1) {
    rows = rows.contiguous();
  }
  at::Tensor out = at::empty({rows.size(0), out_features}, x.options());
  const LinearProblem p{
      rows.const_data_ptr<at::BFloat16>(), packed.const_data_ptr<at::BFloat16>(), bias,
      out.mutable_data_ptr<at::BFloat16>(), rows.size(0), pairs, rows.stride(0), out_features,
      upcoming};
  native ? multiply_all<true, kGated>(p, units) : multiply_all<false, kGated>(p, units);
  return x.dim() == 2 ? out : out.view(shape);
}

} // namespace

// weight [out, in] bf16 -> [ceil(out / 32), ceil(in / 2), 32, 2], zeros beyond the edges.
at::Tensor pack_weight(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kBFloat16, "pack_weight wants a bf16 matrix");
  const int64_t blocks = ceil_div(weight.size(0), kBlock), pairs = ceil_div(weight.size(1), 2);
  const int64_t rows = blocks * kBlock - weight.size(0), columns = pairs * 2 - weight.size(1);
  return at::constant_pad_nd(weight, {0, columns, 0, rows})
      .view({blocks, kBlock, pairs, 2})
      .transpose(1, 2)
      .contiguous();
}

// x [..., in] times the packed weight, plus bias [32 * blocks] fp32 -> [..., out], rounded once. native=false takes the
// path of a CPU without bf16 dot products, so that it can be tested on one that has them.
at::Tensor linear_packed(
    const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias, int64_t out_features,
    bool native, const UpcomingReads& upcoming) {
  TORCH_CHECK(!bias || (bias->numel() == packed.size(0) * kBlock && bias->is_contiguous() &&
              bias->scalar_type() == at::kFloat), "linear_packed: the bias must be float32 and padded to whole blocks of ",
              kBlock);
  return multiply<false>(x, packed, bias ? bias->const_data_ptr<float>() : nullptr, out_features, native, upcoming);
}

// silu(x gate^T) * (x up^T) [..., out], rounded once: the gate and up projections of an MLP together with the
// activation. The weight is pack_weight of both, whose blocks take turns: gate 0, up 0, gate 1, up 1, ...
at::Tensor linear_silu_packed(const at::Tensor& x, const at::Tensor& packed, int64_t out_features, bool native,
                              const UpcomingReads& upcoming) {
  TORCH_CHECK(packed.size(0) % 2 == 0, "linear_silu_packed: gate and up differ in size");
  return multiply<true>(x, packed, nullptr, out_features, native, upcoming);
}

// Whether this library was compiled with bf16 dot products, and `linear_packed` is therefore fast.
bool has_bf16_dot() {
  return FOLOVLLM_BF16_DOT != 0;
}

} // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("linear_packed(Tensor x, Tensor packed, Tensor? bias, int out_features, bool native=True) -> Tensor");
  m.def("linear_silu_packed(Tensor x, Tensor packed, int out_features, bool native=True) -> Tensor");
  m.def("has_bf16_dot() -> bool", &folovllm::has_bf16_dot);
}

TORCH_LIBRARY_IMPL(folovllm, CPU, m) {
  using at::Tensor;
  m.impl("pack_weight", &folovllm::pack_weight);
  m.impl("linear_packed", [](const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t out_features,
                             bool native) { return folovllm::linear_packed(x, packed, bias, out_features, native); });
  m.impl("linear_silu_packed", [](const Tensor& x, const Tensor& packed, int64_t out_features, bool native) {
    return folovllm::linear_silu_packed(x, packed, out_features, native);
  });
}
