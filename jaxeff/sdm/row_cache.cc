// The row cache's look-ups and insertions, key by key, with the memory of the next keys on its way.
//
// What a key, a set, a tag and the hand are is said in sets.py and row_cache.py; results are the same to the bit.

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// As in sets.py.
constexpr uint32_t kOfHigh = 0x9E3779B1u, kOfLow = 0x85EBCA77u;
constexpr int32_t kNever = INT32_MAX;
// Keys whose sets are found, and fetched, before the first of them is looked at.
constexpr int64_t kAhead = 32;

struct Shape {
  int64_t sets, ways, bounded, row_bits, high_bits, tag_bytes, row_bytes;
};

struct Place {
  uint64_t set, tag;
};

inline Place Locate(const Shape& shape, uint64_t key) {
  if (shape.bounded) {
    key = (key >> 40) << shape.row_bits | (key & ((uint64_t{1} << 40) - 1));
  }
  uint32_t a = static_cast<uint32_t>(key >> 32), b = static_cast<uint32_t>(key);
  const int high = static_cast<int>(shape.high_bits);
  if (high) b ^= a * kOfHigh;
  b = (b ^ b >> 16) * 0x85EBCA6Bu;
  b = (b ^ b >> 13) * 0xC2B2AE35u;
  b ^= b >> 16;
  if (high) a ^= (b * kOfLow) >> (32 - high);
  const uint32_t top = high == 0 ? b : high == 32 ? a : (a << (32 - high) | b >> high);
  const uint64_t tag = shape.tag_bytes == 4 ? b : (uint64_t{a} << 32 | b);
  return {(uint64_t{top} * static_cast<uint64_t>(shape.sets)) >> 32, tag};
}

// Which words of a line are this tag, as bits; the last one is no tag.
inline uint32_t Equal(const uint32_t* line, int64_t words, uint64_t tag) {
  uint32_t found = 0;
  int64_t w = 0;
#if defined(__AVX2__)
  const __m256i wanted = _mm256_set1_epi32(static_cast<int>(tag));
  for (; w + 8 <= words; w += 8) {
    const __m256i tags = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + w));
    const uint32_t same = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(tags, wanted)));
    found |= same << w;
  }
#endif
  for (; w < words; ++w) found |= uint32_t{line[w] == static_cast<uint32_t>(tag)} << w;
  return found;
}

inline uint32_t Equal(const uint64_t* line, int64_t words, uint64_t tag) {
  uint32_t found = 0;
  int64_t w = 0;
#if defined(__AVX2__)
  const __m256i wanted = _mm256_set1_epi64x(static_cast<int64_t>(tag));
  for (; w + 4 <= words; w += 4) {
    const __m256i tags = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + w));
    const uint32_t same = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(tags, wanted)));
    found |= same << w;
  }
#endif
  for (; w < words; ++w) found |= uint32_t{line[w] == tag} << w;
  return found;
}

template <typename Tag>
inline void Prefetch(const Tag* line, int64_t words) {
  const char* start = reinterpret_cast<const char*>(line);
  for (int64_t at = 0; at < words * static_cast<int64_t>(sizeof(Tag)); at += 64) __builtin_prefetch(start + at, 1);
}

inline void PrefetchRow(const uint8_t* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes && at < 1024; at += 64) __builtin_prefetch(row + at);
}

// Calls visit(i, place) for every key, when the lines of its set are near.
template <typename Tag, typename Visit>
void ForEach(const Shape& shape, const Tag* lines, const uint64_t* keys, int64_t n, Visit visit) {
  const int64_t words = shape.ways + 1;
  Place places[2 * kAhead];
  auto find = [&](int64_t from) {
    const int64_t to = from + kAhead < n ? from + kAhead : n;
    for (int64_t i = from; i < to; ++i) {
      const Place place = Locate(shape, keys[i]);
      places[i % (2 * kAhead)] = place;
      Prefetch(lines + place.set * words, words);
    }
  };
  find(0);
  for (int64_t from = 0; from < n; from += kAhead) {
    find(from + kAhead);
    const int64_t to = from + kAhead < n ? from + kAhead : n;
    for (int64_t i = from; i < to; ++i) visit(i, places[i % (2 * kAhead)]);
  }
}

// The way of a tag, or -1.
template <typename Tag>
inline int Way(const Tag* line, int64_t ways, uint64_t tag) {
  const uint32_t found = Equal(line, ways + 1, tag) & ((uint32_t{1} << ways) - 1);
  return found ? __builtin_ctz(found) : -1;
}

template <typename Tag>
int64_t Lookup(const Shape& shape, Tag* lines, uint32_t* held, int32_t* next, const int32_t* next_use,
               const uint64_t* keys, int64_t n, int64_t mark, int64_t hold, int64_t* slots) {
  const int64_t ways = shape.ways;
  int64_t hits = 0;
  ForEach(shape, lines, keys, n, [&](int64_t i, const Place& place) {
    Tag* line = lines + place.set * (ways + 1);
    const int way = Way(line, ways, place.tag);
    slots[i] = -1;
    if (way < 0) return;
    slots[i] = static_cast<int64_t>(place.set) * ways + way;
    ++hits;
    if (mark) line[ways] |= Tag{1} << way;
    if (hold) held[place.set] |= uint32_t{1} << way;
    if (next_use) next[slots[i]] = next_use[i];
  });
  return hits;
}

struct Clock {
  uint8_t* hand;
  uint32_t* held;
  int32_t* next;  // of every slot, or null
  int64_t now, choosy;
};

// The way that a new row takes in a set, or -1; references and the hand are as after the sweep.
template <typename Tag>
inline int Victim(const Shape& shape, Tag* line, uint64_t set, const Clock& clock, int32_t next_use, int64_t* evicted) {
  const int ways = static_cast<int>(shape.ways);
  uint8_t& hand = clock.hand[set];
  if (hand < ways) return hand++;
  const uint32_t all = (uint32_t{1} << ways) - 1;
  uint32_t open = all & ~clock.held[set];
  if (clock.next) {
    const int32_t* next = clock.next + set * ways;
    int32_t farthest = -1;
    for (int w = 0; w < ways; ++w) {
      const int32_t use = next[w] < clock.now ? kNever : next[w];
      if (open >> w & 1 && use > farthest) farthest = use;
    }
    if ((clock.choosy || farthest != kNever) && next_use >= farthest) return -1;
    for (int w = 0; w < ways; ++w) {
      const int32_t use = next[w] < clock.now ? kNever : next[w];
      if (use != farthest) open &= ~(uint32_t{1} << w);
    }
  }
  if (!open) return -1;
  const int start = hand - ways;
  uint32_t referenced = static_cast<uint32_t>(line[ways]);
  if (!(open & ~referenced)) referenced &= ~open;
  const uint64_t twice = uint64_t{open & ~referenced} * ((uint64_t{1} << ways) + 1);
  const int passed = __builtin_ctzll(twice >> start);
  const uint64_t sweep = ((uint64_t{1} << passed) - 1) << start;
  referenced &= ~(open & static_cast<uint32_t>(sweep | sweep >> ways));
  line[ways] = referenced;
  const int way = (start + passed) % ways;
  hand = static_cast<uint8_t>(ways + (way + 1) % ways);
  ++*evicted;
  return way;
}

template <typename Tag>
int64_t Insert(const Shape& shape, Tag* lines, const Clock& clock, uint8_t* rows, const uint64_t* keys,
               const uint8_t* values, int64_t stride, const int32_t* next_use, int64_t n, int64_t hold,
               int64_t* slots) {
  const int64_t ways = shape.ways, bytes = shape.row_bytes;
  int64_t evicted = 0;
  auto put = [&](int64_t i, uint64_t set, int way) {
    slots[i] = static_cast<int64_t>(set) * ways + way;
    clock.held[set] |= uint32_t{1} << way;
    if (clock.next) clock.next[slots[i]] = next_use ? next_use[i] : kNever;
    std::memcpy(rows + slots[i] * bytes, values + i * stride, bytes);
  };
  ForEach(shape, lines, keys, n, [&](int64_t i, const Place& place) {
    slots[i] = -1;
    const int way = Way(lines + place.set * (ways + 1), ways, place.tag);
    if (way >= 0) put(i, place.set, way);
  });
  ForEach(shape, lines, keys, n, [&](int64_t i, const Place& place) {
    if (slots[i] >= 0) return;
    Tag* line = lines + place.set * (ways + 1);
    int way = Way(line, ways, place.tag);
    if (way < 0) {
      way = Victim(shape, line, place.set, clock, next_use ? next_use[i] : kNever, &evicted);
      if (way < 0) return;
      line[way] = static_cast<Tag>(place.tag);
      line[ways] &= ~(Tag{1} << way);
    }
    put(i, place.set, way);
  });
  if (!hold) {
    for (int64_t i = 0; i < n; ++i) {
      if (slots[i] >= 0) clock.held[slots[i] / ways] = 0;
    }
  }
  return evicted;
}

}  // namespace

extern "C" {

// Slots of n keys, or -1; how many are there.
int64_t RowCacheLookup(const int64_t* shape, void* lines, uint32_t* held, int32_t* next, const int32_t* next_use,
                       const uint64_t* keys, int64_t n, int64_t mark, int64_t hold, int64_t* slots) {
  const Shape& s = *reinterpret_cast<const Shape*>(shape);
  return s.tag_bytes == 4
             ? Lookup(s, static_cast<uint32_t*>(lines), held, next, next_use, keys, n, mark, hold, slots)
             : Lookup(s, static_cast<uint64_t*>(lines), held, next, next_use, keys, n, mark, hold, slots);
}

// Writes n rows, and slots or -1; how many rows went for them.
int64_t RowCacheInsert(const int64_t* shape, void* lines, uint8_t* hand, uint32_t* held, int32_t* next, int64_t now,
                       int64_t choosy, uint8_t* rows, const uint64_t* keys, const uint8_t* values, int64_t stride,
                       const int32_t* next_use, int64_t n, int64_t hold, int64_t* slots) {
  const Shape& s = *reinterpret_cast<const Shape*>(shape);
  const Clock clock{hand, held, next, now, choosy};
  return s.tag_bytes == 4 ? Insert(s, static_cast<uint32_t*>(lines), clock, rows, keys, values, stride, next_use, n,
                                   hold, slots)
                          : Insert(s, static_cast<uint64_t*>(lines), clock, rows, keys, values, stride, next_use, n,
                                   hold, slots);
}

// out[at[i]] = rows[slots[i]] for slots that are not negative; at is 0, 1, ... where null.
void RowCacheTake(const uint8_t* rows, int64_t row_bytes, const int64_t* slots, const int64_t* at, int64_t n,
                  uint8_t* out, int64_t stride) {
  constexpr int64_t ahead = 16;
  for (int64_t i = 0; i < ahead && i < n; ++i) {
    if (slots[i] >= 0) PrefetchRow(rows + slots[i] * row_bytes, row_bytes);
  }
  for (int64_t i = 0; i < n; ++i) {
    if (i + ahead < n && slots[i + ahead] >= 0) PrefetchRow(rows + slots[i + ahead] * row_bytes, row_bytes);
    if (slots[i] >= 0) std::memcpy(out + (at ? at[i] : i) * stride, rows + slots[i] * row_bytes, row_bytes);
  }
}

}  // extern "C"
