"""How often each row of an embedding table is read: counts drawn from published reuse histograms, or from Zipf's law.

A histogram has bins over the reuse of a row, which is the number of its reads within the trace. Each bin has a share of
the distinct rows and a share of the reads, and counts that are drawn here have both. A shorter trace keeps the reuse
and has fewer rows, as if it were a part of the tables.

Letters: N reads, U distinct rows, B bins, R rows of a table, T tables.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jaxeff.data import LocalityTrace

# Shares are published with three decimals.
ROUNDING = 0.0005
# Ranks whose weight is summed exactly; beyond them an integral is as good (error below 1e-10 of a weight).
_HEAD = 1 << 16
_BEND = (1e-3, 1e3)
# So many of the rows with most reads are dealt one by one, to tables with room for them; the others in one go.
_LARGE = 1024


class Zipf(NamedTuple):
    """A row's chance of being read next falls as a power of its rank.

    Attributes:
      exponent: of the power, at least 0; 0 makes all rows alike.
      rows: how many rows of each table can be read at all; None for all of them.
    """

    exponent: float = 0.9
    rows: int | None = None


Popularity = Zipf | LocalityTrace


def _published(
    tables: int, batch: int, lookups: int, distinct_rows: int, rows_share: tuple[float, ...], reads: tuple[float, ...]
) -> LocalityTrace:
    edges = 2.0 ** np.arange(len(reads))
    low, high = np.append(0, edges[:-1]).astype(np.int64), np.append(edges[:-1], np.inf)
    return LocalityTrace(tables, batch, lookups, distinct_rows, low, high, np.array(rows_share), np.array(reads))


PUBLISHED: Mapping[str, LocalityTrace] = MappingProxyType(
    {
        "2021_t856_bs65536_full": _published(
            *(856, 65536, 887_017_990, 128_435_723),
            (0.473, 0.152, 0.139, 0.112, 0.072, 0.032, 0.011, 0.005, 0.002, 0.001, 0, 0, 0, 0, 0, 0, 0),
            (0.069, 0.044, 0.068, 0.101, 0.121, 0.104, 0.073, 0.058, 0.052)
            + (0.050, 0.049, 0.048, 0.048, 0.043, 0.031, 0.023, 0.019),
        ),
        "2021_t856_bs65536_0": _published(
            *(856, 65536, 468_084_223, 61_644_628),
            (0.423, 0.165, 0.167, 0.121, 0.073, 0.031, 0.011, 0.004, 0.002, 0.001, 0.001, 0, 0, 0, 0, 0, 0),
            (0.056, 0.043, 0.075, 0.099, 0.112, 0.091, 0.064, 0.052, 0.049)
            + (0.050, 0.054, 0.058, 0.061, 0.052, 0.038, 0.026, 0.020),
        ),
        "2022_t788_bs131072_0": _published(
            *(788, 131072, 1_405_163_864, 110_259_238),
            (0.342, 0.144, 0.149, 0.138, 0.112, 0.068, 0.029, 0.010, 0.004, 0.002, 0.001, 0.001, 0, 0, 0, 0, 0),
            (0.027, 0.023, 0.040, 0.068, 0.105, 0.120, 0.099, 0.070, 0.059)
            + (0.054, 0.040, 0.072, 0.064, 0.047, 0.021, 0.017, 0.076),
        ),
    }
)
"""Reuse in Meta's public embedding traces (github.com/facebookresearch/dlrm_datasets, embedding_bag/locality_stats.txt
and embedding_bag/2022/locality_stats.txt, MIT), the same as `jaxeff.data.locality_traces` reads from its file."""


class Shares(NamedTuple):
    """The histogram of some counts.

    Attributes:
      rows: float64 [B], share of the distinct rows in each bin.
      lookups: float64 [B], share of the reads that go to rows of each bin.
    """

    rows: np.ndarray
    lookups: np.ndarray


def shares(counts: np.ndarray, histogram: LocalityTrace) -> Shares:
    """The shares of counts in the bins of a histogram.

    Args:
      counts: int [U], reads of each distinct row, at least 1.
      histogram: whose bins are used.

    >>> low, high = shares(np.array([1, 1, 2, 4]), PUBLISHED["2022_t788_bs131072_0"])
    >>> low[:3].tolist(), high[:3].tolist()
    ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5])
    """
    counts = np.asarray(counts)
    bin_of = np.searchsorted(histogram.reuse_high, counts)
    bins = len(histogram.reuse_high)
    rows, reads = np.bincount(bin_of, minlength=bins), np.bincount(bin_of, weights=counts, minlength=bins)
    return Shares(rows / max(rows.sum(), 1), reads / max(reads.sum(), 1))


def draw_counts(popularity: Popularity, lookups: int, rng: np.random.Generator, rows: int | None = None) -> np.ndarray:
    """Draws how often each distinct row is read.

    From a histogram, the counts have its shares, which are rounded and so contradict each other a little: on ten
    million reads within 0.002 for the rows of a bin and 0.0005 for its reads. A bin that cannot hold one row gives its
    reads to the bin below: below two million reads some cannot. Inside a bin counts are log-uniform, bent by a
    power so that their sum is right. The bin without an end stops at one read by every sample of the published batch.

    Args:
      popularity: a histogram, or Zipf's law.
      lookups: N, at least 0; the sum of the counts.
      rng: source of the draw.
      rows: R, the most rows there can be; Zipf's law needs it unless it has its own. A histogram that has more distinct
        rows keeps the most popular ones, scaled up.

    Returns:
      int64 [U], highest first.

    Raises:
      ValueError: for a negative number of look-ups, an exponent below 0, no rows, or a histogram that is not one.
    """
    if lookups < 0:
        raise ValueError(f"lookups must be at least 0, got {lookups}")
    if isinstance(popularity, Zipf):
        catalogue = _catalogue(popularity, rows)
        counts = np.unique(_zipf_ranks(popularity.exponent, catalogue, rng.random(lookups)), return_counts=True)[1]
        return np.sort(counts)[::-1].astype(np.int64)
    counts = _from_histogram(popularity, lookups, rng)
    return counts if rows is None else fold(counts, rows)


def counts_of_tables(
    popularity: Popularity, drawn: np.ndarray, rows: Sequence[int], rng: np.random.Generator
) -> list[np.ndarray]:
    """Draws how often the rows of several tables are read.

    A histogram holds over all tables together: its rows are dealt to them. Zipf's law holds in each.

    Args:
      popularity: as of `draw_counts`.
      drawn: int [T], the sum of the counts of each table.
      rows: the most rows that each table can have.
      rng: source of the draw.

    Returns:
      int64 [rows of the table] for each, highest first.
    """
    if isinstance(popularity, Zipf):
        return [draw_counts(popularity, int(n), rng, some) for n, some in zip(drawn, rows, strict=True)]
    dealt = _deal(draw_counts(popularity, int(drawn.sum()), rng), drawn, rng)
    return [fold(counts, some) for counts, some in zip(dealt, rows, strict=True)]


def fold(counts: np.ndarray, rows: int) -> np.ndarray:
    """Makes at most so many rows of counts with the same sum: the highest are kept, in proportion.

    Args:
      counts: int64 [U], highest first.
      rows: the most there can be, at least 1.

    Returns:
      int64 [min(U, rows)], highest first.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if len(counts) <= rows:
        return counts
    return _apportion(counts[:rows], int(counts.sum()))


def check_popularity(popularity: Popularity) -> None:
    """Raises ValueError for a popularity that `draw_counts` cannot draw from."""
    if isinstance(popularity, Zipf):
        if not (math.isfinite(popularity.exponent) and popularity.exponent >= 0):
            raise ValueError(f"Zipf(exponent={popularity.exponent}): the exponent must be finite and at least 0")
        if popularity.rows is not None and popularity.rows < 1:
            raise ValueError(f"Zipf(rows={popularity.rows}): at least one row must be there to be read")
        return
    low, high = np.asarray(popularity.reuse_low), np.asarray(popularity.reuse_high)
    for name in ("rows_share", "lookups_share"):
        share = np.asarray(getattr(popularity, name), np.float64)
        if share.shape != low.shape or not (share >= 0).all() or not abs(share.sum() - 1) < 0.05:
            raise ValueError(
                f"{name} of the histogram must hold {len(low)} shares that are at least 0 and sum to 1, got {share}"
            )
    if not ((high > low).all() and (low[1:] == high[:-1]).all() and low[0] == 0):
        raise ValueError(f"bins of the histogram must join and start at 0, got {low} .. {high}")


def _catalogue(law: Zipf, rows: int | None) -> int:
    check_popularity(law)
    known = [some for some in (law.rows, rows) if some is not None]
    if not known:
        raise ValueError("Zipf's law needs the number of rows: give rows= here or in Zipf(...)")
    if min(known) < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    return min(known)


def _from_histogram(histogram: LocalityTrace, lookups: int, rng: np.random.Generator) -> np.ndarray:
    check_popularity(histogram)
    least, most = _bounds(histogram)
    rows, reads = _fill(histogram, lookups, least, most)
    parts = [
        _draw_within(int(rows[b]), int(reads[b]), int(least[b]), int(most[b]), rng) for b in range(len(rows)) if rows[b]
    ]
    counts = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return np.sort(counts)[::-1]


def _bounds(histogram: LocalityTrace) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest count of each bin."""
    low, high = np.asarray(histogram.reuse_low, np.int64), np.asarray(histogram.reuse_high, np.float64)
    end = max(histogram.batch, 2 * int(low[-1]))
    return low + 1, np.where(np.isinf(high), end, high).astype(np.int64)


def _fill(histogram: LocalityTrace, lookups: int, least: np.ndarray, most: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and reads of each bin, int64 [B] both; the reads sum to `lookups`."""
    share = np.asarray(histogram.lookups_share, np.float64)
    wanted = lookups * share / share.sum()
    distinct = lookups * histogram.distinct_rows / histogram.lookups
    # Reads per row where they are log-uniform.
    usual = np.where(most > least, (most - least) / np.log(np.maximum(most / least, 1.0 + 1e-9)), least)
    # Bins of a single count must move reads to have their rows; as many as the published share leaves open.
    slack = np.where(most == least, ROUNDING * lookups, 0.0)
    rows, reads = np.zeros(len(share), np.int64), np.zeros(len(share), np.int64)
    carried = 0.0
    for b in range(len(share) - 1, -1, -1):
        mine = wanted[b] + carried
        # The published share of the rows leaves this much room, of which the usual reuse takes the likeliest.
        fewest, highest = (distinct * max(histogram.rows_share[b] + sign * ROUNDING, 0) for sign in (-1, 1))
        target = min(max(mine / usual[b], fewest), highest)
        bottom, top = max(mine - slack[b], 0) / most[b], max(mine + slack[b], 0) / least[b]
        rows[b] = min(max(round(target), math.ceil(bottom)), math.floor(top))
        reads[b] = min(max(round(mine), rows[b] * least[b]), rows[b] * most[b])
        carried = mine - reads[b]
    # What is left over, either way, goes to bins with room, the widest first, and then to rows that are read once.
    left = lookups - int(reads.sum())
    sign = 1 if left > 0 else -1
    room = rows * most - reads if left > 0 else reads - rows * least
    for b in np.argsort(-room, kind="stable"):
        step = sign * min(abs(left), int(room[b]))
        reads[b] += step
        left -= step
    rows[0] += left
    reads[0] += left
    return rows, reads


def _draw_within(rows: int, reads: int, least: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Counts in least .. most that sum to `reads`, log-uniform as far as the sum allows."""
    if most == least:
        return np.full(rows, least, np.int64)
    u = rng.random(rows)

    def bent(power: float) -> np.ndarray:
        return np.clip((least - 0.5) * ((most + 0.5) / (least - 0.5)) ** u**power, least, most)

    low, high = _BEND
    for _ in range(40):
        power = math.sqrt(low * high)
        low, high = (power, high) if bent(power).sum() > reads else (low, power)
    return _rounded_to(bent(high), reads, least, most)


def _rounded_to(values: np.ndarray, total: int, least: int, most: int) -> np.ndarray:
    """Integers near the values, in least .. most, with a sum that such integers can have."""
    counts = np.clip(np.floor(values), least, most).astype(np.int64)
    # The largest fractions are rounded up, as many as are missing; then whole rounds of one until the sum is met.
    order = np.argsort(counts - values, kind="stable")
    while left := total - int(counts.sum()):
        sign = 1 if left > 0 else -1
        able = order[counts[order] < most] if sign > 0 else order[::-1][counts[order[::-1]] > least]
        # Where much is missing it is spread at once.
        step = max(1, min(abs(left) // len(able), int((most - least) // 8)))
        some = able[: abs(left) // step]
        room = most - counts[some] if sign > 0 else counts[some] - least
        counts[some] += sign * np.minimum(step, room)
    return counts


def _apportion(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to weights, by largest remainder; they sum to `total` and keep the order."""
    exact = weights * (total / weights.sum())
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return np.sort(counts)[::-1]


def _deal(counts: np.ndarray, drawn: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Deals rows to tables so that each has its number of reads; at most one row a table is cut in two for that."""
    left = drawn.astype(np.int64)
    parts: list[list[np.ndarray]] = [[] for _ in left]
    kept = []
    for count in counts[:_LARGE].tolist():
        t = int(rng.choice(len(left), p=left / left.sum())) if left.any() else 0
        if left[t] < count:
            t = int(left.argmax())
        if left[t] < count:
            kept.append(count)
            continue
        parts[t].append(np.array([count]))
        left[t] -= count
    rest = np.concatenate([np.array(kept, np.int64), rng.permutation(counts[_LARGE:])])
    ends, borders = np.cumsum(rest), np.cumsum(left)
    cuts = np.union1d(ends, borders)
    cuts = cuts[cuts > 0]
    pieces = np.diff(cuts, prepend=0)
    owner = np.searchsorted(borders, cuts)
    for t in range(len(left)):
        parts[t].append(pieces[owner == t])
    return [np.sort(np.concatenate(some))[::-1].astype(np.int64) for some in parts]


def _zipf_ranks(exponent: float, rows: int, u: np.ndarray) -> np.ndarray:
    """Ranks 0 .. rows - 1 by inverse transform: exact weights at the head, their integral in the tail."""
    head = _head_sums(exponent, min(rows, _HEAD))
    start, end = len(head) + 0.5, rows + 0.5
    tail = _integral(start, end, exponent) if rows > len(head) else 0.0
    mass = u * (head[-1] + tail)
    ranks = np.searchsorted(head, mass, side="right")
    beyond = np.flatnonzero(ranks >= len(head))
    if len(beyond):
        x = _inverse_integral(start, mass[beyond] - head[-1], exponent)
        ranks[beyond] = np.clip(np.floor(x - 0.5), len(head) if tail else 0, rows - 1).astype(np.int64)
    return np.minimum(ranks, rows - 1)


@functools.lru_cache(maxsize=8)
def _head_sums(exponent: float, rows: int) -> np.ndarray:
    return np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -exponent)


def _integral(start: float, end: float, exponent: float) -> float:
    """Of x ** -exponent; expm1 keeps it right where the exponent is near 1."""
    power = 1 - exponent
    return math.log(end / start) if power == 0 else start**power * math.expm1(power * math.log(end / start)) / power


def _inverse_integral(start: float, mass: np.ndarray, exponent: float) -> np.ndarray:
    power = 1 - exponent
    if power == 0:
        return start * np.exp(mass)
    return start * np.exp(np.log1p(np.maximum(power * mass / start**power, -1 + 1e-15)) / power)
