"""What a cache can do on a trace: reuse distances, hit rates of every size at once, and the bound of Belady.

The reuse distance of an access is the number of distinct keys since the last use of its key; a cache of C rows that
evicts the least recently used one hits exactly where it is less than C, so one histogram holds the hit rate of every
size (Mattson et al. 1970). No cache does better than one that evicts what is used again last (Belady 1966).

Letters: n accesses, p the place of an access's last use, m accesses that have one.
"""

import heapq
from typing import Any

import numpy as np


def last_uses(keys: np.ndarray) -> np.ndarray:
    """The place at which each key of a trace was used last before.

    Args:
      keys: [n] of any type that sorts.

    Returns:
      int64 [n]; -1 at first uses.

    Raises:
      ValueError: for keys of another rank.
    """
    keys = _trace(keys)
    order = np.argsort(keys, kind="stable")
    again = keys[order[1:]] == keys[order[:-1]]
    last = np.full(len(keys), -1, np.int64)
    last[order[1:][again]] = order[:-1][again]
    return last


def reuse_distances(keys: np.ndarray) -> np.ndarray:
    """Exact stack distances of a trace, in O(n log n) without a loop over accesses.

    Of the i - p - 1 accesses since the last use those count that are the first of their key there. The others are those
    whose own last use is after p: as all last uses differ, they are the inversions of the sequence of last uses, and
    are counted by splitting it at one bit after the other, from the highest.

    Args:
      keys: [n] of any type that sorts.

    Returns:
      int64 [n], the number of distinct keys since the last use of the same key; -1 at first uses.

    Raises:
      ValueError: for keys of another rank.
    """
    last = last_uses(keys)
    used_again = np.flatnonzero(last >= 0)
    place = last[used_again]
    is_last_use = np.zeros(len(last), bool)
    is_last_use[place] = True
    # Numbers 0 .. m-1 in the order of last uses, each once.
    numbers = (np.cumsum(is_last_use) - 1)[place]
    distances = np.full(len(last), -1, np.int64)
    distances[used_again] = used_again - place - 1 - _greater_before(numbers)
    return distances


def lru_hits(keys: np.ndarray, capacity: int) -> int:
    """Hits of a fully associative cache of so many rows that evicts the least recently used one."""
    distances = reuse_distances(keys)
    return int(np.count_nonzero((distances >= 0) & (distances < _size("capacity", capacity))))


def lru_curve(keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Hit rates of fully associative caches that evict the least recently used row, of all sizes in one pass.

    Args:
      keys: [n] of any type that sorts.
      sizes: integers [k], rows, none negative, in any order.

    Returns:
      float64 [k], hits / n; 0 for an empty trace.

    Raises:
      ValueError: for keys of another rank, or negative sizes.
    """
    sizes = np.asarray(sizes)
    if sizes.size and (not np.issubdtype(sizes.dtype, np.integer) or sizes.min() < 0):
        raise ValueError(f"sizes must be integers of at least 0, got {sizes.dtype} from {sizes.min()}")
    distances = reuse_distances(keys)
    return hits_of_sizes(distances, sizes) / max(1, len(distances))


def hits_of_sizes(distances: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Hits int64 [k] of caches of `sizes` [k] rows, from the reuse distances of a trace."""
    known = distances[distances >= 0]
    hits = np.concatenate([[0], np.cumsum(np.bincount(known, minlength=1))])
    return hits[np.minimum(sizes, len(hits) - 1)]


def belady_hits(keys: np.ndarray, capacity: int, *, bypass: bool = True) -> int:
    """The most hits that a cache of so many rows can have on a trace: it evicts what is used again last.

    A loop over a heap: about a second for a million accesses.

    Args:
      keys: [n] of any type that sorts.
      capacity: rows.
      bypass: whether a row that comes in may be left out; otherwise something must go for it.

    Returns:
      The number of hits.

    Raises:
      ValueError: for keys of another rank, or a negative capacity.
    """
    last = last_uses(keys)
    room = _size("capacity", capacity)
    n = len(last)
    following = np.full(n, n, np.int64)
    used_again = np.flatnonzero(last >= 0)
    following[last[used_again]] = used_again
    if not room:
        return 0
    # A row is known by the place of its next use: what is resident is what will be used at those places. What is not
    # used again has the place n, and is counted only.
    resident = bytearray(n)
    heap: list[int] = []
    dead = hits = held = 0
    places: list[Any] = following.tolist()
    for i, next_use in enumerate(places):
        if resident[i]:
            hits += 1
        elif held < room:
            held += 1
        elif dead:
            dead -= 1
        else:
            # Places that have passed are below all others, so the highest of the heap is resident for certain.
            farthest = -heap[0]
            if bypass and farthest <= next_use:
                continue
            resident[farthest] = 0
            heapq.heappop(heap)
        if next_use < n:
            resident[next_use] = 1
            heapq.heappush(heap, -next_use)
        else:
            dead += 1
    return hits


def _trace(keys: np.ndarray) -> np.ndarray:
    keys = np.asarray(keys)
    if keys.ndim != 1:
        raise ValueError(f"keys must be [n], a trace in the order of time, got shape {keys.shape}")
    return keys


def _size(name: str, value: int) -> int:
    if value < 0:
        raise ValueError(f"{name} must be at least 0 rows, got {value}")
    return value


def _greater_before(numbers: np.ndarray) -> np.ndarray:
    """How many greater numbers stand before each of a permutation [m] of 0 .. m-1; int64 [m]."""
    m = len(numbers)
    dtype: type[np.signedinteger] = np.int32 if m < 2**30 else np.int64
    values: np.ndarray = numbers.astype(dtype)
    found: np.ndarray = np.zeros(m, dtype)
    places = np.arange(m, dtype=dtype)
    ones = np.zeros(m + 1, dtype)
    # Numbers that agree above a bit stand together from the first of them on, in the order of time.
    for bit in range(max(0, m - 1).bit_length() - 1, -1, -1):
        upper = (values >> bit) & 1
        np.cumsum(upper, out=ones[1:])
        start = values >> (bit + 1) << (bit + 1)
        before = ones[:-1] - ones[start]
        is_upper = upper.astype(bool)
        found += np.where(is_upper, 0, before)
        target = np.where(is_upper, start + (1 << bit) + before, places - before)
        moved, counted = np.empty_like(values), np.empty_like(found)
        moved[target], counted[target] = values, found
        values, found = moved, counted
    # All are sorted now: the count of a number stands at its place.
    return found[numbers].astype(np.int64)
