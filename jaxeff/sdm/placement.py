"""Which table lies in fast memory, which behind a cache and which is read directly, under a budget of fast memory.

Every table has a menu: all of it in memory, a part of a cache, or nothing. What is least is the rows that a query reads
from slow memory, which times queries per second is the load of the device; what is bounded is bytes of fast memory,
where dense parameters, the shared cache and maps of ids have theirs first. `place` chooses for whole tables by
`jaxeff.sdm.knapsack`. `split_rows` takes the most used rows of every table instead, so that the last row taken saves as
many reads per byte everywhere (row-wise sharding by access statistics, as RecShard does it).

Letters: T tables, R rows of a table.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxeff import drawing
from jaxeff.sdm import knapsack
from jaxeff.sdm.demand import HitCurve, TableNeed, check_share
from jaxeff.sdm.knapsack import Option, OverBudget

# Where the rows of a table are: all in memory; in a file, those in use also in the cache; or in a file alone.
TIERS = ("memory", "cached", "direct")
METHODS = {"greedy": knapsack.greedy, "exact": knapsack.exact}


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where tables lie.

    Attributes:
      tables: in the order given.
      options: what was chosen for each.
      other_bytes: of fast memory that have no table: dense parameters, the shared cache and maps of ids.
      budget: bytes of fast memory.
    """

    tables: tuple[TableNeed, ...]
    options: tuple[Option, ...]
    other_bytes: float
    budget: float

    @property
    def tiers(self) -> dict[str, str]:
        """The tier of each table, by name."""
        return {table.name: option.tier for table, option in zip(self.tables, self.options, strict=True)}

    @property
    def memory_bytes(self) -> float:
        """Bytes of fast memory that are used."""
        return self.other_bytes + sum(option.bytes for option in self.options)

    @property
    def reads(self) -> float:
        """Rows of a query that are read from slow memory."""
        return sum(option.reads for option in self.options)

    @property
    def slow_bytes(self) -> int:
        """Bytes of the tables in slow memory."""
        return sum(table.size for table in self.slow)

    @property
    def slow(self) -> tuple[TableNeed, ...]:
        """Tables in slow memory, each with the hit rate that it has there: what `planner.predict` takes."""
        return tuple(
            dataclasses.replace(table, hit_rate=1 - option.reads / table.unique if table.unique else 0.0)
            for table, option in zip(self.tables, self.options, strict=True)
            if option.tier != "memory"
        )

    def rows(self) -> list[dict[str, str]]:
        """The placement in words, a row for each table, for `jaxeff.sdm.power.markdown`."""
        return [
            {
                "table": table.name,
                "tier": option.tier,
                "size": drawing.short(table.size) + "B",
                "fast memory": drawing.short(option.bytes + table.map_bytes) + "B",
                "look-ups per query": drawing.short(table.lookups),
                "slow reads per query": drawing.short(option.reads),
            }
            for table, option in zip(self.tables, self.options, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class RowSplit:
    """How many rows of every table lie in fast memory.

    Attributes:
      tables: in the order given.
      rows: of each, how many are in memory: the most used ones.
      table_reads: of each, rows of a query that are read from slow memory.
      memory_bytes: that the rows and all else in fast memory take.
      density: reads of a query that the best row outside memory would save, per byte: all that save more are in memory.
        0 where no row is outside that is used.
    """

    tables: tuple[TableNeed, ...]
    rows: tuple[int, ...]
    table_reads: tuple[float, ...]
    memory_bytes: float
    density: float

    @property
    def reads(self) -> float:
        """Rows of a query that are read from slow memory."""
        return sum(self.table_reads)

    @property
    def slow(self) -> tuple[TableNeed, ...]:
        """Tables with rows in slow memory and what a query reads there, no cache between: for `planner.predict`."""
        return tuple(
            dataclasses.replace(table, distinct=reads / table.lookups if table.lookups else 0.0, hit_rate=0.0)
            for table, rows, reads in zip(self.tables, self.rows, self.table_reads, strict=True)
            if rows < table.rows
        )


def menu(table: TableNeed, curve: HitCurve | None = None, *, bypass: float = 0.0) -> tuple[Option, ...]:
    """All ways to place a table.

    Args:
      table: its hit rate is that in the shared cache, where it takes no bytes of its own.
      curve: hit rates of a cache of its own, whose sizes become options; None for the shared cache.
      bypass: a table whose hit rate is no higher is not cached, for its rows would only push out those of others.

    Raises:
      ValueError: for a bypass outside 0 to 1.
    """
    check_share("bypass", bypass)
    found = [(0.0, table.hit_rate)] if curve is None else zip(curve.sizes, curve.hit_rates, strict=True)
    cached = [Option("cached", float(size), table.unique * float(1 - rate)) for size, rate in found if rate > bypass]
    return (Option("direct", 0.0, table.unique), *cached, Option("memory", float(table.size), 0.0))


def place(
    tables: Sequence[TableNeed],
    budget: float,
    *,
    dense_bytes: float = 0.0,
    cache_bytes: float = 0.0,
    curves: Mapping[str, HitCurve] | None = None,
    fixed: Mapping[str, str] | None = None,
    bypass: float = 0.0,
    method: str = "greedy",
) -> Placement:
    """Places whole tables.

    Hit rates in a shared cache are taken as given, though each table that goes to memory leaves room to the others:
    give `slow` of the placement to `planner.with_hit_rates` for those that hold then.

    Args:
      tables: T, with names of their own.
      budget: bytes of fast memory, for all that is said here.
      dense_bytes: of dense parameters and whatever else must be in fast memory.
      cache_bytes: of the cache that tables share which have no curve.
      curves: by table, hit rates of a cache of its own, whose size is then a part of the choice.
      fixed: by table, the tier that it must have.
      bypass: as of `menu`.
      method: "greedy" or "exact", as of `jaxeff.sdm.knapsack`.

    Raises:
      ValueError: for two tables of one name, names, tiers or methods that do not exist, or negative sizes.
      OverBudget: if what must be in fast memory is more than the budget.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {tuple(METHODS)}, got {method!r}")
    fixed, curves = dict(fixed or {}), dict(curves or {})
    other = _other_bytes(tables, budget, dense_bytes, cache_bytes, fixed)
    _known("curves", curves, tables)
    menus = []
    for table in tables:
        wanted = fixed.get(table.name)
        options = menu(table, curves.get(table.name), bypass=0.0 if wanted else bypass)
        if wanted is not None:
            # A table that the cache never has can be cached, too: it reads as much as if it were not.
            options = tuple(one for one in options if one.tier == wanted) or (Option(wanted, 0.0, table.unique),)
        menus.append(options)
    _check_budget(budget, other + sum(min(one.bytes for one in options) for options in menus))
    return Placement(tuple(tables), METHODS[method](menus, budget - other), other, budget)


def split_rows(
    tables: Sequence[TableNeed],
    counts: Mapping[str, Any],
    budget: float,
    *,
    dense_bytes: float = 0.0,
    cache_bytes: float = 0.0,
    entry_bytes: int = 0,
    fixed: Mapping[str, str] | None = None,
) -> RowSplit:
    """Takes the most used rows of every table into fast memory.

    Args:
      tables: T, with names of their own.
      counts: by table, [R] uses of its rows, in any order and unit: their sum stands for what a query reads.
      budget: bytes of fast memory.
      dense_bytes: of what else must be there.
      cache_bytes: of the cache of the other rows.
      entry_bytes: that each row in memory takes beside its own, to be found: 0 where rows are stored by use, 4 to 8 in
        a map.
      fixed: by table, "memory" for all of its rows, "cached" or "direct" for none.

    Raises:
      ValueError: as `place`, or for counts that are negative, of another length or missing.
      OverBudget: as `place`.
    """
    fixed = dict(fixed or {})
    other = _other_bytes(tables, budget, dense_bytes, cache_bytes, fixed)
    if not entry_bytes >= 0:
        raise ValueError(f"entry_bytes must be at least 0, got {entry_bytes}")
    uses = {table.name: _uses(table, counts) for table in tables}
    whole = [table for table in tables if fixed.get(table.name) == "memory"]
    needed = other + sum(table.size for table in whole)
    _check_budget(budget, needed)
    left = budget - needed
    free = [number for number, table in enumerate(tables) if table.name not in fixed]
    owner, each, number, saved = _by_density(tables, free, uses, entry_bytes)
    taken = _filled(number, each, left)
    rows = np.bincount(owner, taken, len(tables)).astype(np.int64)
    gained = np.bincount(owner, taken * saved, len(tables))
    for place, table in enumerate(tables):
        if table in whole:
            rows[place], gained[place] = table.rows, table.unique
    out = taken < number
    return RowSplit(
        tables=tuple(tables),
        rows=tuple(rows.tolist()),
        table_reads=tuple(max(0.0, table.unique - gain) for table, gain in zip(tables, gained.tolist(), strict=True)),
        memory_bytes=needed + float(taken @ each),
        density=float((saved[out] / each[out]).max(initial=0.0)),
    )


def hottest(counts: Any, rows: int) -> np.ndarray:
    """Ids of the most used rows of a table, int64 [rows], most used first and the lower id first among equals.

    Raises:
      ValueError: for more rows than there are.
    """
    counts = np.asarray(counts)
    if not 0 <= rows <= len(counts):
        raise ValueError(f"rows must be from 0 to {len(counts)}, got {rows}")
    return np.argsort(-counts.astype(np.float64), kind="stable")[:rows]


def _by_density(
    tables: Sequence[TableNeed], free: Sequence[int], uses: Mapping[str, np.ndarray], entry_bytes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows that are used alike together, most reads saved per byte first.

    Returns:
      Of each group of rows its table, the bytes of a row, the number of rows, and the reads of a query that each saves.
    """
    owner, each, number, saved = [], [], [], []
    for place in free:
        table, counts = tables[place], uses[tables[place].name]
        values, rows = np.unique(counts[counts > 0], return_counts=True)
        owner.append(np.full(len(values), place))
        each.append(np.full(len(values), float(table.row_bytes + entry_bytes)))
        number.append(rows.astype(np.float64))
        saved.append(table.unique * values / max(1e-300, counts.sum()))
    joined = [np.concatenate(parts) if parts else np.zeros(0) for parts in (owner, each, number, saved)]
    order = np.argsort(-joined[3] / joined[1], kind="stable")
    return joined[0][order].astype(np.int64), joined[1][order], joined[2][order], joined[3][order]


def _filled(number: np.ndarray, each: np.ndarray, left: float) -> np.ndarray:
    """How many rows of each group fit, group after group; what one row is too large for goes to later, smaller ones."""
    taken = np.zeros(len(number))
    start = 0
    while start < len(number):
        total = np.cumsum(number[start:] * each[start:])
        stop = start + int(np.searchsorted(total, left, side="right"))
        taken[start:stop] = number[start:stop]
        left -= float(total[stop - start - 1]) if stop > start else 0.0
        if stop == len(number):
            break
        taken[stop] = left // each[stop]
        left -= taken[stop] * each[stop]
        smaller = np.flatnonzero(each[stop + 1 :] <= left)
        if not len(smaller):
            break
        start = stop + 1 + int(smaller[0])
    return taken


def _uses(table: TableNeed, counts: Mapping[str, Any]) -> np.ndarray:
    if table.name not in counts:
        raise ValueError(f"counts must have table {table.name!r}; it has {sorted(counts)}")
    values = np.asarray(counts[table.name], np.float64)
    if values.shape != (table.rows,) or not ((values >= 0) & (values < np.inf)).all():
        raise ValueError(
            f"counts of table {table.name!r} must be {table.rows} numbers of 0 or more, got {values.shape}"
        )
    return values


def _other_bytes(
    tables: Sequence[TableNeed], budget: float, dense_bytes: float, cache_bytes: float, fixed: Mapping[str, str]
) -> float:
    """Bytes of fast memory that no choice changes, after a look at what was given."""
    for name, value in (("budget", budget), ("dense_bytes", dense_bytes), ("cache_bytes", cache_bytes)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of bytes from 0, got {value}")
    names = [table.name for table in tables]
    if len(set(names)) < len(names):
        raise ValueError(f"tables must have names of their own, got {names}")
    _known("fixed", fixed, tables)
    for name, tier in fixed.items():
        if tier not in TIERS:
            raise ValueError(f"fixed[{name!r}] must be one of {TIERS}, got {tier!r}")
    return dense_bytes + cache_bytes + sum(table.map_bytes for table in tables)


def _known(argument: str, given: Mapping[str, Any], tables: Sequence[TableNeed]) -> None:
    unknown = sorted(set(given) - {table.name for table in tables})
    if unknown:
        raise ValueError(f"{argument} names tables that do not exist: {unknown}")


def _check_budget(budget: float, needed: float) -> None:
    if needed > budget:
        raise OverBudget(
            f"dense parameters, caches, maps and what is fixed in memory need {needed:.0f} bytes, but budget is "
            f"{budget:.0f}: raise it, or let more tables go"
        )
