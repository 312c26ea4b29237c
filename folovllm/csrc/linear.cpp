// bf16 linear layers over a weight packed once: a GEMV that runs at memory speed, and a GEMM from the same bytes.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/ (its CPU build multiplies through oneDNN and, for AMX, sgl-kernels).
// Left out: AMX tiles, int8, transposed layouts. Source of the register blocking: Goto & van de Geijn 2008.
//
// For one token every weight is read once and used once, so nothing but the order of the bytes matters. Stored row by
// row, the 16 lanes of a vector would hold 16 inputs of *one* output and had to be summed across. Packed, they hold one
// pair of inputs of 16 *different* outputs; each lane adds up its own output and no sum across lanes is ever needed:
//
//   packed[block][pair][lane][2]      block = output / 32,  lane = output % 32,  pair = input / 2
//
//            outputs 0 .. 31 (2 vectors of 16 lanes)
//   pair 0   w[0][0] w[0][1] | w[1][0] w[1][1] | ... | w[31][0] w[31][1]      x (x[0], x[1]) broadcast to all lanes
//   pair 1   w[0][2] w[0][3] | w[1][2] w[1][3] | ... | w[31][2] w[31][3]      x (x[2], x[3])
//
// With more tokens each pair of weight vectors is used for up to 8 rows while it sits in registers.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <utility>

#include "vectors.h"

namespace folovllm {
namespace {

constexpr int64_t kBlock = 2 * kLanes; // outputs of a block: two vectors, which share each broadcast of x
constexpr int kTile = 8;               // rows at a time: 16 sums hide the latency of dot, and fit 32 registers
constexpr int64_t kPanel = 96;         // rows whose inputs (96 x 1,536 x 2 bytes) stay in L2 while blocks pass by
constexpr int64_t kPrefetch = 48;      // vectors ahead, 3 KiB: where one thread's reads were fastest
constexpr int64_t kGrainBytes = 1 << 16;  // less than this is not worth waking a thread

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

struct Problem {
  const at::BFloat16* x;       // [rows, 2 * pairs], rows x_stride apart
  const at::BFloat16* packed;  // [blocks, pairs, 32, 2]
  const float* bias;           // [blocks * 32] or null
  at::BFloat16* out;           // [rows, out_features]
  int64_t rows, pairs, x_stride, out_features;
};

// Rows row .. row + R of one block: tile `index` of `tiles` that use this block one after another.
//
// Prefetch: memory must never rest. A single tile asks for what it needs 3 KiB later (beyond the block's end lies the
// next one). Where several tiles share a block, only the first would wait for memory and the others leave it idle; so
// each of them fetches its share of the *next* block, evenly over its time.
template <bool native, int R>
void tile(const Problem& p, int64_t block, int64_t row, int64_t index, int64_t tiles) {
  const at::BFloat16* x = p.x + row * p.x_stride;
  const at::BFloat16* weight = p.packed + block * p.pairs * kBlock * 2;
  const int64_t distance = tiles == 1 ? kPrefetch * kLanes : (p.pairs + p.pairs * index / tiles) * kBlock;
  const at::BFloat16* ahead = weight + 2 * distance;
  const int64_t pace = 65536 / tiles; // in fixed point: a division per step would be slow
  Floats sum[R][2];
  for (int r = 0; r < R; ++r) {
    for (int half = 0; half < 2; ++half) {
      sum[r][half] = p.bias != nullptr ? load(p.bias + block * kBlock + half * kLanes) : Floats{};
    }
  }
  for (int64_t pair = 0; pair < p.pairs; ++pair, weight += 2 * kBlock) {
    const at::BFloat16* line = ahead + (pair * pace >> 16) * 2 * kBlock;
    __builtin_prefetch(line);
    __builtin_prefetch(line + 2 * kLanes);
    Pairs w0, w1;
    std::memcpy(&w0, weight, sizeof(w0));
    std::memcpy(&w1, weight + 2 * kLanes, sizeof(w1));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const uint32_t xr = load_pair(x + r * p.x_stride + 2 * pair);
      sum[r][0] = dot<native>(sum[r][0], w0, xr);
      sum[r][1] = dot<native>(sum[r][1], w1, xr);
    }
  }
  const int64_t first = block * kBlock;
  for (int r = 0; r < R; ++r) {
    at::BFloat16* out = p.out + (row + r) * p.out_features + first;
    const int64_t count = p.out_features - first;
    if (count >= kBlock) {
      store(out, sum[r][0]);
      store(out + kLanes, sum[r][1]);
    } else {
      store(out, sum[r][0], std::min(kLanes, count));
      store(out + kLanes, sum[r][1], std::max<int64_t>(0, count - kLanes));
    }
  }
}

using Tile = void (*)(const Problem&, int64_t, int64_t, int64_t, int64_t);

template <bool native, int... R>
constexpr std::array<Tile, sizeof...(R)> all_tiles(std::integer_sequence<int, R...>) {
  return {tile<native, R + 1>...};
}

template <bool native>
void run(const Problem& p, int64_t begin, int64_t end) {
  static constexpr auto tile_of = all_tiles<native>(std::make_integer_sequence<int, kTile>{}); // by rows, less 1
  for (int64_t panel = 0; panel < p.rows; panel += kPanel) {
    const int64_t rows = std::min(kPanel, p.rows - panel), tiles = ceil_div(rows, kTile);
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t index = 0; index < tiles; ++index) {
        // E.g. 9 rows are 4 and 5: of 8 and 1, the 1 would read the weights for a single row.
        const int64_t first = rows * index / tiles, last = rows * (index + 1) / tiles;
        tile_of[last - first - 1](p, block, panel + first, index, tiles);
      }
    }
  }
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

// x [..., in] times the packed weight, plus bias [32 * blocks] fp32 -> [..., out], rounded once. `native` = false takes
// the path of a CPU without bf16 dot products, so that it can be tested on one that has them.
at::Tensor linear_packed(
    const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias, int64_t out_features,
    bool native) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && packed.scalar_type() == at::kBFloat16, "linear_packed wants bf16");
  const int64_t blocks = packed.size(0), pairs = packed.size(1), in_features = x.size(-1);
  TORCH_CHECK(ceil_div(in_features, 2) == pairs && ceil_div(out_features, kBlock) == blocks, "linear_packed: x ",
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
  TORCH_CHECK(!bias || (bias->numel() == blocks * kBlock && bias->is_contiguous() && bias->scalar_type() == at::kFloat),
              "linear_packed: the bias must be float32 and padded to whole blocks of ", kBlock);
  at::Tensor out = at::empty({rows.size(0), out_features}, x.options());
  const Problem p{
      rows.const_data_ptr<at::BFloat16>(), packed.const_data_ptr<at::BFloat16>(),
      bias ? bias->const_data_ptr<float>() : nullptr, out.mutable_data_ptr<at::BFloat16>(),
      rows.size(0), pairs, rows.stride(0), out_features};
  const int64_t grain = ceil_div(kGrainBytes, pairs * kBlock * 4);
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    native ? run<true>(p, begin, end) : run<false>(p, begin, end);
  });
  return out.view(shape);
}

// Whether this library was compiled with bf16 dot products, and `linear_packed` is therefore fast.
bool has_bf16_dot() {
  return FOLOVLLM_BF16_DOT != 0;
}

} // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("linear_packed(Tensor x, Tensor packed, Tensor? bias, int out_features, bool native=True) -> Tensor");
  m.def("has_bf16_dot() -> bool", &folovllm::has_bf16_dot);
}

TORCH_LIBRARY_IMPL(folovllm, CPU, m) {
  m.impl("pack_weight", &folovllm::pack_weight);
  m.impl("linear_packed", &folovllm::linear_packed);
}
