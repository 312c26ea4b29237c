// The operators as C++ functions, for those of them that are made of others (layer.cpp). Each is documented where it is.
//
// Milestone: M4. vLLM counterpart: csrc/ops.h.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "attention_plan.h"

namespace folovllm {

// Memory that will be read soon. A linear layer of 9 to 64 rows computes longer than its weights take to come, so memory
// has time to spare; its tiles ask for these pieces one by one, which then wait in the cache of the core that asked.
struct Piece {
  int64_t offset;  // bytes
  int64_t lines;   // of 64 bytes
};

class Aside {
 public:
  explicit Aside(int64_t num_threads) : shares_(num_threads) {}

  // `thread` will read the piece.
  void add(int64_t thread, Piece piece) {
    shares_[thread].pieces.push_back(piece);
  }
  // From now on the offsets count from `base`, and no piece has been asked for. As many calls of a thread are expected
  // as it made since the last start, and its pieces are spread evenly over them: all at once would keep the weights waiting.
  void start(const void* base) {
    base_ = static_cast<const char*>(base);
    for (Share& share : shares_) {
      share.expected = std::max({size_t{1}, share.pieces.size(), share.calls});
      share.calls = 0;
    }
  }
  // Whether pieces have been asked for since the start.
  bool fetched() const {
    return std::any_of(shares_.begin(), shares_.end(), [](const Share& s) { return s.calls > 0 && !s.pieces.empty(); });
  }
  const char* data(const Piece& piece) const {
    return base_ + piece.offset;
  }
  // A piece for the thread that calls, or null.
  const Piece* take() {
    const size_t thread = at::get_thread_num();
    if (thread >= shares_.size()) {
      return nullptr;
    }
    Share& share = shares_[thread];
    const size_t call = share.calls++, count = share.pieces.size();
    const size_t piece = call * count / share.expected;
    return call < share.expected && piece < (call + 1) * count / share.expected ? &share.pieces[piece] : nullptr;
  }

 private:
  struct alignas(64) Share {  // a line of its own: no thread waits for another's counter
    std::vector<Piece> pieces;
    size_t calls = 0, expected = 1;
  };
  const char* base_ = nullptr;
  std::vector<Share> shares_;
};

// What a linear layer should fetch for those that come after it; nothing, if null.
struct Upcoming {
  Aside* aside = nullptr;
  const at::Tensor* packed = nullptr;  // the next linear layer's weight: of it the beginnings of the threads' shares
};

at::Tensor linear_packed(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                         int64_t out_features, bool native = true, const Upcoming& upcoming = {});
at::Tensor linear_silu_packed(const at::Tensor& x, const at::Tensor& packed, int64_t out_features, bool native = true,
                              const Upcoming& upcoming = {});

struct Int4Weight {
  const at::Tensor &levels, &scales, &zeros, &perm, &bias;
};

at::Tensor linear_int4(const at::Tensor& x, const Int4Weight& weight, int64_t out_features, bool gated = false,
                       bool native = true);
at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight, double eps);
void prepare_qkv(const at::Tensor& qkv, const at::Tensor& query_norm, const at::Tensor& key_norm, double eps,
                 const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& kv_cache, const at::Tensor& slots,
                 const AttentionPlan& plan);
void paged_attention(const at::Tensor& out, const at::Tensor& query, const at::Tensor& kv_cache, const AttentionPlan& plan,
                     const at::Tensor& block_table, double scale, bool native = true, bool fetched = false);

}  // namespace folovllm
