// All decoder layers of a model in one call: the operators of the other files, one after another.
//
// Milestone: M4. vLLM counterpart: none in C++; on a GPU its CUDA graphs replay all launches of a step at once, for the
// same reason. Left out: tensor parallelism.
//
// For one token a layer computes for 260 us, to which its dozen Python modules, views and dispatches would add 40, and
// even one call per layer 30. Nothing is computed here that the model file does not say in the same order
// (model_executor/models/llama.py).

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "ops.h"
#include "thread_team.h"

namespace folovllm {
namespace {

// Reads the layers' weights, one layer behind the other, in the order in which they are used. What the model does not
// have is an empty tensor.
class Weights {
 public:
  Weights(at::TensorList tensors, int64_t max_int4_rows) : tensors_(tensors), max_int4_rows_(max_int4_rows) {}

  const at::Tensor& next() {
    TORCH_CHECK(at_ < tensors_.size(), "more weights expected than ", tensors_.size());
    return tensors_[at_++];
  }

  // x times the next linear layer's weight. It is stored as bf16: packed, bias; or with 4 bits: levels, scales, zeros,
  // perm, bias, packed. If it has both, x of up to max_int4_rows rows is multiplied with the smaller one.
  at::Tensor multiply(const at::Tensor& x, int64_t out_features, bool gated = false, PrefetchQueue* queue = nullptr) {
    const at::Tensor& first = next();
    const at::Tensor* packed = &first;
    const at::Tensor* bias = nullptr;
    if (first.scalar_type() == at::kByte) {
      const at::Tensor &scales = next(), &zeros = next(), &perm = next();
      bias = &next(), packed = &next();
      if (packed->numel() == 0 || x.numel() <= max_int4_rows_ * x.size(-1)) {
        return linear_int4(x, {first, scales, zeros, perm, *bias}, out_features, gated);
      }
    } else {
      bias = &next();
    }
    const UpcomingReads upcoming{queue, next_packed()};
    if (gated) {
      return linear_silu_packed(x, *packed, out_features, /*native=*/true, upcoming);
    }
    const std::optional<at::Tensor> some_bias = bias->numel() == 0 ? std::nullopt : std::optional(*bias);
    return linear_packed(x, *packed, some_bias, out_features, /*native=*/true, upcoming);
  }

  void check_all_used() const {
    TORCH_CHECK(at_ == tensors_.size(), "fewer weights expected than ", tensors_.size());
  }

 private:
  // The weight of the linear layer that comes next, if it is one of bf16.
  const at::Tensor* next_packed() const {
    const auto is_packed = [](const at::Tensor& t) { return t.dim() == 4 && t.scalar_type() == at::kBFloat16; };
    const auto found = std::find_if(tensors_.begin() + at_, tensors_.end(), is_packed);
    return found == tensors_.end() ? nullptr : &*found;
  }

  at::TensorList tensors_;
  int64_t max_int4_rows_;
  size_t at_ = 0;
};

constexpr int64_t kMaxPieceLines = 192;     // about one for each pair that a tile computes with (linear.cpp)
constexpr int64_t kMaxPageLines = 4096;     // a larger page holds more unused places than the batch's keys
constexpr int64_t kMaxAsideTokens = 64;     // with more, each page is read for many rows, and waiting for it is little

// What all layers of a step share.
struct Step {
  const at::Tensor &cos, &sin;  // [num_tokens, 1, head_size]
  const at::Tensor &slot_mapping, &seq_lens, &block_table;
  const AttentionPlan& plan;
  int64_t num_heads, intermediate_size;
  double eps, scale;
};

// The rows that the caller reads, if these are not all.
struct Ends {
  at::Tensor rows;     // [num_reqs] int64, each sequence's last
  AttentionPlan plan;  // for their queries alone
};

// Where in a layer's cache attention will find the K and V of every sequence: all pages, each cut into equal pieces.
void list_pages(const Step& step, const at::Tensor& kv_cache, PrefetchQueue& queue) {
  const int64_t page_bytes = kv_cache.stride(0) * kv_cache.element_size(), lines = page_bytes / 64;
  const int64_t cuts = (lines + kMaxPieceLines - 1) / kMaxPieceLines, block_size = kv_cache.size(3) / step.cos.size(-1);
  if (lines == 0 || lines > kMaxPageLines || step.cos.size(0) > kMaxAsideTokens) {
    return;
  }
  for (int64_t s = 0; s < step.seq_lens.size(0); ++s) {
    const int32_t* table = step.block_table.const_data_ptr<int32_t>() + s * step.block_table.stride(0);
    const int64_t num_pages = (step.seq_lens.const_data_ptr<int32_t>()[s] + block_size - 1) / block_size;
    for (int64_t i = 0; i < num_pages * cuts; ++i) {
      const int64_t first = lines * (i % cuts) / cuts, end = lines * (i % cuts + 1) / cuts;
      queue.add(step.plan.owner(s), {table[i / cuts] * page_bytes + first * 64, end - first});
    }
  }
}

// hidden, residual [num_tokens, hidden_size] -> hidden; residual is updated in place. `fetched`: K and V that attention
// reads are in cache. `queue`, if given, is what to fetch meanwhile. With `ends` all K and V are computed, but of the
// rest only those rows; result and residual have no others.
at::Tensor decoder_layer(const Step& step, const at::Tensor& hidden, at::Tensor& residual, Weights& weights,
                         const at::Tensor& kv_cache, bool fetched, PrefetchQueue* queue, const Ends* ends) {
  const int64_t num_tokens = hidden.size(0), hidden_size = hidden.size(1), head_size = step.cos.size(-1);
  const int64_t num_all_heads = step.num_heads + 2 * kv_cache.size(1);

  at::Tensor x = rms_norm(hidden, residual, weights.next(), step.eps);
  const at::Tensor qkv = weights.multiply(x, num_all_heads * head_size).view({num_tokens, num_all_heads, head_size});
  const at::Tensor &query_norm = weights.next(), &key_norm = weights.next();
  prepare_qkv(qkv, query_norm, key_norm, step.eps, step.cos, step.sin, kv_cache, step.slot_mapping, step.plan);
  at::Tensor query = qkv.narrow(1, 0, step.num_heads);  // [num_tokens, num_heads, head_size]
  if (ends != nullptr) {
    query = query.index_select(0, ends->rows), residual = residual.index_select(0, ends->rows);
  }
  const at::Tensor attended = at::empty(query.sizes(), hidden.options());
  paged_attention(attended, query, kv_cache, ends != nullptr ? ends->plan : step.plan, step.block_table, step.scale,
                  /*native=*/true, fetched);
  x = weights.multiply(attended.view({query.size(0), -1}), hidden_size, /*gated=*/false, queue);

  x = rms_norm(x, residual, weights.next(), step.eps);
  x = weights.multiply(x, step.intermediate_size, /*gated=*/true, queue);
  return weights.multiply(x, hidden_size, /*gated=*/false, queue);
}

}  // namespace

// A linear layer by itself, where a layer does not run as one call. x [..., in] -> [..., out].
at::Tensor linear_mixed(const at::Tensor& x, at::TensorList weights, int64_t out_features, bool gated,
                        int64_t max_int4_rows) {
  return Weights(weights, max_int4_rows).multiply(x, out_features, gated);
}

// hidden, residual [num_tokens, hidden_size] -> hidden; residual is updated in place. cos, sin [num_tokens, 1,
// head_size]. One KV cache per layer. With `ends_only` the last row of each sequence is right, and the others may hold
// anything.
at::Tensor decoder_layers(const at::Tensor& hidden, const at::Tensor& residual, const at::Tensor& cos, const at::Tensor& sin,
                          at::TensorList weights, at::TensorList kv_caches, const at::Tensor& slot_mapping,
                          const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& block_table,
                          int64_t num_heads, int64_t intermediate_size, double eps, double scale, int64_t max_int4_rows,
                          bool ends_only) {
  const auto plan_for = [&](const at::Tensor& start_loc) {
    return AttentionPlan(start_loc, seq_lens, block_table, kv_caches[0], num_heads, cos.size(-1));
  };
  const AttentionPlan plan = plan_for(query_start_loc);
  const Step step{cos, sin, slot_mapping, seq_lens, block_table, plan, num_heads, intermediate_size, eps, scale};
  const at::Tensor one_each = at::arange(seq_lens.size(0) + 1, query_start_loc.options());  // query of each sequence
  std::optional<Ends> ends;
  if (ends_only && seq_lens.size(0) < hidden.size(0)) {
    ends.emplace(Ends{query_start_loc.slice(0, 1).to(at::kLong).sub(1), plan_for(one_each)});
  }
  Weights reader(weights, max_int4_rows);
  PrefetchQueue queue(plan.num_threads());
  list_pages(step, kv_caches[0], queue);
  at::Tensor x = hidden, left = residual;
  ThreadTeam::in_one_region([&] {
    for (size_t i = 0; i + 1 < kv_caches.size(); ++i) {
      const bool fetched = queue.fetched();
      queue.start(kv_caches[i + 1].const_data_ptr());
      x = decoder_layer(step, x, left, reader, kv_caches[i], fetched, &queue, nullptr);
    }
    x = decoder_layer(step, x, left, reader, kv_caches.back(), queue.fetched(), nullptr, ends ? &*ends : nullptr);
  });
  reader.check_all_used();
  if (ends) {  // back to where their rows are looked for
    residual.index_copy_(0, ends->rows, left);
    x = at::zeros_like(hidden).index_copy_(0, ends->rows, x);
  }
  return x;
}

}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def(
      "decoder_layers(Tensor hidden, Tensor(a!) residual, Tensor cos, Tensor sin, Tensor[] weights, Tensor(b!)[] kv_caches, "
      "Tensor slot_mapping, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, int num_heads, "
      "int intermediate_size, float eps, float scale, int max_int4_rows=0, bool ends_only=False) -> Tensor");
  m.def("linear_mixed(Tensor x, Tensor[] weights, int out_features, bool gated, int max_int4_rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(folovllm, CPU, m) {
  m.impl("decoder_layers", &folovllm::decoder_layers);
  m.impl("linear_mixed", &folovllm::linear_mixed);
}
