// Linear layers in plain loops: what linear.cpp computes from the same packed weights, written to be read.
//
// Milestone: M4. vLLM counterpart: none. Left out: everything that makes linear.cpp fast: tiles of rows, vectors,
// threads, prefetching. The engine never calls this file; tests compare the fast operators with it.
//
// A linear layer is y[row][output] = sum over inputs of x[row][input] * w[output][input], plus bias[output]. PyTorch
// stores w row by row. Packed, 32 outputs lie together in a block, and within a block the weights lie in the order in
// which a kernel reads them: for each pair of inputs, the two weights of all 32 outputs.
//
//   packed [blocks, pairs, 32, 2]       block = output / 32, lane = output % 32, pair = input / 2
//
//   block 0            lane 0             lane 1                   lane 31
//     pair 0           w[0][0] w[0][1]    w[1][0] w[1][1]   ...    w[31][0] w[31][1]
//     pair 1           w[0][2] w[0][3]    w[1][2] w[1][3]   ...    w[31][2] w[31][3]
//     ...
//   block 1            lane 0                                      the outputs 32 .. 63
//     pair 0           w[32][0] w[32][1]  ...
//
// Beyond the last output and the last input the packed weight holds zeros. E.g. 40 outputs and 3 inputs are packed as
// [2, 2, 32, 2]: of block 1 the lanes 0 .. 7 are used, and of pair 1 the first number.
//
// The gate and the up projection of an MLP are packed as one weight whose blocks take turns, so that the gate and the
// up value of an output are computed together:
//
//   gated [2 * blocks, pairs, 32, 2]    gate block 0 | up block 0 | gate block 1 | up block 1 | ...

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

namespace folovllm {
namespace {

using at::BFloat16;

constexpr int64_t kOutputsPerBlock = 32;

// weight [outputs, inputs] -> packed [ceil(outputs / 32), ceil(inputs / 2), 32, 2].
at::Tensor reference_pack_weight(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kBFloat16, "reference_pack_weight wants a bf16 matrix");
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int64_t blocks = (outputs + kOutputsPerBlock - 1) / kOutputsPerBlock, pairs = (inputs + 1) / 2;
  at::Tensor packed = at::zeros({blocks, pairs, kOutputsPerBlock, 2}, weight.options());
  const auto w = weight.accessor<BFloat16, 2>();
  auto p = packed.accessor<BFloat16, 4>();
  for (int64_t output = 0; output < outputs; ++output) {
    for (int64_t input = 0; input < inputs; ++input) {
      p[output / kOutputsPerBlock][input / 2][output % kOutputsPerBlock][input % 2] = w[output][input];
    }
  }
  return packed;
}

// The product of one row x [inputs] and the weights of one output, which are a lane of a block. The sum is fp32.
float dot(const at::TensorAccessor<BFloat16, 1>& x, const at::TensorAccessor<BFloat16, 4>& packed, int64_t block,
          int64_t lane) {
  float sum = 0.0f;
  for (int64_t input = 0; input < x.size(0); ++input) {
    sum += static_cast<float>(packed[block][input / 2][lane][input % 2]) * static_cast<float>(x[input]);
  }
  return sum;
}

void check(const at::Tensor& x, const at::Tensor& packed, int64_t out_features, int64_t blocks_per_unit) {
  const int64_t units = (out_features + kOutputsPerBlock - 1) / kOutputsPerBlock;
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kBFloat16 && packed.scalar_type() == at::kBFloat16 &&
              packed.dim() == 4 && packed.size(0) == units * blocks_per_unit && packed.size(1) == (x.size(1) + 1) / 2,
              "reference_linear: x ", x.sizes(), " and ", out_features, " outputs do not fit the packed weight ",
              packed.sizes());
}

// x [rows, inputs], packed as above, bias [32 * blocks] fp32 or none -> [rows, out_features], rounded once to bf16.
at::Tensor reference_linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                            int64_t out_features) {
  check(x, packed, out_features, /*blocks_per_unit=*/1);
  at::Tensor out = at::empty({x.size(0), out_features}, x.options());
  const auto rows = x.accessor<BFloat16, 2>();
  const auto weights = packed.accessor<BFloat16, 4>();
  auto y = out.accessor<BFloat16, 2>();
  for (int64_t row = 0; row < x.size(0); ++row) {
    for (int64_t output = 0; output < out_features; ++output) {
      const float sum = dot(rows[row], weights, output / kOutputsPerBlock, output % kOutputsPerBlock);
      y[row][output] = bias ? sum + bias->const_data_ptr<float>()[output] : sum;
    }
  }
  return out;
}

// x [rows, inputs] and a gated weight -> silu(gate) * up [rows, out_features], rounded once. silu(g) = g / (1 + e^-g).
at::Tensor reference_linear_silu(const at::Tensor& x, const at::Tensor& gated, int64_t out_features) {
  check(x, gated, out_features, /*blocks_per_unit=*/2);
  at::Tensor out = at::empty({x.size(0), out_features}, x.options());
  const auto rows = x.accessor<BFloat16, 2>();
  const auto weights = gated.accessor<BFloat16, 4>();
  auto y = out.accessor<BFloat16, 2>();
  for (int64_t row = 0; row < x.size(0); ++row) {
    for (int64_t output = 0; output < out_features; ++output) {
      const int64_t unit = output / kOutputsPerBlock, lane = output % kOutputsPerBlock;
      const float gate = dot(rows[row], weights, 2 * unit, lane), up = dot(rows[row], weights, 2 * unit + 1, lane);
      y[row][output] = gate / (1.0f + std::exp(-gate)) * up;
    }
  }
  return out;
}

}  // namespace
}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def("reference_pack_weight(Tensor weight) -> Tensor", &folovllm::reference_pack_weight);
  m.def("reference_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor",
        &folovllm::reference_linear);
  m.def("reference_linear_silu(Tensor x, Tensor packed, int out_features) -> Tensor",
        &folovllm::reference_linear_silu);
}
