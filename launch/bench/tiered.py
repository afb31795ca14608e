"""A recommendation model whose user tables are in files, beside the same model with all tables in memory.

The trace has the reuse of Meta's 2022 embedding traces; user tables have a bag for a query, item tables one for each of
its 64 items. Fast memory is a tenth of the tables: item tables whole, the rest a cache of rows.
"""

import dataclasses
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import dlrm, sdm
from jaxeff.dlrm import traces
from jaxeff.sdm import forecast
from launch.bench import results
from launch.bench.timing import pairwise

USERS, ITEMS, BATCH, DIM = 20, 6, 64, 64
QUERIES, WINDOW = 8_000, 200
SHARE = 0.1
# Of the device's ceiling: what queries may need of it where `tiered_qps` has a target.
MOST_NEED = 0.5
DEPTH = 2


class Workload:
    """The store, the trace and the model; use it in a `with` statement."""

    def __init__(self, queries: int = QUERIES, user_rows: int = 24_000, item_rows: int = 4_000, kind: str = "float32"):
        """Makes them; the store lies in the folder of TMPDIR, and is removed again."""
        self._folder = tempfile.TemporaryDirectory(prefix="jaxeff-tiered-")
        features = [traces.Feature(f"user{i}", user_rows, 15, "user", "geometric") for i in range(USERS)]
        features += [traces.Feature(f"item{i}", item_rows, 3, "item", "geometric") for i in range(ITEMS)]
        self.trace = traces.generate(features, queries, batch_items=BATCH, seed=0)
        self.queries = [sdm.query(self.trace[q]) for q in range(queries)]
        rng = np.random.default_rng(0)
        form = sdm.RowFormat(kind, DIM)
        with sdm.Writer(pathlib.Path(self._folder.name) / "store", packing="block") as writer:
            for feature in features:
                values = rng.normal(size=(feature.rows, DIM)).astype(np.float32)
                writer.add(sdm.TableSpec(feature.name, feature.rows, form), [values])
            writer.publish()
        self.store = sdm.open_store(pathlib.Path(self._folder.name) / "store")
        rows = tuple(feature.rows for feature in features)
        # The widths of MLPerf, but for the dimension.
        architecture = dlrm.Architecture(13, rows, DIM, (512, 256, DIM), (1024, 1024, 512, 256, 1))
        self.dense = jnp.asarray(rng.normal(size=(BATCH, 13)), jnp.float32)
        pooled = jnp.zeros((BATCH, USERS + ITEMS, DIM))
        self.params = dlrm.DLRM(architecture).init(jax.random.key(0), self.dense, pooled)["params"]
        self.score = dlrm.scorer(architecture, (*(1,) * USERS, *(BATCH,) * ITEMS), BATCH)
        self.table_bytes = sum(table.spec.rows * form.row_bytes for table in self.store.tables)

    def in_memory(self) -> sdm.Tiers:
        """All tables in memory."""
        return sdm.Tiers(self.store, "memory")

    def tiered(self, share: float = SHARE, **settings: Any) -> sdm.Tiers:
        """Item tables in memory, and a cache for the rest of what is allowed."""
        placement = {
            table.spec.name: "memory" if table.spec.name[0] == "i" else "cached" for table in self.store.tables
        }
        items = sum(t.spec.rows * t.spec.format.row_bytes for t in self.store.tables if t.spec.name[0] == "i")
        return sdm.Tiers(self.store, placement, cache_bytes=int(share * self.table_bytes) - items, **settings)

    def run(self, tiers: sdm.Tiers, start: int, stop: int, depth: int = DEPTH) -> float:
        """Seconds for some queries, fetched ahead."""
        began = time.perf_counter()
        scores = None
        for staged in sdm.stream(tiers, self.queries[start:stop], depth=depth):
            scores, pooled = self.score(self.params, self.dense, staged.arrays, staged.layout)
            tiers.read_by(staged, pooled)
        jax.block_until_ready(scores)
        return time.perf_counter() - began

    def one_by_one(self, tiers: sdm.Tiers, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of fetching and of computing each query, [n] each, nothing at the same time."""
        fetch, compute = [], []
        for asked in self.queries[start:stop]:
            began = time.perf_counter()
            staged = tiers.fetch(tiers.plan(asked))
            fetched = time.perf_counter()
            scores, pooled = self.score(self.params, self.dense, staged.arrays, staged.layout)
            tiers.read_by(staged, pooled)
            scores.block_until_ready()
            fetch.append(fetched - began)
            compute.append(time.perf_counter() - fetched)
        return np.array(fetch), np.array(compute)

    def warm(self, tiers: sdm.Tiers, stop: int) -> None:
        """Brings the cache to where it is after so many queries, and compiles what they need."""
        for asked in self.queries[:stop]:
            tiers.fetch(tiers.plan(asked))
        self.one_by_one(tiers, stop - 20, stop)

    def __enter__(self) -> "Workload":
        return self

    def __exit__(self, *_: Any) -> None:
        self.store.close()
        self._folder.cleanup()


def tiered(pairs: int) -> Iterator[dict[str, Any]]:
    """Queries per second and slow queries beside all tables in memory, what they need of the device, what is hidden."""
    with Workload() as work, work.in_memory() as memory, work.tiered() as tiers:
        start = QUERIES - (pairs + 1) * 2 * WINDOW
        work.warm(memory, 40)
        work.warm(tiers, start)
        before = dataclasses.replace(tiers.counters)
        rates: dict[str, list[float]] = {"memory": [], "tiers": [], "serial": [], "stages": []}
        slow: dict[str, list[float]] = {"memory": [], "tiers": []}
        stages: dict[str, list[float]] = {"fetch": [], "compute": [], "together": [], "cores": []}
        for pair in range(pairs + 1):
            first = start + pair * 2 * WINDOW
            spans = (first, first + WINDOW), (first + WINDOW, first + 2 * WINDOW)
            took = {"memory": work.run(memory, *spans[0])}
            busy = time.process_time()
            took["tiers"] = work.run(tiers, *spans[0])
            busy = time.process_time() - busy
            alone = {"memory": work.one_by_one(memory, *spans[1]), "tiers": work.one_by_one(tiers, *spans[1])}
            if not pair:
                continue
            for name in took:
                rates[name].append(WINDOW / took[name])
                slow[name].append(float(np.quantile(sum(alone[name]), 0.99)))
            fetch, compute = (times.sum() for times in alone["tiers"])
            rates["stages"].append(max(fetch, compute))
            rates["serial"].append(took["tiers"])
            stages["fetch"].append(fetch)
            stages["compute"].append(compute)
            stages["together"].append(took["tiers"])
            stages["cores"].append(busy / took["tiers"] / len(os.sched_getaffinity(0)))
        counted = tiers.counters.since(before)
        reads, ceiling = counted.requests / counted.queries, ceiling_of(work.store)
        need = need_of(reads, rates["tiers"], ceiling)
        yield need
        most = f"the {MOST_NEED} that the target is for"
        judged = f"at most {most}" if need["value"] <= MOST_NEED else f"more than {most}, so it does not apply"
        said = (
            f"{statistics.median(rates['memory']):.0f} queries/s in memory; hit rate {counted.hit_rate:.3f}, "
            f"{reads:.0f} reads a query, {need['value']:.2f} of the ceiling of {ceiling:.0f} reads/s, {judged}"
        )
        yield _ratio("tiered_qps", rates["tiers"], rates["memory"], said, better="higher", target=0.7)
        said = f"{1e3 * statistics.median(slow['memory']):.1f} ms in memory, one query at a time"
        yield _ratio("tiered_p99", slow["tiers"], slow["memory"], said, better="lower", target=3.0)
        each = {name: 1e3 * statistics.median(stages[name]) / WINDOW for name in ("fetch", "compute", "together")}
        said = (
            f"the longer of fetching ({each['fetch']:.2f} ms a query) and computing ({each['compute']:.2f}) as many "
            f"one by one; together {each['together']:.2f}, the cores {statistics.median(stages['cores']):.0%} busy"
        )
        yield _ratio("overlap", rates["serial"], rates["stages"], said, better="lower", target=1.2)


def planner(pairs: int) -> Iterator[dict[str, Any]]:
    """Reads and queries per second that are predicted, beside those that are counted and measured."""
    with Workload() as work, work.tiered() as tiers:
        start = QUERIES // 2
        assert tiers.cache is not None
        (cache,) = tiers.cache.caches.values()
        accesses = work.trace.accesses()
        users = accesses.tables < USERS
        queries, tables, rows = accesses.queries[users], accesses.tables[users], accesses.rows[users]
        row_bytes = np.full(USERS, cache.row_bytes)
        rates = forecast.trace_hit_rates(queries, tables, rows, row_bytes, [cache.capacity * cache.row_bytes])
        found = forecast.measure(queries, tables, rows, USERS)
        needs = [
            sdm.TableNeed(
                spec.name, spec.rows, spec.format.row_bytes, one.lookups, hit_rate=float(rate[0]),
                distinct=one.popularity.distinct / one.lookups,
            )
            for spec, one, rate in zip([t.spec for t in work.store.tables[:USERS]], found, rates, strict=True)
        ]  # fmt: skip
        for asked in work.queries:
            tiers.fetch(tiers.plan(asked))
        counted = tiers.counters
        device = sdm.calibrate(pathlib.Path(work.store.tables[0].path).parent, size=2**27)
        work.one_by_one(tiers, start - WINDOW, start)  # compiles
        fetch, compute = work.one_by_one(tiers, start, start + WINDOW)
        host, busy = _host_seconds(tiers, work.queries[start : start + WINDOW])
        predicted = sdm.predict(
            needs, device, compute_seconds=float(compute.mean()), host_seconds=host, busy_seconds=busy,
            cores=len(os.sched_getaffinity(0)), packing="block", block=tiers.reader.block,
        )  # fmt: skip
        reads = [counted.requests / counted.queries]
        yield _off(
            "planner.ios", "reads", predicted.reads.requests, reads, target=1.1,
            against=f"{reads[0]:.1f} reads a query",
        )  # fmt: skip
        measured = [WINDOW / work.run(tiers, *(start + n * WINDOW for n in (pair, pair + 1))) for pair in range(pairs)]
        yield _off(
            "planner.qps", "queries per second", predicted.qps, measured, target=1.2,
            against=f"{statistics.median(measured):.0f} queries/s, bound by {predicted.bound}",
        )  # fmt: skip


def ceiling_of(store: sdm.Store) -> float:
    """Reads per second that a reader gets from the files of a store with 128 in flight."""
    largest = max(store.tables, key=lambda table: table.size)
    return sdm.calibrate(largest.path, depths=(128,), seconds=0.3).peak


def need_of(reads: float, rates: Sequence[float], ceiling: float) -> dict[str, Any]:
    """The case of the share of the device's ceiling that queries need.

    Args:
      reads: of a query.
      rates: queries per second, of each measurement.
      ceiling: reads per second of the device.
    """
    share = pairwise([reads * rate for rate in rates], [ceiling] * len(rates))
    return results.case(
        "tiered_need", "share of the device's ceiling", share.value, better="lower", target=MOST_NEED,
        spread=(share.low, share.high), n=share.n, against=f"{ceiling:.0f} reads/s with 128 in flight",
    )  # fmt: skip


def _off(
    name: str, what: str, predicted: float, measured: Sequence[float], *, target: float, against: str
) -> dict[str, Any]:
    """The case of how far off a prediction is, too low or too high alike: max(r, 1 / r) of r = predicted / measured."""
    found = pairwise([max(predicted, one) for one in measured], [min(predicted, one) for one in measured])
    plain = pairwise([predicted] * len(measured), measured)
    return results.case(
        name, f"{what}, larger / smaller of predicted and measured", found.value, better="lower", target=target,
        spread=(found.low, found.high), n=found.n, against=f"predicted / measured {plain.value:.3f}; {against}",
    )  # fmt: skip


def _host_seconds(tiers: sdm.Tiers, asked: Sequence[sdm.Query]) -> tuple[float, float]:
    """Seconds of a query that planning and fetching take besides reading, and those of a core with it."""
    began, busy, read = time.perf_counter(), time.thread_time(), 0.0
    for query in asked:
        read += tiers.fetch(tiers.plan(query)).read
    return (time.perf_counter() - began - read) / len(asked), (time.thread_time() - busy) / len(asked)


def _ratio(
    name: str, ours: Sequence[float], theirs: Sequence[float], against: str, *, better: str, target: float
) -> dict[str, Any]:
    found = pairwise(ours, theirs)
    return results.case(
        name, "ratio", found.value, better=better, target=target, spread=(found.low, found.high), n=found.n,
        against=against,
    )  # fmt: skip


CASES = {"tiered": tiered, "planner": planner}
