// Weights of 4 bits as they lie in memory, for who makes them (int4_pack.cpp) and who multiplies with them (int4.cpp).
//
// Milestone: M7. vLLM counterpart: the packed layout of its CPU kernels (csrc/cpu/cpu_wna16.cpp); Marlin's on GPUs.
//
// A weight is scale * (level - zero), with a scale and a zero for each output and group of inputs; levels are 0 .. 15.
//
//   levels[block][group][chunk][64]     block = 32 outputs, chunk = 4 inputs of a group: 64 bytes, a line of the cache
//   scales[block][group][32]            fp32
//   zeros [block][group][32]            int8, zero - 8; absent where all are 0: in a symmetric checkpoint
//   perm  [groups * chunks * 4]         the input for each place, -1 for none; absent where inputs lie as x does
//
// Byte 4 * lane + i of a line is for input i of the chunk: its low nibble is the level of output `lane`, the high one
// that of output 16 + lane. One AND, and one more after a shift, make of a line two vectors whose 16 lanes are 16
// outputs, each with the levels of 4 inputs as bytes: what the dot product instructions for bytes want.

#pragma once

#include <cstdint>

#include "simd.h"

namespace folovllm {

constexpr int64_t kInt4Block = 2 * kLanes;  // outputs of a block
constexpr int64_t kInt4Chunk = 4;           // inputs of a chunk
constexpr int64_t kInt4Line = 64;           // bytes of a chunk
constexpr int64_t kMaxInt4Group = 128;      // inputs of a group: their integer sums must fit 32 bits, see int4.cpp

}  // namespace folovllm
