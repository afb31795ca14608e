"""Tables in tiers: some in memory, the others in files behind a cache of rows.

A look-up has three steps. `Tiers.plan` validates a query on the host and says which rows it needs. `Tiers.fetch` brings
those that are not in memory, from the cache or from the device, into a buffer. `pool` is what JAX compiles: it reads
the buffer where it lies. Fetching one query while another is pooled is `jaxeff.sdm.pipeline`.

Letters: G bags, N row look-ups, T tables, U distinct rows.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxeff.ops import embedding_bag
from jaxeff.ops.bags import POLICIES
from jaxeff.sdm import holdings, pooling, queries
from jaxeff.sdm.assembly import Assembler
from jaxeff.sdm.encoding import decode, zero_row
from jaxeff.sdm.io.files import Direct
from jaxeff.sdm.io.reader import Backend, Reader, open_reader
from jaxeff.sdm.loaded import Buffer, Loaded, load
from jaxeff.sdm.lookahead import LookAhead
from jaxeff.sdm.lookups import Counters, Needed, Plan, Staged
from jaxeff.sdm.placement import TIERS
from jaxeff.sdm.pooled_cache import PooledCache
from jaxeff.sdm.queries import Query
from jaxeff.sdm.remaps import Remaps
from jaxeff.sdm.row_cache import row_keys, split_keys
from jaxeff.sdm.staging import Ring
from jaxeff.sdm.table import Store

BUFFERS = 4
MODES = ("sum", "mean")


class Tiers:
    """Look-ups of a store whose tables lie in several tiers.

    Threads that fetch wait for each other; `pool` may be called by another one. Close it, or use it in a `with` block.
    """

    def __init__(
        self,
        store: Store,
        placement: Mapping[str, str] | str = "cached",
        *,
        cache_bytes: int = 0,
        pinned: Mapping[str, Any] | None = None,
        lookahead: bool = False,
        pooled_bytes: int = 0,
        pooled_threshold: int = 4,
        reader: Backend = "auto",
        queue_depth: int = 128,
        direct: Direct = "auto",
        policy: str = "raise",
        mode: str = "sum",
        canonical: bool = False,
        form: str = "auto",
        buffers: int = BUFFERS,
    ):
        """Opens the files of a store, loads what is to be in memory, and makes the caches.

        Args:
          store: the tables; it must stay open.
          placement: a tier of `TIERS` for every table by name, or one for all.
          cache_bytes: memory for cached rows and what is kept about them, over all tables; 0 for none.
          pinned: by table that is not in memory, ids of rows that are, int [n]: the most used ones, as of
            `jaxeff.sdm.split_rows` and `jaxeff.sdm.placement.hottest`.
          lookahead: whether the cache can be told of queries before they are fetched, by `expect`, at 4 bytes a row.
          pooled_bytes: memory for vectors of whole bags; 0 for none. Bags are then summed in ascending order of ids.
          pooled_threshold: look-ups of a bag from which on its vector is kept; shorter ones are cheap.
          reader: of `jaxeff.sdm.io.open_reader`.
          queue_depth: reads in flight at most, of all files together; a store lies on one device.
          direct: whether reads pass by the page cache.
          policy: of ids out of range: "raise", "drop" or "hash".
          mode: of pooling, "sum" or "mean".
          canonical: sum bags in ascending order of ids even without a cache of vectors.
          form: "csr" (compiled code), "padded" (plain JAX), or "auto" for the first where it can be had.
          buffers: queries that may be staged at once, at least 3.

        Raises:
          ValueError: for a tier, table, mode, policy or form that does not exist, tables of different dimensions, fewer
            than 3 buffers, or a budget that is negative or too small for a cache.
          jaxeff.sdm.StoreError: for tables in memory that are damaged; they are verified as they are read.
          OSError: for files that cannot be read.
        """
        settings = locals()
        # For tiers of the next version of the store.
        self.settings = {name: value for name, value in settings.items() if name not in ("self", "store")}
        specs = [table.spec for table in store.tables]
        names = [spec.name for spec in specs]
        placed = dict.fromkeys(names, placement) if isinstance(placement, str) else dict(placement)
        if set(placed) != set(names):
            odd = sorted(set(placed) ^ set(names))
            raise ValueError(f"placement must give a tier to every table and no other; this does not fit: {odd}")
        known = {"tier": (TIERS, set(placed.values())), "mode": (MODES, {mode})}
        for what, (allowed, given) in (known | {"policy": (POLICIES, {policy})}).items():
            if wrong := sorted(given - set(allowed)):
                raise ValueError(f"{what}={wrong[0]!r} is unknown; there are {', '.join(allowed)}")
        for name, size in (("cache_bytes", cache_bytes), ("pooled_bytes", pooled_bytes)):
            if size < 0:
                raise ValueError(f"{name}={size} must not be negative")
        if len(dims := {spec.format.dim for spec in specs}) > 1:
            raise ValueError(f"tables of one model have one dimension, these have {sorted(dims)}")
        self.store, self.placement, self.policy, self.buffers = store, placed, policy, buffers
        self.dim, self.mode = dims.pop(), mode
        self.rows = np.array([table.ids for table in store.tables], np.int64)
        self.canonical, self.lookahead = canonical or pooled_bytes > 0, lookahead
        self.assembler = Assembler(_csr(form), self.dim, mode)
        self.counters = Counters()
        self.tiers = np.array([TIERS.index(placed[name]) for name in names], np.int8)
        self.formats = list(dict.fromkeys(spec.format for spec in specs))
        self.group = np.array([self.formats.index(spec.format) for spec in specs], np.int32)
        self.remaps = Remaps(store)
        self._rings = [Ring(buffers, Buffer) for _ in self.formats]
        cached = self.tiers == TIERS.index("cached")
        self.cache = holdings.make_cache(specs, cached, cache_bytes, ahead=lookahead)
        self._told = LookAhead(self.cache) if lookahead and self.cache is not None else self.cache
        self.vectors = PooledCache(pooled_bytes, self.dim, threshold=pooled_threshold) if pooled_bytes else None
        # One thread at a time has the reader, the caches and the buffers. The cache of vectors is asked by the thread
        # that plans, and filled by the one that computes.
        self._fetching, self._of_vectors = threading.Lock(), threading.Lock()
        self._looking = threading.Lock()
        self._closed = False
        self.reader: Reader = open_reader(store.paths, backend=reader, direct=direct, queue_depth=queue_depth)
        try:
            self._memory = [self._loaded(group) for group in range(len(self.formats))]
            self._pinned = holdings.pin(store, self.reader, self.remaps, pinned or {}, placed, self.formats)
        except BaseException:
            self.reader.close()
            raise

    # ---- what is in memory -------------------------------------------------------------------------------------------

    def _loaded(self, group: int) -> Loaded | None:
        tables = np.flatnonzero((self.group == group) & (self.tiers == TIERS.index("memory")))
        return load(self.store, tables, self.formats[group]) if len(tables) else None

    def in_memory(self, group: int) -> Loaded:
        """The tables of a format that are in memory; for groups that a plan names."""
        loaded = self._memory[group]
        assert loaded is not None, "a plan names only groups that have tables in memory"
        return loaded

    @property
    def fast_bytes(self) -> int:
        """Bytes of memory that the tables take: rows in memory, caches, and maps of rows that moved or were pruned."""
        loaded = sum(found.rows.nbytes for found in self._memory if found is not None)
        others = sum(held.bytes for held in (self.cache, self.vectors, *self._pinned) if held is not None)
        return loaded + others + self.remaps.nbytes

    # ---- planning ----------------------------------------------------------------------------------------------------

    def plan(self, asked: Query) -> Plan:
        """Validates a query and finds the distinct rows that it needs.

        Raises:
          ValueError: for tables or ids that do not exist, and offsets or weights that are wrong.
        """
        asked = queries.checked(asked, self.rows, self.policy)
        if self.canonical:
            asked = queries.sorted_bags(asked)
        counters = Counters(queries=1, lookups=len(asked.indices))
        in_memory = self.tiers[asked.tables] == TIERS.index("memory")
        counters.bags = int((~in_memory).sum())
        ready, vectors, pooled_keys = np.zeros(len(asked.tables), bool), None, None
        if self.vectors is not None:
            lengths = asked.lengths
            long = ~in_memory & (lengths >= self.vectors.threshold)
            pooled_keys = self.vectors.key(asked.tables, asked.bags)
            with self._of_vectors:
                slots = self.vectors.lookup(pooled_keys[long])
                vectors = self.vectors.vectors[slots[slots >= 0]]
            ready[np.flatnonzero(long)[slots >= 0]] = True
            counters.pooled_hits, counters.avoided = int(ready.sum()), int(lengths[ready].sum())
        memory, needed, found = [], [], []
        groups = self.group[asked.tables]
        for group in range(len(self.formats)):
            if len(bags := np.flatnonzero(in_memory & (groups == group))):
                memory.append((group, queries.chosen(asked, bags)))
                found.append(bags)
        for group in range(len(self.formats)):
            if len(bags := np.flatnonzero(~in_memory & ~ready & (groups == group))):
                one = self._needed(group, queries.chosen(asked, bags))
                needed.append((group, one))
                found.append(bags)
                counters.unique += len(one.keys)
        order = np.empty(len(asked.tables), np.int32)
        order[np.concatenate([*found, np.flatnonzero(ready)]).astype(np.int64)] = np.arange(len(order))
        return Plan(asked, counters, order, tuple(memory), tuple(needed), vectors, pooled_keys)

    def _needed(self, group: int, asked: Query) -> Needed:
        tables = np.repeat(asked.tables, asked.lengths)
        rows = self.remaps.rows(tables, asked.indices)
        kept = rows >= 0
        if kept.all():
            keys, inverse = np.unique(row_keys(tables, rows), return_inverse=True)
        else:
            keys, found = np.unique(row_keys(tables[kept], rows[kept]), return_inverse=True)
            inverse = np.full(len(rows), len(keys))
            inverse[kept] = found
        pins = self._pinned[group]
        return Needed(keys, *split_keys(keys), inverse, asked, None if pins is None else pins.find(keys))

    def expect(self, plan: Plan) -> Plan:
        """Tells the cache that a plan will be fetched after those that it was told of before.

        Returns:
          The plan with its number, which is to be fetched in its place; the same plan without `lookahead`.
        """
        if not isinstance(self._told, LookAhead):
            return plan
        with self._fetching:
            return dataclasses.replace(plan, number=self._told.expect(plan.keys))

    def forget_expected(self) -> None:
        """Says that what was announced by `expect` and was not fetched will not come."""
        if isinstance(self._told, LookAhead):
            with self._fetching:
                self._told.forget()

    # ---- fetching ----------------------------------------------------------------------------------------------------

    def fetch(self, plan: Plan, deadline: float | None = None) -> Staged:
        """Brings the rows of a plan from the cache and the device.

        Args:
          plan: of a query.
          deadline: seconds from now in which reading must end.

        Raises:
          jaxeff.sdm.DeadlineExceeded: if it does not; the query may be fetched again.
          jaxeff.sdm.ReadError: for what the device refuses, naming the file and the place.
          RuntimeError: after `close`.
        """
        with self._fetching:
            return self._fetch(plan, deadline)

    def _fetch(self, plan: Plan, deadline: float | None) -> Staged:
        started = time.perf_counter()
        places, buffers = [], []

        def take(group: int, count: int) -> np.ndarray:
            size = self.assembler.bucket(("rows", group), count + 1)
            place, buffer = self._rings[group].take((size, self.formats[group]))
            places.append((self._rings[group], place))
            buffers.append((size, buffer))
            return buffer.bytes

        found, counters, read = self.bring(plan, take, deadline)
        rows = [(buffer.array(), at, size - 1) for at, (size, buffer) in zip(found, buffers, strict=True)]
        arrays, layout = self.assembled(plan, rows)
        self.counters.add(counters)
        for (array, _, _), (ring, place) in zip(rows, places, strict=True):
            ring.read_by(place, array)  # a copy to a device may still be on its way
        fetched = time.perf_counter() - started
        return Staged(arrays, layout, counters, started, read, fetched, plan, tuple(places))

    def assembled(
        self, plan: Plan, rows: Sequence[tuple[Any, np.ndarray, int]]
    ) -> tuple[pooling.Arrays, pooling.Layout]:
        """What a program takes of a plan; for who has the lock of `exclusively`.

        Args:
          plan: of a query.
          rows: for each format of `plan.needed`, an array of rows, int64 [U] where each distinct row is in it, and the
            position of a row of zeros.
        """
        parts = []
        for group, asked in plan.memory:
            loaded = self.in_memory(group)
            at, zero = self._positions(loaded, asked), len(loaded.rows) - 1
            parts.append(self.assembler.part(("memory", group), loaded.array, at, zero, asked))
        for (group, needed), (array, where, zero) in zip(plan.needed, rows, strict=True):
            at = np.append(where, zero)[needed.inverse]
            parts.append(self.assembler.part(("staged", group), array, at, zero, needed.asked))
        formats = [self.formats[group] for group, _ in (*plan.memory, *plan.needed)]
        return self.assembler.arguments(plan, parts, formats)

    def bring(
        self, plan: Plan, take: Callable[[int, int], np.ndarray], deadline: float | None = None
    ) -> tuple[list[np.ndarray], Counters, float]:
        """Writes the distinct rows of a plan into buffers; for who has the lock of `exclusively`.

        Args:
          plan: of a query.
          take: gives a buffer uint8 [at least U, row bytes] for a format by its number, and U.
          deadline: seconds from now.

        Returns:
          For each format of `plan.needed`, int64 [U], where each row is in its buffer; what the query took; and the
          seconds that reading took.
        """
        if self._closed:
            raise RuntimeError("the tiers are closed; open others")
        started, counters, read, found = time.perf_counter(), dataclasses.replace(plan.counters), 0.0, []
        try:
            for (group, needed), slots in zip(plan.needed, self._slots(plan), strict=True):
                out = take(group, len(needed.keys))
                left = None if deadline is None else deadline - (time.perf_counter() - started)
                where, seconds = self._fill(group, needed, slots, out, counters, left)
                found.append(where)
                read += seconds
        finally:
            if self.cache is not None:
                self.cache.release()
        return found, counters, read

    def exclusively(self) -> threading.Lock:
        """The lock that whoever fetches must have, for what fetches by `bring`."""
        return self._fetching

    def _slots(self, plan: Plan) -> list[np.ndarray]:
        """Where the cache has the rows of each group, -1 for those that it has not.

        What was found is held until all groups are filled: formats whose rows take the same bytes share a cache, and
        rows of one that come in must not take the places of the other's.
        """
        keys = plan.keys
        if isinstance(self._told, LookAhead):
            told = self._told
            slots = told.beside(keys, hold=True) if plan.number is None else told.lookup(keys, plan.number, hold=True)
        elif self._told is not None:
            slots = self._told.lookup(keys, hold=True)
        else:
            slots = np.full(len(keys), -1, np.int64)
        found, start = [], 0
        for _, needed in plan.needed:
            each = np.full(len(needed.keys), -1, np.int64)
            movable = slice(None) if needed.pinned is None else needed.pinned < 0
            stop = start + len(needed.movable)
            each[movable] = slots[start:stop]
            found.append(each)
            start = stop
        return found

    def _fill(
        self, group: int, needed: Needed, slots: np.ndarray, out: np.ndarray, counters: Counters, deadline: float | None
    ) -> tuple[np.ndarray, float]:
        """Writes the distinct rows into `out`: where each one is, and the seconds that reading took."""
        hit = slots >= 0
        pins = self._pinned[group]
        if pins is not None and needed.pinned is not None:
            counters.pinned += int((stay := needed.pinned >= 0).sum())
            hit = hit | stay
        hits = int(hit.sum())
        where = np.where(hit, np.cumsum(hit) - 1, hits + np.cumsum(~hit) - 1)
        if self.cache is not None and hits:
            self.cache.take(needed.keys[hit], slots[hit], out[:hits])
        if pins is not None and needed.pinned is not None:
            out[where[stay]] = pins.rows[needed.pinned[stay]]
        seconds = 0.0
        if hits < len(hit):
            started = time.perf_counter()
            missed = out[hits : len(hit)]
            files, offsets = self.store.locate(needed.tables[~hit], needed.rows[~hit])
            stats = self.reader.gather(files, offsets, out.shape[1], missed, deadline)
            seconds = time.perf_counter() - started
            counters.requests += stats.requests
            counters.bytes += stats.bytes
            counters.blocks += stats.blocks
            if self._told is not None:
                self._told.insert(needed.keys[~hit], missed)
        counters.hits += int((slots >= 0).sum())
        counters.reads += len(hit) - hits
        return where, seconds

    # ---- computing ---------------------------------------------------------------------------------------------------

    def pool(self, staged: Staged) -> jax.Array:
        """The vector of each bag of a query, float32 [G, D], in one compiled program.

        Raises:
          RuntimeError: if so many queries were fetched since that the rows of this one are gone.
        """
        pooled, done = _pool(staged.arrays, staged.layout)
        # The vectors may be donated to the next program, which says nothing of when this one has read the buffers.
        self.read_by(staged, done)
        return pooled

    def read_by(self, staged: Staged, results: Any) -> None:
        """Says what else was computed from a staged query, whose buffers are not used again before that is done.

        Args:
          staged: whose `arrays` a program of the caller's took.
          results: what it gave, or a part of it that is not donated to another program.

        Raises:
          RuntimeError: if so many queries were fetched since that the program may have read the rows of another one.
        """
        for ring, place in staged.places:
            ring.read_by(place, results)

    def remember(self, staged: Staged, pooled: Any) -> None:
        """Keeps the vectors of long bags, if there is a cache of them, for when the same bag is asked for again."""
        if self.vectors is None:
            return
        asked, keys = staged.plan.asked, staged.plan.pooled_keys
        new = (self.tiers[asked.tables] != TIERS.index("memory")) & (asked.lengths >= self.vectors.threshold)
        found = np.asarray(pooled)[new]
        with self._of_vectors:
            self.vectors.insert(keys[new], found)  # type: ignore[index]

    def lookup(self, asked: Query, deadline: float | None = None) -> jax.Array:
        """Plans, fetches and pools one query: float32 [G, D]; threads that do so wait for each other."""
        with self._looking:
            staged = self.fetch(self.plan(asked), deadline)
            pooled = self.pool(staged)
        self.remember(staged, pooled)
        return pooled

    def lookup_on_host(self, asked: Query, deadline: float | None = None) -> np.ndarray:
        """`lookup` without JAX, for callbacks, in which it must not be used: float32 [G, D]."""
        plan = self.plan(asked)
        pooled = [np.zeros((0, self.dim), np.float32)]
        for group, part in plan.memory:
            loaded = self.in_memory(group)
            rows = decode(loaded.rows[self._positions(loaded, part)], self.formats[group])
            pooled.append(pooling.pool_on_host(rows, part, self.mode))
        staged: list[np.ndarray] = []

        def take(group: int, count: int) -> np.ndarray:
            staged.append(np.empty((count + 1, self.formats[group].row_bytes), np.uint8))
            staged[-1][-1] = zero_row(self.formats[group])
            return staged[-1]

        with self._fetching:
            found, counters, _ = self.bring(plan, take, deadline)
            self.counters.add(counters)
        for (group, needed), where, rows in zip(plan.needed, found, staged, strict=True):
            each = decode(rows[np.append(where, len(where))[needed.inverse]], self.formats[group])
            pooled.append(pooling.pool_on_host(each, needed.asked, self.mode))
        if plan.vectors is not None:
            pooled.append(plan.vectors)
        return np.concatenate(pooled)[plan.order]

    def warm(self, tables: np.ndarray, ids: np.ndarray, batch: int = 4096) -> int:
        """Fills the cache with rows, the most important first, without counting them as asked for.

        Args:
          tables: int [n].
          ids: int [n]; those of tables that are not cached, and pruned and pinned ones, are passed over.
          batch: rows that are read at once, at least 1.

        Returns:
          How many of these rows are in the cache then.

        Raises:
          TypeError, ValueError: as `importance`, and for a batch below 1.
        """
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        if self.cache is None:
            self.importance(tables, ids)
            return 0
        keys, kept = self.importance(tables, ids), 0
        of = split_keys(keys)[0]
        keys = keys[self.tiers[of] == TIERS.index("cached")]
        for group, pins in enumerate(self._pinned):
            if pins is not None:
                keys = keys[(self.group[split_keys(keys)[0]] != group) | (pins.find(keys) < 0)]
        sizes = np.array([form.row_bytes for form in self.formats])[self.group]
        for size, cache in self.cache.caches.items():
            mine = keys[sizes[split_keys(keys)[0]] == size][: cache.capacity]
            # From the least important batch on: of what finds no room together, the last to come stay.
            for start in reversed(range(0, len(mine), batch)):
                some = mine[start : start + batch]
                values = np.empty((len(some), size), np.uint8)
                with self._fetching:
                    self.reader.gather(*self.store.locate(*split_keys(some)), size, values)
                    cache.warm(some, values)
            kept += int((cache.find(mine) >= 0).sum())
        return kept

    def importance(self, tables: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Keys of rows, uint64 [m], each once, in the order in which they stand first; pruned ones are left out.

        Raises:
          TypeError: for tables or ids that are not integers.
          ValueError: for those that do not exist.
        """
        tables, ids = np.asarray(tables), np.asarray(ids)
        if tables.shape != ids.shape or tables.ndim != 1:
            raise ValueError(f"tables and ids must be [n] both, got {tables.shape} and {ids.shape}")
        for name, array in (("tables", tables), ("ids", ids)):
            if len(array) and not np.issubdtype(array.dtype, np.integer):
                raise TypeError(f"{name} must be integers, got {array.dtype}")
        tables, ids = tables.astype(np.int64), ids.astype(np.int64)
        if len(tables) and not 0 <= tables.min() <= tables.max() < len(self.rows):
            raise ValueError(f"tables must be 0 .. {len(self.rows) - 1}, got {tables.min()} .. {tables.max()}")
        if (wrong := (ids < 0) | (ids >= self.rows[tables])).any():
            table, odd = tables[wrong][0], ids[wrong][0]
            raise ValueError(f"ids of table {table} must be 0 .. {self.rows[table] - 1}, got {odd}")
        rows = self.remaps.rows(tables, ids)
        distinct, first = np.unique(row_keys(tables[rows >= 0], rows[rows >= 0]), return_index=True)
        return distinct[np.argsort(first)]

    def _positions(self, loaded: Loaded, asked: Query) -> np.ndarray:
        """Where rows of bags are among those in memory."""
        tables = np.repeat(asked.tables, asked.lengths)
        return loaded.positions(tables, self.remaps.rows(tables, asked.indices))

    def close(self) -> None:
        """Closes the files; later look-ups are errors."""
        with self._fetching:
            self._closed = True
            self.reader.close()

    def __enter__(self) -> "Tiers":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _csr(form: str) -> bool:
    if form not in ("auto", "csr", "padded"):
        raise ValueError(f"form={form!r} is unknown; there are auto, csr and padded")
    reason = embedding_bag.unavailable()
    if form == "csr" and reason:
        raise ValueError(f"form='csr' needs compiled code: {reason}")
    return form != "padded" and reason is None


@partial(jax.jit, static_argnums=1)
def _pool(arrays: pooling.Arrays, layout: pooling.Layout) -> tuple[jax.Array, jax.Array]:
    return pooling.pool(arrays, layout), arrays.order[:1]


def compilations() -> int:
    """How many programs `Tiers.pool` compiled in this process."""
    return _pool._cache_size()  # type: ignore[attr-defined]
