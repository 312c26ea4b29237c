// All decoder layers of a model in one call: the operators of the other files, one after another.
//
// Milestone: M4. vLLM counterpart: none in C++; on a GPU its CUDA graphs replay all launches of a step at once, for the
// same reason. Left out: tensor parallelism.
//
// For one token a layer computes for 260 us. Its dozen Python modules, views and dispatches would add 40 us, and even one
// call per layer would add 30. The order of operations is that of model_executor/models/llama.py: this file is the only
// other place where it is written. Python fills a DecoderStack once, by name (model_executor/cpu/decoder_stack.py).

#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops.h"
#include "prefetch.h"
#include "thread_team.h"

namespace folovllm {
namespace {

using NamedTensors = c10::Dict<std::string, at::Tensor>;

// A linear layer whose weight is stored as bf16 or fp32, with 4 bits, or as bf16 and with 4 bits. What it does not have is an empty tensor.
struct Linear {
  at::Tensor packed;  // [blocks, steps, 32, inputs of a step], see linear_kernel.h
  at::Tensor levels, scales, zeros, perm;  // 4 bits, see int4_layout.h
  at::Tensor bias;  // float32 [32 * blocks]

  // x [rows, in] -> [rows, out_features]; `gated`: the weight is that of gate and up, and the result silu(gate) * up. If
  // the weight is stored as both, x of up to `max_int4_rows` rows is multiplied with the smaller one.
  at::Tensor multiply(const at::Tensor& x, int64_t out_features, bool gated, int64_t max_int4_rows,
                      const UpcomingReads& upcoming) const {
    const bool fits_int4 = packed.numel() == 0 || x.numel() <= max_int4_rows * x.size(-1);
    if (levels.numel() > 0 && fits_int4) {
      return linear_int4(x, {levels, scales, zeros, perm, bias}, out_features, gated);
    }
    if (gated) {
      return linear_silu_packed(x, packed, out_features, upcoming);
    }
    const std::optional<at::Tensor> some_bias = bias.numel() == 0 ? std::nullopt : std::optional(bias);
    return linear_packed(x, packed, some_bias, out_features, upcoming);
  }

  // What an earlier layer may fetch for this one, besides what is in the queue. Nothing if this layer has only 4 bits.
  UpcomingReads upcoming(PrefetchQueue* queue = nullptr) const {
    if (packed.numel() == 0) {
      return {queue};
    }
    const char* data = static_cast<const char*>(packed.const_data_ptr());
    return {queue, data, packed.size(0), packed.stride(0) * packed.element_size()};
  }
};

// The weights of a decoder layer, under the names that the modules have in models/llama.py.
struct LayerWeights {
  at::Tensor input_layernorm, post_attention_layernorm;  // [hidden_size]
  at::Tensor q_norm, k_norm;  // [head_size], or empty
  Linear qkv_proj, o_proj, gate_up_proj, down_proj;
};

// Takes the tensors of a layer by their names and reports the names that are missing or left over.
class TensorReader {
 public:
  explicit TensorReader(NamedTensors tensors) : tensors_(std::move(tensors)) {}

  at::Tensor required(const std::string& name) {
    TORCH_CHECK(tensors_.contains(name), "DecoderStack.add_layer: the tensor ", name, " is missing");
    return optional(name);
  }
  at::Tensor optional(const std::string& name) {
    taken_.insert(name);
    return tensors_.contains(name) ? tensors_.at(name) : at::empty({0});
  }
  Linear linear(const std::string& name) {
    const auto part = [&](const char* leaf) { return optional(name + "." + leaf); };
    Linear linear{part("packed"), part("levels"), part("scales"), part("zeros"), part("perm"), part("bias")};
    TORCH_CHECK(linear.packed.numel() + linear.levels.numel() > 0, "DecoderStack.add_layer: ", name,
                " needs a tensor ", name, ".packed or ", name, ".levels");
    return linear;
  }
  void check_all_taken() const {
    for (const auto& entry : tensors_) {
      TORCH_CHECK(taken_.count(entry.key()) > 0, "DecoderStack.add_layer: there is no tensor called ", entry.key());
    }
  }

 private:
  NamedTensors tensors_;
  std::set<std::string> taken_;
};

// What all layers of a step share.
struct Step {
  const at::Tensor &cos, &sin;  // [num_tokens, 1, head_size]
  const at::Tensor &slot_mapping, &block_table;
  const AttentionPlan& plan;
};

// The rows whose hidden states are read after the last layer, if they are not all.
struct Selection {
  at::Tensor rows;             // [num_selected] int64, ascending
  at::Tensor query_start_loc;  // [num_reqs + 1] int32: where the rows of each sequence begin among the selected ones
  AttentionPlan plan;          // for their queries alone
};

// E.g. sequences that begin at [0, 2, 5] of 8 rows, and the selected rows [1, 5, 6, 7] -> [0, 1, 1, 4]. Attention takes the
// queries of a sequence to be its last tokens, so the selected rows of each must be its last ones.
at::Tensor selected_start_loc(const at::Tensor& rows, const at::Tensor& query_start_loc) {
  TORCH_CHECK(rows.dim() == 1 && rows.is_contiguous() && rows.scalar_type() == at::kLong,
              "logits_indices must be contiguous int64 [num_selected]");
  const int64_t num_reqs = query_start_loc.size(0) - 1, num_rows = rows.size(0);
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int32_t* start = query_start_loc.const_data_ptr<int32_t>();
  at::Tensor starts = at::empty({num_reqs + 1}, query_start_loc.options());
  int32_t* out = starts.mutable_data_ptr<int32_t>();
  int64_t next = 0;
  out[0] = 0;
  for (int64_t s = 0; s < num_reqs; ++s) {
    const int64_t first = next;
    while (next < num_rows && row[next] < start[s + 1]) {
      ++next;
    }
    for (int64_t i = first; i < next; ++i) {
      TORCH_CHECK(row[i] == start[s + 1] - (next - i), "logits_indices must be ascending, and the last rows of each sequence");
    }
    out[s + 1] = static_cast<int32_t>(next);
  }
  TORCH_CHECK(next == num_rows, "logits_indices: row ", row[next], " is beyond the batch");
  return starts;
}

}  // namespace

// The decoder layers of a model. Built once; `run` is called in every step.
class DecoderStack : public torch::CustomClassHolder {
 public:
  // `max_int4_rows`: up to how many rows 4 bits are used where a linear layer has bf16 as well.
  DecoderStack(int64_t num_heads, int64_t intermediate_size, double eps, double scale, int64_t max_int4_rows)
      : num_heads_(num_heads), intermediate_size_(intermediate_size), eps_(eps), scale_(scale), max_int4_rows_(max_int4_rows) {}

  // Tensors by name: "input_layernorm", "post_attention_layernorm", "q_norm" and "k_norm" (if the model has them), and of
  // each linear layer ("qkv_proj", "o_proj", "gate_up_proj", "down_proj") the fields of Linear, e.g. "qkv_proj.packed".
  void add_layer(NamedTensors tensors) {
    TensorReader reader(std::move(tensors));
    LayerWeights layer{reader.required("input_layernorm"), reader.required("post_attention_layernorm"),
                       reader.optional("q_norm"),          reader.optional("k_norm"),
                       reader.linear("qkv_proj"),          reader.linear("o_proj"),
                       reader.linear("gate_up_proj"),      reader.linear("down_proj")};
    reader.check_all_taken();
    layers_.push_back(std::move(layer));
  }

  // hidden and residual [num_tokens, hidden_size] of the first layer -> those after the last. cos and sin are
  // [num_tokens, 1, head_size], and there is one KV cache per layer. The residual is overwritten. With `logits_indices`
  // [num_selected] only those rows are computed after the last layer's attention, and only those are returned.
  std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& hidden, at::Tensor residual, const at::Tensor& cos,
                                         const at::Tensor& sin, at::TensorList kv_caches, const at::Tensor& slot_mapping,
                                         const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                                         const at::Tensor& block_table,
                                         const std::optional<at::Tensor>& logits_indices) const {
    TORCH_CHECK(!layers_.empty() && kv_caches.size() == layers_.size(), "DecoderStack: ", layers_.size(), " layers and ",
                kv_caches.size(), " KV caches");
    const auto plan_for = [&](const at::Tensor& start_loc) {
      return make_plan(start_loc, seq_lens, block_table, kv_caches[0], num_heads_, cos.size(-1));
    };
    const AttentionPlan plan = plan_for(query_start_loc);
    std::optional<Selection> selection;
    if (logits_indices) {
      const at::Tensor start_loc = selected_start_loc(*logits_indices, query_start_loc);
      selection.emplace(Selection{*logits_indices, start_loc, plan_for(start_loc)});
    }
    const Step step{cos, sin, slot_mapping, block_table, plan};
    PrefetchQueue queue(plan.num_threads());
    const at::Tensor& pages = kv_caches[0];  // [num_blocks, num_kv_heads, 2, block_size * head_size]
    const BatchPages batch{pages.stride(0) * pages.element_size(), pages.size(3) / cos.size(-1), seq_lens.size(0),
                           seq_lens.const_data_ptr<int32_t>(), block_table.const_data_ptr<int32_t>(), block_table.stride(0)};
    list_pages(queue, batch, hidden.size(0), [&](int64_t sequence) { return plan.owner(sequence); });
    at::Tensor x = hidden;
    const size_t last = layers_.size() - 1;
    ThreadTeam::in_one_region([&] {
      for (size_t i = 0; i <= last; ++i) {
        const bool fetched = queue.fetched();
        if (i < last) {
          queue.start(kv_caches[i + 1].const_data_ptr());
        }
        x = run_layer(step, i, x, residual, kv_caches[i], fetched, i < last ? &queue : nullptr,
                      i == last && selection ? &*selection : nullptr);
      }
    });
    return {x, residual};
  }

 private:
  // hidden [num_tokens, hidden_size] -> the same after layer `index`; the residual is updated. `fetched`: K and V that
  // attention reads are in cache. `queue`, if given, is what to fetch meanwhile. With a selection K and V of all rows are
  // written, but only the selected rows go on.
  at::Tensor run_layer(const Step& step, size_t index, const at::Tensor& hidden, at::Tensor& residual,
                       const at::Tensor& kv_cache, bool fetched, PrefetchQueue* queue, const Selection* selection) const {
    const LayerWeights& layer = layers_[index];
    const int64_t num_tokens = hidden.size(0), hidden_size = hidden.size(1), head_size = step.cos.size(-1);
    const int64_t num_all_heads = num_heads_ + 2 * kv_cache.size(1);

    at::Tensor x = rms_norm(hidden, residual, layer.input_layernorm, eps_);
    const at::Tensor qkv = multiply(layer.qkv_proj, x, num_all_heads * head_size, layer.o_proj.upcoming())
                               .view({num_tokens, num_all_heads, head_size});
    prepare_qkv(qkv, layer.q_norm, layer.k_norm, eps_, step.cos, step.sin, kv_cache, step.slot_mapping, step.plan);
    at::Tensor query = qkv.narrow(1, 0, num_heads_);  // [num_tokens, num_heads, head_size]
    if (selection != nullptr) {
      residual = residual.index_select(0, selection->rows);
      if (selection->rows.size(0) == 0) {  // this step only fills the cache
        return residual;
      }
      query = query.index_select(0, selection->rows);
    }
    const at::Tensor attended = at::empty(query.sizes(), hidden.options());
    paged_attention(attended, query, kv_cache, selection != nullptr ? selection->plan : step.plan, step.block_table, scale_,
                    fetched);
    x = multiply(layer.o_proj, attended.view({query.size(0), -1}), hidden_size, layer.gate_up_proj.upcoming(queue));

    x = rms_norm(x, residual, layer.post_attention_layernorm, eps_);
    x = multiply(layer.gate_up_proj, x, intermediate_size_, layer.down_proj.upcoming(queue), /*gated=*/true);
    const bool is_last = index + 1 == layers_.size();
    return multiply(layer.down_proj, x, hidden_size, is_last ? UpcomingReads{queue} : layers_[index + 1].qkv_proj.upcoming(queue));
  }

  at::Tensor multiply(const Linear& linear, const at::Tensor& x, int64_t out_features, const UpcomingReads& upcoming,
                      bool gated = false) const {
    return linear.multiply(x, out_features, gated, max_int4_rows_, upcoming);
  }

  int64_t num_heads_, intermediate_size_;
  double eps_, scale_;
  int64_t max_int4_rows_;
  std::vector<LayerWeights> layers_;
};

// One linear layer by itself, where the layers do not run as one call. x [..., in] -> [..., out].
at::Tensor linear_mixed(const at::Tensor& x, const at::Tensor& levels, const at::Tensor& scales, const at::Tensor& zeros,
                        const at::Tensor& perm, const at::Tensor& bias, const at::Tensor& packed, int64_t out_features,
                        bool gated, int64_t max_int4_rows) {
  return Linear{packed, levels, scales, zeros, perm, bias}.multiply(x, out_features, gated, max_int4_rows, {});
}

}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.class_<folovllm::DecoderStack>("DecoderStack")
      .def(torch::init<int64_t, int64_t, double, double, int64_t>(), "",
           {torch::arg("num_heads"), torch::arg("intermediate_size"), torch::arg("eps"), torch::arg("scale"),
            torch::arg("max_int4_rows")})
      .def("add_layer", &folovllm::DecoderStack::add_layer);
  // `run` as an operator, so that profilers see it.
  m.def(
      "decoder_stack(__torch__.torch.classes." C10_STRINGIZE(folovllm) ".DecoderStack stack, Tensor hidden, "
      "Tensor(a!) residual, Tensor cos, "
      "Tensor sin, Tensor(b!)[] kv_caches, Tensor slot_mapping, Tensor query_start_loc, Tensor seq_lens, "
      "Tensor block_table, Tensor? logits_indices=None) -> (Tensor, Tensor)");
  m.def(
      "linear_mixed(Tensor x, Tensor levels, Tensor scales, Tensor zeros, Tensor perm, Tensor bias, Tensor packed, "
      "int out_features, bool gated, int max_int4_rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(folovllm, CPU, m) {
  m.impl("decoder_stack",
         [](const c10::intrusive_ptr<folovllm::DecoderStack>& stack, const at::Tensor& hidden, const at::Tensor& residual,
            const at::Tensor& cos, const at::Tensor& sin, at::TensorList kv_caches, const at::Tensor& slot_mapping,
            const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& block_table,
            const std::optional<at::Tensor>& logits_indices) {
           return stack->run(hidden, residual, cos, sin, kv_caches, slot_mapping, query_start_loc, seq_lens, block_table,
                             logits_indices);
         });
  m.impl("linear_mixed", &folovllm::linear_mixed);
}
