"""Tables in tiers: some in memory, the others in files behind a cache of rows.

A look-up has three steps. `Tiers.plan` validates a query on the host and says which rows it needs. `Tiers.fetch` brings
those that are not in memory, from the cache or from the device, into a buffer. `pool` is what JAX compiles: it reads
the buffer where it lies. Fetching one query while another is pooled is `jaxeff.sdm.pipeline`.

Letters: G bags, N row look-ups, T tables, U distinct rows.
"""

import dataclasses
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxeff.ops import embedding_bag
from jaxeff.sdm import pooling, queries
from jaxeff.sdm.encoding import decode, zero_row
from jaxeff.sdm.io.files import Direct
from jaxeff.sdm.io.reader import Backend, Reader, open_reader
from jaxeff.sdm.loaded import Buffer, Loaded, load
from jaxeff.sdm.lookahead import LookAhead
from jaxeff.sdm.lookups import Counters, Needed, Plan, Staged
from jaxeff.sdm.pinned_rows import PinnedRows
from jaxeff.sdm.placement import TIERS
from jaxeff.sdm.pooled_cache import PooledCache
from jaxeff.sdm.queries import Query
from jaxeff.sdm.row_cache import row_keys
from jaxeff.sdm.staging import Ring
from jaxeff.sdm.table import Store
from jaxeff.sdm.unified_cache import UnifiedCache

BUFFERS = 4
# Rows of each size; a smaller cache is not worth its metadata.
SMALLEST_CACHE = 64


class Tiers:
    """Look-ups of a store whose tables lie in several tiers.

    One thread plans and fetches; `pool` may be called by another. Close it, or use it in a `with` block.
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
          cache_bytes: memory for cached rows and what is kept about them, over all tables.
          pinned: by table that is not in memory, ids of rows that are, int [n]: the most used ones, as of
            `jaxeff.sdm.split_rows` and `jaxeff.sdm.placement.hottest`.
          lookahead: whether the cache can be told of queries before they are fetched, by `expect`, at 4 bytes a row.
          pooled_bytes: memory for vectors of whole bags; 0 for none. Bags are then summed in ascending order of ids.
          pooled_threshold: look-ups of a bag from which on its vector is kept; shorter ones are cheap.
          reader: of `jaxeff.sdm.io.open_reader`.
          queue_depth: reads in flight at most.
          direct: whether reads pass by the page cache.
          policy: of ids out of range: "raise", "drop" or "hash".
          mode: of pooling, "sum" or "mean".
          canonical: sum bags in ascending order of ids even without a cache of vectors.
          form: "csr" (compiled code), "padded" (plain JAX), or "auto" for the first where it can be had.
          buffers: queries that may be staged at once, at least 3.

        Raises:
          ValueError: for a tier, table, mode or form that does not exist, tables of different dimensions, or a budget
            below 0.
          OSError: for files that cannot be read.
        """
        settings = locals()
        # For tiers of the next version of the store.
        self.settings = {name: value for name, value in settings.items() if name not in ("self", "store")}
        names = [table.spec.name for table in store.tables]
        placed = dict.fromkeys(names, placement) if isinstance(placement, str) else dict(placement)
        if set(placed) != set(names):
            odd = sorted(set(placed) ^ set(names))
            raise ValueError(f"placement must give a tier to every table and no other; this does not fit: {odd}")
        if wrong := sorted(set(placed.values()) - set(TIERS)):
            raise ValueError(f"tier {wrong[0]!r} is unknown; there are {', '.join(TIERS)}")
        for name, size in (("cache_bytes", cache_bytes), ("pooled_bytes", pooled_bytes)):
            if size < 0:
                raise ValueError(f"{name}={size} must not be negative")
        if len(dims := {table.spec.format.dim for table in store.tables}) > 1:
            raise ValueError(f"tables of one model have one dimension, these have {sorted(dims)}")
        if mode not in ("sum", "mean"):
            raise ValueError(f"mode={mode!r} is unknown; there are sum and mean")
        self.store, self.placement, self.policy, self.mode, self.buffers = store, placed, policy, mode, buffers
        self.dim = dims.pop()
        self.rows = np.array([table.ids for table in store.tables], np.int64)
        self.canonical, self.lookahead = canonical or pooled_bytes > 0, lookahead
        self.csr = _csr(form)
        self.counters = Counters()
        self.tiers = np.array([TIERS.index(placed[name]) for name in names], np.int8)
        self.formats = list(dict.fromkeys(table.spec.format for table in store.tables))
        self.group = np.array([self.formats.index(table.spec.format) for table in store.tables], np.int32)
        self.reader: Reader = open_reader(
            [table.path for table in store.tables], backend=reader, direct=direct, queue_depth=queue_depth
        )
        self._remap, self._remap_start = _remaps(store)
        self._memory = [self._loaded(group) for group in range(len(self.formats))]
        self._pinned = self._pins(pinned or {})
        self.cache = self._cache(cache_bytes, lookahead)
        self._told = LookAhead(self.cache) if lookahead and self.cache is not None else self.cache
        self.vectors = PooledCache(pooled_bytes, self.dim, threshold=pooled_threshold) if pooled_bytes else None
        self._rings = [Ring(buffers, Buffer) for _ in self.formats]
        self._sizes: dict[Any, int] = {}
        # The cache of vectors is asked by the thread that plans, and filled by the one that computes.
        self._of_vectors = threading.Lock()

    # ---- what is in memory -------------------------------------------------------------------------------------------

    def _loaded(self, group: int) -> Loaded | None:
        tables = np.flatnonzero((self.group == group) & (self.tiers == TIERS.index("memory")))
        return load(self.store, self.reader, tables, self.formats[group]) if len(tables) else None

    def _in_memory(self, group: int) -> Loaded:
        loaded = self._memory[group]
        assert loaded is not None, "a plan names only groups that have tables in memory"
        return loaded

    def _pins(self, pinned: Mapping[str, Any]) -> list[PinnedRows | None]:
        """The pinned rows of each format."""
        tables, rows = [], []
        for name, ids in pinned.items():
            if self.placement.get(name, "memory") == "memory":
                raise ValueError(f"pinned: {name!r} is no table whose rows are in a file; take it out")
            table, ids = self.store.index(name), np.unique(np.asarray(ids, np.int64))
            if len(ids) and not 0 <= ids[0] <= ids[-1] < self.rows[table]:
                raise ValueError(
                    f"pinned: ids of {name!r} must be 0 .. {self.rows[table] - 1}, got {ids[0]} .. {ids[-1]}"
                )
            of_table = self._positions(np.full(len(ids), table), ids)
            tables.append(np.full(np.count_nonzero(of_table >= 0), table))
            rows.append(of_table[of_table >= 0])
        if not tables or not sum(map(len, tables)):
            return [None] * len(self.formats)
        of, at = np.concatenate(tables), np.concatenate(rows)
        keys = row_keys(of, at)
        found: list[PinnedRows | None] = []
        for group in range(len(self.formats)):
            mine = self.group[of] == group
            found.append(PinnedRows(self.store, self.reader, of[mine], at[mine], keys[mine]) if mine.any() else None)
        return found

    def _cache(self, budget: int, ahead: bool) -> UnifiedCache | None:
        """A cache for all tables that use one; row sizes share the budget by the bytes of the tables behind it."""
        specs = [table.spec for table in self.store.tables]
        cached = np.flatnonzero(self.tiers == TIERS.index("cached"))
        shares: dict[int, float] = {}
        for table in cached:
            size = specs[table].format.row_bytes
            shares[size] = shares.get(size, 0.0) + max(1, specs[table].rows) * size
        if not shares or budget < SMALLEST_CACHE * sum(shares):
            return None
        return UnifiedCache(
            budget,
            [spec.format.row_bytes for spec in specs],
            bypass=np.setdiff1d(np.arange(len(specs)), cached).tolist(),
            shares=shares,
            rows=[spec.rows for spec in specs],
            ahead=ahead,
        )

    @property
    def fast_bytes(self) -> int:
        """Bytes of memory that the tables take: rows in memory, caches, and maps of rows that moved or were pruned."""
        loaded = sum(found.rows.nbytes for found in self._memory if found is not None)
        others = sum(held.bytes for held in (self.cache, self.vectors, *self._pinned) if held is not None)
        return loaded + others + self._remap.nbytes

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
            if (wanted := in_memory & (groups == group)).any():
                memory.append((group, queries.chosen(asked, wanted)))
                found.append(np.flatnonzero(wanted))
        for group in range(len(self.formats)):
            if (wanted := ~in_memory & ~ready & (groups == group)).any():
                one = self._needed(group, queries.chosen(asked, wanted))
                needed.append((group, one))
                found.append(np.flatnonzero(wanted))
                counters.unique += len(one.keys)
        order = np.empty(len(asked.tables), np.int32)
        order[np.concatenate([*found, np.flatnonzero(ready)]).astype(np.int64)] = np.arange(len(order))
        return Plan(asked, counters, order, tuple(memory), tuple(needed), vectors, pooled_keys)

    def _needed(self, group: int, asked: Query) -> Needed:
        tables = np.repeat(asked.tables, asked.lengths)
        rows = self._positions(tables, asked.indices)
        kept = rows >= 0
        keys, found = np.unique(row_keys(tables[kept], rows[kept]), return_inverse=True)
        inverse = np.full(len(rows), len(keys))
        inverse[kept] = found
        pins = self._pinned[group]
        return Needed(keys, *_of_keys(keys), inverse, asked, None if pins is None else pins.find(keys))

    def _positions(self, tables: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Where the rows with these ids are in the file of their table; -1 for those that were pruned."""
        if not len(self._remap):
            return ids
        start = self._remap_start[tables]
        return np.where(start < 0, ids, self._remap[np.where(start < 0, 0, start + ids)])

    def expect(self, plan: Plan) -> None:
        """Tells the cache that a plan will be fetched after those that they were told of before."""
        if isinstance(self._told, LookAhead):
            self._told.expect(plan.keys)

    # ---- fetching ----------------------------------------------------------------------------------------------------

    def fetch(self, plan: Plan, deadline: float | None = None) -> Staged:
        """Brings the rows of a plan from the cache and the device.

        Args:
          plan: of a query.
          deadline: seconds from now in which reading must end.

        Raises:
          jaxeff.sdm.io.DeadlineExceeded: if it does not; the cache is as before.
          jaxeff.sdm.io.ReadError: for what the device refuses, naming the file and the place.
        """
        started = time.perf_counter()
        counters = dataclasses.replace(plan.counters)
        parts, formats, places, read = [], [], [], 0.0
        for group, asked in plan.memory:
            loaded = self._in_memory(group)
            tables = np.repeat(asked.tables, asked.lengths)
            positions = loaded.positions(tables, self._positions(tables, asked.indices))
            parts.append(self._part(("memory", group), loaded.array, positions, len(loaded.rows) - 1, asked))
            formats.append(self.formats[group])
        for (group, needed), slots in zip(plan.needed, self._slots(plan), strict=True):
            form = self.formats[group]
            size = self._bucket(("rows", group), len(needed.keys) + 1)
            place, buffer = self._rings[group].take((size, form))
            left = None if deadline is None else deadline - (time.perf_counter() - started)
            where, seconds = self._fill(group, needed, slots, buffer.bytes, counters, left)
            read += seconds
            positions = np.append(where, size - 1)[needed.inverse]
            parts.append(self._part(("staged", group), buffer.rows, positions, size - 1, needed.asked))
            formats.append(form)
            places.append((self._rings[group], place))
        self.counters.add(counters)
        ready = np.zeros((0, self.dim), np.float32) if plan.vectors is None else plan.vectors
        rows_ready = self._bucket("ready", len(ready)) if len(ready) else 0
        ready = np.concatenate([ready, np.zeros((rows_ready - len(ready), self.dim), np.float32)])
        order, at, done = plan.order.copy(), 0, 0
        for part, asked in zip(parts, [one for _, one in plan.memory] + [n.asked for _, n in plan.needed], strict=True):
            inside = (plan.order >= done) & (plan.order < done + len(asked.tables))
            order[inside] += at - done
            done, at = done + len(asked.tables), at + self._bags_of(part)
        order[plan.order >= done] += at - done
        arrays = pooling.Arrays(tuple(parts), ready, order)
        layout = pooling.Layout(tuple(formats), self.mode)
        fetched = time.perf_counter() - started
        return Staged(arrays, layout, counters, started, read, fetched, plan, tuple(places))

    def _slots(self, plan: Plan) -> list[np.ndarray]:
        """Where the cache has the rows of each group, -1 for those that it has not."""
        keys = plan.keys
        slots = np.full(len(keys), -1, np.int64) if self._told is None else self._told.lookup(keys)
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

    def _part(self, name: Any, rows: jax.Array, positions: np.ndarray, nothing: int, asked: Query) -> pooling.Part:
        """Bags in the form that the program takes, padded to a size that seldom grows."""
        bags = self._bucket((name, "bags"), len(asked.tables))
        lengths = np.zeros(bags, np.int64)
        lengths[: len(asked.tables)] = asked.lengths
        if self.csr:
            indices = np.full(self._bucket((name, "lookups"), max(1, len(positions))), nothing, np.int32)
            indices[: len(positions)] = positions
            weights = None
            if asked.weights is not None:
                weights = np.zeros(len(indices), np.float32)
                weights[: len(positions)] = asked.weights
            bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            return pooling.Part(rows, indices, bounds, weights)
        longest = self._bucket((name, "longest"), max(1, int(lengths.max(initial=0))))
        inside = np.arange(longest) < lengths[:, None]
        indices = np.full(inside.shape, nothing, np.int32)
        indices[inside] = positions
        weights = None
        if asked.weights is not None:
            weights = np.zeros(inside.shape, np.float32)
            weights[inside] = asked.weights
        return pooling.Part(rows, indices, lengths.astype(np.int32), weights)

    def _bags_of(self, part: pooling.Part) -> int:
        return len(part.bounds) - 1 if self.csr else len(part.bounds)

    def _bucket(self, name: Any, size: int) -> int:
        """A power of two that holds `size`, and what was asked for under this name before: shapes seldom change."""
        self._sizes[name] = max(self._sizes.get(name, 1), 1 << max(0, size - 1).bit_length())
        return self._sizes[name]

    # ---- computing ---------------------------------------------------------------------------------------------------

    def pool(self, staged: Staged) -> jax.Array:
        """The vector of each bag of a query, float32 [G, D], in one compiled program."""
        pooled = _pool(staged.arrays, staged.layout)
        self.read_by(staged, pooled)
        return pooled

    def read_by(self, staged: Staged, results: Any) -> None:
        """Says what else was computed from a staged query, whose buffers are not used again before that is done.

        Args:
          staged: whose `arrays` a program of the caller's took.
          results: what it gave.
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
        """Plans, fetches and pools one query: float32 [G, D]."""
        staged = self.fetch(self.plan(asked), deadline)
        pooled = self.pool(staged)
        self.remember(staged, pooled)
        return pooled

    def lookup_on_host(self, asked: Query, deadline: float | None = None) -> np.ndarray:
        """`lookup` without JAX, for callbacks, in which it must not be used: float32 [G, D]."""
        plan = self.plan(asked)
        counters = dataclasses.replace(plan.counters)
        pooled = [np.zeros((0, self.dim), np.float32)]
        for group, part in plan.memory:
            loaded, tables = self._in_memory(group), np.repeat(part.tables, part.lengths)
            positions = loaded.positions(tables, self._positions(tables, part.indices))
            pooled.append(pooling.pool_on_host(decode(loaded.rows[positions], self.formats[group]), part, self.mode))
        for (group, needed), slots in zip(plan.needed, self._slots(plan), strict=True):
            form = self.formats[group]
            rows = np.empty((len(needed.keys) + 1, form.row_bytes), np.uint8)
            rows[-1] = zero_row(form)
            where, _ = self._fill(group, needed, slots, rows, counters, deadline)
            positions = np.append(where, len(where))[needed.inverse]
            pooled.append(pooling.pool_on_host(decode(rows[positions], form), needed.asked, self.mode))
        self.counters.add(counters)
        if plan.vectors is not None:
            pooled.append(plan.vectors)
        return np.concatenate(pooled)[plan.order]

    def warm(self, tables: np.ndarray, ids: np.ndarray, batch: int = 4096) -> int:
        """Fills the caches with rows, the most important first, without counting them as asked for.

        Args:
          tables: int [n].
          ids: int [n].
          batch: rows that are read at once.

        Returns:
          How many rows are now in the caches.
        """
        if self.cache is None:
            return 0
        tables, rows = np.asarray(tables), self._positions(np.asarray(tables), np.asarray(ids, np.int64))
        wanted = (rows >= 0) & (self.tiers[tables] == TIERS.index("cached"))
        distinct, first = np.unique(row_keys(tables[wanted], rows[wanted]), return_index=True)
        keys = distinct[np.argsort(first)]
        kept = 0
        for group, form in enumerate(self.formats):
            mine = keys[self.group[(keys >> np.uint64(40)).astype(np.int64)] == group]
            most = self.cache.caches[form.row_bytes].capacity if len(mine) else 0
            for start in range(0, min(len(mine), most), batch):
                some = mine[start : start + batch]
                values = np.empty((len(some), form.row_bytes), np.uint8)
                self.reader.gather(*self.store.locate(*_of_keys(some)), form.row_bytes, values)
                kept += int((self.cache.warm(some, values) >= 0).sum())
        return kept

    def close(self) -> None:
        """Closes the files."""
        self.reader.close()

    def __enter__(self) -> "Tiers":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


_ROW = np.uint64(2**40 - 1)


def _of_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tables int32 and rows int64 of keys."""
    return (keys >> np.uint64(40)).astype(np.int32), (keys & _ROW).astype(np.int64)


def _remaps(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """The maps of all tables end to end, and where that of each table starts, -1 for one without."""
    starts, maps, at = [], [], 0
    for table in store.tables:
        starts.append(-1 if table.remap is None else at)
        if table.remap is not None:
            maps.append(table.remap)
            at += len(table.remap)
    return np.concatenate(maps) if maps else np.zeros(0, np.int32), np.array(starts, np.int64)


def _csr(form: str) -> bool:
    if form not in ("auto", "csr", "padded"):
        raise ValueError(f"form={form!r} is unknown; there are auto, csr and padded")
    reason = embedding_bag.unavailable()
    if form == "csr" and reason:
        raise ValueError(f"form='csr' needs compiled code: {reason}")
    return form != "padded" and reason is None


@partial(jax.jit, static_argnums=1)
def _pool(arrays: pooling.Arrays, layout: pooling.Layout) -> jax.Array:
    return pooling.pool(arrays, layout)


def compilations() -> int:
    """How many programs `Tiers.pool` compiled in this process."""
    return _pool._cache_size()  # type: ignore[attr-defined]
