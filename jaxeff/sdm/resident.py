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
from collections.abc import Generator, Iterable
from typing import Any

import jax
import numpy as np

from jaxeff.sdm import pipeline, pooling
from jaxeff.sdm.device_rows import DeviceRows, New
from jaxeff.sdm.lookups import Needed, Plan, Staged
from jaxeff.sdm.placement import TIERS
from jaxeff.sdm.queries import Query
from jaxeff.sdm.row_cache import split_keys
from jaxeff.sdm.tiers import Tiers

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
        self._fetched = self._written = self._announced = 0
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

    def expect(self, plan: Plan) -> Plan:
        """As `Tiers.expect`, for what stays on the device and on the host."""
        keys = {group: needed.keys[self._cached[needed.tables]] for group, needed in plan.needed}
        for group, rows in enumerate(self.formats):
            rows.expect(keys.get(group, np.zeros(0, np.uint64)))
        return dataclasses.replace(self.tiers.expect(plan), resident=self._announce())

    def forget_expected(self) -> None:
        """As `Tiers.forget_expected`."""
        self.tiers.forget_expected()
        with self.tiers.exclusively():
            for rows in self.formats:
                rows.forget_expected()

    def _announce(self) -> int:
        self._announced += 1
        return self._announced - 1

    def fetch(self, plan: Plan, deadline: float | None = None) -> StagedRows:
        """Finds the rows that are not on the device, brings them, and sends them off.

        Args:
          plan: of a query.
          deadline: seconds from now in which reading must end.

        Raises:
          jaxeff.sdm.DeadlineExceeded, jaxeff.sdm.ReadError: as `Tiers.fetch`; what is resident is as before.
        """
        with self.tiers.exclusively():
            return self._fetch(plan, deadline)

    def _fetch(self, plan: Plan, deadline: float | None) -> StagedRows:
        started, placed = time.perf_counter(), False
        mine = [self._cached[needed.tables] for _, needed in plan.needed]
        try:
            positions = [
                self.formats[group].find(needed.keys, which, plan.resident)
                for (group, needed), which in zip(plan.needed, mine, strict=True)
            ]
            missed = [np.flatnonzero(at < 0) for at in positions]
            below = tuple((g, _only(one, which)) for (g, one), which in zip(plan.needed, missed, strict=True))
            unique = sum(map(len, missed))
            values: list[np.ndarray] = []

            def take(group: int, count: int) -> np.ndarray:
                values.append(self.formats[group].buffer(count))
                return values[-1]

            asked = dataclasses.replace(plan.counters, unique=unique)
            rest = dataclasses.replace(plan, needed=below, counters=asked)
            which, counters, read = self.tiers.bring(rest, take, deadline)
            # Places are given only now that reading cannot fail any more.
            placed, new = True, {}
            for i, (group, needed) in enumerate(plan.needed):
                rows = self.formats[group]
                spilled = rows.place(needed.keys, mine[i] & self.update, positions[i])
                if len(missed[i]):
                    new[group] = rows.new(values[i], which[i], positions[i][missed[i]], spilled)
            zeros = [self.formats[group].capacity for group, _ in plan.needed]
            arrays, layout = self.tiers.assembled(plan, [(None, *at) for at in zip(positions, zeros, strict=True)])
            groups = (*(None for _ in plan.memory), *(group for group, _ in plan.needed))
            moved = sum(leaf.nbytes for leaf in jax.tree.leaves((new, arrays)) if isinstance(leaf, np.ndarray))
            # Nobody writes to these any more, so that a device which is the host may read them where they are.
            sent = {group: jax.device_put((one.values, one.where), may_alias=True) for group, one in new.items()}
            new = {group: one._replace(values=sent[group][0], where=sent[group][1]) for group, one in new.items()}
            arrays = jax.device_put(arrays, may_alias=True)
            found, host_hits = plan.counters.unique, counters.hits + counters.pinned
            traffic = Traffic(1, found, found - unique, host_hits, counters.reads, moved)
            self.tiers.counters.add(counters)
            self.traffic.add(traffic)
            fetched, order = time.perf_counter() - started, self._fetched
            staged = StagedRows(
                arrays, layout, counters, started, read, fetched, plan, (), order, new, groups, traffic
            )  # fmt: skip
            self._fetched += 1
            self._pending.append(staged)
        except BaseException:
            if placed:  # rows that will never be in their places
                for rows in self.formats:
                    rows.forget()
            raise
        finally:
            for rows in self.formats:
                rows.release()
        return staged

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
            for group, new in self._pending[0].new.items():
                self.formats[group].write(new)
            self._pending.popleft()
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
        self,
        asked: Iterable[Query],
        *,
        depth: int = 2,
        lookahead: int = 0,
        deadline: float | None = None,
        keep_going: bool = False,
    ) -> Generator[Any, None, None]:
        """As `jaxeff.sdm.stream`: yields queries in order, and fetches the next ones meanwhile."""
        return pipeline.stream(
            self, asked, depth=depth, lookahead=lookahead, deadline=deadline, keep_going=keep_going
        )  # fmt: skip

    def warm(self, tables: np.ndarray, ids: np.ndarray, batch: int = 4096) -> int:
        """Makes rows resident, the most important first, without counting them as asked for.

        Args:
          tables: int [n].
          ids: int [n].
          batch: rows that are read at once.

        Returns:
          How many of these rows are on the device then.

        Raises:
          TypeError, ValueError: as `Tiers.warm`.
        """
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        keys, kept = self.tiers.importance(tables, ids), 0
        if self._pending:
            self.arrays(self._pending[-1])
        of = split_keys(keys)[0]
        groups = np.where(self._cached[of], self.tiers.group[of], -1)
        for group, rows in enumerate(self.formats):
            mine = keys[groups == group][: rows.capacity]
            # From the least important batch on: of what finds no room together, the last to come stay.
            for start in reversed(range(0, len(mine), batch)):
                some = mine[start : start + batch]
                values = rows.buffer(len(some))
                where = self.tiers.store.locate(*split_keys(some))
                with self.tiers.exclusively():
                    self.tiers.reader.gather(*where, rows.form.row_bytes, values[: len(some)])
                rows.write(rows.new(values, np.arange(len(some)), rows.warm(some), 0))
            kept += int(rows.has(mine).sum())
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
