// From logits to a token, one row at a time: temperature, min_p, top_k, top_p and the draw, without sorting a row.
//
// Milestone: M4. vLLM counterpart: none on a CPU (its sampler sorts); on a GPU FlashInfer's kernels. Left out: fp16.
//
// folovllm/sample/ops/topk_topp.py defines the steps, and this operator returns the same tokens: the probabilities come
// from torch's own softmax, and what is done with them here is exact. Two answers could still depend on rounding: a sum
// at the edge of p, because it is added in another order here, and a narrowly won draw, because the last softmax, which
// only renormalises, is left out. For such a row, and for one with NaN or infinity, the operator returns -1, and the
// caller samples the row with torch.
//
// A row of 49,152 logits and its probabilities stay in the L2 cache, so the time depends on the number of passes over
// them. A sort makes log2(49,152) = 16 passes, and mispredicts every second comparison. Halving an interval finds a
// single value in about as many passes, but these only compare and add, a vector at a time.
//
//   sampling_row.h        a row and the passes that several steps need
//   this file             temperature, min_p, top_k, and the order of the steps
//   sampling_nucleus.h    top_p
//   sampling_draw.h       the draw

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "sampling_draw.h"
#include "sampling_nucleus.h"
#include "sampling_row.h"
#include "work_ranges.h"

namespace folovllm {
namespace {

constexpr int64_t kLongestRow = 900'000;  // what the bound kSumError holds for

// The parameters of one row.
struct Steps {
  float temperature = 1.0f, min_p = 0.0f, top_p = 1.0f; // off
  int64_t top_k = std::numeric_limits<int64_t>::max();  // off
  uint64_t key = 0;                                     // of its noise
};

// Floats as integers of the same order. The bits of negative floats count downwards and are inverted.
inline IntVec ordered(Vec v) {
  const IntVec bits = (IntVec)v;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The k-th largest logit: the largest integer that at least k logits reach, found by halving the interval of integers.
float kth_largest(const Row& row, int64_t k) {
  int64_t low = std::numeric_limits<int32_t>::min();  // at least k logits reach it
  int64_t high = std::numeric_limits<int32_t>::max(); // fewer than k logits reach it
  while (high - low > 1) {
    const int32_t middle = static_cast<int32_t>((low + high) / 2);
    IntVec reaching = {};
    for (int64_t i = 0; i < row.padded; i += kWidth) {
      reaching -= ordered(load_vec(row.x + i)) >= middle;
    }
    int64_t count = 0;
    for (int64_t lane = 0; lane < kWidth; ++lane) {
      count += reaching[lane];
    }
    (count >= k ? low : high) = middle;
  }
  const Vec value = (Vec)ordered((Vec)(IntVec{} + static_cast<int32_t>(low)));
  return value[0];
}

int64_t sample_row(const float* logits, const Steps& steps, Row& row) {
  if (row.size > kLongestRow || !fill_row(logits, steps.temperature, row)) {
    return kUndecided;
  }
  row.softmax();
  if (steps.min_p > 0.0f) {
    const float threshold = steps.min_p * largest(row.p, row.padded);
    row.keep_where([&](int64_t, Vec, Vec p) { return ~(p < threshold); });
  }
  if (steps.top_k < row.size) {
    const float threshold = kth_largest(row, steps.top_k);
    row.keep_where([&](int64_t, Vec x, Vec) { return ~(x < threshold); });
  }
  if (steps.top_p < 1.0f) {
    if (steps.min_p > 0.0f || steps.top_k < row.size) {
      row.softmax(); // top_p refers to what is left
    }
    const std::optional<Nucleus> nucleus = find_nucleus(row, 1.0f - steps.top_p);
    if (!nucleus) {
      return kUndecided;
    }
    row.keep_where([&](int64_t i, Vec, Vec p) {
      return (p > nucleus->lowest) | ((p == nucleus->lowest) & (lane_ids() + static_cast<int32_t>(i) >= nucleus->first));
    });
  }
  return draw(row, steps.key);
}

template <typename T>
const T* numbers(const std::optional<at::Tensor>& per_row, int64_t rows, const char* name) {
  if (!per_row) {
    return nullptr;
  }
  TORCH_CHECK(per_row->is_contiguous() && per_row->numel() == rows, "sample_: ", name, " must be [rows], dense");
  return per_row->const_data_ptr<T>();
}

} // namespace

// Takes `logits` [rows, size] fp32 through all steps, in place, and returns a token per row: 0 if the temperature is 0,
// which means greedy, and -1 if the row is undecided. These two kinds of rows are left as they were.
at::Tensor sample_(
    at::Tensor logits, const at::Tensor& temperature, const std::optional<at::Tensor>& min_p,
    const std::optional<at::Tensor>& top_k, const std::optional<at::Tensor>& top_p, const at::Tensor& keys) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.is_contiguous() && logits.scalar_type() == at::kFloat,
              "sample_ wants [rows, size] float32, dense");
  const int64_t rows = logits.size(0), size = logits.size(1);
  const float* temperatures = numbers<float>(temperature, rows, "temperature");
  const float* min_ps = numbers<float>(min_p, rows, "min_p");
  const int64_t* top_ks = numbers<int64_t>(top_k, rows, "top_k");
  const float* top_ps = numbers<float>(top_p, rows, "top_p");
  const int64_t* key_data = numbers<int64_t>(keys, rows, "keys");
  at::Tensor out = at::zeros({rows}, logits.options().dtype(at::kLong));
  int64_t* tokens = out.mutable_data_ptr<int64_t>();
  float* data = logits.mutable_data_ptr<float>();
  const int64_t num_threads = std::min(rows, ThreadTeam::size());
  std::vector<std::optional<Row>> memory(num_threads);  // of each thread
  // Row by row, so that a thread which comes late does not hold up half of the rows.
  WorkRanges(rows, num_threads).for_each([&](int64_t thread, int64_t r, int64_t /*next*/) {
    const c10::InferenceMode no_autograd;  // of this thread: softmax writes into memory of our own
    Steps steps{.temperature = temperatures[r], .key = static_cast<uint64_t>(key_data[r])};
    steps.min_p = min_ps ? min_ps[r] : steps.min_p;
    steps.top_k = top_ks ? top_ks[r] : steps.top_k;
    steps.top_p = top_ps ? top_ps[r] : steps.top_p;
    if (steps.temperature == 0.0f) {
      return;
    }
    Row& row = memory[thread] ? *memory[thread] : memory[thread].emplace(size);
    tokens[r] = sample_row(data + r * size, steps, row);
    if (tokens[r] != kUndecided) {
      std::copy_n(row.x, size, data + r * size);
    }
  });
  return out;
}

} // namespace folovllm

TORCH_LIBRARY_FRAGMENT(folovllm, m) {
  m.def("sample_(Tensor(a!) logits, Tensor temperature, Tensor? min_p, Tensor? top_k, Tensor? top_p, Tensor keys) "
        "-> Tensor");
}

TORCH_LIBRARY_IMPL(folovllm, CPU, m) {
  m.impl("sample_", &folovllm::sample_);
}
