// Which instructions this library was compiled for, so that `folovllm info` and the choice of dtype can tell.
//
// Milestone: M4. vLLM counterpart: none; its wheel has one library per kind of CPU.

#include <torch/library.h>

#include <string>

namespace folovllm {
namespace {

// The names are those of /proc/cpuinfo, separated by spaces. E.g. "avx2 fma f16c".
std::string compiled_for() {
  std::string names;
  const auto add = [&](const char* name) { names += (names.empty() ? "" : " ") + std::string(name); };
#if defined(__AVX2__)
  add("avx2");
#endif
#if defined(__FMA__)
  add("fma");
#endif
#if defined(__F16C__)
  add("f16c");
#endif
#if defined(__AVX512F__)
  add("avx512f");
#endif
#if defined(__AVX512BW__)
  add("avx512bw");
#endif
#if defined(__AVX512DQ__)
  add("avx512dq");
#endif
#if defined(__AVX512VL__)
  add("avx512vl");
#endif
#if defined(__AVX512BF16__)
  add("avx512_bf16");
#endif
#if defined(__AVX512VNNI__)
  add("avx512_vnni");
#endif
#if defined(__ARM_NEON)
  add("neon");
#endif
#if defined(__ARM_FEATURE_DOTPROD)
  add("dotprod");
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  add("bf16");
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
  add("i8mm");
#endif
  return names;
}

}  // namespace
}  // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def("compiled_for() -> str", &folovllm::compiled_for);
}
