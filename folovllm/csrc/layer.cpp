// A whole decoder layer in one call: the operators of the other files, one after another.
//
// Milestone: M4. vLLM counterpart: none in C++; on a GPU its CUDA graphs replay all launches of a step at once, for the
// same reason. Left out: tensor parallelism, quantised weights.
//
// For one token a layer computes for 300 us, of which its dozen Python modules, views and dispatches would take 40.
// Nothing is computed here that the model file does not say in the same order (model_executor/models/llama.py).

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops.h"

namespace folovllm {
namespace {

// Places in `weights`. Linear weights are packed; a bias or head norm that the model does not have is an empty tensor.
enum Weight { kInputNorm, kQkv, kQkvBias, kQueryNorm, kKeyNorm, kOut, kOutBias, kPostNorm, kGateUp, kDown, kDownBias, kNumWeights };

std::optional<at::Tensor> if_any(const at::Tensor& tensor) {
  return tensor.numel() == 0 ? std::nullopt : std::optional<at::Tensor>(tensor);
}

constexpr int64_t kMaxPieceLines = 192;     // about one for each pair that a tile computes with (linear.cpp)
constexpr int64_t kMaxPageLines = 4096;     // a larger page holds more unused places than the batch's keys
constexpr int64_t kMaxAsideTokens = 64;     // with more, each page is read for many rows, and waiting for it is little

// Where the next layer's attention will find the K and V of every sequence: all pages, each cut into equal pieces.
void list_pages(const at::Tensor& kv_cache, const at::Tensor& seq_lens, const at::Tensor& block_table, int64_t block_size,
                std::vector<Piece>& pieces) {
  const int64_t page_bytes = kv_cache.stride(0) * kv_cache.element_size(), lines = page_bytes / 64;
  const int64_t cuts = (lines + kMaxPieceLines - 1) / kMaxPieceLines;
  if (lines == 0 || lines > kMaxPageLines) {
    return;
  }
  const char* data = static_cast<const char*>(kv_cache.const_data_ptr());
  for (int64_t s = 0; s < seq_lens.size(0); ++s) {
    const int32_t* table = block_table.const_data_ptr<int32_t>() + s * block_table.stride(0);
    const int64_t num_pages = (seq_lens.const_data_ptr<int32_t>()[s] + block_size - 1) / block_size;
    for (int64_t i = 0; i < num_pages * cuts; ++i) {
      const int64_t first = lines * (i % cuts) / cuts, end = lines * (i % cuts + 1) / cuts;
      pieces.push_back({data + table[i / cuts] * page_bytes + first * 64, end - first});
    }
  }
}

}  // namespace

// hidden, residual [num_tokens, hidden_size] -> hidden; residual is updated in place. cos, sin [num_tokens, 1, head_size].
// `next_kv_cache` is the following layer's, to be fetched from memory meanwhile.
at::Tensor decoder_layer(const at::Tensor& hidden, const at::Tensor& residual, const at::Tensor& cos, const at::Tensor& sin,
                         at::TensorList weights, const at::Tensor& kv_cache,
                         const std::optional<at::Tensor>& next_kv_cache, const at::Tensor& slot_mapping,
                         const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& block_table,
                         int64_t num_heads, int64_t intermediate_size, double eps, double scale) {
  TORCH_CHECK(weights.size() == kNumWeights, "decoder_layer wants ", int64_t{kNumWeights}, " weights");
  const int64_t num_tokens = hidden.size(0), hidden_size = hidden.size(1), head_size = cos.size(-1);
  const int64_t num_kv_heads = kv_cache.size(1), num_qk_heads = num_heads + num_kv_heads;
  const int64_t num_all_heads = num_qk_heads + num_kv_heads;

  at::Tensor x = rms_norm(hidden, residual, weights[kInputNorm], eps);
  const at::Tensor qkv = linear_packed(x, weights[kQkv], if_any(weights[kQkvBias]), num_all_heads * head_size)
                             .view({num_tokens, num_all_heads, head_size});
  at::Tensor query = qkv.narrow(1, 0, num_heads);                  // [num_tokens, num_heads, head_size]
  at::Tensor key = qkv.narrow(1, num_heads, num_kv_heads);         // [num_tokens, num_kv_heads, head_size]
  const at::Tensor value = qkv.narrow(1, num_qk_heads, num_kv_heads);
  if (weights[kQueryNorm].numel() != 0) {
    query = rms_norm(query, std::nullopt, weights[kQueryNorm], eps);
    key = rms_norm(key, std::nullopt, weights[kKeyNorm], eps);
    rotary_(query, cos, sin);
    rotary_(key, cos, sin);
  } else {
    rotary_(qkv.narrow(1, 0, num_qk_heads), cos, sin);  // queries and keys lie side by side and turn alike
  }
  write_kv(key, value, kv_cache, slot_mapping);
  const at::Tensor attended = at::empty({num_tokens, num_heads, head_size}, hidden.options());
  paged_attention(attended, query, kv_cache, query_start_loc, seq_lens, block_table, scale);

  Aside aside;
  if (next_kv_cache && num_tokens <= kMaxAsideTokens) {
    list_pages(*next_kv_cache, seq_lens, block_table, kv_cache.size(3) / head_size, aside.pieces);
  }
  x = linear_packed(attended.view({num_tokens, -1}), weights[kOut], if_any(weights[kOutBias]), hidden_size, true, &aside);

  x = rms_norm(x, residual, weights[kPostNorm], eps);
  x = linear_silu_packed(x, weights[kGateUp], intermediate_size, true, &aside);
  return linear_packed(x, weights[kDown], if_any(weights[kDownBias]), hidden_size, true, &aside);
}

}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def(
      "decoder_layer(Tensor hidden, Tensor(a!) residual, Tensor cos, Tensor sin, Tensor[] weights, Tensor(b!) kv_cache, "
      "Tensor? next_kv_cache, Tensor slot_mapping, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, "
      "int num_heads, int intermediate_size, float eps, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(folovllm, CPU, m) {
  m.impl("decoder_layer", &folovllm::decoder_layer);
}
