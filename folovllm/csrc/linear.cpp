// Linear layers over weights that are packed once: the operators. linear_kernel.h multiplies; this file checks tensors,
// prepares x and hands out the work.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/ (see linear_kernel.h).

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "linear_kernel.h"
#include "ops.h"
#include "row_ops.h"
#include "tensor_checks.h"
#include "work_ranges.h"

namespace folovllm {
namespace {

constexpr int64_t kGrainBytes = 1 << 16;   // of weights; fewer are done before another thread wakes up
constexpr int64_t kGrainNumbers = 1 << 14;  // of x

// All panels and units. A piece is one unit for the rows of one panel.
template <typename T, bool kGated>
void multiply_all(const LinearProblem<T>& p, int64_t units) {
  const int64_t size = (kGated ? 2 : 1) * p.steps * kStepBytes, total = p.num_panels() * units;
  const int64_t workers = std::clamp<int64_t>(units * size / kGrainBytes, 1, ThreadTeam::size());
  const char* packed = reinterpret_cast<const char*>(p.packed);
  WorkRanges(total, workers).for_each([&](int64_t thread, int64_t piece, int64_t next) {
    const char* next_weights = next != WorkRanges::kNone ? packed + next % units * size
                                                         : p.upcoming.first_weight(thread, workers, packed);
    multiply_unit<T, kGated>(p, piece / units, piece % units, next_weights);
  });
}

// x [rows, in] as the kernel reads it: dense rows of its type of input, with zeros up to a whole number of steps.
template <typename T>
at::Tensor kernel_inputs(const at::Tensor& x, int64_t steps) {
  using Input = typename LinearProblem<T>::Input;
  const int64_t size = x.size(1), padded = steps * Arithmetic<T>::kStepInputs;
  if constexpr (std::is_same_v<Input, T>) {
    const at::Tensor rows = padded > size ? at::constant_pad_nd(x, {0, padded - size}) : x;
    return rows.stride(1) == 1 ? rows : rows.contiguous();
  } else {
    const at::Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
    at::Tensor inputs = at::empty({x.size(0), padded}, x.options().dtype(at::kFloat));
    const T* from = rows.const_data_ptr<T>();
    Input* to = inputs.mutable_data_ptr<Input>();
    ThreadTeam::run_ranges(x.size(0), kGrainNumbers / padded + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        convert_row(from + row * rows.stride(0), to + row * padded, size);
        std::fill(to + row * padded + size, to + (row + 1) * padded, Input{});
      }
    });
    return inputs;
  }
}

// The product that both operators compute: x [..., in] times the packed weight -> [..., out].
template <bool kGated>
at::Tensor multiply(const at::Tensor& x, const at::Tensor& packed, const float* bias, int64_t out_features,
                    const UpcomingReads& upcoming) {
  constexpr int64_t kParts = kGated ? 2 : 1;
  const int64_t units = packed.size(0) / kParts, steps = packed.size(1), in_features = x.size(-1);
  TORCH_CHECK(packed.scalar_type() == x.scalar_type() && ceil_div(in_features, packed.size(3)) == steps &&
                  ceil_div(out_features, kBlock) == units,
              "linear_packed: x ", x.sizes(), " of ", x.scalar_type(), " and ", out_features,
              " outputs do not fit the packed weight ", packed.sizes(), " of ", packed.scalar_type());
  auto shape = x.sizes().vec();
  shape.back() = out_features;
  const at::Tensor rows = x.dim() == 2 ? x : x.reshape({-1, in_features});
  at::Tensor out = at::empty({rows.size(0), out_features}, x.options());
  dispatch_float_or_bf16(x.scalar_type(), "linear_packed", [&](auto zero) {
    using T = decltype(zero);
    const at::Tensor inputs = kernel_inputs<T>(rows, steps);
    const LinearProblem<T> p{inputs.const_data_ptr<typename LinearProblem<T>::Input>(), packed.const_data_ptr<T>(), bias,
                             out.mutable_data_ptr<T>(), rows.size(0), steps, inputs.stride(0), out_features, upcoming};
    multiply_all<T, kGated>(p, units);
  });
  return x.dim() == 2 ? out : out.view(shape);
}

}  // namespace

// weight [out, in] -> [ceil(out / 32), steps, 32, inputs of a step] (linear_kernel.h), zeros beyond the edges. A step takes
// two inputs in bf16, and one in fp32.
at::Tensor pack_weight(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2, "pack_weight wants a matrix");
  at::Tensor packed;
  dispatch_float_or_bf16(weight.scalar_type(), "pack_weight", [&](auto zero) {
    constexpr int64_t kInputs = Arithmetic<decltype(zero)>::kStepInputs;
    const int64_t blocks = ceil_div(weight.size(0), kBlock), steps = ceil_div(weight.size(1), kInputs);
    const int64_t rows = blocks * kBlock - weight.size(0), columns = steps * kInputs - weight.size(1);
    packed = at::constant_pad_nd(weight, {0, columns, 0, rows})
                 .view({blocks, kBlock, steps, kInputs})
                 .transpose(1, 2)
                 .contiguous();
  });
  return packed;
}

// x [..., in] times the packed weight, plus bias [32 * blocks] fp32 -> [..., out], rounded once.
at::Tensor linear_packed(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                         int64_t out_features, const UpcomingReads& upcoming) {
  TORCH_CHECK(!bias || (bias->numel() == packed.size(0) * kBlock && bias->is_contiguous() &&
              bias->scalar_type() == at::kFloat), "linear_packed: the bias must be float32 and padded to whole blocks of ",
              kBlock);
  return multiply<false>(x, packed, bias ? bias->const_data_ptr<float>() : nullptr, out_features, upcoming);
}

// silu(x gate^T) * (x up^T) [..., out], rounded once: the gate and up projections of an MLP together with the
// activation. The weight is pack_weight of both, whose blocks take turns: gate 0, up 0, gate 1, up 1, ...
at::Tensor linear_silu_packed(const at::Tensor& x, const at::Tensor& packed, int64_t out_features,
                              const UpcomingReads& upcoming) {
  TORCH_CHECK(packed.size(0) % 2 == 0, "linear_silu_packed: gate and up differ in size");
  return multiply<true>(x, packed, nullptr, out_features, upcoming);
}

}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("linear_packed(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor");
  m.def("linear_silu_packed(Tensor x, Tensor packed, int out_features) -> Tensor");
}

TORCH_LIBRARY_IMPL(folovllm, CPU, m) {
  using at::Tensor;
  m.impl("pack_weight", &folovllm::pack_weight);
  m.impl("linear_packed", [](const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t out_features) {
    return folovllm::linear_packed(x, packed, bias, out_features);
  });
  m.impl("linear_silu_packed", [](const Tensor& x, const Tensor& packed, int64_t out_features) {
    return folovllm::linear_silu_packed(x, packed, out_features);
  });
}
