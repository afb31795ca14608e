"""Traces of embedding look-ups: queries of one user and several items, with the locality that production has.

What is exact: the reads of every row (`popularity`, drawn over all tables), the length of every bag, and that a session
repeats its user's bags. What holds on average: how soon rows return, and in which company (`recency`). The histogram
counts the look-ups that are drawn; a session of several queries multiplies those of user tables.

Letters: Q queries, T tables, B bags of a table in a query (1 of a user's, or one for each item), N look-ups drawn.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, overload

import numpy as np

from jaxeff.dlrm.popularity import PUBLISHED, Popularity, Shares, check_popularity, counts_of_tables, shares
from jaxeff.dlrm.recency import DEFAULT, CoAccess, Recency, check_coaccess, check_recency, groups, moments
from jaxeff.ops.bags import Bags

SIDES: tuple[str, ...] = ("user", "item")


@dataclasses.dataclass(frozen=True)
class Feature:
    """One sparse feature, which has a table of its own.

    Attributes:
      name: of the table.
      rows: of the table.
      pooling: mean length of a bag.
      side: "user", one bag in a query, or "item", one for each item.
      lengths: distribution of the lengths: "fixed" (the two whole numbers around a fraction), "poisson" or
        "geometric" (from 0 on, many short and few long).
    """

    name: str
    rows: int
    pooling: float = 1.0
    side: str = "item"
    lengths: str = "fixed"

    def __post_init__(self):
        if self.rows < 1:
            raise ValueError(f"table {self.name!r}: rows must be at least 1, got {self.rows}")
        if not (np.isfinite(self.pooling) and self.pooling >= 0):
            raise ValueError(f"table {self.name!r}: pooling must be finite and at least 0, got {self.pooling}")
        if self.side not in SIDES:
            raise ValueError(f"table {self.name!r}: side must be one of {', '.join(SIDES)}, got {self.side!r}")
        if self.lengths not in LENGTHS:
            raise ValueError(f"table {self.name!r}: lengths must be one of {', '.join(LENGTHS)}, got {self.lengths!r}")


class TableTrace(NamedTuple):
    """All bags of one table.

    Attributes:
      name: of the table.
      rows: of the table.
      side: "user" or "item".
      indices: int64 [nnz], row ids, bag after bag.
      offsets: int64 [Q * B + 1], where the bags of query 0 begin, then those of query 1, and so on.
    """

    name: str
    rows: int
    side: str
    indices: np.ndarray
    offsets: np.ndarray


class Accesses(NamedTuple):
    """Row reads in order: by query, then table, then bag.

    Attributes:
      tables: int32 [n].
      rows: int64 [n].
      queries: int64 [n].
    """

    tables: np.ndarray
    rows: np.ndarray
    queries: np.ndarray


class Statistics(NamedTuple):
    """What a trace asks of memory.

    Attributes:
      accesses: row reads.
      distinct_rows: different rows read.
      mean_reuse: reads of a distinct row.
      hit_bound: highest hit rate that a cache which starts empty can have, 1 - distinct rows / reads.
      pooling: float64 [T], mean length of a bag of each table.
      unique_share: rows to fetch where each query fetches a row once, as a share of the reads.
      shares: of rows and reads by reuse, in the bins of the published histograms.
    """

    accesses: int
    distinct_rows: int
    mean_reuse: float
    hit_bound: float
    pooling: np.ndarray
    unique_share: float
    shares: Shares


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Look-ups of queries in order; `len`, `trace[q]`, slices and iteration go by query.

    Attributes:
      tables: the bags of each table.
      batch_items: items in a query, the B of item tables.
      sessions: int64 [Q], the session that each query belongs to.
    """

    tables: tuple[TableTrace, ...]
    batch_items: int
    sessions: np.ndarray

    def __post_init__(self):
        for table in self.tables:
            if len(table.offsets) != len(self) * self.bags(table) + 1:
                raise ValueError(
                    f"table {table.name!r}: {len(self)} queries of {self.bags(table)} bags need "
                    f"{len(self) * self.bags(table) + 1} offsets, got {len(table.offsets)}"
                )

    def __len__(self) -> int:
        return len(self.sessions)

    def bags(self, table: TableTrace) -> int:
        """Bags of a table in one query."""
        return 1 if table.side == "user" else self.batch_items

    @overload
    def __getitem__(self, at: int) -> tuple[Bags, ...]: ...

    @overload
    def __getitem__(self, at: slice) -> "Trace": ...

    def __getitem__(self, at):
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step != 1:
                raise ValueError(f"slices of a trace must have step 1, got {step}")
            return self.part(start, stop)
        return self.query(at)

    def __iter__(self) -> Iterator[tuple[Bags, ...]]:
        return (self.query(q) for q in range(len(self)))

    def query(self, number: int) -> tuple[Bags, ...]:
        """The bags of one query in each table; ids are views.

        Raises:
          IndexError: for a query that is not there.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"query {number} of a trace of {len(self)}")
        return tuple(Bags(*self._cut(table, number % len(self), number % len(self) + 1)) for table in self.tables)

    def part(self, start: int, stop: int) -> "Trace":
        """The queries from `start` up to `stop` as a trace; ids are views."""
        stop = max(start, stop)
        tables = []
        for table in self.tables:
            indices, offsets = self._cut(table, start, stop)
            tables.append(table._replace(indices=indices, offsets=offsets))
        return Trace(tuple(tables), self.batch_items, self.sessions[start:stop])

    def _cut(self, table: TableTrace, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        bags = self.bags(table)
        offsets = table.offsets[start * bags : stop * bags + 1]
        return table.indices[offsets[0] : offsets[-1]], offsets - offsets[0]

    def per_query(self, table: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of one table that each query reads: `(indices int64 [nnz], offsets int64 [Q + 1])`."""
        one = self.tables[table]
        return one.indices, one.offsets[:: self.bags(one)]

    def accesses(self) -> Accesses:
        """All row reads in order of access."""
        starts = np.stack([self.per_query(t)[1] for t in range(len(self.tables))], axis=1)  # [Q + 1, T]
        lengths = np.diff(starts, axis=0)
        total = int(lengths.sum())
        begins = (np.cumsum(lengths.ravel()) - lengths.ravel()).reshape(lengths.shape)
        found = Accesses(np.empty(total, np.int32), np.empty(total, np.int64), np.empty(total, np.int64))
        for t, table in enumerate(self.tables):
            query = np.repeat(np.arange(len(self)), lengths[:, t])
            place = np.arange(len(table.indices)) + (begins[:, t] - starts[:-1, t])[query]
            found.tables[place], found.rows[place], found.queries[place] = t, table.indices, query
        return found

    def statistics(self) -> Statistics:
        """Reuse, pooling and bounds, all tables together."""
        counts, pooling, unique, total = [], [], 0, 0
        for t, table in enumerate(self.tables):
            indices, offsets = self.per_query(t)
            counts.append(np.unique(indices, return_counts=True)[1])
            pooling.append(len(indices) / max(len(table.offsets) - 1, 1))
            query = np.repeat(np.arange(len(self)), np.diff(offsets))
            unique += len(np.unique(query * table.rows + indices))
            total += len(indices)
        all_counts = np.concatenate(counts)
        distinct = len(all_counts)
        return Statistics(
            accesses=total,
            distinct_rows=distinct,
            mean_reuse=total / max(distinct, 1),
            hit_bound=1 - distinct / max(total, 1),
            pooling=np.array(pooling),
            unique_share=unique / max(total, 1),
            shares=shares(all_counts, next(iter(PUBLISHED.values()))),
        )


def generate(
    features: Sequence[Feature],
    queries: int,
    *,
    batch_items: int = 1,
    popularity: Popularity = PUBLISHED["2022_t788_bs131072_0"],
    recency: Recency | None = DEFAULT,
    coaccess: CoAccess | None = None,
    session_queries: float = 1.0,
    users_online: int = 1,
    seed: int = 0,
) -> Trace:
    """Draws a trace; the same arguments give the same trace.

    Args:
      features: the tables.
      queries: Q.
      batch_items: items in a query.
      popularity: how often rows are read: a histogram, over all tables together, or Zipf's law, in each table. A table
        with fewer rows than its part of the histogram has keeps the most popular ones, scaled up.
      recency: how soon rows return; None for in no order.
      coaccess: rows that are read together; None for none.
      session_queries: mean number of queries of a session (lengths are geometric), at least 1. All queries of a session
        have the same bags in user tables.
      users_online: sessions that take turns.
      seed: of the draw.

    Returns:
      A trace of Q queries.

    Raises:
      ValueError: for an argument out of range, or two tables of one name.
    """
    _check(features, queries, batch_items, popularity, session_queries, users_online)
    if recency is not None:
        check_recency(recency)
    if coaccess is not None:
        check_coaccess(coaccess)
    rng = np.random.default_rng(seed)
    sessions = _sessions(queries, session_queries, users_online, rng)
    lengths = [
        LENGTHS[one.lengths](
            one.pooling, (sessions.max(initial=-1) + 1) if one.side == "user" else queries * batch_items, rng
        )
        for one in features
    ]
    drawn = np.array([mine.sum() for mine in lengths])
    counts = counts_of_tables(popularity, drawn, [one.rows for one in features], rng)
    ids = _ordered(counts, [one.rows for one in features], recency, coaccess, int(drawn.sum()) // max(queries, 1), rng)
    tables = []
    for one, mine, rows in zip(features, lengths, ids, strict=True):
        offsets = np.append(0, np.cumsum(mine))
        if one.side == "user":  # the bag of the session, for each of its queries
            each = mine[sessions]
            begins = np.append(0, np.cumsum(each))
            place = np.arange(begins[-1]) + np.repeat(offsets[sessions] - begins[:-1], each)
            rows, offsets = rows[place], begins
        tables.append(TableTrace(one.name, one.rows, one.side, rows, offsets))
    return Trace(tuple(tables), batch_items, sessions)


def draw_rows(
    lookups: int,
    rows: int,
    *,
    popularity: Popularity = PUBLISHED["2022_t788_bs131072_0"],
    recency: Recency | None = DEFAULT,
    seed: int = 0,
) -> np.ndarray:
    """Reads of one table without queries around them, int64 [lookups]; arguments as of `generate`.

    >>> draw_rows(1000, 500).max() < 500
    np.True_
    """
    trace = generate([Feature("rows", rows)], lookups, popularity=popularity, recency=recency, seed=seed)
    return trace.tables[0].indices


def _fixed(mean: float, bags: int, rng: np.random.Generator) -> np.ndarray:
    return np.floor(mean).astype(np.int64) + (rng.random(bags) < mean % 1)


def _poisson(mean: float, bags: int, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(mean, bags)


def _geometric(mean: float, bags: int, rng: np.random.Generator) -> np.ndarray:
    return rng.geometric(1 / (1 + mean), bags) - 1


LENGTHS: Mapping[str, Callable[[float, int, np.random.Generator], np.ndarray]] = {
    "fixed": _fixed,
    "poisson": _poisson,
    "geometric": _geometric,
}
"""Lengths int64 [bags] of a mean, by name."""


def _sessions(queries: int, mean: float, online: int, rng: np.random.Generator) -> np.ndarray:
    """The session of each query, numbered by first queries; `online` of them take turns."""
    turns = -(-queries // online)
    begins = rng.random((turns, online)) < 1 / mean
    begins[:1] = True
    number = np.arange(turns * online).reshape(turns, online)
    first = np.maximum.accumulate(np.where(begins, number, 0), axis=0).ravel()[:queries]
    return np.unique(first, return_inverse=True)[1].astype(np.int64)


def _ordered(
    counts: Sequence[np.ndarray],
    rows: Sequence[int],
    recency: Recency | None,
    coaccess: CoAccess | None,
    per_query: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Row ids of each table in order of access."""
    sizes = np.array([len(some) for some in counts])
    table = np.repeat(np.arange(len(counts)), sizes)
    everything = np.concatenate(counts) if len(counts) else np.zeros(0, np.int64)
    recency = recency or Recency(share=0.0)
    if recency.shallowest is None:
        recency = recency._replace(shallowest=max(1, min(per_query, recency.deepest or per_query)))
    leaders = None if coaccess is None else groups(table, coaccess.size)
    together = coaccess.share if coaccess else 0.0
    moment = moments(everything, recency, rng, leaders=leaders, together=together)
    found, start = [], 0
    for mine, some in zip(counts, rows, strict=True):
        ids = rng.choice(some, len(mine), replace=False) if len(mine) else np.zeros(0, np.int64)
        if coaccess is not None and coaccess.page_locality and len(mine):
            ids = _neighbours(ids, coaccess, rng)
        total = int(mine.sum())
        order = np.argsort(moment[start : start + total], kind="stable")
        found.append(np.repeat(ids, mine)[order].astype(np.int64))
        start += total
    return found


def _neighbours(ids: np.ndarray, coaccess: CoAccess, rng: np.random.Generator) -> np.ndarray:
    """Gives a share of the groups the ids that are next to each other among those that were drawn."""
    group = np.arange(len(ids)) // coaccess.size
    near = (rng.random(group[-1] + 1) < coaccess.page_locality)[group]
    ids = ids.copy()
    mine, order = np.sort(ids[near]), rng.permutation(group[-1] + 1)
    # Groups in any order, so that neighbouring groups are not alike in popularity.
    ids[np.flatnonzero(near)[np.argsort(order[group[near]], kind="stable")]] = mine
    return ids


def _check(features, queries, batch_items, popularity, session_queries, users_online) -> None:
    if not features:
        raise ValueError("features must have at least one table")
    names = [one.name for one in features]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"features must have names of their own, got {', '.join(twice)} more than once")
    for name, value in (("batch_items", batch_items), ("users_online", users_online)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if queries < 0:
        raise ValueError(f"queries must be at least 0, got {queries}")
    if not (np.isfinite(session_queries) and session_queries >= 1):
        raise ValueError(f"session_queries must be finite and at least 1, got {session_queries}")
    check_popularity(popularity)
