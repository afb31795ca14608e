"""Where a key belongs in a set-associative cache: its set, and the tag that tells it from all others of that set.

A key is mixed by a bijection into a number h of K bits. Its 32 highest bits choose one of S sets, for any S, and the
tag is the low end of h. As the h of one set are an interval, tags of 32 bits determine the key exactly as soon as no
interval is longer than 2**32 - 1 (quotienting: the set itself is a part of the key). Otherwise a tag is all of h.

Letters: n keys, S sets, W ways of a set, K bits of a key, A and B the high and the low half of h.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

# Keys are table << ROW_BITS | row.
ROW_BITS = 40
# Odd multipliers and shifts of a bijection of 32 bits in which every bit of the result depends on all (Murmur3's last
# step, which is in the public domain), and two for the halves: the golden ratio and that of xxHash32, both public.
MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
LAST_SHIFT = 16
OF_HIGH, OF_LOW = 0x9E3779B1, 0x85EBCA77
_LOW = np.uint64(0xFFFFFFFF)
# From so many sets on, less than a set that is lost does not matter.
_MANY = 16


@dataclasses.dataclass(frozen=True)
class Sets:
    """The shape of a set-associative cache, and which keys it can hold.

    Attributes:
      sets: S, at least 2 and below 2**32.
      ways: W, at most 31.
      tables: how many tables keys can be of; None for any uint64 as a key.
      row_bits: bits of the row ids of the largest table; ROW_BITS where `tables` is None.
    """

    sets: int
    ways: int
    tables: int | None = None
    row_bits: int = ROW_BITS

    @property
    def high_bits(self) -> int:
        """Bits of A: by how many K is above 32."""
        return 32 if self.tables is None else max(0, self.row_bits + (self.tables - 1).bit_length() - 32)

    @property
    def tag_bytes(self) -> int:
        """4 where that determines a key of a set, else 8."""
        longest = -(-(1 << 32) // self.sets) << self.high_bits
        return 4 if longest < 1 << 32 else 8

    def locate(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The set, int64 [n], and the tag, uint32 or uint64 [n], of keys uint64 [n].

        Raises:
          ValueError: for keys of tables or rows beyond those that were promised.
        """
        if self.tables is not None:
            self.check(keys)
            rows = keys & np.uint64((1 << ROW_BITS) - 1)
            keys = keys >> np.uint64(ROW_BITS) << np.uint64(self.row_bits) | rows
        a, b = self.mixed((keys >> np.uint64(32)).astype(np.uint32), keys.astype(np.uint32))
        # Of 64 bits, for the product; S < 2**32.
        index = (self.top(a, b).astype(np.uint64) * np.uint64(self.sets)) >> np.uint64(32)
        return index.view(np.int64), b if self.tag_bytes == 4 else a.astype(np.uint64) << np.uint64(32) | b

    def check(self, keys: np.ndarray) -> None:
        """Refuses keys, uint64 [n], of tables or rows beyond those that were promised.

        Raises:
          ValueError: naming the highest ones.
        """
        if self.tables is None or not len(keys):
            return
        table, row = int(keys.max()) >> ROW_BITS, int((keys & np.uint64((1 << ROW_BITS) - 1)).max())
        if table >= self.tables or row >> self.row_bits:
            raise ValueError(
                f"keys must be of tables 0 .. {self.tables - 1} and rows below {1 << self.row_bits}, as `bounds` says, "
                f"got table {table} and row {row}"
            )

    def mixed(self, a: Any, b: Any) -> tuple[Any, Any]:
        """The halves A and B of h from those of a key, uint32 arrays of NumPy or JAX, or NumPy scalars."""
        kind = np.uint32
        if self.high_bits:
            b = b ^ a * kind(OF_HIGH)
        for shift, factor in MIX:
            b = (b ^ b >> kind(shift)) * kind(factor)
        b = b ^ b >> kind(LAST_SHIFT)
        if self.high_bits:
            a = a ^ b * kind(OF_LOW) >> kind(32 - self.high_bits)
        return a, b

    def top(self, a: Any, b: Any) -> Any:
        """The 32 highest bits of h, uint32."""
        high = self.high_bits
        if high in (0, 32):
            return a if high else b
        return a << np.uint32(32 - high) | b >> np.uint32(high)

    def keys(self, index: np.ndarray, tags: np.ndarray) -> np.ndarray:
        """The keys, uint64 [n], that belong in sets int64 [n] with tags [n]: what `locate` maps there."""
        kind, h = np.uint64, tags.astype(np.uint64)
        if self.tag_bytes == 4:
            first = self._first(index.astype(np.uint64))
            h = first + (h - first & _LOW)
        a, b = (h >> kind(32)).astype(np.uint32), h.astype(np.uint32)
        if self.high_bits:
            a = a ^ b * np.uint32(OF_LOW) >> np.uint32(32 - self.high_bits)
        b = b ^ b >> np.uint32(LAST_SHIFT)
        for shift, factor in reversed(MIX):
            b = b * np.uint32(pow(factor, -1, 1 << 32))
            # x ^ x >> s is undone by xoring all multiples of s.
            b = b ^ b >> np.uint32(shift) ^ (b >> np.uint32(2 * shift) if 2 * shift < 32 else np.uint32(0))
        if self.high_bits:
            b = b ^ a * np.uint32(OF_HIGH)
        if self.tables is None:
            return a.astype(kind) << kind(32) | b
        key = a.astype(kind) << kind(32) | b
        row = key & kind((1 << self.row_bits) - 1)
        return key >> kind(self.row_bits) << kind(ROW_BITS) | row

    def vacant(self, index: np.ndarray) -> np.ndarray:
        """A tag [n] that no key of the sets int64 [n] has, for ways that hold none: of the h before the first one."""
        before = self._first(index.astype(np.uint64)) - np.uint64(1)
        return before.astype(np.uint32 if self.tag_bytes == 4 else np.uint64)

    def _first(self, index: np.ndarray) -> np.ndarray:
        """The lowest h of a set, uint64."""
        sets = np.uint64(self.sets)
        return ((index << np.uint64(32)) + sets - np.uint64(1)) // sets << np.uint64(self.high_bits)


def fit(
    capacity_bytes: int, set_bytes: Callable[[int, int], int], most_ways: int, bounds: tuple[int, int] | None
) -> Sets:
    """The sets that fit into memory: as many ways as possible, but where sets are few, the most rows.

    Args:
      capacity_bytes: of that memory.
      set_bytes: (ways, tag bytes) -> bytes that a set takes.
      most_ways: at most 31.
      bounds: number of tables and most rows of one of them, or None for any keys.

    Raises:
      ValueError: for bounds that are no such numbers, or a capacity below two sets of one row.
    """
    if bounds is not None and not (0 < bounds[0] <= 1 << 64 - ROW_BITS and 0 < bounds[1] <= 1 << ROW_BITS):
        raise ValueError(f"bounds must be (tables, rows), at most (2**24, 2**40) and above 0, got {bounds}")
    tables, rows = (None, 1 << ROW_BITS) if bounds is None else bounds
    best: Sets | None = None
    for ways in range(most_ways, 0, -1):
        for tag_bytes in (4, 8):
            count = min(capacity_bytes // set_bytes(ways, tag_bytes), 2**32 - 1)
            if count < 2:
                continue
            found = Sets(count, ways, tables, (rows - 1).bit_length())
            if found.tag_bytes > tag_bytes:
                continue
            if best is None or found.sets * ways > best.sets * best.ways:
                best = found
            break
        if best is not None and count >= _MANY:
            return best
    if best is None:
        raise ValueError(
            f"capacity_bytes must hold two sets of a row and its tag, {2 * set_bytes(1, 8)} bytes, got {capacity_bytes}"
        )
    return best
