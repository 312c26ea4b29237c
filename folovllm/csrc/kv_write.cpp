// What happens to queries, keys and values before attention: norms per head (if the model has them), rotary embedding,
// and the write of K and V into their pages (kv_pages.h).
//
// Milestone: M4. vLLM counterpart: reshape_and_cache and rotary_embedding in csrc/cpu/; its GPU builds fuse norm,
// rotary and write as well. Left out: an fp8 cache.

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <cstring>

#include "ops.h"
#include "kv_pages.h"
#include "row_ops.h"
#include "tensor_checks.h"
#include "thread_team.h"

namespace folovllm {
namespace {

constexpr int64_t kTokensPerThread = 8;  // fewer tokens are done before another thread wakes up
constexpr int64_t kMaxOwnedTokens = 64;  // with more tokens, an even split among the threads is faster

// The key and value of one token, for all KV heads.
template <typename T>
struct TokenKV {
  const T *key, *value;
  int64_t key_stride, value_stride;  // from head to head
};

// Calls token_kv(token) for each token, and writes the K and V that it returns into the token's slot. If there is a
// plan and the tokens are few, the thread that will read a sequence also writes it, so that its queries, keys and
// values need not travel from core to core.
template <typename T, typename F>
void write_tokens(const Pages<T>& pages, const at::Tensor& slot_mapping, const AttentionPlan* plan, const F& token_kv) {
  TORCH_CHECK(slot_mapping.dim() == 1 && slot_mapping.is_contiguous(), "slot_mapping must be contiguous [num_tokens]");
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  const int64_t num_tokens = slot_mapping.size(0);
  for (int64_t token = 0; token < num_tokens; ++token) {
    TORCH_CHECK(slots[token] >= 0 && slots[token] < pages.num_blocks * pages.block_size, "slot ", slots[token],
                " is outside the cache");
  }
  const auto write = [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const TokenKV<T> kv = token_kv(token);
      write_token(pages, kv.key, kv.key_stride, kv.value, kv.value_stride, slots[token]);
    }
  };
  if (plan == nullptr || num_tokens < kTokensPerThread || num_tokens > kMaxOwnedTokens) {
    return ThreadTeam::run_ranges(num_tokens, kTokensPerThread, write);
  }
  ThreadTeam::run(plan->num_threads(), [&](int64_t thread) {
    for (int64_t s = 0; s < plan->num_reqs(); ++s) {
      if (plan->owner(s) == thread) {
        write(plan->first_token(s), plan->first_token(s + 1));
      }
    }
  });
}

template <typename T>
const T* norm_weight(const at::Tensor& weight, int64_t head_size) {
  TORCH_CHECK(weight.numel() == 0 || (weight.numel() == head_size && weight.is_contiguous()),
              "the norm of a head must have head_size weights");
  return weight.numel() == 0 ? nullptr : weight.const_data_ptr<T>();
}

}  // namespace

// Writes key and value [num_tokens, num_kv_heads, head_size] into the slots [num_tokens], each block * block_size +
// offset.
void write_kv(const at::Tensor& key, const at::Tensor& value, const at::Tensor& kv_cache, const at::Tensor& slots) {
  TORCH_CHECK(key.dim() == 3 && key.sizes() == value.sizes() && key.stride(2) == 1 && value.stride(2) == 1 &&
              key.size(0) == slots.size(0) && key.size(1) == kv_cache.size(1),
              "write_kv: shapes do not fit: ", key.sizes(), value.sizes(), kv_cache.sizes(), slots.sizes());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, kv_cache.scalar_type(), "write_kv", [&] {
    if constexpr (!std::is_same_v<scalar_t, double>) {
      const scalar_t* keys = key.const_data_ptr<scalar_t>();
      const scalar_t* values = value.const_data_ptr<scalar_t>();
      write_tokens(pages_of<scalar_t>(kv_cache, key.size(2)), slots, nullptr, [&](int64_t token) {
        return TokenKV<scalar_t>{keys + token * key.stride(0), values + token * value.stride(0), key.stride(1),
                                 value.stride(1)};
      });
    } else {
      TORCH_CHECK(false, "write_kv: no fp64");
    }
  });
}

// Prepares qkv [num_tokens, num_heads + 2 * num_kv_heads, head_size] for attention. Queries and keys are normalised
// (unless the norm weights [head_size] are empty) and rotated in place, and K and V are written into their slots.
void prepare_qkv(const at::Tensor& qkv, const at::Tensor& query_norm, const at::Tensor& key_norm, double eps,
                 const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& kv_cache, const at::Tensor& slots,
                 const AttentionPlan& plan) {
  TORCH_CHECK(qkv.dim() == 3 && qkv.is_contiguous() && qkv.size(0) == slots.size(0) && qkv.size(2) % 2 == 0 &&
              qkv.size(0) == plan.num_tokens() && qkv.scalar_type() == kv_cache.scalar_type(),
              "prepare_qkv: shapes do not fit: ", qkv.sizes(), slots.sizes());
  check_table(cos, qkv), check_table(sin, qkv);
  const int64_t num_all_heads = qkv.size(1), size = qkv.size(2), num_kv_heads = kv_cache.size(1);
  const int64_t num_heads = num_all_heads - 2 * num_kv_heads;
  dispatch_float_or_bf16(qkv.scalar_type(), "prepare_qkv", [&](auto zero) {
    using T = decltype(zero);
    T* data = qkv.mutable_data_ptr<T>();
    const T *query_weight = norm_weight<T>(query_norm, size), *key_weight = norm_weight<T>(key_norm, size);
    const T *cos_data = cos.const_data_ptr<T>(), *sin_data = sin.const_data_ptr<T>();
    write_tokens(pages_of<T>(kv_cache, size), slots, &plan, [&](int64_t token) {
      T* heads = data + token * num_all_heads * size;
      for (int64_t head = 0; head < num_heads + num_kv_heads; ++head) {
        T* row = heads + head * size;
        if (const T* weight = head < num_heads ? query_weight : key_weight) {
          rms_norm_row<T>(row, nullptr, weight, row, size, static_cast<float>(eps));
        }
        rotate_row(row, cos_data + token * cos.stride(0), sin_data + token * sin.stride(0), size / 2);
      }
      const T* keys = heads + num_heads * size;
      return TokenKV<T>{keys, keys + num_kv_heads * size, size, size};
    });
  });
}

}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def("write_kv(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()", &folovllm::write_kv);
}
