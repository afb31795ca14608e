"""What a look-up is at each of its steps: planned, staged, counted.

Letters: G bags, N row look-ups, U distinct rows, V bags whose vectors are ready.
"""

import dataclasses

import numpy as np

from jaxeff.sdm import pooling
from jaxeff.sdm.queries import Query
from jaxeff.sdm.staging import Place, Ring


@dataclasses.dataclass
class Counters:
    """What look-ups took since the tiers were opened, or in one query.

    Attributes:
      queries: number of queries.
      lookups: rows asked for, of all tables.
      unique: distinct rows asked of tables that are not in memory.
      pinned: of these, those that stay in memory.
      hits: of these, those found in the cache.
      reads: of these, those read from files.
      requests: reads that the device was asked for; neighbouring rows share one.
      bytes: that these brought.
      blocks: distinct blocks among them.
      bags: bags of tables that are not in memory.
      pooled_hits: of these, those whose vector was found.
      avoided: look-ups that these would have made.
    """

    queries: int = 0
    lookups: int = 0
    unique: int = 0
    pinned: int = 0
    hits: int = 0
    reads: int = 0
    requests: int = 0
    bytes: int = 0
    blocks: int = 0
    bags: int = 0
    pooled_hits: int = 0
    avoided: int = 0

    def add(self, other: "Counters") -> None:
        """Adds what another counter has."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def since(self, before: "Counters") -> "Counters":
        """What was counted after a copy of this counter, by `dataclasses.replace`, was made."""
        fields = [field.name for field in dataclasses.fields(self)]
        return Counters(**{name: getattr(self, name) - getattr(before, name) for name in fields})

    @property
    def hit_rate(self) -> float:
        """Share of distinct rows, but for pinned ones, that the cache had; 0 before the first."""
        return self.hits / (self.hits + self.reads) if self.hits + self.reads else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Needed:
    """Rows that bags need of tables that are not in memory and whose rows have one format.

    Attributes:
      keys: uint64 [U], the distinct rows.
      tables: int32 [U], of each.
      rows: int64 [U], positions in the file of its table.
      inverse: int64 [N], the distinct row of each look-up, U for one that was pruned.
      asked: the bags.
      pinned: int64 [U], where rows that stay in memory are, -1 for others; None where there are none.
    """

    keys: np.ndarray
    tables: np.ndarray
    rows: np.ndarray
    inverse: np.ndarray
    asked: Query
    pinned: np.ndarray | None = None

    @property
    def movable(self) -> np.ndarray:
        """uint64, the keys of rows that do not stay in memory."""
        return self.keys if self.pinned is None else self.keys[self.pinned < 0]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a query needs, found without touching a cache of rows; made by `Tiers.plan`.

    Attributes:
      asked: the query, validated.
      counters: of this query, as far as they are known.
      order: int32 [G], where the vector of each bag is: those of `memory` one after another, then of `needed`, and
        then `vectors`.
      memory: by number of the format, bags of tables in memory.
      needed: by number of the format, bags of other tables.
      vectors: float32 [V, D], of bags that were found whole; None without a cache of vectors.
      pooled_keys: uint64 [G, 2], by which it knows bags; None without it.
      number: under which `Tiers.expect` announced it; None for a plan that was not announced.
      resident: the same of `Resident.expect`.
    """

    asked: Query
    counters: Counters
    order: np.ndarray
    memory: tuple[tuple[int, Query], ...]
    needed: tuple[tuple[int, Needed], ...]
    vectors: np.ndarray | None
    pooled_keys: np.ndarray | None
    number: int | None = None
    resident: int | None = None

    @property
    def bags(self) -> list[int]:
        """Bags of each entry of `memory`, and then of `needed`."""
        return [len(asked.tables) for _, asked in self.memory] + [len(one.asked.tables) for _, one in self.needed]

    @property
    def keys(self) -> np.ndarray:
        """uint64 [U], the distinct rows that this query needs and that are not in memory for ever."""
        return np.concatenate([one.movable for _, one in self.needed]) if self.needed else np.zeros(0, np.uint64)


@dataclasses.dataclass(frozen=True, eq=False)
class Staged:
    """A query whose rows are at hand; made by `Tiers.fetch`.

    Attributes:
      arrays: what a program takes; on CPU it reads the tiers' own buffers, so it must be called before so many later
        queries were fetched as `Tiers` has buffers. `Tiers.pool` and `Tiers.read_by` see to that.
      layout: the static part.
      counters: what this query took.
      started: when fetching began, in seconds of `time.perf_counter`.
      read: seconds spent in reading from files.
      fetched: seconds from start to end.
      plan: from which it was made.
      places: the buffers of the tiers that have its rows.
    """

    arrays: pooling.Arrays
    layout: pooling.Layout
    counters: Counters
    started: float
    read: float
    fetched: float
    plan: Plan
    places: tuple[tuple[Ring, Place], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Failed:
    """A query whose rows could not be brought, in a stream that keeps going.

    Attributes:
      plan: of the query.
      error: why.
    """

    plan: Plan
    error: Exception
