// How weights of 4 bits lie in memory: for int4_pack.cpp, which packs them, and int4_kernel.h, which multiplies with
// them.
//
// Milestone: M7. vLLM counterpart: the layout of csrc/cpu/cpu_wna16.cpp (after v0.11.0); Marlin's on GPUs.
//
// A weight is scale * (level - zero). Each output has a scale and a zero for each group of inputs. Levels are 0 .. 15.
//
//   levels[block][group][chunk][64]     block = 32 outputs, chunk = 4 inputs of a group: 64 bytes, a line of the cache
//   scales[block][group][32]            fp32
//   zeros [block][group][32]            int8, zero - 8; absent if all are 0, as in a symmetric checkpoint
//   perm  [groups * chunks * 4]         the input at each place, -1 for none; absent if inputs are in the order of x
//
//   a line   byte 0             1          2          3          4          ...   63
//            input 0            1          2          3          0                3         of the chunk
//            low    level of output 0 ............................ output 1 ...   15        of the block
//            high   level of output 16 ........................... output 17 ...  31
//
// Byte 4 * lane + i of a line belongs to input i of the chunk. Its low nibble is the level of output `lane`, its high
// nibble that of output 16 + lane. Seen as words of 32 bits, each word belongs to two outputs:
//
//   bits    0-3      4-7      8-11     12-15    16-19    20-23    24-27    28-31
//   input   0        0        1        1        2        2        3        3
//   output  lane     16+lane  lane     16+lane  lane     16+lane  lane     16+lane
//
// One AND with 0x000f000f leaves the levels of inputs 0 and 2 of output `lane`, each as a number of 16 bits. After a shift
// by 4, 8 or 12 it leaves those of output 16 + lane, or of inputs 1 and 3. Each lane of a vector then is one output, with
// the levels of two inputs, as instructions want them that multiply pairs of 16-bit integers.

#pragma once

#include <cstdint>

namespace folovllm {

constexpr int64_t kInt4Lanes = 16;              // words of a line
constexpr int64_t kInt4Block = 2 * kInt4Lanes;  // outputs of a block
constexpr int64_t kInt4Chunk = 4;               // inputs of a chunk
constexpr int64_t kInt4Line = 64;               // bytes of a chunk
constexpr int64_t kMaxInt4Group = 128;          // inputs of a group: their integer sums must fit 32 bits

// A weight, and the sizes of a multiplication with it.
struct Int4Problem {
  const uint8_t* levels;  // [blocks, groups, chunks, 64]
  const float* scales;    // [blocks, groups, 32]
  const int8_t* zeros;    // the same shape, zero - 8; null: all are 0
  const float* bias;      // [blocks * 32] or null
  int64_t rows, groups, chunks, out_features;

  int64_t group_size() const {
    return chunks * kInt4Chunk;
  }
  int64_t group_bytes() const {
    return chunks * kInt4Line;
  }
};

}  // namespace folovllm
