// Which instructions this library may use: those of the level that it is compiled for (build.py), which the compiler
// announces as macros.
//
// Milestone: M4. vLLM counterpart: the checks in cmake/cpu_extension.cmake.
//
// E.g. on a CPU with AVX-512 and bf16, the library is compiled with -march=native and all macros of x86 are 1. Limited
// to AVX2 (-march=x86-64-v3), only FOLOVLLM_AVX2 is. On a baseline x86 none is, and the kernels are plain vector code.

#pragma once

// Vectors of 16 fp32 numbers, of which instructions can leave out lanes.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FOLOVLLM_AVX512 1
#else
#define FOLOVLLM_AVX512 0
#endif

// Vectors of 8 fp32 numbers, x * y + z as one instruction, and conversions from and to fp16.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FOLOVLLM_AVX2 1
#else
#define FOLOVLLM_AVX2 0
#endif

// Vectors of 4 fp32 numbers on a 64-bit Arm CPU. Every one has them.
#if defined(__aarch64__) && defined(__ARM_NEON)
#define FOLOVLLM_NEON 1
#else
#define FOLOVLLM_NEON 0
#endif

// Dot products of pairs of bf16 numbers, which are added in fp32: of 16 pairs at once.
#if FOLOVLLM_AVX512 && defined(__AVX512BF16__)
#define FOLOVLLM_BF16_DOT 1
#else
#define FOLOVLLM_BF16_DOT 0
#endif

// The same on Arm (bfdot), and products of small bf16 matrices (bfmmla).
#if FOLOVLLM_NEON && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define FOLOVLLM_NEON_BF16 1
#else
#define FOLOVLLM_NEON_BF16 0
#endif

// Dot products of pairs of 16-bit integers, which are added in int32 (VNNI): of 16 pairs, or of 8.
#if (FOLOVLLM_AVX512 && defined(__AVX512VNNI__)) || (FOLOVLLM_AVX2 && !FOLOVLLM_AVX512 && defined(__AVXVNNI__))
#define FOLOVLLM_INT16_DOT 1
#else
#define FOLOVLLM_INT16_DOT 0
#endif
