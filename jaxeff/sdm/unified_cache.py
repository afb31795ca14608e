"""One cache of rows for tables with rows of several sizes, under one budget of memory.

Tables with rows of one size share one `RowCache`, so that its room goes to the hot ones by itself. Between sizes the
budget is split by what room is worth on a trace: the hit curve of every size (Mattson's, all at once) is replaced by
the least concave curve above it, and memory goes where the next byte saves most. Small rows get the compact, large ones
the fast organisation.

Letters: n keys, T tables.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxeff.sdm import reuse
from jaxeff.sdm.row_cache import NEVER, RowCache
from jaxeff.sdm.sets import ROW_BITS

# Points of a hit curve; between them it is taken as straight.
POINTS = 512
# Of the budget; a size gets at least this, as a cache of no rows at all could never show what it is worth.
LEAST_SHARE = 0.005
# What a cache keeps about a row, at most, in bytes.
_ABOUT_A_ROW = 9


class UnifiedCache:
    """Rows of tables of several row sizes, by keys of `row_keys`.

    Attributes:
      caches: the cache of each row size that is not only bypassed.
      row_bytes: int64 [T].
      hits: int64 [T], keys of each table that were looked up and found.
      misses: int64 [T], those that were not, those of bypassed tables among them.
      ahead: whether next uses can be given.
    """

    def __init__(
        self,
        capacity_bytes: int,
        row_bytes: Sequence[int],
        *,
        bypass: Collection[int] = (),
        shares: Mapping[int, float] | None = None,
        rows: Sequence[int] | None = None,
        ahead: bool = False,
        compiled: bool | None = None,
    ):
        """Makes an empty cache.

        Args:
          capacity_bytes: for rows and all that is kept about them.
          row_bytes: of a row of each table.
          bypass: numbers of the tables whose rows are never kept, as they would not be used again.
          shares: of the budget for each row size, positive, as `split` finds them; None for the number of tables that
            have it times its bytes, so that each table has room for as many rows.
          rows: of each table, for shorter tags; None where they are not known.
          ahead: whether next uses can be given, as of `RowCache`.
          compiled: as of `RowCache`.

        Raises:
          ValueError: for tables that do not exist, shares of other sizes than there are, or a budget that is too small.
          jaxeff.ops.native.UnavailableError: if compiled code is demanded and cannot be had.
        """
        self.row_bytes = np.asarray(row_bytes, np.int64)
        count = len(self.row_bytes)
        if odd := [table for table in bypass if not 0 <= table < count]:
            raise ValueError(f"bypass must name tables 0 .. {count - 1}, got {odd}")
        if rows is not None and len(rows) != count:
            raise ValueError(f"rows must have one number for each of {count} tables, got {len(rows)}")
        self.capacity_bytes = capacity_bytes
        self._cached = np.ones(count, bool)
        self._cached[list(bypass)] = False
        self._bounds = None if rows is None else (count, max(1, *rows))
        self.ahead, self._compiled = ahead, compiled
        self.hits, self.misses = np.zeros(count, np.int64), np.zeros(count, np.int64)
        sizes, tables = np.unique(self.row_bytes[self._cached], return_counts=True)
        if shares is None:
            shares = {int(size): float(size * many) for size, many in zip(sizes, tables, strict=True)}
        self.caches: dict[int, RowCache] = {}
        self.resize(shares)

    @property
    def bytes(self) -> int:
        """Memory of a full cache, at most the capacity asked for."""
        return sum(cache.bytes for cache in self.caches.values())

    @property
    def capacity(self) -> int:
        """Rows of a full cache, of all sizes."""
        return sum(cache.capacity for cache in self.caches.values())

    @property
    def width(self) -> int:
        """Bytes of the largest row."""
        return int(self.row_bytes.max(initial=0))

    def lookup(self, keys: np.ndarray, next_use: np.ndarray | None = None, *, hold: bool = False) -> np.ndarray:
        """Finds rows, counts them, and remembers that they were used.

        Args:
          keys: uint64 [n], no two alike.
          next_use: int32 [n], as of `RowCache.lookup`.
          hold: whether what is found, and what is inserted from now on, must stay until `release`.

        Returns:
          int64 [n], slots of the cache of the table's row size, or -1 for what is not here.

        Raises:
          ValueError: for keys of tables that do not exist.
        """
        slots = np.full(len(keys), -1, np.int64)
        tables = self._tables(keys)
        for cache, mine in self._parts(tables):
            slots[mine] = cache.lookup(keys[mine], None if next_use is None else next_use[mine], hold=hold)
        found = np.bincount(tables[slots >= 0], minlength=len(self.hits))
        self.hits += found
        self.misses += np.bincount(tables, minlength=len(self.hits)) - found
        return slots

    def take(self, keys: np.ndarray, slots: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copies rows to the left of `out`, uint8 [n, >= width]; where a slot is -1, nothing. Returns `out`."""
        for cache, mine in self._parts(self._tables(keys)):
            cache.take(slots[mine], out, np.arange(len(keys))[mine])
        return out

    def insert(self, keys: np.ndarray, rows: np.ndarray, next_use: np.ndarray | None = None) -> np.ndarray:
        """Keeps rows, uint8 [n, >= width], at their left, if their tables are cached; next uses as of `RowCache`.

        Returns:
          int64 [n], slots, or -1 for what is not kept.
        """
        slots = np.full(len(keys), -1, np.int64)
        for cache, mine in self._parts(self._tables(keys)):
            slots[mine] = cache.insert(keys[mine], rows[mine], None if next_use is None else next_use[mine])
        return slots

    def warm(self, keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Keeps rows, the most important first, without counting anything; arguments and result as of `insert`."""
        slots = np.full(len(keys), -1, np.int64)
        for cache, mine in self._parts(self._tables(keys)):
            slots[mine] = cache.warm(keys[mine], rows[mine])
        return slots

    def release(self) -> None:
        """Lets everything go again that `hold` kept."""
        for cache in self.caches.values():
            cache.release()

    def discard(self, keys: np.ndarray) -> None:
        """Forgets rows, as when their table has changed."""
        for cache, mine in self._parts(self._tables(keys)):
            cache.discard(keys[mine])

    def postpone(self, keys: np.ndarray, batch: int) -> None:
        """As `RowCache.postpone`."""
        for cache, mine in self._parts(self._tables(keys)):
            cache.postpone(keys[mine], batch)

    def known_uses(self, keys: np.ndarray) -> np.ndarray:
        """As `RowCache.known_uses`."""
        uses = np.full(len(keys), NEVER, np.int32)
        for cache, mine in self._parts(self._tables(keys)):
            uses[mine] = cache.known_uses(keys[mine])
        return uses

    def advance(self, batch: int, *, choosy: bool = False) -> None:
        """As `RowCache.advance`."""
        for cache in self.caches.values():
            cache.advance(batch, choosy=choosy)

    def resize(self, shares: Mapping[int, float]) -> None:
        """Splits the budget anew; rows stay as far as there is room, those in use first.

        Slots are other ones then, nothing is held any more, and next uses are forgotten.

        Args:
          shares: of the budget for each row size, in any unit.

        Raises:
          ValueError: for other sizes than there are, shares that are not positive, or too small for two rows; then
            nothing has changed.
        """
        sizes = {int(size) for size in np.unique(self.row_bytes[self._cached])}
        if set(shares) != sizes:
            raise ValueError(f"shares must be given for row sizes {sorted(sizes)}, got {sorted(shares)}")
        total = sum(shares.values())
        if not all(0 < share < np.inf for share in shares.values()):
            raise ValueError(f"shares must be finite and above 0, got {dict(shares)}")
        fresh = {
            size: RowCache(
                int(self.capacity_bytes * share / total),
                size,
                bounds=self._bounds,
                ahead=self.ahead,
                compiled=self._compiled,
            )
            for size, share in shares.items()
        }
        for size, old in self.caches.items():
            keys, slots = old.contents()
            order = np.argsort(~old.in_use(slots), kind="stable")
            fresh[size].warm(keys[order], old.rows[slots[order]])
        self.caches = fresh

    def rebalance(self, keys: np.ndarray, *, miss_cost: Mapping[int, float] | None = None) -> dict[int, float]:
        """Splits the budget as `split` finds it for a recent trace, keys uint64 [n], and returns the shares."""
        keys = keys[self._cached[self._tables(keys)]]
        shares = split(keys, self.row_bytes, self.capacity_bytes, miss_cost=miss_cost)
        wanted = {int(size): shares.get(int(size), LEAST_SHARE) for size in self.caches}
        self.resize(wanted)
        return wanted

    def _tables(self, keys: np.ndarray) -> np.ndarray:
        tables = (keys >> np.uint64(ROW_BITS)).astype(np.int64)
        if len(tables) and tables.max() >= len(self.row_bytes):
            raise ValueError(f"keys must be of tables 0 .. {len(self.row_bytes) - 1}, got table {tables.max()}")
        return tables

    def _parts(self, tables: np.ndarray) -> Iterator[tuple[RowCache, Any]]:
        """Each cache, and which keys are of it."""
        if len(self.caches) == 1 and self._cached.all():
            yield next(iter(self.caches.values())), slice(None)
            return
        sizes = np.where(self._cached, self.row_bytes, -1)[tables]
        for size, cache in self.caches.items():
            mine = np.flatnonzero(sizes == size)
            if len(mine):
                yield cache, mine


def split(
    keys: np.ndarray, row_bytes: np.ndarray, capacity_bytes: int, *, miss_cost: Mapping[int, float] | None = None
) -> dict[int, float]:
    """Shares of a budget for each row size, for the fewest misses of a trace.

    Args:
      keys: uint64 [n], of `row_keys`, in the order of time. For long traces a sample by key does: all uses of a tenth
        of the rows, with a tenth of the budget.
      row_bytes: int [T], of a row of each table.
      capacity_bytes: the budget.
      miss_cost: of a row of each size, in any unit; None for 1.

    Returns:
      The share of each size that the trace has; none is below `LEAST_SHARE` before they are made to sum to 1.

    Raises:
      ValueError: for a capacity that is not positive.
    """
    if capacity_bytes < 1:
        raise ValueError(f"capacity_bytes must be at least 1, got {capacity_bytes}")
    sizes = np.asarray(row_bytes)[(keys >> np.uint64(ROW_BITS)).astype(np.int64)]
    slopes, lengths, owners = [], [], []
    found = [int(size) for size in np.unique(sizes)]
    for size in found:
        distances = reuse.reuse_distances(keys[sizes == size])
        each = size + _ABOUT_A_ROW
        most = min(capacity_bytes // each, int(distances.max(initial=0)) + 1)
        points = np.unique(np.linspace(0, most, POINTS).astype(np.int64))
        saved = reuse.hits_of_sizes(distances, points) * (1.0 if miss_cost is None else miss_cost[size])
        for start, end in _hull(points, saved):
            lengths.append((points[end] - points[start]) * each)
            slopes.append((saved[end] - saved[start]) / lengths[-1])
            owners.append(size)
    given = dict.fromkeys(found, 0.0)
    left = float(capacity_bytes)
    # Slopes of one size fall, so that its parts are taken in their order.
    for part in np.argsort(slopes, kind="stable")[::-1]:
        if slopes[part] <= 0 or left <= 0:
            break
        taken = min(left, lengths[part])
        given[owners[part]] += taken
        left -= taken
    shares = {size: max(room / capacity_bytes, LEAST_SHARE) for size, room in given.items()}
    total = sum(shares.values())
    return {size: share / total for size, share in shares.items()}


def _hull(x: np.ndarray, y: np.ndarray) -> list[tuple[int, int]]:
    """The pieces, as (first, last point), of the least concave curve above points in ascending order of x."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) > (y[i] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return list(zip(corners, corners[1:], strict=False))
