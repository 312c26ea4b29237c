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

namespace folovllm {
namespace {

constexpr int64_t kGroup = 16;           // tokens in a group of K; part of the layout, whatever the CPU
constexpr int64_t kTile = 256;           // keys between two updates of the softmax
constexpr int64_t kTileGroups = kTile / kGroup;
constexpr int64_t kMaxHeadSize = 256;
template <typename T>
constexpr int64_t kPerLine = 64 / sizeof(T);  // numbers in a line of the cache

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

// ---- A tile: up to 256 keys and values, wherever their pages are

template <typename T>
struct Tile {
  int64_t count;                   // keys
  const float* key[kTileGroups];   // each [words][16 tokens]; "float" stands for 32 bits, perhaps two bf16
  const T* value[kTileGroups];     // each [16 tokens][head_size]
  bool whole[kTileGroups];         // readable where it is: all 16 tokens lie together in one group of a page

  int64_t groups() const {
    return (count + kGroup - 1) / kGroup;
  }
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

// Where keys `first` .. `first + count` of a sequence are.
template <typename T>
void locate(const Pages<T>& pages, const int32_t* table, int64_t head, int64_t first, int64_t count, Tile<T>& tile) {
  tile.count = count;
  int64_t page = first / pages.block_size, offset = first % pages.block_size;
  for (int64_t g = 0; g < tile.groups(); ++g, offset += kGroup) {
    for (; offset >= pages.block_size; offset -= pages.block_size) {
      ++page;
    }
    tile.key[g] = reinterpret_cast<const float*>(pages.lane(table[page], head, offset));
    tile.value[g] = pages.value(table[page], head, offset);
    tile.whole[g] = offset % kGroup == 0 && offset + kGroup <= pages.block_size;
  }
}

// Ask for a line of the next tile. Into L2 and not L1: a core waits for some 24 lines at once on their way to L1, and
// 24 x 64 bytes per 110 ns are 14 GB/s; more may be on their way to L2 (measured here: 11 GB/s against 18 per core).
inline void prefetch(const void* line) {
  __builtin_prefetch(line, /*write=*/0, /*locality=*/2);
}

// What to ask for while a tile is computed, so that memory works meanwhile: pages lie anywhere, and the CPU's own
// prefetcher starts anew in each. Group by group, a line for each that is computed with. Each line is asked for
// twice, a tile ahead and half a tile ahead: measured, once is not enough, as if a core that has too much under way
// dropped what it is asked for next.
//
//   while this tile's keys are scored      next tile's keys, this tile's values
//   while a row's softmax is computed      some of next tile's values: nothing else keeps memory busy then
//   while this tile's values are added     next tile's values, next tile's keys
//
// Only the first time of each is left with `once`: where all is in the core's cache already, or where a tile is computed
// with many rows, more would cost time and bring nothing.
template <typename T>
class Ahead {
  static constexpr int64_t kGroupsPerSoftmax = 3;  // 6 KiB with a head of 64 in bf16: what comes while it computes

 public:
  // `now` computes, then comes `next`, perhaps of no keys. Has it fewer groups, then the loops ask for the first again,
  // so that they need not count; has it more, then those are asked for by `fetch_rest`.
  Ahead(const Tile<T>& now, Tile<T>& next, int64_t head_size, bool once)
      : now_(now), next_(next), lines_(kGroup * head_size / kPerLine<T>), once_(once) {
    for (int64_t g = next.groups(); next.count > 0 && g < now.groups(); ++g) {
      next.key[g] = next.key[0];
      next.value[g] = next.value[0];
    }
  }
  const float* const* keys() const {
    return next_.count > 0 ? next_.key : nullptr;
  }
  const T* const* values() const {
    return next_.count > 0 ? next_.value : nullptr;
  }
  const float* const* keys_again() const {
    return once_ ? nullptr : keys();
  }
  const T* const* own_values_again() const {
    return once_ ? nullptr : now_.value;
  }
  // For row r of those that are computed together.
  void fetch_during_softmax(int64_t r) const {
    const int64_t end = once_ ? 0 : std::min((r + 1) * kGroupsPerSoftmax, next_.groups());
    for (int64_t g = r * kGroupsPerSoftmax; g < end; ++g) {
      fetch(next_.value[g]);
    }
  }
  void fetch_rest() const {
    for (int64_t g = now_.groups(); !once_ && g < next_.groups(); ++g) {
      fetch(next_.key[g]);
      fetch(next_.value[g]);
    }
  }

 private:
  const Tile<T>& now_;
  Tile<T>& next_;
  int64_t lines_;  // of a group's keys, and of its values
  bool once_;

  void fetch(const void* group) const {
    asm volatile("");  // GCC sees no effect in a function that only prefetches, and would drop the call
    for (int64_t i = 0; i < lines_; ++i) {
      prefetch(static_cast<const char*>(group) + 64 * i);
    }
  }
};

// Make every group of a located tile readable: collect those that are not whole token by token (pages of 1 or 5 tokens),
// and widen the keys where the CPU cannot multiply 16-bit words. Each buffer has room for a tile.
template <typename T, bool kWords>
void collect(const Pages<T>& pages, const int32_t* table, int64_t head, int64_t first, float* keys, T* values,
             float* widened, Tile<T>& tile) {
  const int64_t words = pages.words(), head_size = pages.head_size;
  for (int64_t g = 0; g < tile.groups(); ++g) {
    if (!tile.whole[g]) {
      float* key = keys + g * words * kGroup;
      T* value = values + g * kGroup * head_size;
      for (int64_t i = 0; i < std::min(tile.count - g * kGroup, kGroup); ++i) {
        const int64_t position = first + g * kGroup + i, offset = position % pages.block_size;
        const int64_t block = table[position / pages.block_size], stride = pages.width(offset) * Pages<T>::kPerWord;
        const T* lane = pages.lane(block, head, offset);
        for (int64_t p = 0; p < words; ++p) {
          std::memcpy(key + p * kGroup + i, lane + p * stride, 4);
        }
        std::memcpy(value + i * head_size, pages.value(block, head, offset), head_size * sizeof(T));
      }
      tile.key[g] = key;
      tile.value[g] = value;
    }
    if constexpr (!kWords) {
      float* wide = widened + g * head_size * kGroup;
      widen<T>(tile.key[g], words, wide);
      tile.key[g] = wide;
    }
  }
}

}  // namespace
}  // namespace folovllm
