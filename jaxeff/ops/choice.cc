// What a gate chooses by, and what it chooses: means of a feature map along both of its axes, the highest scores, and
// the map with zeros in the place of the rest.

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

// Of what the mean is taken, and what is made of it, by the numbers that choice.py gives them.
struct Itself {
  static float Of(float value) { return value; }
  static float From(float mean) { return mean; }
};
struct Magnitude {
  static float Of(float value) { return std::fabs(value); }
  static float From(float mean) { return mean; }
};
struct Square {
  static float Of(float value) { return value * value; }
  static float From(float mean) { return std::sqrt(mean); }
};

// Means of a map [positions, size] over positions, and of `group` neighbours of these. Few are added up at a time, as a
// sum of many in float loses its last digits.
template <typename Term>
void ChannelMeans(const float* map, int64_t positions, int64_t size, int64_t group, float* means) {
  constexpr int64_t kTogether = 64;
  std::vector<float> few(size), of_channel(size);
  if (positions <= kTogether) {
    for (int64_t i = 0; i < positions; ++i, map += size)
      for (int64_t j = 0; j < size; ++j) few[j] += Term::Of(map[j]);
    for (int64_t j = 0; j < size; ++j) of_channel[j] = Term::From(few[j] / positions);
  } else {
    std::vector<double> total(size);
    for (int64_t start = 0; start < positions; start += kTogether) {
      std::fill(few.begin(), few.end(), 0.0f);
      for (int64_t i = start; i < std::min(start + kTogether, positions); ++i, map += size)
        for (int64_t j = 0; j < size; ++j) few[j] += Term::Of(map[j]);
      for (int64_t j = 0; j < size; ++j) total[j] += few[j];
    }
    for (int64_t j = 0; j < size; ++j) of_channel[j] = Term::From(static_cast<float>(total[j] / positions));
  }
  if (group == 1) {
    std::copy(of_channel.begin(), of_channel.end(), means);
    return;
  }
  for (int64_t first = 0; first < size; first += group) {
    float sum = 0.0f;
    for (int64_t j = first; j < first + group; ++j) sum += of_channel[j];
    *means++ = sum / group;
  }
}

// Means of a map [positions, size] over its last axis, in as many parts as a vector has numbers.
template <typename Term>
void ColumnMeans(const float* map, int64_t positions, int64_t size, int64_t, float* means) {
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
    means[i] = Term::From((parts[0] + rest) / size);
  }
}

using Mean = void (*)(const float*, int64_t, int64_t, int64_t, float*);
constexpr Mean kChannelMeans[] = {ChannelMeans<Itself>, ChannelMeans<Magnitude>, ChannelMeans<Square>};
constexpr Mean kColumnMeans[] = {ColumnMeans<Itself>, ColumnMeans<Magnitude>, ColumnMeans<Square>};

// To wake a thread takes as long as to read this many numbers.
constexpr int64_t kLeast = 1 << 17;

// Maps of so many numbers are small.
constexpr int64_t kSmall = 1 << 15;

// Has the threads of the pool awake for the convolution that follows: to wake them takes as long as a small one. They are
// not to wake on the core of this thread, which would then wait for them.
void WakeBeforeSmall(ffi::ThreadPool& pool, int64_t numbers) {
  if (numbers > kSmall) return;
  for (int64_t i = 1; i < pool.num_threads(); ++i)
    pool.Schedule([core = jaxeff::Elsewhere::Core()] { const jaxeff::Elsewhere elsewhere(core); });
}

// The last two axes of maps [..., positions, channels], and how many maps there are.
struct Maps {
  explicit Maps(Floats& maps)
      : positions(maps.dimensions()[maps.dimensions().size() - 2]),
        size(maps.dimensions().back()),
        each(positions * size),
        count(each ? static_cast<int64_t>(maps.element_count()) / each : 0) {}
  int64_t positions, size, each, count;
};

// A task is a map, or a part of the positions of a map where each has its own mean.
ffi::Error Means(ffi::ThreadPool& pool, Floats& maps, Floats& means, const Mean* kinds, int64_t kind, int64_t group,
                 bool apart) {
  const Maps of(maps);
  if (kind < 0 || kind > 2) return ffi::Error::InvalidArgument("map means: no such kind");
  if (group < 1 || of.size % group) return ffi::Error::InvalidArgument("map means: the group does not divide");
  const int64_t result = of.count ? static_cast<int64_t>(means.element_count()) / of.count : 0;
  const float* values = maps.typed_data();
  float* out = means.typed_data();
  // Maps without positions or channels.
  if (!of.count) std::fill_n(out, means.element_count(), std::numeric_limits<float>::quiet_NaN());
  const int64_t parts = apart ? std::clamp<int64_t>(of.each / kLeast, 1, std::max<int64_t>(of.positions, 1)) : 1;
  const auto one = [&](int64_t task) {
    const int64_t map = task / parts, part = task % parts;
    const int64_t first = of.positions * part / parts, last = of.positions * (part + 1) / parts;
    kinds[kind](values + map * of.each + first * of.size, last - first, of.size, group, out + map * result + first);
  };
  if (of.count * of.each < kLeast) {
    WakeBeforeSmall(pool, of.count * of.each);
    for (int64_t task = 0; task < of.count * parts; ++task) one(task);
  } else {
    jaxeff::Parallel(pool, of.count * parts, one);
  }
  return ffi::Error::Success();
}

ffi::Error OverPositions(ffi::ThreadPool pool, Floats maps, ffi::Result<Floats> means, int64_t kind, int64_t group,
                         int64_t, int64_t) {
  return Means(pool, maps, *means, kChannelMeans, kind, group, false);
}

ffi::Error OverChannels(ffi::ThreadPool pool, Floats maps, ffi::Result<Floats> means, int64_t kind, int64_t group,
                        int64_t, int64_t) {
  return Means(pool, maps, *means, kColumnMeans, kind, group, true);
}

// In the order of the numbers; NaN as minus infinity, -0 as 0.
uint32_t Key(float score) {
  score = score != score ? -std::numeric_limits<float>::infinity() : score + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return static_cast<uint32_t>(bits) ^ (static_cast<uint32_t>(bits >> 31) | 0x80000000u);
}

// All bits of what is kept, none of the rest.
using Bits = std::vector<uint32_t>;
constexpr uint32_t kKept = ~0u;

// The k highest of a row, by the k-th of them, which is found bit by bit; among equal ones the lower indices. No branch
// depends on a score: guessed wrong, one costs more than the rest.
void MarkHighest(const float* values, int64_t size, int64_t k, Bits& keys, uint32_t* kept) {
  keys.resize(size);
  for (int64_t i = 0; i < size; ++i) keys[i] = Key(values[i]);
  uint32_t threshold = 0;
  int32_t at_least = static_cast<int32_t>(size);
  for (uint32_t bit = 0x80000000u; bit && at_least != k; bit >>= 1) {
    const uint32_t higher = threshold | bit;
    int32_t count = 0;
    for (int64_t i = 0; i < size; ++i) count += keys[i] >= higher;
    if (count < k) continue;
    threshold = higher;
    at_least = count;
  }
  for (int64_t i = 0; i < size; ++i) kept[i] = keys[i] >= threshold ? kKept : 0u;
  // Of those at the threshold, the last ones are too many.
  for (int64_t i = size; at_least > k;)
    if (keys[--i] == threshold) kept[i] = 0u, --at_least;
}

ffi::Error Choose(Floats scores, ffi::Result<ffi::Buffer<ffi::S32>> indices, int64_t, int64_t) {
  const int64_t size = scores.dimensions().back(), k = indices->dimensions().back();
  if (k < 0 || k > size) return ffi::Error::InvalidArgument("highest: more than there are");
  const int64_t rows = k ? static_cast<int64_t>(indices->element_count()) / k : 0;
  Bits keys, kept(size);
  std::vector<int32_t> chosen(size + 1);
  for (int64_t row = 0; row < rows; ++row) {
    MarkHighest(scores.typed_data() + row * size, size, k, keys, kept.data());
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i) {
      chosen[count] = static_cast<int32_t>(i);
      count += kept[i] & 1;
    }
    std::copy_n(chosen.begin(), k, indices->typed_data() + row * k);
  }
  return ffi::Error::Success();
}

// The same as a mask, with a number of its own for each row; none below 1, all from the size of a row on.
ffi::Error ChooseMask(Floats scores, ffi::Buffer<ffi::S32> counts, ffi::Result<ffi::Buffer<ffi::PRED>> mask, int64_t,
                      int64_t) {
  const int64_t size = scores.dimensions().back();
  const int64_t rows = size ? static_cast<int64_t>(scores.element_count()) / size : 0;
  Bits keys, kept(size);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t k = counts.typed_data()[row];
    bool* chosen = mask->typed_data() + row * size;
    if (k < 1 || k >= size) {
      std::fill_n(chosen, size, k >= 1);
      continue;
    }
    MarkHighest(scores.typed_data() + row * size, size, k, keys, kept.data());
    for (int64_t i = 0; i < size; ++i) chosen[i] = kept[i] & 1;
  }
  return ffi::Error::Success();
}

// Copies a map [positions, channels], with zeros in the place of channels and positions that are not kept; an empty list
// keeps all.
void CopyKept(const float* from, int64_t positions, int64_t size, const Bits& channels, const Bits& columns,
              float* to) {
  for (int64_t i = 0; i < positions; ++i, from += size, to += size) {
    if (!columns.empty() && !columns[i]) {
      std::fill_n(to, size, 0.0f);
    } else if (channels.empty()) {
      std::copy_n(from, size, to);
    } else {
      for (int64_t j = 0; j < size; ++j) {
        uint32_t bits;
        std::memcpy(&bits, from + j, sizeof(bits));
        bits &= channels[j];
        std::memcpy(to + j, &bits, sizeof(bits));
      }
    }
  }
}

// The channels of groups that are kept; of no groups none, which is to say all.
Bits OfChannels(const Bits& groups, int64_t size) {
  if (groups.empty() || static_cast<int64_t>(groups.size()) == size) return groups;
  Bits channels(size);
  const int64_t width = size / static_cast<int64_t>(groups.size());
  for (size_t i = 0; i < groups.size(); ++i) std::fill_n(channels.begin() + i * width, width, groups[i]);
  return channels;
}

template <typename Work>
void ForEachMap(ffi::ThreadPool& pool, const Maps& of, const Work& work) {
  if (of.count * of.each < kLeast) {
    WakeBeforeSmall(pool, of.count * of.each);
    for (int64_t map = 0; map < of.count; ++map) work(map);
  } else {
    jaxeff::Parallel(pool, of.count, work);
  }
}

// Means over channels, without channel groups that are dropped by their scores: of all of those, or of those alone whose
// score is NaN, which would make every mean NaN.
ffi::Error OverKept(ffi::ThreadPool pool, Floats maps, Floats by_group, ffi::Result<Floats> means, int64_t kind,
                    int64_t groups_kept, int64_t only_nan, int64_t, int64_t) {
  const Maps of(maps);
  const int64_t groups = by_group.dimensions().back();
  if (kind < 0 || kind > 2) return ffi::Error::InvalidArgument("map means: no such kind");
  const bool fits = groups && of.size % groups == 0 && groups_kept >= 0 && groups_kept <= groups;
  if (!of.count || !fits || static_cast<int64_t>(by_group.element_count()) != of.count * groups)
    return ffi::Error::InvalidArgument("map means: scores do not fit");
  ForEachMap(pool, of, [&](int64_t map) {
    const float* scores = by_group.typed_data() + map * groups;
    const float* values = maps.typed_data() + map * of.each;
    float* out = means->typed_data() + map * of.positions;
    if (only_nan && std::none_of(scores, scores + groups, [](float score) { return std::isnan(score); }))
      return kColumnMeans[kind](values, of.positions, of.size, 1, out);
    Bits keys, kept(groups);
    MarkHighest(scores, groups, groups_kept, keys, kept.data());
    for (int64_t i = 0; only_nan && i < groups; ++i)
      if (!std::isnan(scores[i])) kept[i] = kKept;
    const Bits channel = OfChannels(kept, of.size);
    std::vector<float> row(of.size);
    for (int64_t i = 0; i < of.positions; ++i) {
      CopyKept(values + i * of.size, 1, of.size, channel, {}, row.data());
      kColumnMeans[kind](row.data(), 1, of.size, 1, out + i);
    }
  });
  return ffi::Error::Success();
}

// Maps of which the highest channel groups by one list of scores, and the highest positions by another, are kept; a list
// without scores keeps all.
ffi::Error KeepByScores(ffi::ThreadPool pool, Floats maps, Floats by_group, Floats by_column,
                        ffi::Result<Floats> result, int64_t groups_kept, int64_t columns_kept, int64_t, int64_t) {
  const Maps of(maps);
  const int64_t groups = by_group.dimensions().back(), columns = by_column.dimensions().back();
  const auto fits = [&](Floats& scores, int64_t each, int64_t kept) {
    const bool there = static_cast<int64_t>(scores.element_count()) == of.count * each;
    return !each || (there && kept >= 0 && kept <= each);
  };
  if ((groups && of.size % groups) || (columns && columns != of.positions) || !fits(by_group, groups, groups_kept) ||
      !fits(by_column, columns, columns_kept))
    return ffi::Error::InvalidArgument("keep: scores do not fit");
  ForEachMap(pool, of, [&](int64_t map) {
    Bits keys, group(groups), column(columns);
    if (groups) MarkHighest(by_group.typed_data() + map * groups, groups, groups_kept, keys, group.data());
    if (columns) MarkHighest(by_column.typed_data() + map * columns, columns, columns_kept, keys, column.data());
    CopyKept(maps.typed_data() + map * of.each, of.positions, of.size, OfChannels(group, of.size), column,
             result->typed_data() + map * of.each);
  });
  return ffi::Error::Success();
}

// Maps of which the channels of a list are kept.
ffi::Error KeepListed(ffi::ThreadPool pool, Floats maps, ffi::Buffer<ffi::S32> channels, ffi::Result<Floats> result,
                      int64_t, int64_t) {
  const Maps of(maps);
  const int64_t kept = channels.dimensions().back();
  if (static_cast<int64_t>(channels.element_count()) != of.count * kept)
    return ffi::Error::InvalidArgument("keep: the list does not fit");
  const int32_t* listed = channels.typed_data();
  for (int64_t i = 0; i < of.count * kept; ++i)
    if (listed[i] < 0 || listed[i] >= of.size) return ffi::Error::InvalidArgument("keep: a channel is out of range");
  ForEachMap(pool, of, [&](int64_t map) {
    Bits channel(of.size);
    for (int64_t i = map * kept; i < (map + 1) * kept; ++i) channel[listed[i]] = kKept;
    CopyKept(maps.typed_data() + map * of.each, of.positions, of.size, channel, {},
             result->typed_data() + map * of.each);
  });
  return ffi::Error::Success();
}

}  // namespace

// The last two attributes are for who counts multiply-accumulates in a traced program: there are none.
#define COUNTED(binding) (binding).Attr<int64_t>("paper_macs").Attr<int64_t>("xla_macs")
#define MEANS \
  ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Ret<Floats>().Attr<int64_t>("kind").Attr<int64_t>("group")

XLA_FFI_DEFINE_HANDLER_SYMBOL(MeanOverPositions, OverPositions, COUNTED(MEANS));
XLA_FFI_DEFINE_HANDLER_SYMBOL(MeanOverChannels, OverChannels, COUNTED(MEANS));
XLA_FFI_DEFINE_HANDLER_SYMBOL(Highest, Choose, COUNTED(ffi::Ffi::Bind().Arg<Floats>().Ret<ffi::Buffer<ffi::S32>>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(HighestMask, ChooseMask,
                              COUNTED(ffi::Ffi::Bind()
                                          .Arg<Floats>()
                                          .Arg<ffi::Buffer<ffi::S32>>()
                                          .Ret<ffi::Buffer<ffi::PRED>>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KeepHighest, KeepByScores,
                              COUNTED(ffi::Ffi::Bind()
                                          .Ctx<ffi::ThreadPool>()
                                          .Arg<Floats>()
                                          .Arg<Floats>()
                                          .Arg<Floats>()
                                          .Ret<Floats>()
                                          .Attr<int64_t>("groups_kept")
                                          .Attr<int64_t>("columns_kept")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KeepChannels, KeepListed,
                              COUNTED(ffi::Ffi::Bind()
                                          .Ctx<ffi::ThreadPool>()
                                          .Arg<Floats>()
                                          .Arg<ffi::Buffer<ffi::S32>>()
                                          .Ret<Floats>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(MeanOverKept, OverKept,
                              COUNTED(ffi::Ffi::Bind()
                                          .Ctx<ffi::ThreadPool>()
                                          .Arg<Floats>()
                                          .Arg<Floats>()
                                          .Ret<Floats>()
                                          .Attr<int64_t>("kind")
                                          .Attr<int64_t>("groups_kept")
                                          .Attr<int64_t>("only_nan")));
