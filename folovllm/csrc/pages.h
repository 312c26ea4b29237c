// The pages of the KV cache, and tiles of keys and values found in them.
//
// Milestone: M4. vLLM counterpart: reshape_and_cache in csrc/cpu/ and the cache layout of its CPU backend.
//
// A decoding token reads its whole KV cache and does a handful of operations with each number, so all that counts is to
// read every byte once and to stay out of the way of the memory. Hence the layout of a page:
//
//   kv_cache [num_blocks, num_kv_heads, 2, block_size * head_size]       2: K, then V
//
//   V is stored as it comes: [block_size, head_size].
//   K is cut into groups of 16 tokens (the last group of a page may be narrower) and turned on its side:
//   [group][word][token in group], where a word is 32 bits: one fp32 number or two neighbouring 16-bit ones.
//
//                 token 0   token 1   ...   token 15
//        word 0    k0 k1     k0 k1           k0 k1         x  (q0 q1) in all lanes
//        word 1    k2 k3     k2 k3           k2 k3         x  (q2 q3)
//
// A vector holds the same word of 16 tokens, so each lane adds up the score of its own token; no sums across lanes.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <iterator>

namespace folovllm {
namespace {

constexpr int64_t kGroup = 16;           // tokens in a group of K; part of the layout, whatever the CPU
constexpr int64_t kTile = 64;            // keys between two updates of the softmax
constexpr int64_t kMaxHeadSize = 256;

// ---- The pages

template <typename T>
struct Pages {
  static constexpr int64_t kPerWord = 4 / sizeof(T);
  T* data;
  int64_t num_blocks, num_kv_heads, block_size, head_size;

  T* key(int64_t block, int64_t head) const {
    return data + (block * num_kv_heads + head) * 2 * block_size * head_size;
  }
  T* value(int64_t block, int64_t head, int64_t offset) const {
    return key(block, head) + (block_size + offset) * head_size;
  }
  int64_t words() const {
    return head_size / kPerWord;
  }
  // Width of the group that token `offset` of a page is in. E.g. pages of 40: groups of 16, 16 and 8 tokens.
  int64_t width(int64_t offset) const {
    return std::min(kGroup, block_size - offset / kGroup * kGroup);
  }
  // Word 0 of a token's key; word p lies p * width(offset) words behind it.
  T* lane(int64_t block, int64_t head, int64_t offset) const {
    const int64_t first = offset / kGroup * kGroup;
    return key(block, head) + first * head_size + (offset - first) * kPerWord;
  }
};

template <typename T>
Pages<T> pages_of(const at::Tensor& kv_cache, int64_t head_size) {
  TORCH_CHECK(kv_cache.dim() == 4 && kv_cache.size(2) == 2 && kv_cache.is_contiguous(),
              "kv_cache must be a contiguous [num_blocks, num_kv_heads, 2, block_size * head_size]");
  TORCH_CHECK(head_size % 16 == 0 && head_size <= kMaxHeadSize && kv_cache.size(3) % head_size == 0,
              "head_size must be a multiple of 16 up to ", kMaxHeadSize, " that divides a page, not ", head_size);
  return {kv_cache.mutable_data_ptr<T>(), kv_cache.size(0), kv_cache.size(1), kv_cache.size(3) / head_size, head_size};
}

// ---- A tile: up to 64 keys and values, wherever their pages are

template <typename T>
struct Tile {
  const float* group[kTile / kGroup];  // each [words][16 tokens]; "float" stands for 32 bits, perhaps two bf16
  const T* value[kTile];               // each [head_size]
};

// Words of two 16-bit numbers [words][16] -> fp32 [2 * words][16].
template <typename T>
void widen(const float* group, int64_t words, float* out) {
  for (int64_t p = 0; p < words; ++p) {
    T pairs[2 * kGroup];
    std::memcpy(pairs, group + p * kGroup, sizeof(pairs));
    for (int64_t i = 0; i < kGroup; ++i) {
      out[2 * p * kGroup + i] = static_cast<float>(pairs[2 * i]);
      out[(2 * p + 1) * kGroup + i] = static_cast<float>(pairs[2 * i + 1]);
    }
  }
}

// Where keys `first` .. `first + count` of a sequence are. A group of K that is whole is used in place; null otherwise.
template <typename T>
void locate(const Pages<T>& pages, const int32_t* table, int64_t head, int64_t first, int64_t count, Tile<T>& tile) {
  std::fill(std::begin(tile.group), std::end(tile.group), nullptr);
  for (int64_t i = 0; i < count;) {  // a page, or what of it belongs to the tile, at a time
    const int64_t block = table[(first + i) / pages.block_size], offset = (first + i) % pages.block_size;
    const int64_t here = std::min(count - i, pages.block_size - offset);
    for (int64_t t = (kGroup - i % kGroup) % kGroup; t < here; t += kGroup) {
      if ((offset + t) % kGroup == 0 && offset + t + kGroup <= pages.block_size) {
        tile.group[(i + t) / kGroup] = reinterpret_cast<const float*>(pages.lane(block, head, offset + t));
      }
    }
    const T* value = pages.value(block, head, offset);
    for (int64_t end = i + here; i < end; ++i, value += pages.head_size) {
      tile.value[i] = value;
    }
  }
}

// Ask for a line of the next tile. Into L2 and not L1: a core waits for some 24 lines at once on their way to L1, and
// 24 x 64 bytes per 110 ns are 14 GB/s; more may be on their way to L2 (measured here: 11 GB/s against 18 per core).
inline void prefetch(const void* line) {
  __builtin_prefetch(line, /*write=*/0, /*locality=*/2);
}

// Where the next tile is, for asking for its lines while this one is computed. The last tile of a sequence is shorter: what
// it lacks is made up with what it has, so that the loops that ask need not count. Nothing to ask for: null.
template <typename T>
class Ahead {
 public:
  Ahead(Tile<T>& next, int64_t count) : next_(next), whole_(count > 0 && next.group[0] != nullptr) {
    if (whole_) {
      std::transform(std::begin(next.group), std::end(next.group), keys_,
                     [&](const float* group) { return group != nullptr ? group : next.group[0]; });
      std::fill(next.value + count, std::end(next.value), next.value[0]);
    }
  }
  const float* const* keys() const {
    return whole_ ? keys_ : nullptr;
  }
  const T* const* values() const {
    return whole_ ? next_.value : nullptr;
  }
  void fetch_values(int64_t begin, int64_t end, int64_t head_size) const {
    for (int64_t j = begin; whole_ && j < end; ++j) {
      for (int64_t d = 0; d < head_size; d += 64 / static_cast<int64_t>(sizeof(T))) {
        prefetch(next_.value[j] + d);
      }
    }
  }

 private:
  Tile<T>& next_;
  bool whole_;
  const float* keys_[kTile / kGroup];
};

// Make every group of a located tile readable as [words][16]: collect those that are not whole, token by token (pages
// of 1 or 5 tokens), and widen them where the CPU cannot multiply 16-bit words. `collected` and `widened` have room for
// a tile.
template <typename T, bool kWords>
void collect(const Pages<T>& pages, const int32_t* table, int64_t head, int64_t first, int64_t count, float* collected,
             float* widened, Tile<T>& tile) {
  const int64_t words = pages.words();
  for (int64_t g = 0; g < kTile / kGroup; ++g) {
    if (g * kGroup >= count) {
      tile.group[g] = tile.group[0];  // something to multiply with; these scores are thrown away
      continue;
    }
    if (tile.group[g] == nullptr) {
      float* group = collected + g * words * kGroup;
      for (int64_t i = 0; i < std::min(count - g * kGroup, kGroup); ++i) {
        const int64_t position = first + g * kGroup + i, offset = position % pages.block_size;
        const T* lane = pages.lane(table[position / pages.block_size], head, offset);
        const int64_t stride = pages.width(offset) * Pages<T>::kPerWord;
        for (int64_t p = 0; p < words; ++p) {
          std::memcpy(group + p * kGroup + i, lane + p * stride, 4);
        }
      }
      tile.group[g] = group;
    }
    if constexpr (!kWords) {
      float* wide = widened + g * pages.head_size * kGroup;
      widen<T>(tile.group[g], words, wide);
      tile.group[g] = wide;
    }
  }
}

}  // namespace
}  // namespace folovllm
