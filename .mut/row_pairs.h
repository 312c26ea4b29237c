// Products of small bf16 matrices, on Arm CPUs that have an instruction for them (bfmmla).
//
// Milestone: M4. vLLM counterpart: csrc/cpu/micro_gemm (after v0.11.0) has such kernels for other instructions.
//
// The instruction multiplies two rows of x with two outputs, four inputs at a time: 16 products, twice as many as the one
// for pairs. Its operands and its result are matrices in a register:
//
//   rows a and b of x   a[0] a[1] a[2] a[3] | b[0] b[1] b[2] b[3]
//   outputs 0 and 1     w0[0] ..       w0[3] | w1[0] ..       w1[3]        the words of two steps, interleaved
//   sums                a.w0  a.w1           | b.w0  b.w1
//
// So the sums of two rows are not in the order of the rows while they grow:
//
//   in order   s[a] = a.w0 a.w1 | a.w2 a.w3       s[b] = b.w0 b.w1 | b.w2 b.w3
//   growing    s[a] = a.w0 a.w1 | b.w0 b.w1       s[b] = a.w2 a.w3 | b.w2 b.w3
//
// The second half of s[a] and the first of s[b] change places, before and after.

#pragma once

#include <cstring>
#include <type_traits>

#include "simd.h"

namespace folovllm {
namespace {

// Whether two rows at a time are multiplied with weights of type T.
template <typename T>
constexpr bool kRowPairs = FOLOVLLM_NEON_BF16 && std::is_same_v<T, c10::BFloat16>;

template <bool kWanted, int R, int V>
inline void exchange_halves([[maybe_unused]] Vec (&s)[R][V]) {
#if FOLOVLLM_NEON_BF16
  if constexpr (kWanted) {
    for (int r = 0; r < R; r += 2) {
      for (int v = 0; v < V; ++v) {
        const Vec a = s[r][v], b = s[r + 1][v];
        s[r][v] = Vec{a[0], a[1], b[0], b[1]};
        s[r + 1][v] = Vec{a[2], a[3], b[2], b[3]};
      }
    }
  }
#endif
}

#if FOLOVLLM_NEON_BF16
// Up to four numbers of x, 0 beyond `count`.
inline bfloat16x4_t load_inputs(const c10::BFloat16* x, int count) {
  bfloat16x4_t inputs = vcreate_bf16(0);
  count == 4 ? std::memcpy(&inputs, x, 8) : std::memcpy(&inputs, x, 4);
  return inputs;
}

// Adds one step or two to the sums of R rows and V vectors of outputs. A step is a pair of inputs. The words of a step
// begin at `words`, those of the next one `step_bytes` further on.
template <int R, int V>
inline void add_steps(Vec (&s)[R + R % 2][V], bool two, const char* words, int64_t step_bytes, const c10::BFloat16* x,
                      int64_t x_stride) {
  bfloat16x8_t rows[(R + 1) / 2];
#pragma GCC unroll 8
  for (int r = 0; r < R; r += 2) {
    const c10::BFloat16* next = r + 1 < R ? x + (r + 1) * x_stride : x + r * x_stride;
    rows[r / 2] = vcombine_bf16(load_inputs(x + r * x_stride, two ? 4 : 2), load_inputs(next, two ? 4 : 2));
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const uint32x4_t w0 = (uint32x4_t)load_words(words + v * sizeof(Words));
    const uint32x4_t w1 = two ? (uint32x4_t)load_words(words + step_bytes + v * sizeof(Words)) : vdupq_n_u32(0);
    const bfloat16x8_t first = (bfloat16x8_t)vzip1q_u32(w0, w1);
    const bfloat16x8_t second = (bfloat16x8_t)vzip2q_u32(w0, w1);
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 2) {
      s[r][v] = (Vec)vbfmmlaq_f32((float32x4_t)s[r][v], rows[r / 2], first);
      s[r + 1][v] = (Vec)vbfmmlaq_f32((float32x4_t)s[r + 1][v], rows[r / 2], first);
    }
  }
}

// Steps begin .. end. fetch(i) prefetches what belongs to step begin + i.
template <int R, int V, typename Fetch>
inline void add_row_pairs(Vec (&s)[R + R % 2][V], int64_t begin, int64_t end, const char* words, int64_t step_bytes,
                          const c10::BFloat16* x, int64_t x_stride, const Fetch& fetch) {
  int64_t step = begin;
  for (; step + 2 <= end; step += 2) {
    fetch(step - begin);
    fetch(step + 1 - begin);
    add_steps<R, V>(s, true, words + step * step_bytes, step_bytes, x + 2 * step, x_stride);
  }
  if (step < end) {
    fetch(step - begin);
    add_steps<R, V>(s, false, words + step * step_bytes, step_bytes, x + 2 * step, x_stride);
  }
}
#endif

}  // namespace
}  // namespace folovllm
