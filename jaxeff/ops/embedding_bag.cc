// Sums of chosen rows of a table, one for each bag, with the rows that come next fetched ahead of their use.
//
// Every product and every sum is rounded on its own, in the order of the positions of a bag, so that the bits are those
// of a plain loop over NumPy rows; the flags of the file would contract multiply-adds, and `Rounded` keeps them apart.
//
// Letters: R rows of the table, D numbers in each, B bags, N positions of all bags.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// Vectors of sums that are kept in registers at a time.
constexpr int kVectors = 8;
constexpr int64_t kBlock = kLanes * kVectors;
// Bytes of a line of the cache, and bytes of rows on their way at a time: what a core has room for.
constexpr int64_t kLine = 64, kFetched = 16384;
// Positions that are worth a task of their own.
constexpr int64_t kTask = 8192;

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Words __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// The same number, which the compiler must have computed and rounded by itself.
template <typename Number>
inline Number Rounded(Number x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

template <typename To, typename From>
inline To Bits(From x) {
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <typename Number>
inline Number Read(const uint8_t* from) {
  Number x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

// --- vectors of small numbers: compilers make single loads of these only where they are told to ----------------------

// kLanes bytes.
inline Words Widened(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  Words to;
  for (int i = 0; i < kLanes; ++i) to[i] = from[i];
  return to;
#endif
}

// kLanes half bytes, the lower one of each byte first.
inline Words WidenedHalves(const uint8_t* from) {
#if defined(__AVX512F__)
  const __m128i both = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m128i apart = _mm_and_si128(_mm_or_si128(both, _mm_slli_epi16(both, 4)), _mm_set1_epi8(15));
  return (Words)_mm512_cvtepu8_epi32(apart);
#elif defined(__AVX2__)
  const __m128i both = _mm_cvtepu8_epi16(_mm_cvtsi32_si128(Read<int32_t>(from)));
  const __m128i apart = _mm_and_si128(_mm_or_si128(both, _mm_slli_epi16(both, 4)), _mm_set1_epi8(15));
  return (Words)_mm256_cvtepu8_epi32(apart);
#else
  Words to;
  for (int i = 0; i < kLanes; ++i) to[i] = from[i / 2] >> 4 * (i % 2) & 15;
  return to;
#endif
}

// kLanes integers of 16 bits.
inline Words WidenedShorts(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Words to;
  for (int i = 0; i < kLanes; ++i) to[i] = Read<uint16_t>(from + 2 * i);
  return to;
#endif
}

inline Vector Converted(Words x) { return __builtin_convertvector(x, Vector); }

// --- rows -----------------------------------------------------------------------------------------------------------

// Half precision in the low 16 bits of each word. Numbers below the smallest normal one are made without any of
// float's: XLA's threads take those for zero.
template <typename Integers, typename Floats>
inline Floats FromHalf(Integers half) {
  const Integers magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
  const Integers normal = (magnitude << 13) + (112 << 23), infinite = (magnitude << 13) | 0x7f800000;
  const Floats offset = Bits<Floats>((half & 0) + (113 << 23));
  const Integers small = Bits<Integers>(Bits<Floats>((magnitude << 13) + (113 << 23)) - offset);
  const Integers finite = magnitude < 0x400 ? small : normal;
  return Bits<Floats>((magnitude < 0x7c00 ? finite : infinite) | sign);
}

inline float HalfAt(const uint8_t* from) { return FromHalf<int32_t, float>(Read<uint16_t>(from)); }

struct Float32 {
  static int64_t Size(int64_t dim) { return 4 * dim; }
  const uint8_t* row;
  Float32(const uint8_t* row, int64_t) : row(row) {}
  Vector Many(int64_t column) const { return *reinterpret_cast<const Vector*>(row + 4 * column); }
  float One(int64_t column) const { return Read<float>(row + 4 * column); }
};

struct Float16 {
  static int64_t Size(int64_t dim) { return 2 * dim; }
  const uint8_t* row;
  Float16(const uint8_t* row, int64_t) : row(row) {}
  Vector Many(int64_t column) const {
    return FromHalf<Words, Vector>(WidenedShorts(row + 2 * column));
  }
  float One(int64_t column) const { return HalfAt(row + 2 * column); }
};

struct Bfloat16 {
  static int64_t Size(int64_t dim) { return 2 * dim; }
  const uint8_t* row;
  Bfloat16(const uint8_t* row, int64_t) : row(row) {}
  Vector Many(int64_t column) const {
    return (Vector)(WidenedShorts(row + 2 * column) << 16);
  }
  float One(int64_t column) const { return Bits<float>(uint32_t{Read<uint16_t>(row + 2 * column)} << 16); }
};

// One byte each, then scale and bias in single precision.
struct Int8 {
  static int64_t Size(int64_t dim) { return dim + 8; }
  const uint8_t* row;
  float scale, bias;
  Int8(const uint8_t* row, int64_t dim) : row(row), scale(Read<float>(row + dim)), bias(Read<float>(row + dim + 4)) {}
  Vector Many(int64_t column) const {
    return Rounded(Converted(Widened(row + column)) * scale) + bias;
  }
  float One(int64_t column) const { return Rounded(static_cast<float>(row[column]) * scale) + bias; }
};

// Two to a byte, the lower half first, then scale and bias in half precision.
struct Int4 {
  static int64_t Size(int64_t dim) { return (dim + 1) / 2 + 4; }
  const uint8_t* row;
  float scale, bias;
  Int4(const uint8_t* row, int64_t dim)
      : row(row), scale(HalfAt(row + (dim + 1) / 2)), bias(HalfAt(row + (dim + 1) / 2 + 2)) {}
  Vector Many(int64_t column) const {
    return Rounded(Converted(WidenedHalves(row + column / 2)) * scale) + bias;
  }
  float One(int64_t column) const {
    return Rounded(static_cast<float>(row[column / 2] >> (column % 2 ? 4 : 0) & 15) * scale) + bias;
  }
};

// --- sums -----------------------------------------------------------------------------------------------------------

struct Table {
  const uint8_t* data;
  int64_t rows, stride, size, dim, lines;

  Table(const void* data, int64_t rows, int64_t stride, int64_t size, int64_t dim)
      : data(static_cast<const uint8_t*>(data)), rows(rows), stride(stride), size(size), dim(dim) {
    // What all rows are aligned to says how many lines of the cache one can touch.
    const int64_t aligned = std::gcd(std::gcd(reinterpret_cast<intptr_t>(data), stride), kLine);
    lines = (kLine - aligned + size - 1) / kLine + 1;
  }

  const uint8_t* Row(int64_t i) const { return data + i * stride; }

  // Not a loop for short rows, the end of which a processor would have to guess: that takes as long as the sums do. Must
  // be inline, as GCC takes a function that does nothing but fetch for one without effect, and drops its calls.
  __attribute__((always_inline)) inline void Fetch(int64_t i) const {
    const uint8_t *row = Row(i), *last = row + size - 1;
    switch (lines) {
      default:
        for (const uint8_t* line = row + 8 * kLine; line < last; line += kLine) __builtin_prefetch(line);
        [[fallthrough]];
      case 9: __builtin_prefetch(row + 7 * kLine); [[fallthrough]];
      case 8: __builtin_prefetch(row + 6 * kLine); [[fallthrough]];
      case 7: __builtin_prefetch(row + 5 * kLine); [[fallthrough]];
      case 6: __builtin_prefetch(row + 4 * kLine); [[fallthrough]];
      case 5: __builtin_prefetch(row + 3 * kLine); [[fallthrough]];
      case 4: __builtin_prefetch(row + 2 * kLine); [[fallthrough]];
      case 3: __builtin_prefetch(row + kLine); [[fallthrough]];
      case 2: __builtin_prefetch(row); [[fallthrough]];
      case 1: __builtin_prefetch(last);
    }
  }
};

// Positions of a bag: `count` rows, with a weight each unless `weight` is null. Where `next` is not null, the row that
// it names is fetched with each of them.
struct Bag {
  const int32_t *row, *next;
  const float* weight;
  int64_t count;
};

// out[0..V vectors) = the sum of these columns of the rows of a bag, over `divisor`.
template <typename Row, bool Weighted, int V>
void Sum(const Table& table, Bag bag, int64_t column, float divisor, float* out) {
  Vector total[V] = {};
  for (int64_t j = 0; j < bag.count; ++j) {
    if (bag.next) table.Fetch(bag.next[j]);
    const Row row(table.Row(bag.row[j]), table.dim);
    for (int v = 0; v < V; ++v) {
      const Vector values = row.Many(column + v * kLanes);
      if constexpr (Weighted) total[v] += Rounded(values * bag.weight[j]); else total[v] += values;
    }
  }
  Vector* to = reinterpret_cast<Vector*>(out);
  if (divisor == 1.0f)
    for (int v = 0; v < V; ++v) to[v] = total[v];
  else
    for (int v = 0; v < V; ++v) to[v] = total[v] / divisor;
}

// The columns that do not fill a vector.
template <typename Row, bool Weighted>
void SumRest(const Table& table, Bag bag, int64_t column, float divisor, float* out) {
  float total[kLanes] = {};
  for (int64_t j = 0; j < bag.count; ++j) {
    if (bag.next) table.Fetch(bag.next[j]);
    const Row row(table.Row(bag.row[j]), table.dim);
    for (int64_t i = 0; column + i < table.dim; ++i) {
      const float value = row.One(column + i);
      if constexpr (Weighted) total[i] += Rounded(value * bag.weight[j]); else total[i] += value;
    }
  }
  for (int64_t i = 0; column + i < table.dim; ++i) out[i] = total[i] / divisor;
}

using Summing = void (*)(const Table&, Bag, int64_t, float, float*);

template <typename Row, bool Weighted, int... I>
constexpr std::array<Summing, sizeof...(I)> Sums(std::integer_sequence<int, I...>) {
  return {Sum<Row, Weighted, I + 1>...};
}

template <typename Row, bool Weighted>
void PoolBag(const Table& table, Bag bag, float divisor, float* out) {
  static constexpr auto kSums = Sums<Row, Weighted>(std::make_integer_sequence<int, kVectors>());
  int64_t column = 0;
  while (const int64_t vectors = std::min<int64_t>((table.dim - column) / kLanes, kVectors)) {
    kSums[vectors - 1](table, bag, column, divisor, out + column);
    column += vectors * kLanes;
    bag.next = nullptr;
  }
  if (column < table.dim) SumRest<Row, Weighted>(table, bag, column, divisor, out + column);
}

using Integers = ffi::Buffer<ffi::S32>;
using Pooling = void (*)(const Table&, Bag, float, float*);

template <typename Row>
constexpr std::array<Pooling, 2> kPoolings{PoolBag<Row, false>, PoolBag<Row, true>};

// By the numbers that embedding_bag.py gives them.
constexpr int64_t kKinds = 5;
constexpr std::array<std::array<Pooling, 2>, kKinds> kByKind{
    kPoolings<Float32>, kPoolings<Float16>, kPoolings<Bfloat16>, kPoolings<Int8>, kPoolings<Int4>};
constexpr std::array<int64_t (*)(int64_t), kKinds> kSizes{Float32::Size, Float16::Size, Bfloat16::Size, Int8::Size,
                                                          Int4::Size};

// Where the positions of each bag are: between offsets [B + 1], or the first of every `pitch`, as many as `bounds` [B]
// says, or all where it is empty.
struct Layout {
  const int32_t* bounds;
  int64_t pitch, given;

  int64_t Begin(int64_t b) const { return pitch < 0 ? bounds[b] : b * pitch; }
  int64_t End(int64_t b) const { return pitch < 0 ? bounds[b + 1] : b * pitch + (given ? bounds[b] : pitch); }
};

ffi::Error PoolBags(ffi::ThreadPool pool, ffi::AnyBuffer rows, Integers indices, Integers bounds,
                    ffi::Buffer<ffi::F32> weights, ffi::Result<ffi::Buffer<ffi::F32>> out, int64_t kind, int64_t dim,
                    int64_t mean, int64_t pitch, int64_t, int64_t) {
  const int64_t positions = indices.element_count(), bags = out->dimensions()[0];
  const int64_t given = bounds.element_count();
  const bool weighted = weights.element_count() > 0;
  const bool bounded = pitch < 0 ? given == bags + 1 : positions == bags * pitch && (!given || given == bags);
  if (kind < 0 || kind >= kKinds || dim < 1 || rows.dimensions().size() != 2 || out->dimensions()[1] != dim ||
      !bounded || (weighted && static_cast<int64_t>(weights.element_count()) != positions))
    return ffi::Error::InvalidArgument("the operands of EmbeddingBag do not fit together");
  const int64_t height = rows.dimensions()[0], size = kSizes[kind](dim);
  const int64_t stride = height ? static_cast<int64_t>(rows.size_bytes()) / height : size;
  if (stride < size) return ffi::Error::InvalidArgument("the rows of the table of EmbeddingBag are too short");
  const Table table(rows.untyped_data(), height, stride, size, dim);
  const int32_t* index = indices.typed_data();
  const Layout layout{bounds.typed_data(), pitch, given};
  int64_t used = 0;
  for (int64_t b = 0; b < bags; ++b) {
    const int64_t begin = layout.Begin(b), end = layout.End(b);
    if (begin < 0 || begin > end || end > (pitch < 0 ? positions : begin + pitch))
      return ffi::Error::InvalidArgument("bag " + std::to_string(b) + " of EmbeddingBag is from " +
                                         std::to_string(begin) + " to " + std::to_string(end) + " of " +
                                         std::to_string(positions) + " positions");
    used += end - begin;
  }
  const Pooling pooling = kByKind[kind][weighted];
  const int64_t ahead = std::clamp<int64_t>(kFetched / (kLine * table.lines), 2, 64);
  if (!bags) return ffi::Error::Success();
  const int64_t tasks = std::clamp<int64_t>(used / kTask, 1, bags);
  std::atomic<int64_t> wrong{-1};
  jaxeff::Parallel(pool, tasks, [&](int64_t task) {
    const int64_t first = bags * task / tasks, last = bags * (task + 1) / tasks;
    const int32_t *row = index + layout.Begin(first), *end = index + positions;
    int64_t count = layout.End(last - 1) - layout.Begin(first);
    // Rows in the order in which they are read: those of offsets are already.
    thread_local std::vector<int32_t> order;  // new pages would take as long as the sums
    if (pitch >= 0) {
      order.clear();
      for (int64_t b = first; b < last; ++b) order.insert(order.end(), index + layout.Begin(b), index + layout.End(b));
      row = order.data();
      count = order.size();
      end = row + count;
    }
    int64_t outside = 0;
    for (int64_t j = 0; j < count; ++j) outside += static_cast<uint32_t>(row[j]) >= table.rows;
    if (outside) {
      for (int64_t b = first; b < last; ++b)
        for (int64_t j = layout.Begin(b); j < layout.End(b); ++j)
          if (static_cast<uint32_t>(index[j]) >= table.rows) wrong.store(j);
      return;
    }
    for (int64_t j = 0; j < std::min(ahead, count); ++j) table.Fetch(row[j]);
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = layout.Begin(b), length = layout.End(b) - begin;
      const float* weight = weighted ? weights.typed_data() + begin : nullptr;
      const float divisor = mean ? static_cast<float>(std::max<int64_t>(length, 1)) : 1.0f;
      // At the end the last rows are fetched once more.
      pooling(table, {row, std::min(row + ahead, end - length), weight, length}, divisor, out->typed_data() + b * dim);
      row += length;
    }
  });
  if (const int64_t j = wrong.load(); j >= 0)
    return ffi::Error::InvalidArgument("index " + std::to_string(index[j]) + " at position " + std::to_string(j) +
                                       " of EmbeddingBag is out of range for " + std::to_string(table.rows) + " rows");
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbeddingBag, PoolBags,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("kind")
                                  .Attr<int64_t>("dim")
                                  .Attr<int64_t>("mean")
                                  .Attr<int64_t>("pitch")
                                  // For who counts multiply-accumulates in a traced program.
                                  .Attr<int64_t>("paper_macs")
                                  .Attr<int64_t>("xla_macs"));
