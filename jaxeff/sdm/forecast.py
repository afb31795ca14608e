"""What a row cache will hit, from how often rows are used: no trace is replayed.

A row that comes back within the cache's memory T is hit; T is the time in which as many bytes are touched as the cache
holds (Che, Tung and Wang, IEEE JSAC 2002). Time is counted in queries, in each of which a row is
read once however many bags name it, so that hits and misses are those of distinct rows, as the cache sees them.

Two regimes:

    steady state    the shares are those of an endless stream; the cache has been warm for long
    a finite trace  the shares were counted in a cold run of N queries, so that first uses miss; exact where rows are
                    used in any order alike

Both suppose that uses are independent of the past. For a trace in which they are not (sessions, bursts) they promise
too few hits: take its exact curves, of `trace_hit_rates`.

Letters: N queries, T characteristic time in queries, G groups of rows, R rows, S cache sizes, K moments.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxeff.sdm.reuse import hits_of_sizes, reuse_distances
from jaxeff.sdm.row_cache import row_keys

# Rows of like popularity are put together where there are more kinds of them: shares then differ by less than a
# percent from that of their group, and what is computed of them by less than 1e-4.
GROUPS = 4096
# Bisection halves the logarithm of T; the widest start spans e**60.
_HALVINGS = 64
# Numbers of one temporary array: 32 MiB.
_AT_ONCE = 1 << 22


class Popularity(NamedTuple):
    """How often the rows of a table are used, rows of like popularity together.

    Attributes:
      shares: float64 [G], share of the queries that read a row of the group; above 0 and at most 1.
      rows: int64 [G], how many rows the group has. Rows that no query reads are in none.
      queries: N, of the trace in which they were counted; infinite for a steady state.
    """

    shares: np.ndarray
    rows: np.ndarray
    queries: float

    @property
    def distinct(self) -> float:
        """Distinct rows that a query reads, on average."""
        return float(self.shares @ self.rows)


class Measured(NamedTuple):
    """What a trace does to one table.

    Attributes:
      lookups: row look-ups of a query, on average; rows named twice count twice.
      popularity: of its rows.
    """

    lookups: float
    popularity: Popularity


class LruForecast(NamedTuple):
    """A cache of least recently used rows that the tables share, of each of S sizes.

    Attributes:
      time: float64 [S], T, for how many queries a row stays; infinite where the cache holds all rows.
      misses: float64 [number of tables, S], rows of a query that it misses.
      hit_rates: float64 [number of tables, S], share of the distinct rows of a query that it has.
    """

    time: np.ndarray
    misses: np.ndarray
    hit_rates: np.ndarray


def counted(counts: Any, queries: int) -> Popularity:
    """Popularity of rows in a finite trace that began with a cold cache.

    Args:
      counts: int [R], in how many of the queries each row was read.
      queries: N.

    Raises:
      ValueError: for counts below 0 or above N, or a trace of no query.
    """
    counts = _numbers("counts", counts)
    if not queries >= 1 or (counts.size and counts.max() > queries):
        raise ValueError(
            f"queries must be at least 1 and no fewer than the largest count, got {queries} and counts up to "
            f"{counts.max(initial=0):g}: count each row once in a query that names it many times"
        )
    return Popularity(*_grouped(counts / queries), float(queries))


def steady(probabilities: Any, lookups: float) -> Popularity:
    """Popularity of rows under a known law, each look-up drawn by itself.

    Args:
      probabilities: float [R], of a look-up naming the row; divided by their sum.
      lookups: of one query.

    Raises:
      ValueError: for probabilities that are negative or all 0, or look-ups below 0.

    >>> steady([0.5, 0.5], 2).distinct
    1.5
    """
    probabilities = _numbers("probabilities", probabilities)
    total = probabilities.sum()
    if not total > 0 or not 0 <= lookups < np.inf:
        raise ValueError(f"probabilities must not all be 0 and lookups be finite, got sum {total:g} and {lookups}")
    with np.errstate(divide="ignore"):
        shares = -np.expm1(lookups * np.log1p(-probabilities / total)) if lookups else 0 * probabilities
    return Popularity(*_grouped(shares), np.inf)


def measure(queries: Any, tables: Any, rows: Any, number: int) -> tuple[Measured, ...]:
    """Counts what a trace does to every table.

    Args:
      queries: int [n], of which query an access is: 0 .. N - 1.
      tables: int [n], of which table: 0 .. number - 1.
      rows: int [n], of which row.
      number: of tables.

    Returns:
      One `Measured` for each table; N is the largest query and one.

    Raises:
      ValueError: for an empty trace, numbers out of range, or arrays of different length.
    """
    queries, tables, rows = _trace(queries, tables, rows, number)
    total = int(queries.max()) + 1
    order = np.lexsort((queries, rows, tables))
    queries, tables, rows = queries[order], tables[order], rows[order]
    lookups = np.bincount(tables, minlength=number) / total
    other = np.ones(len(rows), bool)
    other[1:] = (tables[1:] != tables[:-1]) | (rows[1:] != rows[:-1])
    again = np.zeros(len(rows), bool)
    again[1:] = ~other[1:] & (queries[1:] == queries[:-1])
    # Reads of a row in one query count once; a row's reads then lie together.
    first = np.flatnonzero(other[~again])
    counts = np.diff(np.append(first, int((~again).sum())))
    bounds = np.searchsorted(tables[~again][first], np.arange(number + 1))
    return tuple(
        Measured(float(lookups[table]), counted(counts[bounds[table] : bounds[table + 1]], total))
        for table in range(number)
    )


def trace_hit_rates(queries: Any, tables: Any, rows: Any, row_bytes: Any, sizes: Any) -> np.ndarray:
    """Hit rates of one cache of least recently used rows over several tables, by the stack distances of a trace.

    Exact where all rows take the same bytes; else a distance counts rows of mean length.

    Args:
      queries: int [n], as of `measure`, and so are `tables` and `rows`.
      tables: int [n].
      rows: int [n].
      row_bytes: int [number of tables], bytes that a row takes in the cache.
      sizes: [S], bytes of the cache.

    Returns:
      float64 [number of tables, S], of the distinct rows of queries; 0 for a table that is not read.

    Raises:
      ValueError: as `measure`, and for row bytes of 0 or below or negative sizes.
    """
    row_bytes, sizes = _numbers("row_bytes", row_bytes), _numbers("sizes", sizes)
    queries, tables, rows = _trace(queries, tables, rows, len(row_bytes))
    if row_bytes.min() <= 0:
        raise ValueError(f"row_bytes must be above 0, got {row_bytes.tolist()}")
    order = np.lexsort((rows, tables, queries))
    queries, tables, rows = queries[order], tables[order], rows[order]
    new = np.ones(len(rows), bool)
    new[1:] = (queries[1:] != queries[:-1]) | (tables[1:] != tables[:-1]) | (rows[1:] != rows[:-1])
    tables, rows = tables[new], rows[new]
    distances = reuse_distances(row_keys(tables, rows))
    held = (sizes / row_bytes[tables].mean()).astype(np.int64)
    number = np.bincount(tables, minlength=len(row_bytes))
    hits = np.stack([hits_of_sizes(distances[tables == table], held) for table in range(len(row_bytes))])
    return hits / np.maximum(1, number)[:, None]


def forecast_lru(populations: Sequence[Popularity], row_bytes: Any, sizes: Any) -> LruForecast:
    """Hit rates of one cache of least recently used rows over several tables, by Che's approximation.

    Args:
      populations: of each table, all of them counted in the same queries or all of them steady.
      row_bytes: int [number of tables], bytes that a row takes in the cache.
      sizes: [S], bytes of the cache.

    Raises:
      ValueError: for no table, lengths that differ, mixed regimes, row bytes of 0 or below, or negative sizes.
    """
    sizes = _numbers("sizes", sizes)
    time = _characteristic_times(*_together(populations, row_bytes), sizes)
    misses = np.stack([_misses(one, time) for one in populations])
    distinct = np.array([one.distinct for one in populations])[:, None]
    hit_rates = 1 - np.divide(misses, distinct, out=np.ones_like(misses), where=distinct > 0)
    return LruForecast(time, misses, hit_rates.clip(0, 1))


def forecast_warm_up(populations: Sequence[Popularity], row_bytes: Any, size: float, moments: Any) -> np.ndarray:
    """Rows of a query that an empty cache misses while it fills, after a load or an update.

    Args:
      populations: of each table, steady.
      row_bytes: int [number of tables].
      size: bytes of the cache.
      moments: [K], queries served since.

    Returns:
      float64 [number of tables, K]; it falls to the misses of `forecast_lru` once the cache is full.

    Raises:
      ValueError: as `forecast_lru`, and for counted populations, whose first uses are counted in already.
    """
    if any(np.isfinite(one.queries) for one in populations):
        raise ValueError("populations must be steady: make them with steady(...), from counts as probabilities")
    moments = _numbers("moments", moments)
    sizes = _numbers("size", [size])
    time = _characteristic_times(*_together(populations, row_bytes), sizes)
    return np.stack([_misses(one, np.minimum(moments, time)) for one in populations])


def _together(populations: Sequence[Popularity], row_bytes: Any) -> tuple[Popularity, np.ndarray]:
    """All groups of all tables, and the bytes of a row of each."""
    row_bytes = _numbers("row_bytes", row_bytes)
    if not len(populations) == len(row_bytes) > 0 or row_bytes.min() <= 0:
        raise ValueError(
            f"row_bytes must have a number above 0 for each population, got {row_bytes.tolist()} for {len(populations)}"
        )
    lengths = {one.queries for one in populations}
    if len(lengths) > 1:
        raise ValueError(f"populations must be of the same queries, got some of {sorted(lengths)}")
    merged = Popularity(
        np.concatenate([one.shares for one in populations]),
        np.concatenate([one.rows for one in populations]),
        lengths.pop(),
    )
    return merged, np.repeat(row_bytes, [len(one.rows) for one in populations])


def _characteristic_times(merged: Popularity, row_bytes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """T of each size: as many queries as touch that many bytes."""
    weights = row_bytes * merged.rows
    times = np.full(len(sizes), np.inf)
    small = np.flatnonzero(sizes < weights.sum())
    times[sizes == 0] = 0.0
    small = small[sizes[small] > 0]
    step = max(1, _AT_ONCE // max(1, len(weights)))
    for start in range(0, len(small), step):
        part = small[start : start + step]
        # A query touches at most `rate` bytes that were not touched before, so T is no less than this.
        low = np.log(sizes[part] / (weights @ merged.shares))
        high = np.full(len(part), np.log(50 / merged.shares.min()))
        high = np.maximum(high, low)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            full = (1 - _untouched(merged, np.exp(middle))) @ weights >= sizes[part]
            low, high = np.where(full, low, middle), np.where(full, middle, high)
        times[part] = np.exp(high)
    return times


def _misses(one: Popularity, time: np.ndarray) -> np.ndarray:
    """Rows of a query that were not touched in the time before it, [S]."""
    result = np.empty(len(time))
    step = max(1, _AT_ONCE // max(1, len(one.rows)))
    for start in range(0, len(time), step):
        away = _untouched(one, time[start : start + step])
        if np.isfinite(one.queries):
            counts = one.shares * one.queries
            result[start : start + step] = (1 + (counts - 1).clip(0) * away) @ one.rows / one.queries
        else:
            result[start : start + step] = away @ (one.rows * one.shares)
    return result


def _untouched(one: Popularity, time: np.ndarray) -> np.ndarray:
    """Probability that T queries in a row do not read a row of each group, [S, G]."""
    time = time[:, None]
    if not np.isfinite(one.queries):
        with np.errstate(divide="ignore", invalid="ignore"):
            # In no time nothing is read, not even a row of every query, for which the product is none.
            return np.where(time > 0, np.exp(time * np.log1p(-one.shares)), 1.0)
    # c uses lie anywhere among N queries: (N-T choose c) / (N choose c), a product of as many terms as the smaller of T
    # and c, each near the middle one: wrong by less than 1e-3 from 60 queries on.
    counts = one.shares * one.queries
    less, more = np.minimum(time, counts), np.maximum(time, counts)
    return (1 - more / (one.queries - (less - 1) / 2)).clip(0) ** less


def _grouped(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different shares above 0, and how many rows have each; likes put together where there are too many."""
    values, rows = np.unique(shares[shares > 0], return_counts=True)
    if len(values) <= GROUPS:
        return values, rows
    logs = np.log(values)
    group = np.minimum((logs - logs[0]) / (logs[-1] - logs[0]) * GROUPS, GROUPS - 1).astype(np.int64)
    start = np.flatnonzero(np.diff(group, prepend=-1))
    together = np.add.reduceat(rows, start)
    return np.add.reduceat(values * rows, start) / together, together


def _trace(queries: Any, tables: Any, rows: Any, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    queries, tables, rows = (np.asarray(values, np.int64).ravel() for values in (queries, tables, rows))
    if not len(queries) == len(tables) == len(rows) > 0:
        raise ValueError(
            f"queries, tables and rows must have one length, not 0, got {len(queries)}, {len(tables)}, {len(rows)}"
        )
    if min(queries.min(), tables.min(), rows.min()) < 0 or tables.max() >= number:
        raise ValueError(f"queries and rows must be 0 or more, and tables 0 to {number - 1}; the trace has others")
    return queries, tables, rows


def _numbers(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values, np.float64).ravel()
    if not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(
            f"{name} must be finite numbers of 0 or more, got {array[~(array >= 0) | np.isinf(array)][:3]}"
        )
    return array
