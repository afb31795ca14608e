// Convolution of chosen channels and positions on CPU: products of what is kept, read where it lies.
//
// A channel that is dropped is a row of the kernel that nobody loads, and a column that is dropped a row of the map.
// What is copied first are blocks of the kernel that many positions read, and the patches of a few channels. Blocks of
// output channels are the outer loop, so that the part of the kernel that all samples of a batch share is in the cache
// of a core when the next sample reads its own rows of it.
//
// Letters: N batch, P input and Q output positions, T taps, C input and O output channels; of each sample S positions
// and K channels are kept, and L output channels computed. The map is [N, P, C], the kernel [T, C, O], `reads` [T, Q]
// says which input position an output reads through a tap, or P for none, and `writes` [T, P] which output an input
// contributes to, or Q.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Registers hold a tile of kRows x kVectors sums, a row of kVectors operands and what is broadcast.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 2;
#else
constexpr int kLanes = 4, kVectors = 4;
#endif
constexpr int kRows = 6;
constexpr int kBlock = kLanes * kVectors;
// Numbers in a line of the cache.
constexpr int kLine = 16;
// Rows of the kernel that fewer positions read than this are not copied together first.
constexpr int kWorthCopying = 32;
// Positions from which on a block of the kernel is mirrored for the gradient of the map.
constexpr int kWorthMirroring = 24;
// Fewer channels than this are multiplied for all taps at once.
constexpr int kFewChannels = 16;
// Zeros that are written at a time.
constexpr int64_t kZeros = 1 << 16;
// Output positions that a task sums at a time: with a block of channels they take 64 KiB where vectors are of 16.
constexpr int64_t kPositions = 256;

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// --- products -------------------------------------------------------------------------------------------------------

// Rows of a matrix by their numbers: row i is at data + number[i] * pitch.
template <typename Number>
struct Rows {
  Number* data;
  const int64_t* number;
  int64_t pitch;

  Number* operator[](int64_t i) const { return data + number[i] * pitch; }
  Rows From(int64_t i) const { return {data, number + i, pitch}; }
};

// Rows that are read next, by their offsets; none where `at` is null.
struct Ahead {
  const float* data = nullptr;
  const int64_t* at = nullptr;
};

// sums[r][0..V) += sum over k of a[r][a_at[k]] * b[b_at[k]][0..V), V vectors wide. F fetches what is read next.
template <int R, int V, bool F>
void Multiply(int64_t depth, Rows<const float> a, const int64_t* a_at, const float* b, const int64_t* b_at,
              Rows<float> sums, Ahead ahead) {
  Vector total[R][V];
  const float* rows[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = a[r];
    for (int v = 0; v < V; ++v) total[r][v] = *reinterpret_cast<const Vector*>(sums[r] + v * kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = b + b_at[k];
    const int64_t at = a_at[k];
    if constexpr (F)
      for (int i = 0; i < V * kLanes; i += kLine) __builtin_prefetch(ahead.data + ahead.at[k] + i);
    Vector values[V];
    for (int v = 0; v < V; ++v) values[v] = *reinterpret_cast<const Vector*>(row + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const float factor = rows[r][at];
      for (int v = 0; v < V; ++v) total[r][v] += factor * values[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) *reinterpret_cast<Vector*>(sums[r] + v * kLanes) = total[r][v];
}

using Product = void (*)(int64_t, Rows<const float>, const int64_t*, const float*, const int64_t*, Rows<float>, Ahead);

template <bool F, int... I>
constexpr std::array<Product, sizeof...(I)> Products(std::integer_sequence<int, I...>) {
  return {Multiply<I / kVectors + 1, I % kVectors + 1, F>...};
}

// By rows and vectors, both from one.
constexpr auto kSizes = std::make_integer_sequence<int, kRows * kVectors>();
constexpr auto kProducts = Products<false>(kSizes), kFetching = Products<true>(kSizes);

// The same for any number of rows, in tiles of nearly equal height. What is read next is fetched with the first of
// them, as no processor foresees a list of indices.
void MultiplyRows(int vectors, int64_t count, int64_t depth, Rows<const float> a, const int64_t* a_at, const float* b,
                  const int64_t* b_at, Rows<float> sums, Ahead ahead = {}) {
  for (int64_t tiles = (count + kRows - 1) / kRows, from = 0; tiles > 0; --tiles) {
    const int64_t height = (count - from + tiles - 1) / tiles;
    const auto& products = ahead.at && !from ? kFetching : kProducts;
    products[(height - 1) * kVectors + vectors - 1](depth, a.From(from), a_at, b, b_at, sums.From(from), ahead);
    from += height;
  }
}

template <int... I>
Vector Interleave(Vector a, Vector b, int, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I % 2 ? kLanes + I / 2 : I / 2)...);
}

template <int... I>
Vector Interleave(Vector a, Vector b, long, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (kLanes / 2 + (I % 2 ? kLanes + I / 2 : I / 2))...);
}

// A square of kLanes vectors, mirrored: as many interleavings of its halves as kLanes has bits.
void Transpose(Vector* square) {
  constexpr auto kOrder = std::make_integer_sequence<int, kLanes>();
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Vector mixed[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = Interleave(square[i], square[i + kLanes / 2], 0, kOrder);
      mixed[2 * i + 1] = Interleave(square[i], square[i + kLanes / 2], 0L, kOrder);
    }
    for (int i = 0; i < kLanes; ++i) square[i] = mixed[i];
  }
}

// Rows of both operands whose inner products are summed at a time: one for each lane of a vector.
constexpr int kDotRows = 4, kDotColumns = kLanes / kDotRows;

// sums[i * kDotColumns + j] = inner product of a[i] and b[j].
template <int R>
void Dot(int64_t depth, const float* const* a, const float* const* b, float* sums) {
  Vector total[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vector values[kDotColumns];
    for (int j = 0; j < kDotColumns; ++j) values[j] = *reinterpret_cast<const Vector*>(b[j] + k);
    for (int i = 0; i < R; ++i) {
      const Vector row = *reinterpret_cast<const Vector*>(a[i] + k);
      for (int j = 0; j < kDotColumns; ++j) total[i * kDotColumns + j] += row * values[j];
    }
  }
  Transpose(total);
  for (int i = 1; i < kLanes; ++i) total[0] += total[i];
  *reinterpret_cast<Vector*>(sums) = total[0];
  for (; k < depth; ++k)
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < kDotColumns; ++j) sums[i * kDotColumns + j] += a[i][k] * b[j][k];
}

constexpr void (*kDots[])(int64_t, const float* const*, const float* const*, float*) = {Dot<1>, Dot<2>, Dot<3>, Dot<4>};

// --- tasks ---------------------------------------------------------------------------------------------------------

// Threads wake up late, by as much as a small convolution takes: so many tasks let them share what is left then.
int64_t Wanted(ffi::ThreadPool& pool) { return 8 * std::max<int64_t>(1, pool.num_threads()); }

// How many positions a task takes: kPositions at most, and about half of it where tasks are too few.
int64_t Piece(int64_t positions, int64_t tasks, int64_t wanted) {
  const int64_t least = (positions + kPositions - 1) / kPositions, most = std::max(least, 2 * positions / kPositions);
  const int64_t pieces = std::clamp((wanted + tasks - 1) / tasks, least, most);
  return (positions + pieces - 1) / pieces;
}

// --- operands -------------------------------------------------------------------------------------------------------

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;

struct Problem {
  int64_t n, p, c, t, o, q, k, s;
  const int32_t* reads;
  const int32_t* writes;
  const int32_t* channels;           // null: all
  const int32_t* columns;            // null: all
  int64_t l = 0;
  const int32_t* features = nullptr;  // null: all

  // Which of the kept channels of a sample lie in [from, to): the first, and the one after the last.
  std::pair<int64_t, int64_t> Between(int64_t sample, int64_t from, int64_t to) const {
    if (!channels) return {from, to};
    const int32_t* own = channels + sample * k;
    return {std::lower_bound(own, own + k, from) - own, std::lower_bound(own, own + k, to) - own};
  }
  int64_t Column(int64_t sample, int64_t i) const { return columns ? columns[sample * s + i] : i; }
  int64_t Channel(int64_t sample, int64_t i) const { return channels ? channels[sample * k + i] : i; }
};

// Kept positions of a sample that contribute to outputs through a tap: which of the kept, where, and to which output.
struct Pairs {
  std::vector<int64_t> number, from, to;
  int64_t size = 0;

  void Room(int64_t most) {
    if (static_cast<int64_t>(number.size()) >= most) return;
    number.resize(most);
    from.resize(most);
    to.resize(most);
  }

  // Of the kept positions [begin, end) those that write to outputs [first, last).
  void OfPositions(const Problem& problem, int64_t sample, int64_t tap, int64_t begin, int64_t end, int64_t first,
                   int64_t last) {
    Room(end - begin);
    size = 0;
    const int32_t* writes = problem.writes + tap * problem.p;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t position = problem.Column(sample, i), output = writes[position];
      number[size] = i;
      from[size] = position;
      to[size] = output;
      size += output >= first && output < last;
    }
  }

  // Those that outputs [first, last) read.
  void OfOutputs(const Problem& problem, int64_t sample, int64_t tap, int64_t first, int64_t last) {
    if (problem.columns) return OfPositions(problem, sample, tap, 0, problem.s, first, last);
    Room(last - first);
    size = 0;
    const int32_t* reads = problem.reads + tap * problem.q;
    for (int64_t output = first; output < last; ++output) {
      const int64_t position = reads[output];
      number[size] = from[size] = position;
      to[size] = output;
      size += position < problem.p;
    }
  }
};

ffi::Error Invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("gathered convolution: " + message);
}

// Indices of each of `rows` samples: in range, no two alike, and ascending where that is asked for.
ffi::Error CheckIndices(const char* what, const int32_t* indices, int64_t rows, int64_t count, int64_t limit,
                        bool ascending) {
  std::vector<char> seen(limit);
  for (int64_t row = 0; row < rows; ++row, indices += count) {
    for (int64_t i = 0; i < count; ++i) {
      if (indices[i] < 0 || indices[i] >= limit)
        return Invalid(std::string("an index of ") + what + " is " + std::to_string(indices[i]) + ", of " +
                       std::to_string(limit));
      if (ascending && i && indices[i] <= indices[i - 1])
        return Invalid(std::string("indices of ") + what + " must ascend; sort them, and take none twice");
      if (!ascending && seen[indices[i]]++)
        return Invalid(std::string("index ") + std::to_string(indices[i]) + " of " + what + " is there twice");
    }
    for (int64_t i = 0; i < count; ++i) seen[indices[i]] = 0;
  }
  return ffi::Error::Success();
}

// Indices of shape [N, 0] stand for all.
ffi::Error Read(const int64_t* map, const int64_t* kernel, int64_t outputs, const Integers& channels,
                const Integers& columns, const Integers& reads, const Integers& writes, Problem* problem) {
  *problem = {map[0], map[1], map[2], kernel[0], kernel[2], outputs, channels.dimensions()[1],
              columns.dimensions()[1], reads.typed_data(), writes.typed_data(), nullptr, nullptr};
  if (problem->k) problem->channels = channels.typed_data(); else problem->k = problem->c;
  if (problem->s) problem->columns = columns.typed_data(); else problem->s = problem->p;
  if (problem->channels)
    if (auto error = CheckIndices("channels", problem->channels, problem->n, problem->k, problem->c, true);
        error.failure())
      return error;
  return problem->columns ? CheckIndices("columns", problem->columns, problem->n, problem->s, problem->p, false)
                          : ffi::Error::Success();
}

// `count` rows, by their offsets, one after the other; what lies beyond `used` of the `width` numbers is zero.
void CopyRows(const float* rows, const int64_t* at, int64_t count, int64_t used, int64_t width, float* copy) {
  for (int64_t i = 0; i < count; ++i, copy += width) {
    std::memcpy(copy, rows + at[i], used * sizeof(float));
    std::fill(copy + used, copy + width, 0.0f);
  }
}

// The same for chosen numbers of each row.
void CopyChosen(const float* rows, const int64_t* at, int64_t count, const int32_t* chosen, int64_t used, int64_t width,
                float* copy) {
  for (int64_t i = 0; i < count; ++i, copy += width) {
    const float* row = rows + at[i];
    for (int64_t j = 0; j < used; ++j) copy[j] = row[chosen[j]];
    std::fill(copy + used, copy + width, 0.0f);
  }
}

// --- output ---------------------------------------------------------------------------------------------------------

// A block of output channels, `used` from `from` on, at outputs [first, first + height) of samples [begin, end).
struct OutputBlock {
  const Problem& problem;
  const float *map, *weights;
  int64_t first, height, begin, end, from, used, width;
  int vectors;
  std::vector<float> sums;
  Pairs pairs;

  float* Sums(int64_t sample) { return sums.data() + (sample - begin) * height * width; }

  // Where the channels that a sample keeps lie in the kernel; chosen output channels are counted from the first of all.
  void Locate(int64_t tap, int64_t sample, int64_t* at) const {
    const int64_t start = problem.features ? 0 : from;
    for (int64_t i = 0; i < problem.k; ++i)
      at[i] = (tap * problem.c + problem.Channel(sample, i)) * problem.o + start;
  }

  // Those of the output channels of this block that a sample has computed.
  const int32_t* Chosen(int64_t sample) const {
    return problem.features ? problem.features + sample * problem.l + from : nullptr;
  }

  void Copy(const int64_t* rows, int64_t count, int64_t sample, float* copy) const {
    if (const int32_t* chosen = Chosen(sample)) CopyChosen(weights, rows, count, chosen, used, width, copy);
    else CopyRows(weights, rows, count, used, width, copy);
  }

  // All samples take one tap, then the next: the rows of the kernel that several of them keep are in the cache.
  void ByTap() {
    const int64_t k = problem.k, samples = end - begin, turns = problem.t * samples;
    std::vector<float> copy;
    std::vector<int64_t> read(k), rows(k), ahead(k), copied(k);
    for (int64_t i = 0; i < k; ++i) copied[i] = i * width;
    Locate(0, begin, ahead.data());
    for (int64_t turn = 0; turn < turns; ++turn) {
      const int64_t tap = turn / samples, sample = begin + turn % samples, next = turn + 1;
      std::swap(rows, ahead);
      if (next < turns) Locate(next / samples, begin + next % samples, ahead.data());
      pairs.OfOutputs(problem, sample, tap, first, first + height);
      if (!pairs.size) continue;
      for (int64_t i = 0; i < k; ++i) read[i] = problem.Channel(sample, i);
      const bool worth = pairs.size >= kWorthCopying || used < width || problem.features;
      if (worth) {
        copy.resize(k * width);
        Copy(rows.data(), k, sample, copy.data());
      }
      MultiplyRows(vectors, pairs.size, k, {map + sample * problem.p * problem.c, pairs.from.data(), problem.c},
                   read.data(), worth ? copy.data() : weights, worth ? copied.data() : rows.data(),
                   {Sums(sample) - first * width, pairs.to.data(), width},
                   next < turns && !problem.features ? Ahead{weights, ahead.data()} : Ahead{});
    }
  }

  // One product with the patches of a sample: of a few channels, products for each tap would be mostly overhead.
  void ByPatches() {
    const int64_t k = problem.k, depth = problem.t * k;
    std::vector<float> patches(height * depth), copy(depth * width);
    std::vector<int64_t> read(depth), rows(depth), copied(depth), order(height);
    std::iota(read.begin(), read.end(), 0);
    std::iota(order.begin(), order.end(), 0);
    for (int64_t i = 0; i < depth; ++i) copied[i] = i * width;
    for (int64_t sample = begin; sample < end; ++sample) {
      std::fill(patches.begin(), patches.end(), 0.0f);
      for (int64_t tap = 0; tap < problem.t; ++tap) {
        Locate(tap, sample, rows.data() + tap * k);
        pairs.OfOutputs(problem, sample, tap, first, first + height);
        for (int64_t j = 0; j < pairs.size; ++j) {
          const float* values = map + (sample * problem.p + pairs.from[j]) * problem.c;
          float* patch = patches.data() + (pairs.to[j] - first) * depth + tap * k;
          for (int64_t i = 0; i < k; ++i) patch[i] = values[problem.Channel(sample, i)];
        }
      }
      Copy(rows.data(), depth, sample, copy.data());
      MultiplyRows(vectors, height, depth, {patches.data(), order.data(), depth}, read.data(), copy.data(),
                   copied.data(), {Sums(sample), order.data(), width});
    }
  }

  void Deliver(float* y) {
    for (int64_t sample = begin; sample < end; ++sample)
      for (int64_t i = 0; i < height; ++i) {
        float* row = y + (sample * problem.q + first + i) * problem.o;
        const float* own = Sums(sample) + i * width;
        if (const int32_t* chosen = Chosen(sample))
          for (int64_t j = 0; j < used; ++j) row[chosen[j]] = own[j];
        else
          std::memcpy(row + from, own, used * sizeof(float));
      }
  }
};

void Clear(ffi::ThreadPool& pool, float* out, int64_t size) {
  jaxeff::Parallel(pool, (size + kZeros - 1) / kZeros, [&](int64_t part) {
    std::fill(out + part * kZeros, out + std::min((part + 1) * kZeros, size), 0.0f);
  });
}

ffi::Error Forward(ffi::ThreadPool pool, Floats x, Floats kernel, Integers channels, Integers columns, Integers reads,
                   Integers writes, Integers features, ffi::Result<Floats> y, ffi::Dictionary) {
  Problem problem;
  if (auto error = Read(x.dimensions().begin(), kernel.dimensions().begin(), y->dimensions()[1], channels, columns,
                        reads, writes, &problem);
      error.failure())
    return error;
  const int64_t n = problem.n, q = problem.q;
  int64_t o = problem.o;
  if ((problem.l = features.dimensions()[1])) {
    problem.features = features.typed_data();
    if (auto error = CheckIndices("features", problem.features, n, problem.l, o, true); error.failure()) return error;
    Clear(pool, y->typed_data(), n * q * o);
    o = problem.l;
  }
  const int64_t blocks = (o + kBlock - 1) / kBlock, wanted = Wanted(pool);
  const int64_t piece = Piece(q, n * blocks, wanted), pieces = (q + piece - 1) / piece;
  // Small maps: several samples share a task, and with it the part of the kernel in the cache.
  int64_t together = std::max<int64_t>(1, kPositions / q);
  while (together > 1 && blocks * ((n + together - 1) / together) < wanted / 2) together = (together + 1) / 2;
  const int64_t teams = (n + together - 1) / together;
  jaxeff::Parallel(pool, teams * pieces * blocks, [&](int64_t task) {
    const int64_t first = task / blocks % pieces * piece, height = std::min(piece, q - first);
    const int64_t begin = task / blocks / pieces * together, end = std::min(begin + together, n);
    const int64_t from = task % blocks * kBlock, used = std::min<int64_t>(kBlock, o - from);
    const int vectors = static_cast<int>((used + kLanes - 1) / kLanes);
    const int64_t width = vectors * kLanes;
    OutputBlock block{problem, x.typed_data(), kernel.typed_data(), first, height, begin, end, from, used, width,
                      vectors, std::vector<float>((end - begin) * height * width), {}};
    // Patches have room for every position, kept or not.
    if (problem.k < kFewChannels && !problem.columns) block.ByPatches(); else block.ByTap();
    block.Deliver(y->typed_data());
  });
  return ffi::Error::Success();
}

// --- gradient of the map --------------------------------------------------------------------------------------------

// copy[i][j] = rows[j][i], `width` numbers for each i; zero beyond the rows there are.
void TransposeRows(const float* const* rows, int64_t count, int64_t depth, int64_t width, float* copy) {
  for (int64_t j = 0; j < width; j += kLanes) {
    int64_t i = 0;
    if (j + kLanes <= count)
      for (; i + kLanes <= depth; i += kLanes) {
        Vector square[kLanes];
        for (int r = 0; r < kLanes; ++r) square[r] = *reinterpret_cast<const Vector*>(rows[j + r] + i);
        Transpose(square);
        for (int r = 0; r < kLanes; ++r) *reinterpret_cast<Vector*>(copy + (i + r) * width + j) = square[r];
      }
    for (; i < depth; ++i)
      for (int r = 0; r < kLanes; ++r) copy[i * width + j + r] = j + r < count ? rows[j + r][i] : 0.0f;
  }
}

// Large maps: products with blocks of the kernel, mirrored so that its input channels are neighbours.
void MapGradientOfMany(ffi::ThreadPool& pool, const Problem& problem, const float* g, const float* kernel, float* dx) {
  const int64_t q = problem.q, o = problem.o, c = problem.c, k = problem.k, s = problem.s;
  const int64_t blocks = (k + kBlock - 1) / kBlock;
  const int64_t piece = Piece(s, problem.n * blocks, Wanted(pool)), pieces = (s + piece - 1) / piece;
  std::vector<int64_t> order(o);
  std::iota(order.begin(), order.end(), 0);
  jaxeff::Parallel(pool, problem.n * pieces * blocks, [&](int64_t task) {
    const int64_t block = task % blocks, first = task / blocks % pieces * piece, sample = task / blocks / pieces;
    const int64_t height = std::min(piece, s - first);
    const int64_t from = block * kBlock, used = std::min<int64_t>(kBlock, k - from);
    const int vectors = static_cast<int>((used + kLanes - 1) / kLanes);
    const int64_t width = vectors * kLanes;
    std::vector<float> sums(height * width), copy(o * width);
    std::vector<int64_t> at(o);
    for (int64_t i = 0; i < o; ++i) at[i] = i * width;
    std::vector<const float*> rows(used);
    Pairs pairs;
    for (int64_t tap = 0; tap < problem.t; ++tap) {
      pairs.OfPositions(problem, sample, tap, first, first + height, 0, q);
      if (!pairs.size) continue;
      for (int64_t j = 0; j < used; ++j) rows[j] = kernel + (tap * c + problem.Channel(sample, from + j)) * o;
      TransposeRows(rows.data(), used, o, width, copy.data());
      MultiplyRows(vectors, pairs.size, o, {g + sample * q * o, pairs.to.data(), o}, order.data(), copy.data(),
                   at.data(), {sums.data() - first * width, pairs.number.data(), width});
    }
    for (int64_t i = 0; i < height; ++i) {
      float* row = dx + (sample * problem.p + problem.Column(sample, first + i)) * c;
      for (int64_t j = 0; j < used; ++j) row[problem.Channel(sample, from + j)] = sums[i * width + j];
    }
  });
}

// Small maps: inner products of rows as they lie, block by block of the input channels for all samples.
void MapGradientOfFew(ffi::ThreadPool& pool, const Problem& problem, const float* g, const float* kernel, float* dx) {
  const int64_t q = problem.q, o = problem.o, c = problem.c;
  const int64_t part = std::clamp<int64_t>(c / Wanted(pool), kDotColumns, 32);
  jaxeff::Parallel(pool, (c + part - 1) / part, [&](int64_t task) {
    const int64_t begin = task * part, end = std::min(begin + part, c);
    Pairs pairs;
    float sums[kLanes];
    const float *a[kDotRows], *b[kDotColumns];
    for (int64_t tap = 0; tap < problem.t; ++tap)
      for (int64_t sample = 0; sample < problem.n; ++sample) {
        pairs.OfPositions(problem, sample, tap, 0, problem.s, 0, q);
        const auto [first, last] = problem.Between(sample, begin, end);
        for (int64_t tiles = (pairs.size + kDotRows - 1) / kDotRows, i = 0, height; tiles > 0; --tiles, i += height) {
          height = (pairs.size - i + tiles - 1) / tiles;
          for (int64_t r = 0; r < height; ++r) a[r] = g + (sample * q + pairs.to[i + r]) * o;
          for (int64_t j = first; j < last; j += kDotColumns) {
            const int64_t width = std::min<int64_t>(kDotColumns, last - j);
            for (int64_t v = 0; v < kDotColumns; ++v)
              b[v] = kernel + (tap * c + problem.Channel(sample, std::min(j + v, last - 1))) * o;
            kDots[height - 1](o, a, b, sums);
            for (int64_t r = 0; r < height; ++r) {
              float* row = dx + (sample * problem.p + pairs.from[i + r]) * c;
              for (int64_t v = 0; v < width; ++v) row[problem.Channel(sample, j + v)] += sums[r * kDotColumns + v];
            }
          }
        }
      }
  });
}

ffi::Error MapGradient(ffi::ThreadPool pool, Floats g, Floats kernel, Integers channels, Integers columns,
                       Integers reads, Integers writes, ffi::Result<Floats> dx, ffi::Dictionary) {
  Problem problem;
  if (auto error = Read(dx->dimensions().begin(), kernel.dimensions().begin(), g.dimensions()[1], channels, columns,
                        reads, writes, &problem);
      error.failure())
    return error;
  float* out = dx->typed_data();
  Clear(pool, out, problem.n * problem.p * problem.c);
  const auto gradient = problem.s < kWorthMirroring ? MapGradientOfFew : MapGradientOfMany;
  gradient(pool, problem, g.typed_data(), kernel.typed_data(), out);
  return ffi::Error::Success();
}

// --- gradient of the kernel -----------------------------------------------------------------------------------------

// A block of the gradient of one tap: input channels [begin, end), `used` output channels from `from` on.
struct KernelBlock {
  const Problem& problem;
  const float *map, *gradient;
  int64_t tap, begin, end, from, used, width;
  int vectors;
  std::vector<float> sums, copy;
  std::vector<int64_t> read, rows, copied, channels;
  Pairs pairs;

  KernelBlock(const Problem& problem, const float* map, const float* gradient, int64_t tap, int64_t begin, int64_t end,
              int64_t from)
      : problem(problem), map(map), gradient(gradient), tap(tap), begin(begin), end(end), from(from),
        used(std::min<int64_t>(kBlock, problem.o - from)), width((used + kLanes - 1) / kLanes * kLanes),
        vectors(static_cast<int>(width / kLanes)), sums((end - begin) * width), copy(kPositions * width),
        copied(kPositions) {
    for (int64_t i = 0; i < kPositions; ++i) copied[i] = i * width;
  }

  // Appends the pairs of a sample from kept positions [first, last) on.
  void Collect(int64_t sample, int64_t first, int64_t last) {
    pairs.OfPositions(problem, sample, tap, first, last, 0, problem.q);
    for (int64_t i = 0; i < pairs.size; ++i) {
      read.push_back((sample * problem.p + pairs.from[i]) * problem.c);
      rows.push_back((sample * problem.q + pairs.to[i]) * problem.o);
    }
  }

  // Adds the products of what was collected for these channels of all those pairs.
  void Flush() {
    const int64_t depth = static_cast<int64_t>(read.size()), height = static_cast<int64_t>(channels.size());
    if (depth && height) {
      const bool worth = height >= kWorthCopying || used < width;
      if (worth) CopyRows(gradient + from, rows.data(), depth, used, width, copy.data());
      MultiplyRows(vectors, height, depth, {map, channels.data(), 1}, read.data(),
                   worth ? copy.data() : gradient + from, worth ? copied.data() : rows.data(),
                   {sums.data() - begin * width, channels.data(), width});
    }
    read.clear();
    rows.clear();
  }

  // Positions of several samples make up one product.
  void OfAllChannels() {
    channels.resize(end - begin);
    std::iota(channels.begin(), channels.end(), begin);
    for (int64_t sample = 0; sample < problem.n; ++sample)
      for (int64_t start = 0; start < problem.s; start += kPositions) {
        const int64_t stop = std::min(start + kPositions, problem.s);
        if (static_cast<int64_t>(read.size()) + stop - start > kPositions) Flush();
        Collect(sample, start, stop);
      }
    Flush();
  }

  // A product for each sample.
  void OfEachSample() {
    for (int64_t sample = 0; sample < problem.n; ++sample) {
      const auto [first, last] = problem.Between(sample, begin, end);
      channels.clear();
      for (int64_t i = first; i < last; ++i) channels.push_back(problem.Channel(sample, i));
      for (int64_t start = 0; start < problem.s; start += kPositions) {
        Collect(sample, start, std::min(start + kPositions, problem.s));
        Flush();
      }
    }
  }
};

ffi::Error KernelGradient(ffi::ThreadPool pool, Floats g, Floats x, Integers channels, Integers columns,
                          Integers reads, Integers writes, ffi::Result<Floats> dk, ffi::Dictionary) {
  Problem given;
  if (auto error = Read(x.dimensions().begin(), dk->dimensions().begin(), g.dimensions()[1], channels, columns, reads,
                        writes, &given);
      error.failure())
    return error;
  const Problem& problem = given;
  const float *map = x.typed_data(), *gradient = g.typed_data();
  float* out = dk->typed_data();
  // Products of a few positions each take more than twice the time of products of many: where much is kept, all samples
  // are multiplied at once, with zeros for what is dropped.
  std::vector<float> masked;
  const bool few = problem.channels && problem.s < kWorthCopying && 5 * problem.k > 2 * problem.c;
  if (few) {
    masked.resize(problem.n * problem.p * problem.c);
    for (int64_t sample = 0; sample < problem.n; ++sample)
      for (int64_t i = 0; i < problem.s; ++i) {
        const int64_t row = (sample * problem.p + problem.Column(sample, i)) * problem.c;
        for (int64_t j = 0; j < problem.k; ++j) {
          const int64_t channel = problem.Channel(sample, j);
          masked[row + channel] = map[row + channel];
        }
      }
    map = masked.data();
  }
  const bool together = few || !problem.channels;
  const int64_t blocks = (problem.o + kBlock - 1) / kBlock;
  // A product of few channels is mostly overhead, one of many leaves threads without work.
  const int64_t size = std::clamp<int64_t>(problem.c * problem.t * blocks / Wanted(pool), 48, 512);
  const int64_t parts = (problem.c + size - 1) / size;
  jaxeff::Parallel(pool, problem.t * parts * blocks, [&](int64_t task) {
    const int64_t from = task % blocks * kBlock, begin = task / blocks % parts * size;
    KernelBlock block(problem, map, gradient, task / blocks / parts, begin, std::min(begin + size, problem.c),
                      from);
    if (together) block.OfAllChannels(); else block.OfEachSample();
    for (int64_t i = begin; i < block.end; ++i)
      std::memcpy(out + (block.tap * problem.c + i) * problem.o + from, block.sums.data() + (i - begin) * block.width,
                  block.used * sizeof(float));
  });
  return ffi::Error::Success();
}

}  // namespace

// All take two arrays of numbers, the tables of what is kept and of who writes where, and attributes for who counts
// multiply-accumulates in a traced program; the convolution also which output channels are computed.
#define OPERANDS                      \
  ffi::Ffi::Bind()                    \
      .Ctx<ffi::ThreadPool>()         \
      .Arg<Floats>()                  \
      .Arg<Floats>()                  \
      .Arg<Integers>()                \
      .Arg<Integers>()                \
      .Arg<Integers>()                \
      .Arg<Integers>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(GatheredConv, Forward, OPERANDS.Arg<Integers>().Ret<Floats>().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(GatheredMapGradient, MapGradient, OPERANDS.Ret<Floats>().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(GatheredKernelGradient, KernelGradient, OPERANDS.Ret<Floats>().Attrs());
