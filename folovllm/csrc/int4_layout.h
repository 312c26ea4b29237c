// How weights of 4 bits lie in memory: for int4_pack.cpp, which packs them, and int4.cpp, which multiplies with them.
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
// nibble that of output 16 + lane. One AND, and one more after a shift, turn a line into two vectors. Each of the 16
// lanes of a vector is one output, with the levels of 4 inputs as bytes, as the dot product instructions for bytes need
// them.

#pragma once

#include <cstdint>

#include "simd.h"

namespace folovllm {

constexpr int64_t kInt4Block = 2 * kLanes;  // outputs of a block
constexpr int64_t kInt4Chunk = 4;           // inputs of a chunk
constexpr int64_t kInt4Line = 64;           // bytes of a chunk
constexpr int64_t kMaxInt4Group = 128;      // inputs of a group: their integer sums must fit 32 bits, see int4.cpp

}  // namespace folovllm
