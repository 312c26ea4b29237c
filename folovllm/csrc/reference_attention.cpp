// Paged attention in plain loops: what attention.cpp and kv_write.cpp compute, written to be read.
//
// Milestone: M4. vLLM counterpart: none (its tests compare kernels with a reference in Python). Left out: everything
// that makes attention.cpp fast: tiles, the online softmax, vectors, threads, prefetching. The engine never calls this
// file; tests compare the fast operators with it.
//
// Where is the key of position p of sequence s? The block table says in which block, and the position says where in it.
// E.g. with blocks of 16 tokens:
//
//   block_table[s]    7          2            9              position 20 = 1 * 16 + 4: block 2, offset 4
//   positions         0 .. 15    16 .. 31     32 .. 47       slot = block * block_size + offset = 36
//
//   kv_cache [num_blocks, num_kv_heads, 2, block_size * head_size]      of each block and KV head a K page and a V page
//
// The V page holds one row for each token. Number d of the value at `offset` is v[offset][d]:
//
//   offset 0    v0  v1  v2  ...  v(head_size - 1)
//   offset 1    v0  v1  v2  ...
//
// The K page lies on its side, so that a vector register can hold the same numbers of 16 different tokens. It is cut
// into groups of 16 tokens (the last group may have fewer), and a group into words of 32 bits. A word holds two
// neighbouring 16-bit numbers or one fp32 number of a key, and the words with the same number of all tokens of the
// group lie together:
//
//              token 0   token 1   ...   token 15                   group 0, 16-bit numbers
//   word 0     k0 k1     k0 k1           k0 k1
//   word 1     k2 k3     k2 k3           k2 k3
//   ...
//   word 31    k62 k63   k62 k63         k62 k63                    (a head of 64 numbers)
//              token 16  token 17  ...                              group 1
//   word 0     k0 k1     k0 k1

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace folovllm {
namespace {

constexpr int64_t kTokensPerGroup = 16;

template <typename T>
struct KvCache {
  T* data;
  int64_t num_blocks, num_kv_heads, block_size, head_size;

  KvCache(const at::Tensor& cache, int64_t head_size)
      : data(cache.mutable_data_ptr<T>()),
        num_blocks(cache.size(0)),
        num_kv_heads(cache.size(1)),
        block_size(cache.size(3) / head_size),
        head_size(head_size) {
    TORCH_CHECK(cache.dim() == 4 && cache.size(2) == 2 && cache.is_contiguous() && cache.size(3) % head_size == 0,
                "kv_cache must be a contiguous [num_blocks, num_kv_heads, 2, block_size * head_size]");
  }

  T* k_page(int64_t block, int64_t head) const {
    return data + (block * num_kv_heads + head) * 2 * block_size * head_size;
  }
  T& value(int64_t block, int64_t head, int64_t offset, int64_t d) const {
    T* v_page = k_page(block, head) + block_size * head_size;
    return v_page[offset * head_size + d];
  }
  T& key(int64_t block, int64_t head, int64_t offset, int64_t d) const {
    const int64_t per_word = 4 / sizeof(T);                                        // numbers in 32 bits: 1 or 2
    const int64_t first = offset / kTokensPerGroup * kTokensPerGroup;              // token of the group
    const int64_t width = std::min(kTokensPerGroup, block_size - first);           // tokens in the group
    const int64_t word = d / per_word, token = offset - first;
    T* group = k_page(block, head) + first * head_size;                            // all groups before it are full
    return group[(word * width + token) * per_word + d % per_word];
  }
};

// key, value [num_tokens, num_kv_heads, head_size] into the slots [num_tokens].
template <typename T>
void write_kv(const at::Tensor& key, const at::Tensor& value, const KvCache<T>& cache, const at::Tensor& slots) {
  const auto k = key.accessor<T, 3>(), v = value.accessor<T, 3>();
  const auto slot = slots.accessor<int64_t, 1>();
  for (int64_t token = 0; token < slots.size(0); ++token) {
    const int64_t block = slot[token] / cache.block_size, offset = slot[token] % cache.block_size;
    TORCH_CHECK(slot[token] >= 0 && block < cache.num_blocks, "slot ", slot[token], " is outside the cache");
    for (int64_t head = 0; head < cache.num_kv_heads; ++head) {
      for (int64_t d = 0; d < cache.head_size; ++d) {
        cache.key(block, head, offset, d) = k[token][head][d];
        cache.value(block, head, offset, d) = v[token][head][d];
      }
    }
  }
}

// One query of one head: softmax(scale * q . K) V over the first `num_keys` positions of its sequence.
// query, out [head_size]; table [blocks of the sequence].
template <typename T>
void attend(const T* query, const KvCache<T>& cache, const int32_t* table, int64_t kv_head, int64_t num_keys,
            float scale, T* out) {
  const int64_t size = cache.head_size;
  const auto key = [&](int64_t p, int64_t d) {  // number d of the key of position p
    return static_cast<float>(cache.key(table[p / cache.block_size], kv_head, p % cache.block_size, d));
  };
  const auto value = [&](int64_t p, int64_t d) {
    return static_cast<float>(cache.value(table[p / cache.block_size], kv_head, p % cache.block_size, d));
  };
  std::vector<float> weights(num_keys), sum(size, 0.0f);
  float highest = -std::numeric_limits<float>::infinity();
  for (int64_t p = 0; p < num_keys; ++p) {  // 1. the scores
    float score = 0.0f;
    for (int64_t d = 0; d < size; ++d) {
      score += static_cast<float>(query[d]) * key(p, d);
    }
    weights[p] = scale * score;
    highest = std::max(highest, weights[p]);
  }
  float total = 0.0f;
  for (float& weight : weights) {  // 2. the softmax, whose largest exponent is 0: it cannot overflow
    weight = std::exp(weight - highest);
    total += weight;
  }
  for (int64_t p = 0; p < num_keys; ++p) {  // 3. the weighted sum of values
    for (int64_t d = 0; d < size; ++d) {
      sum[d] += weights[p] * value(p, d);
    }
  }
  for (int64_t d = 0; d < size; ++d) {
    out[d] = static_cast<T>(sum[d] / total);
  }
}

// Causal attention of a batch. Sequence s has seq_lens[s] keys, of which the last belong to its queries, the tokens
// query_start_loc[s] .. query_start_loc[s + 1] of the batch. query, out [num_tokens, num_heads, head_size].
template <typename T>
void paged_attention(const at::Tensor& out, const at::Tensor& query, const KvCache<T>& cache,
                     const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& block_table,
                     float scale) {
  const auto starts = query_start_loc.accessor<int32_t, 1>(), lens = seq_lens.accessor<int32_t, 1>();
  const int64_t num_heads = query.size(1), queries_per_kv = num_heads / cache.num_kv_heads;
  for (int64_t s = 0; s < seq_lens.size(0); ++s) {
    const int64_t num_queries = starts[s + 1] - starts[s];
    TORCH_CHECK(num_queries <= lens[s] && lens[s] <= block_table.size(1) * cache.block_size, "sequence ", s, " has ",
                num_queries, " queries, ", lens[s], " keys and ", block_table.size(1), " blocks");
    for (int64_t q = 0; q < num_queries; ++q) {
      const int64_t token = starts[s] + q;
      const int64_t num_keys = lens[s] - num_queries + q + 1;  // a query sees the keys up to its own position
      for (int64_t head = 0; head < num_heads; ++head) {       // e.g. of 9 query heads, 0 .. 2 share KV head 0
        attend(query[token][head].const_data_ptr<T>(), cache, block_table[s].const_data_ptr<int32_t>(),
               head / queries_per_kv, num_keys, scale, out[token][head].mutable_data_ptr<T>());
      }
    }
  }
}

#define FOLOVLLM_FOR_TYPE(TYPE, NAME, ...)                                              \
  AT_DISPATCH_SWITCH(TYPE, NAME, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)              \
                     AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__) AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

void reference_write_kv(const at::Tensor& key, const at::Tensor& value, const at::Tensor& kv_cache,
                        const at::Tensor& slots) {
  FOLOVLLM_FOR_TYPE(kv_cache.scalar_type(), "reference_write_kv", [&] {
    write_kv<scalar_t>(key, value, KvCache<scalar_t>(kv_cache, key.size(2)), slots);
  });
}

void reference_paged_attention(const at::Tensor& out, const at::Tensor& query, const at::Tensor& kv_cache,
                               const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                               const at::Tensor& block_table, double scale) {
  FOLOVLLM_FOR_TYPE(query.scalar_type(), "reference_paged_attention", [&] {
    paged_attention<scalar_t>(out, query, KvCache<scalar_t>(kv_cache, query.size(2)), query_start_loc, seq_lens,
                              block_table, static_cast<float>(scale));
  });
}

}  // namespace
}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def("reference_write_kv(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()",
        &folovllm::reference_write_kv);
  m.def("reference_paged_attention(Tensor(a!) out, Tensor query, Tensor kv_cache, Tensor query_start_loc, "
        "Tensor seq_lens, Tensor block_table, float scale) -> ()", &folovllm::reference_paged_attention);
}
