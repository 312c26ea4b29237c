// Packing, while a model is loaded: levels into the order of int4_layout.h, and from there to bf16 for linear.cpp.
//
// Milestone: M7. vLLM counterpart: gptq_marlin_repack (csrc/quantization/gptq_marlin). In torch either would be a dozen
// passes over every weight, and loading took ten times as long.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "int4_layout.h"
#include "thread_team.h"

namespace folovllm {
namespace {

constexpr uint8_t kNoLevel = 8;  // for a place without an input, whose x is 0; in a symmetric checkpoint it means 0

// levels [in, out] uint8, 0 .. 15 after adding `shift`; order [groups, places] int32, the input of each place or -1 for
// none -> [blocks, groups, places / 4, 64].
at::Tensor pack_int4(const at::Tensor& levels, const at::Tensor& order, int64_t shift) {
  TORCH_CHECK(levels.dim() == 2 && levels.scalar_type() == at::kByte && levels.is_contiguous(),
              "pack_int4: levels must be a contiguous uint8 [inputs, outputs]");
  TORCH_CHECK(order.dim() == 2 && order.scalar_type() == at::kInt && order.is_contiguous() &&
              order.size(1) % kInt4Chunk == 0, "pack_int4: order must be a contiguous int32 [groups, multiples of 4]");
  TORCH_CHECK(order.numel() == 0 || order.max().item<int>() < levels.size(0), "pack_int4: order is beyond the inputs");
  const int64_t outputs = levels.size(1), blocks = (outputs + kInt4Block - 1) / kInt4Block;
  const int64_t chunks = order.numel() / kInt4Chunk;  // of all groups
  at::Tensor packed = at::empty({blocks, order.size(0), order.size(1) / kInt4Chunk, kInt4Line}, levels.options());
  const uint8_t* from = levels.const_data_ptr<uint8_t>();
  const int32_t* input_of = order.const_data_ptr<int32_t>();
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  ThreadTeam::run_ranges(blocks, /*grain=*/1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * chunks; i < end * chunks; ++i) {
      const int64_t first = i / chunks * kInt4Block, count = std::min(kInt4Block, outputs - first);
      for (int64_t j = 0; j < kInt4Chunk; ++j) {
        uint8_t column[kInt4Block];
        std::fill_n(column, kInt4Block, kNoLevel);
        const int32_t input = input_of[i % chunks * kInt4Chunk + j];
        for (int64_t lane = 0; input >= 0 && lane < count; ++lane) {
          column[lane] = from[input * outputs + first + lane] + static_cast<uint8_t>(shift);
        }
        for (int64_t lane = 0; lane < kInt4Lanes; ++lane) {
          to[i * kInt4Line + lane * kInt4Chunk + j] = column[lane] | column[kInt4Lanes + lane] << 4;
        }
      }
    }
  });
  return packed;
}

// scale * (level - zero), rounded once, in the packed order of pack_weight (linear.cpp). perm and zeros may be empty.
at::Tensor int4_to_bf16(const at::Tensor& levels, const at::Tensor& scales, const at::Tensor& zeros,
                        const at::Tensor& perm, int64_t in_features) {
  TORCH_CHECK(levels.dim() == 4 && levels.scalar_type() == at::kByte && levels.is_contiguous() &&
              levels.size(3) == kInt4Line,
              "int4_to_bf16: levels must be a contiguous uint8 [blocks, groups, chunks, 64]");
  const int64_t blocks = levels.size(0), groups = levels.size(1), chunks = levels.size(2);
  const int64_t width = groups * chunks * kInt4Chunk;
  TORCH_CHECK(perm.numel() == 0 ? width == in_features : perm.numel() == width && perm.scalar_type() == at::kInt &&
              perm.is_contiguous() && perm.max().item<int>() < in_features, "int4_to_bf16: perm does not fit");
  TORCH_CHECK(scales.numel() == blocks * groups * kInt4Block && scales.scalar_type() == at::kFloat &&
              (zeros.numel() == 0 || (zeros.numel() == scales.numel() && zeros.scalar_type() == at::kChar)) &&
              scales.is_contiguous() && zeros.is_contiguous(), "int4_to_bf16: scales or zeros do not fit");
  const int64_t pairs = (in_features + 1) / 2;
  at::Tensor packed = at::zeros({blocks, pairs, kInt4Block, 2}, scales.options().dtype(at::kBFloat16));
  const uint8_t* from = levels.const_data_ptr<uint8_t>();
  const float* scale = scales.const_data_ptr<float>();
  const int8_t* zero = zeros.numel() != 0 ? zeros.const_data_ptr<int8_t>() : nullptr;
  const int32_t* input_of = perm.numel() != 0 ? perm.const_data_ptr<int32_t>() : nullptr;
  at::BFloat16* to = packed.mutable_data_ptr<at::BFloat16>();
  ThreadTeam::run_ranges(blocks, /*grain=*/1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * width; i < end * width; ++i) {
      const int64_t block = i / width, place = i % width, input = input_of == nullptr ? place : input_of[place];
      if (input < 0) {
        continue;
      }
      const int64_t group = (block * groups + place / (chunks * kInt4Chunk)) * kInt4Block;
      const uint8_t* line = from + i / kInt4Chunk * kInt4Line + i % kInt4Chunk;
      at::BFloat16* pair = to + ((block * pairs + input / 2) * kInt4Block) * 2 + input % 2;
      for (int64_t lane = 0; lane < kInt4Block; ++lane) {
        const int level = line[lane % kInt4Lanes * kInt4Chunk] >> (lane < kInt4Lanes ? 0 : 4) & 15;
        const int middle = 8 + (zero == nullptr ? 0 : zero[group + lane]);
        pair[2 * lane] = at::BFloat16(static_cast<float>(level - middle) * scale[group + lane]);
      }
    }
  });
  return packed;
}

}  // namespace
}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def("pack_int4(Tensor levels, Tensor order, int shift) -> Tensor");
  m.def("int4_to_bf16(Tensor levels, Tensor scales, Tensor zeros, Tensor perm, int in_features) -> Tensor");
}

TORCH_LIBRARY_IMPL(folovllm, CPU, m) {
  m.impl("pack_int4", &folovllm::pack_int4);
  m.impl("int4_to_bf16", &folovllm::int4_to_bf16);
}
