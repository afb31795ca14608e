"""Look-ups whose hot rows stay in the memory of a device; others come from the tiers below and alone cross the bus.

`Resident.fetch` finds what is not on the device, brings it from the host's cache or from files, sends it off and notes
where it will be. `Resident.arrays` writes it there, into memory that is donated, and hands out what a program pools.

Notes run ahead of the device: fetching query k + 3 may give the place of a row that query k reads to another one. That
is safe, because notes are carried out in the order in which they were taken, each just before the query that it was
taken for. What query k reads was put in place by the notes up to k; programs that write later ones into the same memory
come after the program of query k, as JAX keeps the order of those that use one buffer. Within a query, what it found is
held until its new rows have their places.

Letters: G bags, U distinct rows.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from typing import Any, cast

import jax
import numpy as np

from jaxeff.sdm import pipeline, pooling
from jaxeff.sdm.device_rows import DeviceRows, New
from jaxeff.sdm.lookups import Counters, Needed, Plan, Staged
from jaxeff.sdm.placement import TIERS
from jaxeff.sdm.queries import Query
from jaxeff.sdm.row_cache import row_keys
from jaxeff.sdm.tiers import Tiers, _of_keys

# Rows of each format; with fewer there are no sets to speak of.
LEAST_ROWS = 16
SPILL = 1024


@dataclasses.dataclass
class Traffic:
    """What queries took since the rows became resident, or in one query.

    Attributes:
      queries: number of queries.
      unique: distinct rows asked of tables that are not in memory whole.
      device_hits: of these, those that were on the device.
      host_hits: those that the host had.
      reads: those that were read from files.
      moved: bytes sent to the device: rows, and what says which of them are added up.
    """

    queries: int = 0
    unique: int = 0
    device_hits: int = 0
    host_hits: int = 0
    reads: int = 0
    moved: int = 0

    def add(self, other: "Traffic") -> None:
        """Adds what another counter has."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def hit_rate(self) -> float:
        """Share of distinct rows that were on the device; 0 before the first."""
        return self.device_hits / self.unique if self.unique else 0.0

    @property
    def moved_per_query(self) -> float:
        """Bytes sent to the device for a query; 0 before the first."""
        return self.moved / self.queries if self.queries else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class StagedRows(Staged):
    """A query whose new rows are on their way; made by `Resident.fetch`.

    In `arrays`, resident rows are None: `Resident.arrays` puts them in.

    Attributes:
      number: of the query, in the order of fetching.
      new: by number of the format.
      groups: number of the format of each part; None where its tables are in memory whole.
      traffic: what this query took.
    """

    number: int
    new: dict[int, New]
    groups: tuple[int | None, ...]
    traffic: Traffic


class Resident:
    """Look-ups of tiers whose hot rows stay in the memory of a device.

    Rows of tables that are cached become resident; those of "direct" ones never do, and tables in memory are on the
    device anyway. One thread plans and fetches; another one may, in the same order, take `arrays` or pool.

    Attributes:
      tiers: below; they must stay open, and nobody else may fetch from them meanwhile.
      formats: the rows of each format of the tiers.
      traffic: what all queries took.
    """

    def __init__(self, tiers: Tiers, capacity_bytes: int, *, update: bool = True, spill: int = SPILL):
        """Makes room on the default device.

        Args:
          tiers: where rows come from; if they look ahead, so does the choice of what stays.
          capacity_bytes: of the device for rows that stay; formats share it by the bytes of their tables. The host
            keeps 5 to 10 bytes for each of these rows.
          update: whether rows come and go; else those of `warm` stay for ever.
          spill: room for rows of each format that do not stay, in one query; doubled where that is not enough, for
            which all rows are copied once.

        Raises:
          ValueError: if no table is cached, the capacity is below `LEAST_ROWS` rows of a format, or the spill below 1.
        """
        self._cached = tiers.tiers == TIERS.index("cached")
        if not self._cached.any():
            raise ValueError("no table of the tiers is cached, so no row may stay on the device; see their placement")
        if spill < 1:
            raise ValueError(f"spill={spill} must be at least 1")
        self.tiers, self.update, self.traffic = tiers, update, Traffic()
        specs = [table.spec for table in tiers.store.tables]
        weights = np.array([max(1, spec.rows) * spec.format.row_bytes for spec in specs], float) * self._cached
        shares = np.bincount(tiers.group, weights, len(tiers.formats)) / weights.sum()
        slots = [
            int(share * capacity_bytes) // form.row_bytes for share, form in zip(shares, tiers.formats, strict=True)
        ]
        for form, share, count in zip(tiers.formats, shares, slots, strict=True):
            if share and count < LEAST_ROWS:
                raise ValueError(
                    f"capacity_bytes={capacity_bytes} has room for {count} rows of {form.kind}, expected at least "
                    f"{LEAST_ROWS} of each format; give more, or keep these rows on the host"
                )
        bounds = len(specs), max(1, *(spec.rows for spec in specs))
        self.formats = [
            DeviceRows(form, count, spill, bounds, ahead=tiers.lookahead)
            for form, count in zip(tiers.formats, slots, strict=True)
        ]
        self._fetched = self._written = 0
        self._pending: deque[StagedRows] = deque()

    @property
    def bytes(self) -> int:
        """Memory of the device that rows take, with the spill."""
        return sum(of.rows.nbytes for of in self.formats)

    @property
    def capacity(self) -> int:
        """Rows that can stay, of all formats."""
        return sum(of.capacity for of in self.formats)

    @property
    def buffers(self) -> int:
        """One more than the queries that may be fetched ahead."""
        return self.tiers.buffers

    @property
    def lookahead(self) -> bool:
        """Whether `expect` has an effect."""
        return self.tiers.lookahead

    def __len__(self) -> int:
        return sum(map(len, self.formats))

    # ---- on the host -------------------------------------------------------------------------------------------------

    def plan(self, asked: Query) -> Plan:
        """As `Tiers.plan`."""
        return self.tiers.plan(asked)

    def expect(self, plan: Plan) -> None:
        """Says that a plan will be fetched after those of before, for what stays on the device and on the host."""
        self.tiers.expect(plan)
        for group, needed in plan.needed:
            self.formats[group].expect(needed.keys[self._cached[needed.tables]])

    def fetch(self, plan: Plan, deadline: float | None = None) -> StagedRows:
        """Finds the rows that are not on the device, brings them, and sends them off.

        Args:
          plan: of a query.
          deadline: seconds from now in which reading must end.

        Raises:
          jaxeff.sdm.io.DeadlineExceeded, jaxeff.sdm.io.ReadError: as `Tiers.fetch`; what is resident is as before.
        """
        started = time.perf_counter()
        counters, placed = dataclasses.replace(plan.counters), False
        mine = [self._cached[needed.tables] for _, needed in plan.needed]
        try:
            positions = [self.formats[g].find(one.keys, m) for (g, one), m in zip(plan.needed, mine, strict=True)]
            missed = [np.flatnonzero(at < 0) for at in positions]
            below = tuple((g, _only(one, which)) for (g, one), which in zip(plan.needed, missed, strict=True))
            counters.unique = sum(map(len, missed))
            brought, read = self._bring(dataclasses.replace(plan, needed=below), counters, started, deadline)
            # Places are given only now that reading cannot fail any more.
            placed, new = True, {}
            for i, (group, needed) in enumerate(plan.needed):
                rows = self.formats[group]
                spilled = rows.place(needed.keys, mine[i] & self.update, positions[i])
                if len(missed[i]):
                    new[group] = rows.new(*brought[i], positions[i][missed[i]], spilled)
            arrays, layout, groups = self._assembled(plan, positions)
            moved = sum(leaf.nbytes for leaf in jax.tree.leaves((new, arrays)) if isinstance(leaf, np.ndarray))
            # Nobody writes to these any more, so that a device which is the host may read them where they are.
            sent = {group: jax.device_put((one.values, one.where), may_alias=True) for group, one in new.items()}
            new = {group: one._replace(values=sent[group][0], where=sent[group][1]) for group, one in new.items()}
            arrays = jax.device_put(arrays, may_alias=True)
        except BaseException:
            if placed:  # rows that will never be in their places
                for rows in self.formats:
                    rows.forget()
            raise
        finally:
            for rows in self.formats:
                rows.release()
        unique, host_hits = plan.counters.unique, counters.hits + counters.pinned
        traffic = Traffic(1, unique, unique - counters.unique, host_hits, counters.reads, moved)
        self.tiers.counters.add(counters)
        self.traffic.add(traffic)
        fetched, number = time.perf_counter() - started, self._fetched
        staged = StagedRows(
            arrays, layout, counters, started, read, fetched, plan, (), number, new, groups, traffic
        )  # fmt: skip
        self._fetched += 1
        self._pending.append(staged)
        return staged

    def _bring(
        self, plan: Plan, counters: Counters, started: float, deadline: float | None
    ) -> tuple[list[tuple[np.ndarray, np.ndarray]], float]:
        """Rows of a plan, of each format uint8 [M, row bytes], which of them each key has, and seconds of reading."""
        brought, read = [], 0.0
        for (group, needed), slots in zip(plan.needed, self.tiers._slots(plan), strict=True):
            values = self.formats[group].buffer(len(slots))
            left = None if deadline is None else deadline - (time.perf_counter() - started)
            which, seconds = self.tiers._fill(group, needed, slots, values[: len(slots)], counters, left)
            brought.append((values, which))
            read += seconds
        return brought, read

    def _assembled(
        self, plan: Plan, positions: Sequence[np.ndarray]
    ) -> tuple[pooling.Arrays, pooling.Layout, tuple[int | None, ...]]:
        """What a program takes but for the resident rows, and the format of these in each part."""
        tiers = self.tiers
        parts: list[pooling.Part] = []
        groups: list[int | None] = []
        for group, asked in plan.memory:
            loaded, tables = tiers._in_memory(group), np.repeat(asked.tables, asked.lengths)
            at = loaded.positions(tables, tiers._positions(tables, asked.indices))
            parts.append(tiers._part(("memory", group), loaded.array, at, len(loaded.rows) - 1, asked))
            groups.append(None)
        for (group, needed), where in zip(plan.needed, positions, strict=True):
            zero = self.formats[group].capacity
            at = np.append(where, zero)[needed.inverse]
            parts.append(tiers._part(("resident", group), cast(jax.Array, None), at, zero, needed.asked))
            groups.append(group)
        ready = np.zeros((0, tiers.dim), np.float32) if plan.vectors is None else plan.vectors
        size = tiers._bucket("ready", len(ready)) if len(ready) else 0
        ready = np.concatenate([ready, np.zeros((size - len(ready), tiers.dim), np.float32)])
        order, start, done = plan.order.copy(), 0, 0
        bags = [len(asked.tables) for _, asked in plan.memory] + [len(one.asked.tables) for _, one in plan.needed]
        for part, count in zip(parts, bags, strict=True):
            order[(plan.order >= done) & (plan.order < done + count)] += start - done
            done, start = done + count, start + tiers._bags_of(part)
        order[plan.order >= done] += start - done
        formats = [tiers.formats[group] for group, _ in (*plan.memory, *plan.needed)]
        return pooling.Arrays(tuple(parts), ready, order), pooling.Layout(tuple(formats), tiers.mode), tuple(groups)

    # ---- on the device -----------------------------------------------------------------------------------------------

    def arrays(self, staged: StagedRows) -> pooling.Arrays:
        """Writes the new rows of a query, and of those before it that nobody asked for, and says where all rows are.

        Args:
          staged: of `fetch`, in its order; some may be left out.

        Returns:
          What `jaxeff.sdm.pool` takes together with `staged.layout`. The rows are donated when the next query is
          written, so hand the program that reads them to JAX before.

        Raises:
          ValueError: if a later query was written already, over rows that this one may need.
        """
        if staged.number < self._written - 1:
            raise ValueError(
                f"query {staged.number} comes after query {self._written - 1}, which may have taken the places of its "
                "rows; pool queries in the order in which they were fetched, and before more rows are warmed"
            )
        while self._written <= staged.number:
            for group, new in self._pending.popleft().new.items():
                self.formats[group].write(new)
            self._written += 1
        parts = tuple(
            part if group is None else part._replace(rows=self.formats[group].rows)
            for part, group in zip(staged.arrays.parts, staged.groups, strict=True)
        )
        return staged.arrays._replace(parts=parts)

    def pool(self, staged: StagedRows) -> jax.Array:
        """The vector of each bag of a query, float32 [G, D]; raises as `arrays`."""
        return _pool(self.arrays(staged), staged.layout)

    def remember(self, staged: StagedRows, pooled: Any) -> None:
        """As `Tiers.remember`."""
        self.tiers.remember(staged, pooled)

    # ---- both --------------------------------------------------------------------------------------------------------

    def lookup(self, asked: Query, deadline: float | None = None) -> jax.Array:
        """Plans, fetches and pools one query: float32 [G, D]."""
        staged = self.fetch(self.plan(asked), deadline)
        pooled = self.pool(staged)
        self.remember(staged, pooled)
        return pooled

    def stream(
        self, asked: Iterable[Query], *, depth: int = 2, lookahead: int = 0, deadline: float | None = None
    ) -> Generator[StagedRows, None, None]:
        """As `jaxeff.sdm.stream`: yields queries in order, and fetches the next ones meanwhile."""
        source = pipeline.stream(cast(Tiers, self), asked, depth=depth, lookahead=lookahead, deadline=deadline)
        return cast(Generator[StagedRows, None, None], source)

    def warm(self, tables: np.ndarray, ids: np.ndarray, batch: int = 4096) -> int:
        """Makes rows resident, the most important first, without counting them as asked for.

        Args:
          tables: int [n].
          ids: int [n].
          batch: rows that are read at once.

        Returns:
          How many rows came, or were there.
        """
        if self._pending:
            self.arrays(self._pending[-1])
        tables = np.asarray(tables)
        of_table = self.tiers._positions(tables, np.asarray(ids, np.int64))
        wanted = (of_table >= 0) & self._cached[tables]
        distinct, first = np.unique(row_keys(tables[wanted], of_table[wanted]), return_index=True)
        keys, kept = distinct[np.argsort(first)], 0
        groups = self.tiers.group[_of_keys(keys)[0]]
        for group, rows in enumerate(self.formats):
            mine = keys[groups == group][: rows.capacity]
            for start in range(0, len(mine), batch):
                some = mine[start : start + batch]
                values = rows.buffer(len(some))
                where = self.tiers.store.locate(*_of_keys(some))
                self.tiers.reader.gather(*where, rows.form.row_bytes, values[: len(some)])
                slots = rows.warm(some)
                rows.write(rows.new(values, np.arange(len(some)), slots, 0))
                kept += int((slots >= 0).sum())
        # Queries that were fetched before may have lost rows.
        self._fetched += 1
        self._written += 1
        return kept


_pool = jax.jit(pooling.pool, static_argnums=1)


def _only(needed: Needed, which: np.ndarray) -> Needed:
    """Some of the distinct rows."""
    return dataclasses.replace(
        needed,
        keys=needed.keys[which],
        tables=needed.tables[which],
        rows=needed.rows[which],
        pinned=None if needed.pinned is None else needed.pinned[which],
    )
