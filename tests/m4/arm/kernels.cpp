// The kernels of folovllm/csrc as a program without torch's library, for a CPU that is emulated.
//
// Milestone: M4. vLLM counterpart: none. test_arm_kernels.py compiles this file for Arm, runs it under QEMU, and
// compares its results with those of the operators of this machine. It includes the kernels' headers, and does what the
// operators in the .cpp files do around them, on one thread.
//
//   kernels OPERATOR TYPE NUMBERS...     e.g.  kernels linear_packed bfloat16 5 64 48 0
//
// Standard input holds the tensors one after another, each as its size in bytes (8 bytes) and its numbers. The result
// goes to standard output.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "attention_task.h"
#include "int4_kernel.h"
#include "linear_kernel.h"
#include "row_ops.h"

#ifdef FOLOVLLM_NO_CXX_LIBRARY
// The little of the C++ library that the headers need. Zig would compile the whole library first, for over a minute.
void* operator new(size_t size) {
  return std::malloc(size);
}
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  return std::malloc(size);
}
void* operator new[](size_t size) {
  return std::malloc(size);
}
void* operator new(size_t size, std::align_val_t alignment) {
  return std::aligned_alloc(static_cast<size_t>(alignment), (size + 63) / 64 * 64);
}
void operator delete(void* p) noexcept {
  std::free(p);
}
void operator delete(void* p, size_t) noexcept {
  std::free(p);
}
void operator delete[](void* p) noexcept {
  std::free(p);
}
void operator delete(void* p, std::align_val_t) noexcept {
  std::free(p);
}
void operator delete(void* p, size_t, std::align_val_t) noexcept {
  std::free(p);
}
namespace std {
inline namespace __1 {
[[noreturn]] void __libcpp_verbose_abort(const char* message, ...) noexcept {
  std::fputs(message, stderr);
  std::abort();
}
}  // namespace __1
}  // namespace std
#endif

namespace folovllm {

// Instead of thread_team.cpp: the program has one thread.
int64_t ThreadTeam::thread_index() {
  return 0;
}

namespace {

// ---- Arguments, inputs and results

struct Arguments {
  char** next;

  int64_t number() {
    return std::strtoll(*next++, nullptr, 10);
  }
  float real() {
    return std::strtof(*next++, nullptr);
  }
  std::string word() {
    return *next++;
  }
};

// A tensor's numbers. Without numbers it stands for none, and its data is null.
class Tensor {
 public:
  explicit Tensor(int64_t bytes) : bytes_(bytes) {}

  static Tensor read() {
    int64_t bytes;
    take(&bytes, sizeof(bytes));
    Tensor tensor(bytes);
    take(tensor.bytes_.data(), bytes);
    return tensor;
  }
  template <typename T>
  T* data() {
    return bytes_.empty() ? nullptr : reinterpret_cast<T*>(bytes_.data());
  }
  void write() const {
    std::fwrite(bytes_.data(), 1, bytes_.size(), stdout);
  }

 private:
  static void take(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, stdin) != bytes) {
      std::fputs("kernels: the input ends early\n", stderr);
      std::exit(2);
    }
  }
  std::vector<char> bytes_;
};

// ---- Operators

// x [rows, inputs], packed, bias [units * 32] or nothing -> [rows, outputs]. linear_silu_packed if `gated`.
template <typename T, bool kGated>
Tensor linear_packed(int64_t rows, int64_t inputs, int64_t outputs) {
  using Input = typename LinearProblem<T>::Input;
  Tensor x = Tensor::read(), packed = Tensor::read(), bias = Tensor::read(), out(rows * outputs * sizeof(T));
  const int64_t steps = ceil_div(inputs, Arithmetic<T>::kStepInputs), padded = steps * Arithmetic<T>::kStepInputs;
  std::vector<Input> input(rows * padded, Input(0.0f));
  for (int64_t i = 0; i < rows * inputs; ++i) {
    input[i / inputs * padded + i % inputs] = static_cast<Input>(x.data<T>()[i]);
  }
  const LinearProblem<T> p{input.data(),  packed.data<T>(), bias.data<float>(), out.data<T>(), rows, steps, padded,
                           outputs, {}};
  const int64_t units = ceil_div(outputs, kBlock);
  for (int64_t i = 0; i < p.num_panels() * units; ++i) {
    multiply_unit<T, kGated>(p, i / units, i % units, packed.data<char>());
  }
  return out;
}

// query [tokens, heads, head_size], cache [blocks, kv_heads, 2, block_size * head_size], starts [reqs + 1], lens
// [reqs], table [reqs, width] -> like query. The plan is that of two threads, so that long sequences are cut into parts.
template <typename T>
Tensor paged_attention(Arguments args) {
  Tensor query = Tensor::read(), cache = Tensor::read(), starts = Tensor::read(), lens = Tensor::read(),
         table = Tensor::read();
  const int64_t reqs = args.number(), heads = args.number(), kv_heads = args.number(), head_size = args.number(),
                blocks = args.number(), block_size = args.number(), width = args.number();
  const float scale = args.real();
  const AttentionPlan plan({starts.data<int32_t>(), lens.data<int32_t>(), reqs, heads, kv_heads, head_size}, 2);
  Tensor out(plan.num_tokens() * heads * head_size * sizeof(T));
  const Batch<T> batch{plan, {cache.data<T>(), blocks, kv_heads, block_size, head_size}, query.data<T>(), out.data<T>(),
                       heads * head_size, head_size, table.data<int32_t>(), width, scale, false};
  std::vector<float> parts(plan.buffer_size);
  const auto scratch = std::make_unique<Scratch<T>>();
  for (size_t i = 0; i < plan.tasks.size(); ++i) {
    const Task* next = i + 1 < plan.tasks.size() ? &plan.tasks[i + 1] : nullptr;
    run_task(batch, plan.tasks[i], next, *scratch, parts.data());
  }
  for (const Output& output : plan.outputs) {
    if (output.num_parts > 1) {
      merge(batch, output, parts.data());
    }
  }
  return out;
}

// key and value [tokens, kv_heads, head_size], cache, slots [tokens] -> the cache
template <typename T>
Tensor write_kv(Arguments args) {
  Tensor key = Tensor::read(), value = Tensor::read(), cache = Tensor::read(), slots = Tensor::read();
  const int64_t tokens = args.number(), kv_heads = args.number(), head_size = args.number(), blocks = args.number(),
                block_size = args.number(), stride = kv_heads * head_size;
  const Pages<T> pages{cache.data<T>(), blocks, kv_heads, block_size, head_size};
  for (int64_t i = 0; i < tokens; ++i) {
    write_token(pages, key.data<T>() + i * stride, head_size, value.data<T>() + i * stride, head_size,
                slots.data<int64_t>()[i]);
  }
  return cache;
}

// x [rows, groups * chunks * 4], levels, scales, zeros or nothing, bias or nothing -> [rows, outputs]
template <typename T, bool kGated>
Tensor linear_int4(int64_t rows, int64_t groups, int64_t chunks, int64_t outputs) {
  using Rows = std::conditional_t<std::is_same_v<T, float>, FloatInputs, IntegerInputs>;
  Tensor x = Tensor::read(), levels = Tensor::read(), scales = Tensor::read(), zeros = Tensor::read(),
         bias = Tensor::read(), out(rows * outputs * sizeof(T));
  const Int4Problem p{levels.data<uint8_t>(), scales.data<float>(), zeros.data<int8_t>(), bias.data<float>(),
                      rows, groups, chunks, outputs};
  Rows prepared(x.data<T>(), p.groups * p.group_size(), p);
  for (int64_t row = 0; row < rows; ++row) {
    prepared.prepare_row(row);
  }
  const int64_t units = ceil_div(outputs, kInt4Block), panels = ceil_div(rows, kInt4PanelRows);
  for (int64_t i = 0; i < panels * units; ++i) {
    multiply_int4_unit<kGated>(p, prepared, out.data<T>(), i / units, i % units, (i + 1) % units, nullptr);
  }
  return out;
}

// x [rows, size], residual like x or nothing, weight [size] -> normalised x, and behind it the new residual
template <typename T>
Tensor rms_norm(int64_t rows, int64_t size, float eps) {
  Tensor x = Tensor::read(), residual = Tensor::read(), weight = Tensor::read();
  Tensor out((residual.data<T>() == nullptr ? 1 : 2) * rows * size * sizeof(T));
  for (int64_t i = 0; i < rows * size; i += size) {
    T* row = residual.data<T>() == nullptr ? nullptr : residual.data<T>() + i;
    rms_norm_row(x.data<T>() + i, row, weight.data<T>(), out.data<T>() + i, size, eps);
  }
  if (residual.data<T>() != nullptr) {
    std::memcpy(out.data<T>() + rows * size, residual.data<T>(), rows * size * sizeof(T));
  }
  return out;
}

// x [rows, 2 * size] -> silu(first half) * second half
template <typename T>
Tensor silu_and_mul(int64_t rows, int64_t size) {
  Tensor x = Tensor::read(), out(rows * size * sizeof(T));
  for (int64_t i = 0; i < rows; ++i) {
    const T* gate = x.data<T>() + i * 2 * size;
    silu_and_mul_row(gate, gate + size, out.data<T>() + i * size, size);
  }
  return out;
}

// x [rows, size] -> the place of each row's maximum, int64
template <typename T>
Tensor argmax(int64_t rows, int64_t size) {
  Tensor x = Tensor::read(), out(rows * sizeof(int64_t));
  for (int64_t i = 0; i < rows; ++i) {
    out.data<int64_t>()[i] = first_argmax(x.data<T>() + i * size, size);
  }
  return out;
}

template <typename T>
Tensor run(const std::string& name, Arguments args) {
  if (name == "paged_attention") {
    return paged_attention<T>(args);
  }
  if (name == "write_kv") {
    return write_kv<T>(args);
  }
  const int64_t rows = args.number(), size = args.number();
  if constexpr (!std::is_same_v<T, c10::Half>) {
    if (name == "linear_packed" || name == "linear_silu_packed") {
      const int64_t outputs = args.number();
      return name == "linear_packed" ? linear_packed<T, false>(rows, size, outputs)
                                     : linear_packed<T, true>(rows, size, outputs);
    }
    if (name == "linear_int4") {
      const int64_t chunks = args.number(), outputs = args.number();
      return args.number() != 0 ? linear_int4<T, true>(rows, size, chunks, outputs)
                                : linear_int4<T, false>(rows, size, chunks, outputs);
    }
    if (name == "rms_norm") {
      return rms_norm<T>(rows, size, args.real());
    }
    if (name == "silu_and_mul") {
      return silu_and_mul<T>(rows, size);
    }
    if (name == "argmax") {
      return argmax<T>(rows, size);
    }
  }
  std::fprintf(stderr, "kernels: no operator %s for this type\n", name.c_str());
  std::exit(2);
}

}  // namespace
}  // namespace folovllm

int main(int count, char** words) {
  if (count < 3) {
    std::fputs("kernels: expected OPERATOR TYPE NUMBERS...\n", stderr);
    return 2;
  }
  folovllm::Arguments args{words + 1};
  const std::string name = args.word(), type = args.word();
  if (name == "features") {  // which instructions the compiler could use
    std::printf("neon=%d bf16=%d\n", FOLOVLLM_NEON, FOLOVLLM_NEON_BF16);
  } else if (type == "float32") {
    folovllm::run<float>(name, args).write();
  } else if (type == "bfloat16") {
    folovllm::run<c10::BFloat16>(name, args).write();
  } else {
    folovllm::run<c10::Half>(name, args).write();
  }
  return 0;
}
