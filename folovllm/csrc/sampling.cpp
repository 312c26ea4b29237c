// From logits to a token, one row at a time: temperature, min_p, top_k, top_p and the draw, without sorting a row.
//
// Milestone: M4. vLLM counterpart: none on a CPU (its sampler sorts); on a GPU FlashInfer's kernels. Left out: fp16.
//
// folovllm/sample/ops/topk_topp.py says what the steps mean, and this gives its tokens bit for bit: probabilities come
// from torch's own softmax, and what is done with them here is exact. Two answers could depend on rounding elsewhere: a
// sum on the edge of p (it is added in another order here), and a race won by a hair (the last softmax, which only
// renormalises, is left out). Such a row, and one with NaN or infinity, is answered by -1 and goes the torch way.
//
// A row of 49,152 logits and its probabilities stay in the second-level cache, so what counts is how often they are
// passed over. A sort does it log2(49,152) = 16 times, and mispredicts every second comparison. Halving an interval
// finds a single value in about as many passes, but they only compare and add, 16 numbers at a time.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "vectors.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace folovllm {
namespace {

typedef int32_t Ints __attribute__((vector_size(64)));       // [16]
typedef float HalfFloats __attribute__((vector_size(32)));   // [8]
typedef double HalfDoubles __attribute__((vector_size(64))); // [8]: of 16, GCC would make sixteen single ones

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kPasses = 12;              // over the whole row at most ...
constexpr int64_t kSparse = 64;          // ... or until one token in so many is left: these are listed
constexpr int64_t kFew = 64;             // and sorted once they are so few, or all equal
constexpr double kSumError = 1e-10;      // of a float64 sum of up to 900,000 probabilities, see topk_topp.mass_exceeds
constexpr int64_t kLongestRow = 900'000;
constexpr double kHair = 3e-6;           // relative; torch's log1p and divisions are each off by less than 2^-21
constexpr int64_t kInDoubt = -1;
constexpr Ints kLaneIds = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// What one row goes through.
struct Steps {
  float temperature = 1.0f, min_p = 0.0f, top_p = 1.0f; // off
  int64_t top_k = std::numeric_limits<int64_t>::max();  // off
  uint64_t key = 0;                                     // of its noise
};

// The memory a row is worked on in. It is a multiple of 16 long: what was added has logit -inf and probability 0, which
// is what a removed token has, so no step needs to know.
struct Row {
  int64_t size, padded;
  at::Tensor logits, probs; // [padded] fp32
  float *x, *p;             // their numbers

  explicit Row(int64_t size)
      : size(size),
        padded((size + kLanes - 1) / kLanes * kLanes),
        logits(at::empty({padded}, at::kFloat)),
        probs(at::empty({padded}, at::kFloat)),
        x(logits.mutable_data_ptr<float>()),
        p(probs.mutable_data_ptr<float>()) {
    std::fill(x + size, x + padded, -kInfinity);
    std::fill(p, p + padded, 0.0f);
  }

  // The same kernel, and so the same bits, as `logits.softmax(-1)`.
  void softmax() {
    at::Tensor out = probs.narrow(0, 0, size).unsqueeze(0); // [1, size]
    at::_softmax_out(out, logits.narrow(0, 0, size).unsqueeze(0), -1, false);
  }

  template <typename Keep>
  void keep_where(const Keep& keep) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Floats v = load(x + i), q = load(p + i);
      const Ints kept = keep(i, v, q);
      store(x + i, kept ? v : Floats{} - kInfinity);
      store(p + i, kept ? q : Floats{});
    }
  }
};

inline bool any(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int64_t parts[8], all = 0;
  std::memcpy(parts, &mask, sizeof(mask));
  for (const int64_t part : parts) {
    all |= part;
  }
  return all != 0;
#endif
}

inline int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float largest(Floats v) {
  float best = v[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    best = std::max(best, v[lane]);
  }
  return best;
}

float largest(const float* values, int64_t padded) {
  Floats highest = load(values);
  for (int64_t i = kLanes; i < padded; i += kLanes) {
    const Floats v = load(values + i);
    highest = v > highest ? v : highest;
  }
  return largest(highest);
}

// x = logits / temperature. -> whether the largest is a number: with NaN or infinity there are no probabilities.
bool take_row(const float* logits, float temperature, Row& row) {
  const int64_t whole = row.size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    store(row.x + i, load(logits + i) / temperature);
  }
  for (int64_t i = whole; i < row.size; ++i) {
    row.x[i] = logits[i] / temperature;
  }
  Ints strange = {};
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    strange |= ~(load(row.x + i) < kInfinity);
  }
  return !any(strange) && largest(row.x, row.padded) > -kInfinity;
}

// ---- top_k

// Floats as integers of the same order: the bits of negative ones count downwards.
inline Ints ordered(Floats v) {
  const Ints bits = (Ints)v;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The k-th largest: the largest integer that at least k reach, found bit by bit.
float kth_largest(const Row& row, int64_t k) {
  int64_t low = std::numeric_limits<int32_t>::min();  // at least k reach it
  int64_t high = std::numeric_limits<int32_t>::max(); // fewer do
  while (high - low > 1) {
    const int32_t middle = static_cast<int32_t>((low + high) / 2);
    Ints reaching = {};
    for (int64_t i = 0; i < row.padded; i += kLanes) {
      reaching -= ordered(load(row.x + i)) >= middle;
    }
    int64_t count = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      count += reaching[lane];
    }
    (count >= k ? low : high) = middle;
  }
  const Floats value = (Floats)ordered((Floats)(Ints{} + static_cast<int32_t>(low)));
  return value[0];
}

// ---- top_p

struct Part {
  double mass = 0.0;
  int64_t count = 0;
};

// The probabilities whose bits are above `low` and not above `high`. Positive floats have the order of their bits.
Part part_between(const Row& row, int32_t low, int32_t high) {
  HalfDoubles mass[2] = {};
  Ints count = {};
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    const Ints bits = (Ints)load(row.p + i);
    const Ints inside = (bits > low) & (bits <= high);
    const Ints counted = bits & inside;
    HalfFloats halves[2];
    std::memcpy(halves, &counted, sizeof(counted));
    mass[0] += __builtin_convertvector(halves[0], HalfDoubles);
    mass[1] += __builtin_convertvector(halves[1], HalfDoubles);
    count -= inside; // a true lane is -1
  }
  Part part;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    part.mass += mass[lane / 8][lane % 8];
    part.count += count[lane];
  }
  return part;
}

// What stays: the probabilities above `lowest`, and of those equal to it the ids from `first` on.
struct Nucleus {
  float lowest;
  int32_t first;
};

inline bool exceeds(double mass, float limit) {
  return static_cast<float>(mass) > limit;
}

// A token whose place among the others is open: the bits of its probability, then its id, so that integers sort them.
typedef uint64_t Entry;

inline int32_t bits_of(Entry entry) {
  return static_cast<int32_t>(entry >> 32);
}

inline float prob_of(Entry entry) {
  const int32_t bits = bits_of(entry);
  float p;
  std::memcpy(&p, &bits, sizeof(p));
  return p;
}

// The interval of bits in which the sum of all probabilities, from the least up, comes to exceed the limit.
struct Interval {
  int32_t low, high;  // `low` itself does not
  double below = 0.0; // the mass up to and with `low`

  // Cut at `middle`, given the mass from `low` to there. -> whether the lower half remains.
  bool cut(int32_t middle, double mass, float limit) {
    const bool lower = exceeds(below + mass, limit);
    (lower ? high : low) = middle;
    below += lower ? 0.0 : mass;
    return lower;
  }
};

std::vector<Entry> entries_in(const Row& row, const Interval& interval) {
  std::vector<Entry> entries;
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    const Ints bits = (Ints)load(row.p + i);
    const Ints inside = (bits > interval.low) & (bits <= interval.high);
    if (any(inside)) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        if (inside[lane] != 0) {
          entries.push_back(static_cast<Entry>(bits[lane]) << 32 | static_cast<Entry>(i + lane));
        }
      }
    }
  }
  return entries;
}

// Halve on, in what is left, until little is or all are equal.
void narrow(std::vector<Entry>& entries, Interval& interval, float limit) {
  while (static_cast<int64_t>(entries.size()) > kFew) {
    const auto [least, greatest] = std::minmax_element(entries.begin(), entries.end());
    const int32_t lowest = bits_of(*least), highest = bits_of(*greatest);
    if (lowest == highest) {
      return;
    }
    const int32_t middle = lowest + (highest - lowest) / 2; // below the highest: both halves have something
    double mass = 0.0;
    for (const Entry entry : entries) {
      mass += bits_of(entry) <= middle ? prob_of(entry) : 0.0f;
    }
    const bool lower = interval.cut(middle, mass, limit);
    std::erase_if(entries, [&](Entry entry) { return (bits_of(entry) <= middle) != lower; });
  }
}

// Add them one by one, the least likely first and lower ids first among equals.
std::optional<Nucleus> cross(const std::vector<Entry>& entries, double mass, float limit) {
  if (exceeds(mass + kSumError, limit)) {
    return std::nullopt;
  }
  for (const Entry& entry : entries) {
    mass += prob_of(entry);
    const bool surely = exceeds(mass - kSumError, limit), surely_not = !exceeds(mass + kSumError, limit);
    if (surely || (surely_not && &entry == &entries.back())) { // the likeliest stays, however small p is
      return Nucleus{prob_of(entry), static_cast<int32_t>(entry)};
    }
    if (!surely_not) {
      return std::nullopt;
    }
  }
  return std::nullopt;
}

// top_p's set, or nothing where rounding would decide. `limit` = 1 - p is the mass that may go.
std::optional<Nucleus> find_nucleus(const Row& row, float limit) {
  const float highest = largest(row.p, row.padded);
  Interval interval{0, bits_of(highest)};
  int32_t middle = bits_of(std::min(limit / static_cast<float>(row.size), highest)); // so little never exceeds
  int64_t count = row.size;
  for (int pass = 0; pass < kPasses && count > row.size / kSparse && interval.high - interval.low > 1; ++pass) {
    middle = std::clamp(middle, interval.low + 1, interval.high - 1);
    const Part part = part_between(row, interval.low, middle);
    count = interval.cut(middle, part.mass, limit) ? part.count : count - part.count;
    middle = interval.low + (interval.high - interval.low) / 2;
  }
  std::vector<Entry> entries = entries_in(row, interval);
  narrow(entries, interval, limit);
  std::sort(entries.begin(), entries.end());
  return cross(entries, interval.below, limit);
}

// ---- the draw

inline Bits xor_shift(Bits v, int shift) {
  return v ^ (v >> shift);
}

// The hash and the uniform number of ops/noise.py, the same bits. q = -log1p(-v) is the noise.
inline Floats uniform(Bits token_ids, uint64_t key) {
  Bits h = token_ids + static_cast<uint32_t>(key);
  h = xor_shift(h, 17) * 0xed5ad4bbu;
  h = xor_shift(h, 11) + static_cast<uint32_t>(key >> 32);
  h = xor_shift(h * 0xac4c1b51u, 15) * 0x31848babu;
  h = xor_shift(h, 14) & 0x7fffffffu;
  const Floats v = (__builtin_convertvector((Ints)h, Floats) + 0.5f) * 0x1p-31f;
  constexpr float below_one = 1.0f - 0x1p-24f;
  return v > below_one ? Floats{} + below_one : v;
}

// The winner of the race p / q. As q >= v, p / v says who cannot win, and spares nearly all logarithms.
int64_t draw(const Row& row, uint64_t key) {
  double best = 0.0, second = 0.0;
  int64_t winner = kInDoubt;
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    const Floats p = load(row.p + i);
    if (!any(p > 0.0f)) {
      continue;
    }
    const Floats v = uniform((Bits)kLaneIds + static_cast<uint32_t>(i), key);
    const Ints may_win = p / v >= static_cast<float>(best * (1.0 - 2 * kHair));
    for (int64_t lane = 0; any(may_win) && lane < kLanes; ++lane) {
      const double ratio = may_win[lane] == 0 ? 0.0 : -p[lane] / std::log1p(-static_cast<double>(v[lane]));
      if (ratio > best) {
        second = best;
        best = ratio;
        winner = i + lane;
      } else {
        second = std::max(second, ratio);
      }
    }
  }
  return second < best * (1.0 - kHair) ? winner : kInDoubt;
}

int64_t sample_row(const float* logits, const Steps& steps, Row& row) {
  if (row.size > kLongestRow || !take_row(logits, steps.temperature, row)) {
    return kInDoubt;
  }
  row.softmax();
  if (steps.min_p > 0.0f) {
    const float threshold = steps.min_p * largest(row.p, row.padded);
    row.keep_where([&](int64_t, Floats, Floats p) { return ~(p < threshold); });
  }
  if (steps.top_k < row.size) {
    const float threshold = kth_largest(row, steps.top_k);
    row.keep_where([&](int64_t, Floats x, Floats) { return ~(x < threshold); });
  }
  if (steps.top_p < 1.0f) {
    if (steps.min_p > 0.0f || steps.top_k < row.size) {
      row.softmax(); // top_p is of what is left
    }
    const std::optional<Nucleus> nucleus = find_nucleus(row, 1.0f - steps.top_p);
    if (!nucleus) {
      return kInDoubt;
    }
    row.keep_where([&](int64_t i, Floats, Floats p) {
      return (p > nucleus->lowest) | ((p == nucleus->lowest) & (kLaneIds + static_cast<int32_t>(i) >= nucleus->first));
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

// Takes `logits` [rows, size] fp32 through all steps, in place, and answers a token per row: 0 where the temperature is
// 0, which means greedy, and -1 for a row that is in doubt. These two kinds of rows are left as they were.
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
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    const c10::InferenceMode no_autograd; // of this thread: softmax writes into memory of our own
    Row row(size);
    for (int64_t r = begin; r < end; ++r) {
      Steps steps{.temperature = temperatures[r], .key = static_cast<uint64_t>(key_data[r])};
      steps.min_p = min_ps ? min_ps[r] : steps.min_p;
      steps.top_k = top_ks ? top_ks[r] : steps.top_k;
      steps.top_p = top_ps ? top_ps[r] : steps.top_p;
      if (steps.temperature != 0.0f) {
        tokens[r] = sample_row(data + r * size, steps, row);
        if (tokens[r] != kInDoubt) {
          std::copy_n(row.x, size, data + r * size);
        }
      }
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
