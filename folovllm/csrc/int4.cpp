// The operator for linear layers over weights of 4 bits: it checks tensors and hands out the work. int4_kernel.h computes.
//
// Milestone: M7. vLLM counterpart: csrc/cpu/cpu_wna16.cpp (after v0.11.0).

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>

#include "int4_kernel.h"
#include "ops.h"
#include "thread_team.h"
#include "work_ranges.h"

namespace folovllm {
namespace {

constexpr int64_t kGrainBytes = 1 << 14;  // of levels; fewer are done before another thread wakes up

// All panels and units, as in linear.cpp.
template <bool kGated, typename T, typename Rows>
void multiply_all(const Int4Problem& p, Rows&& x, T* out, int64_t units, PrefetchQueue* queue) {
  ThreadTeam::run_ranges(p.rows, /*grain=*/16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      x.prepare_row(row);
    }
  });
  const int64_t total = (p.rows + kInt4PanelRows - 1) / kInt4PanelRows * units;
  const int64_t bytes = units * (kGated ? 2 : 1) * p.groups * p.group_bytes();
  const int64_t workers = std::clamp<int64_t>(bytes / kGrainBytes, 1, ThreadTeam::size());
  WorkRanges(total, workers).for_each([&](int64_t /*thread*/, int64_t i, int64_t next) {
    multiply_int4_unit<kGated>(p, x, out, i / units, i % units, next == WorkRanges::kNone ? 0 : next % units, queue);
  });
}

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
at::Tensor multiply(const at::Tensor& x, const Int4Weight& w, int64_t out_features, PrefetchQueue* queue) {
  using Rows = std::conditional_t<std::is_same_v<T, float>, FloatInputs, IntegerInputs>;
  const at::Tensor rows = w.perm.numel() != 0 ? permuted<T>(x, w.perm) : x;
  at::Tensor out = at::empty({x.size(0), out_features}, x.options());
  const Int4Problem p{
      w.levels.const_data_ptr<uint8_t>(), w.scales.const_data_ptr<float>(),
      w.zeros.numel() != 0 ? w.zeros.const_data_ptr<int8_t>() : nullptr,
      w.bias.numel() != 0 ? w.bias.const_data_ptr<float>() : nullptr, rows.size(0), w.levels.size(1), w.levels.size(2),
      out_features};
  const int64_t units = w.levels.size(0) / (kGated ? 2 : 1);
  multiply_all<kGated>(p, Rows(rows.const_data_ptr<T>(), rows.stride(0), p), out.mutable_data_ptr<T>(), units,
                       queue);
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
// with a weight in which the blocks of gate and up take turns. An empty tensor means that there is none. Pages
// that wait in `queue`, if there is one, are fetched meanwhile.
at::Tensor linear_int4(const at::Tensor& x, const Int4Weight& weight, int64_t out_features, bool gated, PrefetchQueue* queue) {
  check(x, weight, out_features, gated);
  at::Tensor rows = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
  rows = rows.stride(1) == 1 ? rows : rows.contiguous();
  at::Tensor out;
  if (x.scalar_type() == at::kBFloat16) {
    out = gated ? multiply<at::BFloat16, true>(rows, weight, out_features, queue)
                : multiply<at::BFloat16, false>(rows, weight, out_features, queue);
  } else {
    TORCH_CHECK(x.scalar_type() == at::kFloat, "linear_int4 knows float32 and bfloat16, not ", x.scalar_type());
    out = gated ? multiply<float, true>(rows, weight, out_features, queue)
                : multiply<float, false>(rows, weight, out_features, queue);
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
                          bool gated) {
  // A caller's mistake can come in only here, so perm is checked here and not in each layer of a step.
  if (perm.numel() != 0 && perm.scalar_type() == at::kInt && perm.is_contiguous()) {
    const int32_t* source = perm.const_data_ptr<int32_t>();
    TORCH_CHECK(*std::max_element(source, source + perm.numel()) < x.size(-1), "linear_int4: perm is beyond x");
  }
  return linear_int4(x, {levels, scales, zeros, perm, bias}, out_features, gated, /*queue=*/nullptr);
}

}  // namespace
}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def(
      "linear_int4(Tensor x, Tensor levels, Tensor scales, Tensor zeros, Tensor perm, Tensor bias, int out_features, "
      "bool gated=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(folovllm, CPU, m) {
  m.impl("linear_int4", &folovllm::linear_int4_op);
}
