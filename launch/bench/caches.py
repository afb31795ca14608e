"""Benchmarks of the row cache: its hits beside exact LRU and Belady's bound on traces with published reuse, its speed.

python -m launch.bench.caches [--case NAME]... [--pairs 9] [--json FILE]
"""

import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from jaxeff.dlrm import traces
from jaxeff.dlrm.popularity import PUBLISHED
from jaxeff.dlrm.recency import Recency
from jaxeff.sdm import reuse
from jaxeff.sdm.lookahead import LookAhead
from jaxeff.sdm.row_cache import RowCache, row_keys
from launch.bench import results, suite

# Of the distinct rows of a trace.
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
TABLES, POOLING, QUERIES, ROWS = 8, 20, 2000, 4_000_000
RECENCIES = {"popularity": None, "returns": Recency(0.3), "sessions": Recency(0.7)}
ROW_BYTES = {"compact": 64, "fast": 256}
# Row look-ups that are announced for each row that the cache holds.
WINDOWS, WINDOW = (1, 2, 4), 4
AT_ONCE = 10_000


@cache
def trace(histogram: str, recency: str) -> tuple[np.ndarray, ...]:
    """The distinct rows of each query, as keys, in the order of their first use."""
    features = [traces.Feature(f"table{number}", ROWS, POOLING) for number in range(TABLES)]
    drawn = traces.generate(features, QUERIES, popularity=PUBLISHED[histogram], recency=RECENCIES[recency])
    found = drawn.accesses()
    keys = np.split(row_keys(found.tables, found.rows), np.flatnonzero(np.diff(found.queries)) + 1)
    return tuple(query[np.sort(np.unique(query, return_index=True)[1])] for query in keys)


def every_trace() -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
    """Two published histograms, each in an order without and with temporal locality."""
    for histogram in ("2021_t856_bs65536_0", "2022_t788_bs131072_0"):
        for recency in RECENCIES:
            yield f"{histogram}, {recency}", trace(histogram, recency)


def cache_of(rows: int, organisation: str, *, ahead: bool = False) -> RowCache:
    """A cache of so many rows, less what does not fill a set."""
    bounds = (TABLES, ROWS)
    about = RowCache(1000 * ROW_BYTES[organisation], ROW_BYTES[organisation], organisation, bounds=bounds, ahead=ahead)
    return RowCache(
        int(rows * (about.bytes / about.capacity)) + 1, about.row_bytes, organisation, bounds=bounds, ahead=ahead
    )


def cache_clock(pairs: int) -> Iterator[dict[str, Any]]:
    """How many fewer hits than a fully associative LRU cache of as many rows."""
    for organisation, row_bytes in ROW_BYTES.items():
        losses = []
        for _, queries in every_trace():
            flat = np.concatenate(queries)
            distances, distinct = reuse.reuse_distances(flat), len(np.unique(flat))
            rows = np.zeros((len(max(queries, key=len)), row_bytes), np.uint8)
            for share in SHARES:
                ours = cache_of(int(share * distinct), organisation)
                for keys in queries:
                    missed = keys[ours.lookup(keys) < 0]
                    ours.insert(missed, rows[: len(missed)])
                best = reuse.hits_of_sizes(distances, np.array([ours.capacity]))[0]
                losses.append((best - ours.hits) / len(flat))
        low, high = np.quantile(losses, (0.25, 0.75))
        yield results.case(
            f"cache_clock.{organisation}", "hit rate lost, largest of all sizes", max(losses), better="lower",
            target=0.02, spread=(low, high), n=len(losses),
            against="exact LRU of as many rows, 1 to 50 % of the distinct ones; below zero CLOCK hits more",
        )  # fmt: skip


def cache_lookahead(pairs: int) -> Iterator[dict[str, Any]]:
    """The share of the hits between LRU and Belady's bound that announcing batches gains."""
    gained: dict[int, list[float]] = {window: [] for window in WINDOWS}
    for _, queries in every_trace():
        flat = np.concatenate(queries)
        distances, distinct = reuse.reuse_distances(flat), len(np.unique(flat))
        for share in SHARES[::2]:
            rows = cache_of(int(share * distinct), "compact", ahead=True).capacity
            lru, best = reuse.hits_of_sizes(distances, np.array([rows]))[0], reuse.belady_hits(flat, rows)
            for window in WINDOWS:
                ours = cache_of(int(share * distinct), "compact", ahead=True)
                _replay_ahead(ours, queries, max(1, round(window * rows / np.mean([len(keys) for keys in queries]))))
                gained[window].append((ours.hits - lru) / (best - lru))
    for window, shares in gained.items():
        low, high = np.quantile(shares, (0.25, 0.75))
        yield results.case(
            f"cache_lookahead.window{window}", "share of the gap closed, least of all sizes", min(shares),
            better="higher", target=0.6 if window == WINDOW else None, spread=(low, high), n=len(shares),
            against=f"LRU 0, Belady with bypass 1; {window} row look-ups announced for each row of the cache",
        )  # fmt: skip


def _replay_ahead(ours: RowCache, queries: tuple[np.ndarray, ...], window: int) -> None:
    ahead = LookAhead(ours)
    rows = np.zeros((len(max(queries, key=len)), ours.row_bytes), np.uint8)
    for keys in queries[:window]:
        ahead.expect(keys)
    for number, keys in enumerate(queries):
        if number + window < len(queries):
            ahead.expect(queries[number + window])
        missed = keys[ahead.lookup(keys) < 0]
        ahead.insert(missed, rows[: len(missed)])


def cache_speed(pairs: int) -> Iterator[dict[str, Any]]:
    """Nanoseconds for a key: of a million rows of 72 bytes, ten thousand keys at once."""
    for form, compiled in (("native", True), ("numpy", False)):
        ours = RowCache(78_000_000, 72, bounds=(TABLES, ROWS), compiled=compiled)
        for name, found in _times(ours, max(pairs, 5)).items():
            low, median, high = np.quantile(found, (0.25, 0.5, 0.75))
            yield results.case(
                f"cache_speed.{name}.{form}", "ns per key", median, better="lower", spread=(low, high), n=len(found),
                against="a million rows of 72 bytes, ten thousand at once",
            )  # fmt: skip


def _times(ours: RowCache, repeats: int) -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    rows = np.zeros((AT_ONCE, ours.row_bytes), np.uint8)
    known = rng.permutation(row_keys(rng.integers(0, TABLES, ours.capacity), np.arange(ours.capacity)))
    for start in range(0, len(known), AT_ONCE):
        keys = known[start : start + AT_ONCE]
        ours.insert(keys, rows[: len(keys)])
    found: dict[str, list[float]] = {"lookup": [], "take": [], "insert": []}
    for _ in range(repeats):
        some = known[rng.permutation(len(known))[:AT_ONCE]]
        new = row_keys(rng.integers(0, TABLES, AT_ONCE), ours.capacity + rng.permutation(ROWS // 2)[:AT_ONCE])
        found["lookup"].append(_nanoseconds(ours.lookup, some))
        found["take"].append(_nanoseconds(partial(ours.take, out=rows), ours.find(some)))
        found["insert"].append(_nanoseconds(partial(ours.insert, rows=rows), new))
    return found


def _nanoseconds(run: Callable[[np.ndarray], Any], keys: np.ndarray) -> float:
    start = time.perf_counter()
    run(keys)
    return 1e9 * (time.perf_counter() - start) / len(keys)


CASES = {"cache_clock": cache_clock, "cache_lookahead": cache_lookahead, "cache_speed": cache_speed}

if __name__ == "__main__":
    suite.main("caches", __doc__, CASES, ())
