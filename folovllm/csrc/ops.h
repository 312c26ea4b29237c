// The operators as C++ functions, for those of them that are made of others (layer.cpp). Each is documented where it is.
//
// Milestone: M4. vLLM counterpart: csrc/ops.h.

#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <optional>
#include <vector>

namespace folovllm {

// Memory that will be read soon. A linear layer of 9 to 64 rows computes longer than its weights take to come, so memory
// has time to spare; its tiles ask for these pieces one by one, which then wait in the L3 cache.
struct Piece {
  int64_t offset;  // bytes
  int64_t lines;   // of 64 bytes
};

class Aside {
 public:
  std::vector<Piece> pieces;

  // From now on the offsets count from `base`, and no piece has been asked for.
  void start(const void* base) {
    base_ = static_cast<const char*>(base);
    taken_ = 0;
  }
  const char* data(const Piece& piece) const {
    return base_ + piece.offset;
  }
  const Piece* take() {
    const size_t i = taken_.fetch_add(1, std::memory_order_relaxed);
    return i < pieces.size() ? &pieces[i] : nullptr;
  }

 private:
  const char* base_ = nullptr;
  std::atomic<size_t> taken_{0};
};

at::Tensor linear_packed(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                         int64_t out_features, bool native = true, Aside* aside = nullptr);
at::Tensor linear_silu_packed(const at::Tensor& x, const at::Tensor& packed, int64_t out_features, bool native = true,
                              Aside* aside = nullptr);

struct Int4Weight {
  const at::Tensor &levels, &scales, &zeros, &perm, &bias;
};

at::Tensor linear_int4(const at::Tensor& x, const Int4Weight& weight, int64_t out_features, bool gated = false,
                       bool native = true);
at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight, double eps);
at::Tensor rotary_(at::Tensor x, const at::Tensor& cos, const at::Tensor& sin);
void write_kv(const at::Tensor& key, const at::Tensor& value, const at::Tensor& kv_cache, const at::Tensor& slots);
void paged_attention(const at::Tensor& out, const at::Tensor& query, const at::Tensor& kv_cache,
                     const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& block_table,
                     double scale, bool native = true);

}  // namespace folovllm
