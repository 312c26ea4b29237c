// A tile: up to 256 keys and values of a sequence, found in its pages.
//
// Milestone: M4. vLLM counterpart: none (its CPU kernel walks the block table inside its loops).

#pragma once

#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kv_pages.h"

namespace folovllm {
namespace {

constexpr int64_t kTileKeys = 256;  // keys between two updates of the softmax
constexpr int64_t kGroupsPerTile = kTileKeys / kKeysPerGroup;

template <typename T>
struct KvTile {
  int64_t count;                     // of keys
  const float* key[kGroupsPerTile];  // each [words][16 tokens]; a "float" is a word of 32 bits, perhaps two bf16
  const T* value[kGroupsPerTile];    // each [16 tokens][head_size]
  bool whole[kGroupsPerTile];        // whether all 16 tokens lie together in one group of a page: readable in place

  int64_t groups() const {
    return (count + kKeysPerGroup - 1) / kKeysPerGroup;
  }
};

// Whether keys are widened to fp32 before they are multiplied: fp16, for which no CPU here has products of pairs.
template <typename T>
constexpr bool kWidened = std::is_same_v<T, c10::Half>;

// Words of two fp16 numbers [words][16] -> fp32 [2 * words][16].
template <typename T>
void widen(const float* group, int64_t words, float* out) {
  for (int64_t p = 0; p < words; ++p) {
    T pairs[2 * kKeysPerGroup];
    std::memcpy(pairs, group + p * kKeysPerGroup, sizeof(pairs));
    for (int64_t i = 0; i < kKeysPerGroup; ++i) {
      out[2 * p * kKeysPerGroup + i] = static_cast<float>(pairs[2 * i]);
      out[(2 * p + 1) * kKeysPerGroup + i] = static_cast<float>(pairs[2 * i + 1]);
    }
  }
}

// Finds the keys `first` .. `first + count` of a sequence through its block table.
template <typename T>
void locate(const Pages<T>& pages, const int32_t* table, int64_t head, int64_t first, int64_t count, KvTile<T>& tile) {
  tile.count = count;
  int64_t page = first / pages.block_size, offset = first % pages.block_size;
  for (int64_t g = 0; g < tile.groups(); ++g, offset += kKeysPerGroup) {
    for (; offset >= pages.block_size; offset -= pages.block_size) {
      ++page;
    }
    tile.key[g] = reinterpret_cast<const float*>(pages.key_word(table[page], head, offset));
    tile.value[g] = pages.value(table[page], head, offset);
    tile.whole[g] = offset % kKeysPerGroup == 0 && offset + kKeysPerGroup <= pages.block_size;
  }
}

// Makes every group of a located tile readable. A group that is not whole (e.g. in pages of 5 tokens) is copied token
// by token into the buffers `keys` and `values`. fp16 keys are widened into the buffer `widened`. Each buffer has room for
// a tile.
template <typename T>
void collect(const Pages<T>& pages, const int32_t* table, int64_t head, int64_t first, float* keys, T* values,
             float* widened, KvTile<T>& tile) {
  const int64_t words = pages.words(), head_size = pages.head_size;
  for (int64_t g = 0; g < tile.groups(); ++g) {
    if (!tile.whole[g]) {
      float* key = keys + g * words * kKeysPerGroup;
      T* value = values + g * kKeysPerGroup * head_size;
      for (int64_t i = 0; i < std::min(tile.count - g * kKeysPerGroup, kKeysPerGroup); ++i) {
        const int64_t position = first + g * kKeysPerGroup + i, offset = position % pages.block_size;
        const int64_t block = table[position / pages.block_size];
        const int64_t stride = pages.group_width(offset) * Pages<T>::kPerWord;
        const T* first_word = pages.key_word(block, head, offset);
        for (int64_t p = 0; p < words; ++p) {
          std::memcpy(key + p * kKeysPerGroup + i, first_word + p * stride, 4);
        }
        std::memcpy(value + i * head_size, pages.value(block, head, offset), head_size * sizeof(T));
      }
      tile.key[g] = key;
      tile.value[g] = value;
    }
    if constexpr (kWidened<T>) {
      float* wide = widened + g * head_size * kKeysPerGroup;
      widen<T>(tile.key[g], words, wide);
      tile.key[g] = wide;
    }
  }
}

}  // namespace
}  // namespace folovllm
