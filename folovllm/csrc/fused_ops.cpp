// The operators between the matrix products, each as one pass over memory: RMSNorm with its residual, rotary embedding,
// SiLU-mul, and the sampler's argmax.
//
// Milestone: M4. vLLM counterpart: csrc/cpu/{layernorm,pos_encoding,activation}.cpp. Left out: fp16, quantised outputs.
//
// For one token each of them is little work: 576 numbers. But in torch each is five operators of 2 to 5 us, and 30
// layers of those cost as much time as reading the weights. All arithmetic is fp32, so a result is rounded once.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "ops.h"
#include "row_ops.h"
#include "tensor_checks.h"
#include "thread_team.h"

namespace folovllm {
namespace {

constexpr int64_t kGrain = 1 << 14; // numbers; less work than this is done before another thread wakes up

int64_t rows_per_thread(int64_t size) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size));
}

// Where the rows of x [tokens, heads, size] or [rows, size] begin: row i is head i % heads of token i / heads. The last
// axis is dense.
struct Rows {
  int64_t count, heads, token_stride, head_stride;

  explicit Rows(const at::Tensor& x)
      : count(x.numel() / std::max<int64_t>(1, x.size(-1))),
        heads(x.dim() == 3 ? x.size(1) : 1),
        token_stride(x.stride(0)),
        head_stride(x.dim() == 3 ? x.stride(1) : 0) {}

  int64_t offset(int64_t row) const {
    return row / heads * token_stride + row % heads * head_stride;
  }
};

at::Tensor with_dense_rows(const at::Tensor& x) {
  const bool fits = (x.dim() == 2 || x.dim() == 3) && x.stride(-1) == 1;
  return fits ? x : x.reshape({-1, x.size(-1)}).contiguous();
}

} // namespace

// norm(x) * weight for x [..., size]. With `residual`: first residual += x, and then norm(residual) * weight.
at::Tensor rms_norm(
    const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight, double eps) {
  const int64_t size = x.size(-1);
  TORCH_CHECK(weight.numel() == size && weight.scalar_type() == x.scalar_type(), "rms_norm: weight does not fit x");
  TORCH_CHECK(!residual || (residual->sizes() == x.sizes() && residual->scalar_type() == x.scalar_type() &&
              residual->is_contiguous()), "rms_norm: residual must be contiguous, of x's shape and type");
  const at::Tensor input = with_dense_rows(x), scale = weight.contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options());
  const Rows rows(input);
  dispatch_float_or_bf16(x.scalar_type(), "rms_norm", [&](auto zero) {
    using T = decltype(zero);
    const T* x_data = input.const_data_ptr<T>();
    const T* scale_data = scale.const_data_ptr<T>();
    T* residual_data = residual ? residual->mutable_data_ptr<T>() : nullptr;
    T* out_data = out.mutable_data_ptr<T>();
    ThreadTeam::run_ranges(rows.count, rows_per_thread(size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* sum = residual_data == nullptr ? nullptr : residual_data + row * size;
        rms_norm_row(x_data + rows.offset(row), sum, scale_data, out_data + row * size, size, static_cast<float>(eps));
      }
    });
  });
  return out;
}

// gate_up [..., 2 * size] -> silu(gate) * up [..., size].
at::Tensor silu_and_mul(const at::Tensor& gate_up) {
  TORCH_CHECK(gate_up.size(-1) % 2 == 0, "silu_and_mul: gate and up differ in size");
  const int64_t size = gate_up.size(-1) / 2;
  const at::Tensor input = with_dense_rows(gate_up);
  auto shape = gate_up.sizes().vec();
  shape.back() = size;
  at::Tensor out = at::empty(shape, gate_up.options());
  const Rows rows(input);
  dispatch_float_or_bf16(gate_up.scalar_type(), "silu_and_mul", [&](auto zero) {
    using T = decltype(zero);
    const T* data = input.const_data_ptr<T>();
    T* out_data = out.mutable_data_ptr<T>();
    ThreadTeam::run_ranges(rows.count, rows_per_thread(size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = data + rows.offset(row);
        silu_and_mul_row(gate, gate + size, out_data + row * size, size);
      }
    });
  });
  return out;
}

// Rotates x [tokens, heads, head_size] in place, by cos and sin [tokens, 1, head_size] of the tokens' positions.
at::Tensor rotary_(at::Tensor x, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t size = x.size(-1);
  TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1 && size % 2 == 0,
              "rotary_ wants [tokens, heads, even size], dense rows");
  check_table(cos, x), check_table(sin, x);
  const Rows rows(x);
  dispatch_float_or_bf16(x.scalar_type(), "rotary_", [&](auto zero) {
    using T = decltype(zero);
    T* data = x.mutable_data_ptr<T>();
    const T* cos_data = cos.const_data_ptr<T>();
    const T* sin_data = sin.const_data_ptr<T>();
    ThreadTeam::run_ranges(rows.count, rows_per_thread(size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t token = row / rows.heads;
        const T* cos_row = cos_data + token * cos.stride(0);
        const T* sin_row = sin_data + token * sin.stride(0);
        rotate_row(data + rows.offset(row), cos_row, sin_row, size / 2);
      }
    });
  });
  return x;
}

// values [rows, size] -> the place of each row's largest value (first_argmax) [rows] int64.
at::Tensor argmax(const at::Tensor& values) {
  TORCH_CHECK(values.dim() == 2 && values.size(1) > 0, "argmax wants [rows, size] with a size, not ", values.sizes());
  const at::Tensor rows = with_dense_rows(values);
  at::Tensor out = at::empty({rows.size(0)}, values.options().dtype(at::kLong));
  int64_t* places = out.mutable_data_ptr<int64_t>();
  dispatch_float_or_bf16(values.scalar_type(), "argmax", [&](auto zero) {
    using T = decltype(zero);
    const T* data = rows.const_data_ptr<T>();
    ThreadTeam::run_ranges(rows.size(0), rows_per_thread(rows.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        places[row] = first_argmax(data + row * rows.stride(0), rows.size(1));
      }
    });
  });
  return out;
}

} // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def("rms_norm(Tensor x, Tensor(a!)? residual, Tensor weight, float eps) -> Tensor");
  m.def("argmax(Tensor values) -> Tensor");
  m.def("silu_and_mul(Tensor gate_up) -> Tensor");
  m.def("rotary_(Tensor(a!) x, Tensor cos, Tensor sin) -> Tensor(a!)");
}

TORCH_LIBRARY_IMPL(folovllm, CPU, m) {
  m.impl("rms_norm", &folovllm::rms_norm);
  m.impl("argmax", &folovllm::argmax);
  m.impl("silu_and_mul", &folovllm::silu_and_mul);
  m.impl("rotary_", &folovllm::rotary_);
}
