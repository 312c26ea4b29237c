// The pages of the KV cache: where each number of a key and of a value lies.
//
// Milestone: M4. vLLM counterpart: reshape_and_cache in csrc/cpu/ and the cache layout of its CPU backend.
//
// A decoding token reads its whole KV cache and does a handful of operations with each number. Its speed is therefore
// the speed of the memory, and a page is laid out so that the arithmetic never delays the reads:
//
//   kv_cache [num_blocks, num_kv_heads, 2, block_size * head_size]       2: K, then V
//
//   V is stored as it comes: [block_size, head_size].
//   K lies on its side. It is cut into groups of 16 tokens (the last group of a page may be narrower), and a group is
//   [word][token in group]. A word is 32 bits: one fp32 number or two neighbouring 16-bit ones.
//
//                 token 0   token 1   ...   token 15
//        word 0    k0 k1     k0 k1           k0 k1         x  (q0 q1) in all lanes
//        word 1    k2 k3     k2 k3           k2 k3         x  (q2 q3)
//
// A vector holds the same word of 16 tokens, so each lane adds up the score of its own token, and no sums across lanes
// are needed. reference_attention.cpp reads and writes the same pages in plain loops.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace folovllm {
namespace {

constexpr int64_t kKeysPerGroup = 16;  // part of the layout, the same on every CPU
constexpr int64_t kMaxHeadSize = 256;

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
  // The width of the group that holds token `offset` of a page. E.g. pages of 40 have groups of 16, 16 and 8 tokens.
  int64_t group_width(int64_t offset) const {
    return std::min(kKeysPerGroup, block_size - offset / kKeysPerGroup * kKeysPerGroup);
  }
  // Word 0 of a token's key. Word p lies p * group_width(offset) words behind it.
  T* key_word(int64_t block, int64_t head, int64_t offset) const {
    const int64_t first = offset / kKeysPerGroup * kKeysPerGroup;
    return key(block, head) + first * head_size + (offset - first) * kPerWord;
  }
};

// Writes key and value [num_kv_heads, head_size] of one token into its slot. The heads are `key_stride` and
// `value_stride` numbers apart.
template <typename T>
void write_token(const Pages<T>& pages, const T* key, int64_t key_stride, const T* value, int64_t value_stride,
                 int64_t slot) {
  const int64_t block = slot / pages.block_size, offset = slot % pages.block_size;
  const int64_t stride = pages.group_width(offset) * Pages<T>::kPerWord;
  for (int64_t head = 0; head < pages.num_kv_heads; ++head, key += key_stride, value += value_stride) {
    T* first_word = pages.key_word(block, head, offset);
    for (int64_t p = 0; p < pages.words(); ++p) {
      std::memcpy(first_word + p * stride, key + p * Pages<T>::kPerWord, 4);
    }
    std::memcpy(pages.value(block, head, offset), value, pages.head_size * sizeof(T));
  }
}

}  // namespace
}  // namespace folovllm
