// What a gate chooses by, and what it chooses: sums of a feature map along both of its axes, and the indices of the
// highest scores.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;

// What is summed, by the numbers that choice.py gives them.
struct Itself {
  static float Of(float value) { return value; }
};
struct Magnitude {
  static float Of(float value) { return std::fabs(value); }
};
struct Square {
  static float Of(float value) { return value * value; }
};

// Sums of a map [positions, size] over positions, of a few at a time, as a sum of many in float loses its last digits.
template <typename Term>
void ChannelSums(const float* map, int64_t positions, int64_t size, float* sums) {
  constexpr int64_t kTogether = 64;
  std::vector<float> few(size);
  std::vector<double> total(size);
  for (int64_t start = 0; start < positions; start += kTogether) {
    std::fill(few.begin(), few.end(), 0.0f);
    for (int64_t i = start; i < std::min(start + kTogether, positions); ++i, map += size)
      for (int64_t j = 0; j < size; ++j) few[j] += Term::Of(map[j]);
    for (int64_t j = 0; j < size; ++j) total[j] += few[j];
  }
  std::copy(total.begin(), total.end(), sums);
}

// Sums of a map [positions, size] over its last axis, in as many parts as a vector has numbers.
template <typename Term>
void ColumnSums(const float* map, int64_t positions, int64_t size, float* sums) {
  constexpr int64_t kParts = 32;
  for (int64_t i = 0; i < positions; ++i, map += size) {
    float parts[kParts] = {};
    int64_t j = 0;
    for (; j + kParts <= size; j += kParts)
      for (int64_t part = 0; part < kParts; ++part) parts[part] += Term::Of(map[j + part]);
    float rest = 0.0f;
    for (; j < size; ++j) rest += Term::Of(map[j]);
    for (int64_t width = kParts / 2; width; width /= 2)
      for (int64_t part = 0; part < width; ++part) parts[part] += parts[part + width];
    sums[i] = parts[0] + rest;
  }
}

using Sum = void (*)(const float*, int64_t, int64_t, float*);
constexpr Sum kChannelSums[] = {ChannelSums<Itself>, ChannelSums<Magnitude>, ChannelSums<Square>};
constexpr Sum kColumnSums[] = {ColumnSums<Itself>, ColumnSums<Magnitude>, ColumnSums<Square>};

// Of maps [..., positions, channels]; a task is a map, or a part of the positions of a map where each has its own sum.
ffi::Error Sums(ffi::ThreadPool& pool, Floats& maps, Floats& sums, const Sum* kinds, int64_t kind, bool apart) {
  if (kind < 0 || kind > 2) return ffi::Error::InvalidArgument("map sums: no such kind");
  const auto shape = maps.dimensions();
  const int64_t positions = shape[shape.size() - 2], size = shape.back();
  const int64_t each = positions * size, count = each ? static_cast<int64_t>(maps.element_count()) / each : 0;
  const int64_t result = count ? static_cast<int64_t>(sums.element_count()) / count : 0;
  const float* values = maps.typed_data();
  float* out = sums.typed_data();
  if (!count) std::fill_n(out, sums.element_count(), 0.0f);  // maps without positions or channels
  // To wake a thread takes as long as to sum this many numbers.
  constexpr int64_t kLeast = 1 << 17;
  const int64_t parts = apart ? std::clamp<int64_t>(each / kLeast, 1, positions) : 1;
  const auto one = [&](int64_t task) {
    const int64_t map = task / parts, part = task % parts;
    const int64_t first = positions * part / parts, last = positions * (part + 1) / parts;
    kinds[kind](values + map * each + first * size, last - first, size, out + map * result + first);
  };
  if (count * each < kLeast) {
    for (int64_t task = 0; task < count * parts; ++task) one(task);
  } else {
    jaxeff::Parallel(pool, count * parts, one);
  }
  return ffi::Error::Success();
}

ffi::Error OverPositions(ffi::ThreadPool pool, Floats maps, ffi::Result<Floats> sums, int64_t kind, int64_t, int64_t) {
  return Sums(pool, maps, *sums, kChannelSums, kind, false);
}

ffi::Error OverChannels(ffi::ThreadPool pool, Floats maps, ffi::Result<Floats> sums, int64_t kind, int64_t, int64_t) {
  return Sums(pool, maps, *sums, kColumnSums, kind, true);
}

// In the order of the numbers; NaN as minus infinity, -0 as 0.
uint32_t Key(float score) {
  score = score != score ? -std::numeric_limits<float>::infinity() : score == 0.0f ? 0.0f : score;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  constexpr uint32_t kSign = 0x80000000u;
  return bits & kSign ? ~bits : bits | kSign;
}

// The k-th highest number of each row is found bit by bit; among equal ones the lower indices are chosen.
ffi::Error Choose(Floats scores, ffi::Result<ffi::Buffer<ffi::S32>> indices, int64_t, int64_t) {
  const int64_t size = scores.dimensions().back(), k = indices->dimensions().back();
  const int64_t rows = k ? static_cast<int64_t>(indices->element_count()) / k : 0;
  std::vector<uint32_t> keys(size);
  for (int64_t row = 0; row < rows; ++row) {
    const float* values = scores.typed_data() + row * size;
    for (int64_t i = 0; i < size; ++i) keys[i] = Key(values[i]);
    uint32_t threshold = 0;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
      const uint32_t higher = threshold | bit;
      int32_t count = 0;
      for (int64_t i = 0; i < size; ++i) count += keys[i] >= higher;
      if (count >= k) threshold = higher;
    }
    int64_t equal = k;
    for (int64_t i = 0; i < size; ++i) equal -= keys[i] > threshold;
    int32_t* chosen = indices->typed_data() + row * k;
    for (int64_t i = 0; i < size; ++i) {
      if (keys[i] < threshold || (keys[i] == threshold && equal-- <= 0)) continue;
      *chosen++ = static_cast<int32_t>(i);
    }
  }
  return ffi::Error::Success();
}

}  // namespace

// The last two attributes are for who counts multiply-accumulates in a traced program: there are none.
#define COUNTED(binding) (binding).Attr<int64_t>("paper_macs").Attr<int64_t>("xla_macs")
#define SUMS ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Ret<Floats>().Attr<int64_t>("kind")

XLA_FFI_DEFINE_HANDLER_SYMBOL(SumOverPositions, OverPositions, COUNTED(SUMS));
XLA_FFI_DEFINE_HANDLER_SYMBOL(SumOverChannels, OverChannels, COUNTED(SUMS));
XLA_FFI_DEFINE_HANDLER_SYMBOL(Highest, Choose, COUNTED(ffi::Ffi::Bind().Arg<Floats>().Ret<ffi::Buffer<ffi::S32>>()));
