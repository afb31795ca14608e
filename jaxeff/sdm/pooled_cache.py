"""A cache of pooled vectors: a bag that was summed before needs neither its rows nor the sum.

A bag is known by 128 bits that do not depend on the order of its rows: the sums of two mixes of each row id and weight,
with the table and the length (order-free hashing of multisets, as Clarke et al. 2003, by addition). Short bags are
cheaper summed again, and get no key.

A sum in another order may round otherwise. Where the same bits are asked for with and without this cache, pool every
bag in ascending order of ids.

Letters: b bags, N row look-ups of all bags, D numbers of a vector, slots of the cache.
"""

from typing import Any

import numpy as np

from jaxeff.sdm.row_cache import RowCache

# The length of a bag is in the key as it is, up to 2**20 - 1: so many of the 128 bits are no hash.
LENGTH_BITS = 20
_LENGTH = np.uint64((1 << LENGTH_BITS) - 1)
# Odd numbers: the golden ratio, and those of SplitMix64's last step (Steele et al. 2014; public domain).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
# What the second mix begins with: the digits of pi.
_OTHER = np.uint64(0x243F6A8885A308D3)
_ONE = np.array([1], np.float32).view(np.uint32).astype(np.uint64)


class PooledCache:
    """Vectors of bags by their keys.

    Attributes:
      threshold: bags of fewer rows have no key.
      hits: bags with a key that were looked up and found.
      misses: those that were not.
      avoided: row look-ups that hits made needless.
      refused: bags whose key was here for another bag; only with `verify`.
    """

    def __init__(
        self,
        capacity_bytes: int,
        dim: int,
        threshold: int = 8,
        verify: bool = False,
        *,
        longest: int = 128,
        compiled: bool | None = None,
    ):
        """Makes an empty cache.

        Args:
          capacity_bytes: for vectors and all that is kept about them.
          dim: D.
          threshold: rows of the shortest bag that is kept, at least 1.
          verify: keeps the ids and weights of every bag too, and compares them, at 12 * `longest` bytes a vector; then
            look-ups and insertions need the bags.
          longest: rows of the longest bag that is kept; only with `verify`.
          compiled: as of `RowCache`.

        Raises:
          ValueError: for sizes that are not positive, a `longest` below `threshold`, or a capacity below two vectors.
          jaxeff.ops.native.UnavailableError: if compiled code is demanded and cannot be had.
        """
        if dim < 1 or threshold < 1:
            raise ValueError(f"dim and threshold must be at least 1, got {dim} and {threshold}")
        if verify and longest < threshold:
            raise ValueError(f"longest must be at least threshold = {threshold}, got {longest}")
        self.dim, self.threshold, self.verify, self.longest = dim, threshold, verify, longest
        # Behind the second half of the key and the vector: ids, then weights.
        self._vector = slice(8, 8 + 4 * dim)
        row_bytes = self._vector.stop + (12 * longest if verify else 0)
        self.cache = RowCache(capacity_bytes, row_bytes, compiled=compiled)
        self.hits = self.misses = self.avoided = self.refused = 0

    @property
    def bytes(self) -> int:
        """Memory of a full cache, at most the capacity asked for."""
        return self.cache.bytes

    @property
    def vectors(self) -> np.ndarray:
        """float32 [slots, D], what is kept, by slot."""
        return self.cache.rows[:, self._vector].view(np.float32)

    def key(self, tables: np.ndarray, bags: Any) -> np.ndarray:
        """Keys of bags, the same for every order of their rows.

        Args:
          tables: int [b], the table of each bag; pooling of another kind needs a number of its own.
          bags: their `indices` int [N], `offsets` int64 [b + 1] and `weights` float32 [N], or None for ones, as of
            `jaxeff.ops.bags.check_bags`.

        Returns:
          uint64 [b, 2]; zeros for bags that are not kept.

        Raises:
          ValueError: for offsets that are not one more than tables.
        """
        offsets = np.asarray(bags.offsets, np.int64)
        if len(offsets) != len(tables) + 1:
            raise ValueError(f"bags.offsets must be [{len(tables) + 1}], one more than tables, got [{len(offsets)}]")
        lengths = np.diff(offsets)
        kept = lengths >= self.threshold
        if self.verify:
            kept &= lengths <= self.longest
        keys = np.zeros((len(tables), 2), np.uint64)
        ids, weights, starts = _of_bags(bags, lengths, kept)
        bits = weights.view(np.uint32).astype(np.uint64) if weights is not None else _ONE
        sizes, its_table = lengths[kept].astype(np.uint64), np.asarray(tables)[kept].astype(np.uint64)
        for half, start in enumerate((_GOLDEN, _OTHER)):
            # Sums are modulo 2**64, so that differences of running sums are exact.
            sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mixed(ids ^ _mixed(bits + start)))])
            total = sums[starts[1:]] - sums[starts[:-1]]
            keys[kept, half] = _mixed(total + start * (sizes + (its_table << np.uint64(32))))
        keys[kept, 1] = keys[kept, 1] & ~_LENGTH | np.minimum(sizes, _LENGTH)
        return keys

    def lookup(self, keys: np.ndarray, bags: Any = None) -> np.ndarray:
        """Finds vectors, counts them, and remembers that they were used.

        Args:
          keys: uint64 [b, 2], of `key`; they may repeat.
          bags: those that the keys are of; only with `verify`.

        Returns:
          int64 [b], slots for `vectors`, or -1 for what is not here. A slot holds its vector until the next `insert`.

        Raises:
          ValueError: for keys of another form, or bags that are missing.
        """
        known = self._known(keys, bags)
        slots = np.full(len(keys), -1, np.int64)
        found = self.cache.lookup(keys[known, 0])
        second = self.cache.rows[:, :8].view(np.uint64)[:, 0]
        found[second[found] != keys[known, 1]] = -1
        if self.verify:
            hit = np.flatnonzero(found >= 0)
            same = (self.cache.rows[found[hit], self._vector.stop :] == self._proof(bags)[known[hit]]).all(1)
            self.refused += int(np.count_nonzero(~same))
            found[hit[~same]] = -1
        slots[known] = found
        hit = known[found >= 0]
        self.hits += len(hit)
        self.misses += len(known) - len(hit)
        self.avoided += int((keys[hit, 1] & _LENGTH).sum())
        return slots

    def insert(self, keys: np.ndarray, vectors: np.ndarray, bags: Any = None) -> np.ndarray:
        """Keeps vectors.

        Args:
          keys: uint64 [b, 2], of `key`; of one that repeats, the first vector is kept.
          vectors: float32 [b, D].
          bags: those that the keys are of; only with `verify`.

        Returns:
          int64 [b], slots, or -1 for what is not kept.

        Raises:
          ValueError: for keys or vectors of another form, or bags that are missing.
        """
        known = self._known(keys, bags)
        vectors = np.asarray(vectors)
        if vectors.dtype != np.float32 or vectors.shape != (len(keys), self.dim):
            raise ValueError(
                f"vectors must be float32 [{len(keys)}, {self.dim}], got {vectors.dtype} {list(vectors.shape)}"
            )
        firsts, first, inverse = np.unique(keys[known, 0], return_index=True, return_inverse=True)
        chosen = known[first]
        rows = np.empty((len(chosen), self.cache.row_bytes), np.uint8)
        rows[:, :8] = np.ascontiguousarray(keys[chosen, 1:]).view(np.uint8)
        rows[:, self._vector] = np.ascontiguousarray(vectors[chosen]).view(np.uint8)
        if self.verify:
            rows[:, self._vector.stop :] = self._proof(bags)[chosen]
        slots = np.full(len(keys), -1, np.int64)
        slots[known] = self.cache.insert(firsts, rows)[inverse]
        return slots

    def clear(self) -> None:
        """Forgets all vectors and counts, as when a table has changed."""
        self.cache.clear()
        self.hits = self.misses = self.avoided = self.refused = 0

    def _known(self, keys: np.ndarray, bags: Any) -> np.ndarray:
        """Which bags have a key, int64 [k]."""
        if keys.dtype != np.uint64 or keys.ndim != 2 or keys.shape[1] != 2:
            raise ValueError(f"keys must be uint64 [b, 2], as of key(), got {keys.dtype} {list(keys.shape)}")
        if self.verify and (bags is None or len(bags.offsets) != len(keys) + 1):
            raise ValueError(f"bags must be those that the {len(keys)} keys are of, as verify=True compares them")
        return np.flatnonzero(keys[:, 1] & _LENGTH)

    def _proof(self, bags: Any) -> np.ndarray:
        """uint8 [b, 12 * longest]: ids and the bits of weights in ascending order, and ones behind them."""
        lengths = np.diff(bags.offsets)
        kept = (lengths >= self.threshold) & (lengths <= self.longest)
        ids, weights, starts = _of_bags(bags, lengths, kept)
        bag = np.repeat(np.flatnonzero(kept), lengths[kept])
        bits = np.broadcast_to(_ONE.astype(np.uint32), ids.shape) if weights is None else weights.view(np.uint32)
        order = np.lexsort((bits, ids, bag))
        place = np.arange(len(ids)) - np.repeat(starts[:-1], lengths[kept])
        proof = np.full((len(lengths), 12 * self.longest), 255, np.uint8)
        proof[:, : 8 * self.longest].view(np.uint64)[bag, place] = ids[order]
        proof[:, 8 * self.longest :].view(np.uint32)[bag, place] = bits[order]
        return proof


def _of_bags(bags: Any, lengths: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Ids uint64 [M] and weights of the bags that are kept, end to end, and where each begins."""
    ids, weights = np.asarray(bags.indices), bags.weights
    if not kept.all():
        wanted = np.repeat(kept, lengths)
        ids, weights = ids[wanted], None if weights is None else weights[wanted]
    starts = np.concatenate([[0], np.cumsum(lengths[kept])])
    return ids.astype(np.uint64), None if weights is None else np.ascontiguousarray(weights, np.float32), starts


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits in which every bit of the result depends on all (SplitMix64's last step)."""
    x = x ^ x >> np.uint64(30)
    x *= _FIRST
    x ^= x >> np.uint64(27)
    x *= _SECOND
    x ^= x >> np.uint64(31)
    return x
