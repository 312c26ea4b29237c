// top_p without sorting: the smallest set of the likeliest tokens whose probabilities sum up to p.
//
// Milestone: M4. vLLM counterpart: none on a CPU (its sampler sorts); on a GPU FlashInfer's kernels.
//
// The set is everything above a limit, and the limit is found by halving an interval of probabilities. Positive floats
// have the order of their bits, so the interval is one of integers.
//
//   1. Passes over the whole row add up what lies below the middle of the interval, and choose a half (find_nucleus).
//   2. Once few tokens are left in the interval, these are listed, and the halving goes on in the list (narrow).
//   3. The last tokens are sorted, and added one by one until the sum crosses the limit (find_crossing).

#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "sampling_row.h"

namespace folovllm {
namespace {

// Half a vector, because twice as many bytes hold one double for each of its numbers.
using HalfFloats = VectorOf<float, kWidth / 2>::type;
using HalfDoubles = VectorOf<double, kWidth / 2>::type;

constexpr int kMaxPasses = 12;        // over the whole row ...
constexpr int64_t kListedShare = 64;  // ... or until only one token in so many is left
constexpr int64_t kSortedTokens = 64; // so few are sorted
constexpr double kSumError = 1e-10;   // of a float64 sum of up to 900,000 probabilities, see topk_topp.mass_exceeds

struct MassAndCount {
  double mass = 0.0;
  int64_t count = 0;
};

// The sum and the number of the probabilities whose bits are above `low` and not above `high`.
MassAndCount mass_between(const Row& row, int32_t low, int32_t high) {
  HalfDoubles mass[2] = {};
  IntVec count = {};
  for (int64_t i = 0; i < row.padded; i += kWidth) {
    const IntVec bits = (IntVec)load_vec(row.p + i);
    const IntVec inside = (bits > low) & (bits <= high);
    const IntVec counted = bits & inside;
    HalfFloats halves[2];
    std::memcpy(halves, &counted, sizeof(counted));
    mass[0] += __builtin_convertvector(halves[0], HalfDoubles);
    mass[1] += __builtin_convertvector(halves[1], HalfDoubles);
    count -= inside; // a true lane is -1
  }
  MassAndCount found;
  for (int64_t lane = 0; lane < kWidth; ++lane) {
    found.mass += mass[lane / (kWidth / 2)][lane % (kWidth / 2)];
    found.count += count[lane];
  }
  return found;
}

// The set that stays: all probabilities above `lowest`, and of those equal to it the ids from `first` on.
struct Nucleus {
  float lowest;
  int32_t first;
};

inline bool exceeds(double mass, float limit) {
  return static_cast<float>(mass) > limit;
}

// A token that may or may not stay: the bits of its probability, then its id, so that entries are sorted as integers.
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

// The interval of bits in which the sum of all probabilities, added from the least likely on, first exceeds the limit.
struct Interval {
  int32_t low, high;  // at `low` the sum does not exceed it
  double below = 0.0; // the mass up to and with `low`

  // Cuts the interval at `middle`, given the mass between `low` and `middle`. Returns whether the lower half remains.
  bool cut(int32_t middle, double mass, float limit) {
    const bool lower = exceeds(below + mass, limit);
    (lower ? high : low) = middle;
    below += lower ? 0.0 : mass;
    return lower;
  }
};

std::vector<Entry> entries_in(const Row& row, const Interval& interval) {
  std::vector<Entry> entries;
  for (int64_t i = 0; i < row.padded; i += kWidth) {
    const IntVec bits = (IntVec)load_vec(row.p + i);
    const IntVec inside = (bits > interval.low) & (bits <= interval.high);
    if (any(inside)) {
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        if (inside[lane] != 0) {
          entries.push_back(static_cast<Entry>(bits[lane]) << 32 | static_cast<Entry>(i + lane));
        }
      }
    }
  }
  return entries;
}

// Goes on halving in the list, until few entries are left or all of them are equally likely.
void narrow(std::vector<Entry>& entries, Interval& interval, float limit) {
  while (static_cast<int64_t>(entries.size()) > kSortedTokens) {
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

// Adds the entries one by one, the least likely first, and lower ids first among equals. Returns nothing if rounding of
// the sum could change the answer.
std::optional<Nucleus> find_crossing(const std::vector<Entry>& entries, double mass, float limit) {
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

// The set of top_p, or nothing if rounding would decide. `limit` = 1 - p is the mass that may be removed.
std::optional<Nucleus> find_nucleus(const Row& row, float limit) {
  const float highest = largest(row.p, row.padded);
  Interval interval{0, bits_of(highest)};
  // A sum of `size` values of at most limit / size never exceeds the limit.
  int32_t middle = bits_of(std::min(limit / static_cast<float>(row.size), highest));
  int64_t count = row.size;
  for (int pass = 0; pass < kMaxPasses && count > row.size / kListedShare && interval.high - interval.low > 1; ++pass) {
    middle = std::clamp(middle, interval.low + 1, interval.high - 1);
    const MassAndCount found = mass_between(row, interval.low, middle);
    count = interval.cut(middle, found.mass, limit) ? found.count : count - found.count;
    middle = interval.low + (interval.high - interval.low) / 2;
  }
  std::vector<Entry> entries = entries_in(row, interval);
  narrow(entries, interval, limit);
  std::sort(entries.begin(), entries.end());
  return find_crossing(entries, interval.below, limit);
}

}  // namespace
}  // namespace folovllm
