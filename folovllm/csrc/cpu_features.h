// Which instructions this library may use: all that the CPU has on which it is compiled (-march=native).
//
// Milestone: M4. vLLM counterpart: the checks in cmake/cpu_extension.cmake.

#pragma once

// Dot products of pairs of bf16 numbers, which are added in fp32.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512BF16__)
#define FOLOVLLM_BF16_DOT 1
#else
#define FOLOVLLM_BF16_DOT 0
#endif

// Dot products of four bytes, which are added in int32.
#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define FOLOVLLM_INT4_DOT 1
#else
#define FOLOVLLM_INT4_DOT 0
#endif
