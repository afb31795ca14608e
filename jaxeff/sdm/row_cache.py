"""A cache of embedding rows in memory: set-associative, with CLOCK (second chance) for the choice of what goes.

A set has W ways and one word of reference bits behind their tags, in two lines of the processor's cache; a look-up
reads nothing else. A hit sets a bit. For a row that comes in, the hand of its set goes from way to way, clears the bits
that are set, and stops at the first that is not. Rows come in without a reference, so that what is used once goes
first.

Rows of less than 255 bytes have sets of 31 ways ("compact"): with `bounds` on the keys a tag takes 4 bytes, and the
cache hits like a fully associative one. Larger rows have 15 ways and tags of 8 bytes, which need no bounds ("fast").

Everything is done for whole arrays of keys: in compiled code where it can be had, else by `jaxeff.sdm.clock`, with the
same results; for rows in the memory of a device there is `jaxeff.sdm.device_cache`.
A cache belongs to one thread at a time.

Letters: n keys, S sets, W ways, slots S * W.
"""

import ctypes
import pathlib
from typing import Any

import numpy as np

from jaxeff.ops import native
from jaxeff.sdm import clock
from jaxeff.sdm.clock import NEVER
from jaxeff.sdm.sets import ROW_BITS, fit

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
ORGANISATIONS = ("compact", "fast")
# Smallest row of the fast organisation; where the paper switches, as far as we recall (arXiv 2110.11489).
FAST_ROW_BYTES = 255
# With the word of references 32 or 16 tags, whole lines. On traces with Meta's published reuse, with and without
# temporal locality, 31 ways hit at most 0.004 less than a fully associative LRU cache of 1 to 50 % of the rows, and 15
# ways 0.009; mostly they hit more (`python -m launch.bench.caches --case cache_clock`).
WAYS = {"compact": 31, "fast": 15}
_LINE = 64
# Of the hand and of what is held.
_SET_BYTES = 5


def row_keys(tables: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Keys uint64 [n] of rows of tables, both integers [n] or one number: table << 40 | row.

    Raises:
      ValueError: for a negative number, a table from 2**24 or a row from 2**40 on.
    """
    tables, rows = np.asarray(tables), np.asarray(rows)
    for name, numbers, limit in (("tables", tables, 1 << 64 - ROW_BITS), ("rows", rows, 1 << ROW_BITS)):
        if numbers.size and (numbers.min() < 0 or int(numbers.max()) >= limit):
            raise ValueError(f"{name} must be 0 .. {limit - 1}, got {numbers.min()} .. {numbers.max()}")
    return tables.astype(np.uint64) << np.uint64(ROW_BITS) | rows.astype(np.uint64)


def split_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tables int32 [n] and rows int64 [n] of keys uint64 [n] of `row_keys`."""
    return (keys >> np.uint64(ROW_BITS)).astype(np.int32), (keys & np.uint64((1 << ROW_BITS) - 1)).astype(np.int64)


class RowCache:
    """Rows of one size by their keys.

    Attributes:
      rows: uint8 [slots, row_bytes], what is kept, by slot.
      capacity: slots.
      sets: the shape.
      organisation: "compact" or "fast".
      hits: keys that were looked up and found.
      misses: those that were not.
      evictions: rows that went for others.
      compiled: whether compiled code is used.
    """

    def __init__(
        self,
        capacity_bytes: int,
        row_bytes: int,
        organisation: str = "auto",
        *,
        bounds: tuple[int, int] | None = None,
        ahead: bool = False,
        compiled: bool | None = None,
    ):
        """Makes an empty cache; the memory of rows is touched as they come in.

        Args:
          capacity_bytes: for rows and all that is kept about them.
          row_bytes: of a row.
          organisation: "compact", "fast", or "auto", by the size of rows.
          bounds: number of tables and most rows of one of them, if all keys are of `row_keys`; keys beyond are errors.
            With them a tag takes 4 bytes where that is exact, as it is in all but tiny caches.
          ahead: whether next uses can be given, at 4 bytes a row; see `jaxeff.sdm.lookahead`.
          compiled: True demands compiled code, False forbids it.

        Raises:
          ValueError: for an unknown organisation, bounds or sizes that are not positive, or a capacity below two rows
            and their tags.
          jaxeff.ops.native.UnavailableError: if compiled code is demanded and cannot be had.
        """
        if organisation not in (*ORGANISATIONS, "auto"):
            raise ValueError(f"organisation must be 'auto' or one of {ORGANISATIONS}, got {organisation!r}")
        if row_bytes < 1:
            raise ValueError(f"row_bytes must be at least 1, got {row_bytes}")
        if organisation == "auto":
            organisation = "fast" if row_bytes >= FAST_ROW_BYTES else "compact"
        self.organisation, self.row_bytes, self.compiled = organisation, row_bytes, False
        each = row_bytes + 4 * ahead
        set_bytes = lambda ways, tag_bytes: ways * each + (ways + 1) * tag_bytes + _SET_BYTES
        self.sets = fit(capacity_bytes, set_bytes, WAYS[organisation], bounds)
        count, ways = self.sets.sets, self.sets.ways
        self.capacity = count * ways
        self.rows = _aligned((self.capacity, row_bytes), np.uint8)
        self._state = clock.State(
            sets=self.sets,
            lines=_aligned((count, ways + 1), np.uint32 if self.sets.tag_bytes == 4 else np.uint64),
            hand=np.zeros(count, np.uint8),
            held=np.zeros(count, np.uint32),
            next_use=np.empty(self.capacity, np.int32) if ahead else None,
        )
        self._holding: list[np.ndarray] = []
        self.hits = self.misses = self.evictions = 0
        self.clear()
        self._native: Any = None
        if compiled is not False:
            try:
                self._native = _library()
                self.compiled = True
            except native.UnavailableError:
                if compiled:
                    raise
        high = self.sets.high_bits
        numbers = (count, ways, bounds is not None, self.sets.row_bits, high, self.sets.tag_bytes, row_bytes)
        self._numbers = np.array(numbers, np.int64)

    @property
    def bytes(self) -> int:
        """Memory of a full cache, at most the capacity asked for."""
        return self.rows.nbytes + self._metadata

    @property
    def ahead(self) -> bool:
        """Whether next uses can be given."""
        return self._state.next_use is not None

    @property
    def metadata_per_row(self) -> float:
        """Bytes kept about a row besides itself."""
        return self._metadata / self.capacity

    @property
    def _metadata(self) -> int:
        state = self._state
        arrays = (state.lines, state.hand, state.held, state.next_use)
        return sum(array.nbytes for array in arrays if array is not None)

    def __len__(self) -> int:
        return len(self.contents()[0])

    def lookup(self, keys: np.ndarray, next_use: np.ndarray | None = None, *, hold: bool = False) -> np.ndarray:
        """Finds rows, counts them, and remembers that they were used.

        Args:
          keys: uint64 [n], no two alike.
          next_use: int32 [n], as of `insert`; only of a cache that was made with `ahead`.
          hold: whether what is found, and what is inserted from now on, must stay until `release`.

        Returns:
          int64 [n], slots, or -1 for what is not here. A slot holds its row until the next `insert`; with `hold`, until
          `release`.

        Raises:
          ValueError: for keys that are not uint64 [n], or out of `bounds`.
        """
        keys = self._checked(keys)
        slots = self._find(keys, mark=True, hold=hold, next_use=self._uses(next_use, keys))
        found = int(np.count_nonzero(slots >= 0))
        self.hits += found
        self.misses += len(keys) - found
        if hold:
            self._holding.append(slots)
        return slots

    def find(self, keys: np.ndarray) -> np.ndarray:
        """As `lookup`, but nothing is counted or remembered."""
        return self._find(self._checked(keys), mark=False)

    def take(self, slots: np.ndarray, out: np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
        """Copies rows.

        Args:
          slots: int64 [n]; those that are negative are left out.
          out: uint8 [m, >= row_bytes], rows of it contiguous.
          at: int64 [n], the row of `out` for each slot; None for 0, 1, ...

        Returns:
          `out`, with rows at its left.

        Raises:
          ValueError: for an `out` that is too small or not contiguous, or places and slots that do not exist.
        """
        slots = np.ascontiguousarray(slots, np.int64)
        at = None if at is None else np.ascontiguousarray(at, np.int64)
        side_by_side = out.ndim == 2 and (out.size == 0 or out.strides[1] == 1)
        if out.dtype != np.uint8 or not side_by_side or out.shape[1] < self.row_bytes:
            raise ValueError(
                f"out must be uint8 [m, at least {self.row_bytes}] with contiguous rows, got {out.dtype} {out.shape}"
            )
        if len(slots) and int(slots.max()) >= self.capacity:
            raise ValueError(f"slots must be below {self.capacity}, got {slots.max()}")
        if at is None and len(slots) > len(out):
            raise ValueError(f"out must have a row for each of {len(slots)} slots, got {len(out)}")
        if at is not None and (at.shape != slots.shape or (len(at) and not 0 <= at.min() <= at.max() < len(out))):
            raise ValueError(f"at must be one of the {len(out)} rows of out for each of {len(slots)} slots")
        if self._native is not None and out.strides[0] >= 0:
            self._native.RowCacheTake(
                _address(self.rows), self.row_bytes, _address(slots), _address(at), len(slots), _address(out),
                out.strides[0],
            )  # fmt: skip
            return out
        hit = np.flatnonzero(slots >= 0)
        out[hit if at is None else at[hit], : self.row_bytes] = self.rows[slots[hit]]
        return out

    def insert(self, keys: np.ndarray, rows: np.ndarray, next_use: np.ndarray | None = None) -> np.ndarray:
        """Keeps rows; of keys that are here already, in their place.

        A row that comes in by this call does not go by it: of more new rows of a set than it has ways, the last ones
        are left out.

        Args:
          keys: uint64 [n]; of a key that stands twice, the last row is kept.
          rows: uint8 [n, >= row_bytes], of which the left is taken.
          next_use: int32 [n], number of the batch in which each row is used next, or `NEVER` where none is known; None
            for `NEVER`. Then the row goes that is used last, and by CLOCK one of those that may never be; what is used
            later than all others of its set is left out.

        Returns:
          int64 [n], slots, or -1 for what was left out.

        Raises:
          ValueError: for keys that are not uint64 [n] or out of `bounds`, rows of another size, or next uses for a
            cache that was not made with `ahead`.
        """
        keys = self._checked(keys)
        rows = np.asarray(rows)
        if rows.dtype != np.uint8 or rows.ndim != 2 or len(rows) != len(keys) or rows.shape[1] < self.row_bytes:
            raise ValueError(
                f"rows must be uint8 [{len(keys)}, at least {self.row_bytes}], got {rows.dtype} {rows.shape}"
            )
        uses = self._uses(next_use, keys)
        if self._native is not None:
            rows = rows if rows.strides[1] == 1 and rows.strides[0] >= 0 else np.ascontiguousarray(rows)
            slots, state = np.empty(len(keys), np.int64), self._state
            self.evictions += self._native.RowCacheInsert(
                _address(self._numbers), _address(state.lines), _address(state.hand), _address(state.held),
                _address(state.next_use), state.now, state.choosy, _address(self.rows), _address(keys), _address(rows),
                rows.strides[0], _address(uses), len(keys), bool(self._holding), _address(slots),
            )  # fmt: skip
        else:
            slots, evicted = clock.insert(self._state, keys, uses)
            kept = np.flatnonzero(slots >= 0)
            # Of a key that stands twice, its last row is written last.
            self.rows[slots[kept]] = rows[kept, : self.row_bytes]
            self.evictions += evicted
            if not self._holding:
                clock.release(self._state, slots)
        if self._holding:
            self._holding.append(slots)
        return slots

    def warm(self, keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Keeps rows without counting anything, the most important first: none of them makes another one go.

        Args:
          keys: uint64 [n].
          rows: uint8 [n, >= row_bytes].

        Returns:
          int64 [n], slots, or -1 for what found no room.
        """
        evictions = self.evictions
        slots = self.insert(keys, rows)
        self.evictions = evictions
        return slots

    def release(self) -> None:
        """Lets everything go again that `hold` kept."""
        for slots in self._holding:
            clock.release(self._state, slots)
        self._holding = []

    def discard(self, keys: np.ndarray) -> None:
        """Forgets rows, as when their table has changed; the next that takes such a place counts as an eviction."""
        slots = self.find(keys)
        index, way = np.divmod(slots[slots >= 0], self.sets.ways)
        self._state.lines[index, way] = self.sets.vacant(index)

    def clear(self) -> None:
        """Forgets all rows and counts."""
        self.hits = self.misses = self.evictions = 0
        self._holding = []
        clock.clear(self._state)

    def contents(self) -> tuple[np.ndarray, np.ndarray]:
        """The keys that are here, uint64 [m], and their slots, int64 [m], in the order of slots."""
        tags = self._state.lines[:, :-1]
        index, way = np.nonzero(tags != self.sets.vacant(np.arange(self.sets.sets))[:, None])
        return self.sets.keys(index, tags[index, way]), index * self.sets.ways + way

    def in_use(self, slots: np.ndarray) -> np.ndarray:
        """Whether rows, int64 [n] slots, were used since the hand passed them; bool [n]."""
        index, way = np.divmod(slots, self.sets.ways)
        return (self._state.lines[index, -1].astype(np.int64) >> way) & 1 > 0

    def postpone(self, keys: np.ndarray, batch: int) -> None:
        """Says that keys, uint64 [n], are used in a batch: of rows that are here and no earlier use of which is known.

        Raises:
          ValueError: for a cache that was not made with `ahead`.
        """
        next_use = self._state.next_use
        if next_use is None:
            raise ValueError("next uses need a cache that is made with ahead=True")
        slots = self.find(keys)
        slots = slots[slots >= 0]
        slots = slots[(next_use[slots] == NEVER) | (next_use[slots] < self._state.now)]
        next_use[slots] = batch

    def known_uses(self, keys: np.ndarray) -> np.ndarray:
        """Next uses, int32 [n], of rows that are here, and `NEVER` of others and of those whose use is not known."""
        slots, uses = self.find(keys), np.full(len(keys), NEVER, np.int32)
        if self._state.next_use is not None:
            uses[slots >= 0] = self._state.next_use[slots[slots >= 0]]
        return uses

    def advance(self, batch: int, *, choosy: bool = False) -> None:
        """Says which batch comes now, so that next uses before it have passed.

        Args:
          batch: its number.
          choosy: whether rows that may never be used stay out of full sets; otherwise CLOCK decides between them and
            those that are there and may never be used either.
        """
        self._state.now, self._state.choosy = batch, choosy

    def _checked(self, keys: np.ndarray) -> np.ndarray:
        keys = np.asarray(keys)
        if keys.dtype != np.uint64 or keys.ndim != 1:
            raise ValueError(f"keys must be uint64 [n], as of row_keys, got {keys.dtype} {keys.shape}")
        if self._native is not None:
            self.sets.check(keys)
        return np.ascontiguousarray(keys)

    def _uses(self, next_use: np.ndarray | None, keys: np.ndarray) -> np.ndarray | None:
        if not self.ahead:
            if next_use is not None:
                raise ValueError("next_use needs a cache that is made with ahead=True")
            return None
        if next_use is None:
            return np.full(len(keys), NEVER, np.int32)
        if next_use.shape != keys.shape:
            raise ValueError(f"next_use must be [{len(keys)}], one for each key, got {next_use.shape}")
        return np.ascontiguousarray(next_use, np.int32)

    def _find(
        self, keys: np.ndarray, *, mark: bool, hold: bool = False, next_use: np.ndarray | None = None
    ) -> np.ndarray:
        if self._native is None:
            return clock.find(self._state, keys, mark=mark, hold=hold, next_use=next_use)
        slots, state = np.empty(len(keys), np.int64), self._state
        self._native.RowCacheLookup(
            _address(self._numbers), _address(state.lines), _address(state.held), _address(state.next_use),
            _address(next_use), _address(keys), len(keys), mark, hold, _address(slots),
        )  # fmt: skip
        return slots


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that begin with a line of the processor's cache; pages are not touched."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    # Not `staging.aligned`: NumPy asks for large pages, and random rows of a cache of 3 GB take 42 ns each in place of
    # the 51 of shared memory, where the kernel gives none.
    buffer = np.zeros(size + _LINE, np.uint8)
    start = -buffer.ctypes.data % _LINE
    return buffer[start : start + size].view(dtype).reshape(shape)


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.__array_interface__["data"][0]


def _library() -> ctypes.CDLL:
    library = native.load(SOURCE)
    p, i = ctypes.c_void_p, ctypes.c_int64
    library.RowCacheLookup.argtypes, library.RowCacheLookup.restype = [p, p, p, p, p, p, i, i, i, p], i
    library.RowCacheInsert.argtypes = [p, p, p, p, p, i, i, p, p, p, i, p, i, i, p]
    library.RowCacheInsert.restype = i
    library.RowCacheTake.argtypes, library.RowCacheTake.restype = [p, i, p, p, i, p, i], None
    return library
