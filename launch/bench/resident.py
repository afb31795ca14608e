"""Hot rows in the memory of a device: beside the same tiers without them, and beside pinned memory of the host alone.

The trace has the reuse of Meta's 2022 embedding traces, in bags of one length. A twentieth of the rows is resident. The
host's cache has room for three tenths, and begins with those that the trace uses most, as after a long time of service;
the rest is read from files.
"""

import contextlib
import functools
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import sdm
from jaxeff.dlrm import traces
from jaxeff.ops.embedding_bag import pooled_lookup
from jaxeff.sdm import host_memory, placement
from jaxeff.sdm.resident import Resident
from launch.bench import results
from launch.bench.timing import Times, contest

SHARE, ON_HOST = 0.05, 0.3
POOLING = 8
# Queries of a turn, and before the first one.
WINDOW, WARM = 10, 30
DEPTH = 3


class Workload:
    """The store, its values in memory, and queries; use it in a `with` statement."""

    def __init__(self, queries: int, tables: int, rows: int, dim: int, batch: int):
        """Makes them; the store lies in the folder of TMPDIR, and is removed again."""
        self._folder = tempfile.TemporaryDirectory(prefix="jaxeff-resident-")
        features = [traces.Feature(f"table{i}", rows, POOLING) for i in range(tables)]
        trace = traces.generate(features, queries, batch_items=batch, seed=0)
        self.queries = [sdm.query(trace[q]) for q in range(queries)]
        rows_of = [np.repeat(asked.tables, POOLING) * rows + asked.indices for asked in self.queries]
        self.uses = np.bincount(np.concatenate(rows_of), minlength=tables * rows)
        self.values = np.random.default_rng(0).standard_normal((tables * rows, dim), np.float32)
        self.rows, self.dim = rows, dim
        with sdm.Writer(pathlib.Path(self._folder.name) / "store", packing="block") as writer:
            for feature, values in zip(features, np.split(self.values, tables), strict=True):
                writer.add(sdm.TableSpec(feature.name, rows, sdm.RowFormat("float32", dim)), [values])
            writer.publish()
        self.store = sdm.open_store(pathlib.Path(self._folder.name) / "store")

    def tiers(self) -> sdm.Tiers:
        """Files behind the host's cache; bags are padded, as on any device, for none is longer than another."""
        budget = int(ON_HOST * self.values.nbytes)
        tiers = sdm.Tiers(self.store, cache_bytes=budget, form="padded", buffers=DEPTH + 1)
        hot = placement.hottest(self.uses, int(ON_HOST * len(self.uses)))
        tiers.warm(*np.divmod(hot[self.uses[hot] > 0], self.rows))
        return tiers

    def resident(self, tiers: sdm.Tiers, kind: type[Resident] = Resident) -> Resident:
        """With a twentieth of the rows on the device."""
        return kind(tiers, int(SHARE * self.values.nbytes))

    def positions(self, plan: sdm.Plan) -> tuple[np.ndarray, np.ndarray]:
        """Where rows are among all values: of every look-up, int32 [G, L], and the same by distinct rows, padded."""
        ((_, needed),) = plan.needed
        distinct = needed.tables.astype(np.int64) * self.rows + needed.rows
        padded = np.zeros(1 << (len(distinct) - 1).bit_length(), np.int32)
        padded[: len(distinct)] = distinct
        return needed.inverse.reshape(-1, POOLING).astype(np.int32), padded

    def __enter__(self) -> "Workload":
        return self

    def __exit__(self, *_: Any) -> None:
        self.store.close()
        self._folder.cleanup()


class Planned(Resident):
    """Resident rows that are asked for by plans: planning is the same with and without them."""

    def plan(self, asked: Any) -> sdm.Plan:
        """The plan itself."""
        return asked


def resident(pairs: int, **sizes: int) -> Iterator[dict[str, Any]]:
    """What crosses to the device, of what queries ask for; and what it costs where the device is the host."""
    sizes = {"tables": 8, "rows": 20_000, "dim": 64, "batch": 64} | sizes
    with Workload(_queries(pairs), **sizes) as work, work.tiers() as below, work.tiers() as alone:
        hot = work.resident(below)
        for asked in work.queries[:WARM]:
            hot.lookup(asked)
            alone.lookup(asked)
        before = hot.traffic.moved, hot.traffic.queries
        contestants = {
            "resident": _in_turn(work.queries[WARM:], functools.partial(_pooled, hot)),
            "tiers": _in_turn(
                work.queries[WARM:], lambda some: [alone.pool(one) for one in sdm.stream(alone, some, depth=DEPTH)][-1]
            ),
        }
        times = contest(contestants, pairs=pairs)
        moved = (hot.traffic.moved - before[0]) / (hot.traffic.queries - before[1])
        asked_for = len(work.queries[0].indices) * work.dim * 4
        yield results.case(
            "resident.moved", "bytes sent / bytes of rows asked for", moved / asked_for, better="lower",
            against=f"{asked_for / 2**20:.1f} MiB a query; {hot.traffic.hit_rate:.3f} of distinct rows were there",
        )  # fmt: skip
        yield results.time_ratio("resident.time", times, "resident", "tiers", against="the same tiers without it")


def gpu_tiers(pairs: int, **sizes: int) -> Iterator[dict[str, Any]]:
    """How many times faster than from pinned memory of the host alone.

    All are given plans, which say which rows are distinct. Besides, with planning, and what the device does of it.
    """
    sizes = {"tables": 20, "rows": 50_000, "dim": 64, "batch": 256} | sizes
    with Workload(_queries(pairs), **sizes) as work, contextlib.ExitStack() as opened:
        below = [opened.enter_context(work.tiers()) for _ in range(3)]
        planned, whole, device = work.resident(below[0], Planned), work.resident(below[1]), work.resident(below[2])
        plans = [whole.plan(asked) for asked in work.queries]
        for hot in (planned, whole, device):
            for plan in plans[:WARM]:
                hot.pool(hot.fetch(plan))
        peers, located = _pinned_peers(work.values), [work.positions(plan) for plan in plans]
        _agree(device.pool(device.fetch(plans[0])), {name: run(*located[0]) for name, run in peers.items()})
        staged = [device.fetch(plan) for plan in plans[WARM:]]
        contestants = {
            "planned": _in_turn(plans[WARM:], functools.partial(_pooled, planned)),
            "whole": _in_turn(work.queries[WARM:], functools.partial(_pooled, whole)),
            "device": _in_turn(staged, lambda some: [device.pool(one) for one in some][-1]),
        }
        for name, run in peers.items():
            contestants[name] = _in_turn(located[WARM:], functools.partial(_last, run))
        times = contest(contestants, pairs=pairs)
        best = times.fastest(*peers)
        traffic = planned.traffic
        said = (
            f"{best}; {traffic.hit_rate:.3f} of {traffic.unique / traffic.queries:.0f} distinct rows of a query on the "
            f"device, {traffic.reads / traffic.queries:.1f} read; {traffic.moved_per_query / 2**20:.2f} MiB sent"
        )
        yield _faster("gpu_tiers", times, best, "planned", said, target=5.0)
        yield _faster("gpu_tiers.with_planning", times, best, "whole", f"{best}, which is given plans")
        yield _faster("gpu_tiers.on_device", times, best, "device", f"{best}; new rows were sent before")
        for name in peers:
            if name != best:
                yield _faster(f"gpu_tiers.beside_{name.replace(' ', '_')}", times, name, "planned", name)


def gpu_pooled(pairs: int, rows: int = 2**22, bags: Sequence[int] = (2048, 16384), length: int = 32):
    """Bytes of hot rows that are read and summed in a second, beside those that a copy on the device moves."""
    copied = jnp.zeros(2**28 if rows >= 2**22 else 2**10, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    for dim, count in itertools.product((64, 128), bags):
        table = jax.random.normal(jax.random.key(0), (rows, dim))
        # As many as take about as long as the copy, each of other rows.
        times_over = max(1, 2 * copied.nbytes // (count * length * dim * 4))
        ids = jax.random.randint(jax.random.key(1), (times_over, count, length), 0, rows)
        forms = {name: jax.jit(functools.partial(_each, form)) for name, form in POOLED.items()}
        _agree(forms["scan"](table, ids[:1]), {name: run(table, ids[:1]) for name, run in forms.items()})
        contestants: dict[str, Callable[[], Any]] = {n: functools.partial(run, table, ids) for n, run in forms.items()}
        times = contest({"copy": lambda: copy(copied), **contestants}, pairs=pairs, warmup=2)
        best = times.fastest(*forms)
        for name in forms:
            found = times.ratio("copy", name)
            scale = ids.size * dim * 4 / (2 * copied.nbytes)
            rate = 2 * copied.nbytes / times.seconds("copy") / 1e9
            yield results.case(
                f"gpu_pooled.dim{dim}.bags{count}.{name}", "bytes read / bytes copied in a second", found.value * scale,
                better="higher", target=0.6 if name == best and count == max(bags) else None,
                spread=(found.low * scale, found.high * scale), n=found.n,
                against=f"{rate:.0f} GB/s; {rows:,} rows, bags of {length}",
            )  # fmt: skip


def _scan(table: jax.Array, ids: jax.Array) -> jax.Array:
    return pooled_lookup(table, ids)


def _unrolled(table: jax.Array, ids: jax.Array) -> jax.Array:
    return functools.reduce(jnp.add, [table[ids[:, position]] for position in range(ids.shape[1])])


def _take(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table[ids].sum(1)


POOLED = {"scan": _scan, "unrolled": _unrolled, "take_and_sum": _take}


def _each(form: Callable[[jax.Array, jax.Array], jax.Array], table: jax.Array, ids: jax.Array) -> jax.Array:
    """The sum over all sets of bags, so that none can be left out."""
    return jax.lax.scan(lambda total, some: (total + form(table, some), None), form(table, ids[0]), ids[1:])[0]


def _pinned_peers(values: np.ndarray) -> dict[str, Callable[[np.ndarray, np.ndarray], jax.Array]]:
    """Look-ups of `Workload.positions` in the host's memory alone, in every form that works here."""

    @functools.partial(jax.jit, static_argnums=3)
    def every(table, inverse, distinct, form):
        rows = host_memory.take_rows(table, distinct[inverse].reshape(-1), form)
        return rows.reshape(*inverse.shape, -1).sum(1)

    @functools.partial(jax.jit, static_argnums=3)
    def once(table, inverse, distinct, form):
        return pooled_lookup(host_memory.take_rows(table, distinct, form), inverse)

    pool = jax.jit(pooled_lookup)
    peers: dict[str, Callable[[np.ndarray, np.ndarray], jax.Array]] = {
        "distinct rows by NumPy": lambda inverse, distinct: pool(host_memory.take_rows(values, distinct), inverse)
    }
    if forms := host_memory.forms():
        table = host_memory.pinned(values)
        for form in forms:
            for name, run in {"pinned rows": every, "distinct pinned rows": once}.items():
                peers[f"{name} by the {form}"] = functools.partial(_with_table, run, table, form)
    return peers


def _with_table(run: Callable[..., jax.Array], table: jax.Array, form: str, *where: np.ndarray) -> jax.Array:
    return run(table, *where, form)


def _last(run: Callable[..., jax.Array], located: Sequence[Any]) -> jax.Array:
    return [run(*where) for where in located][-1]


def _pooled(hot: Resident, asked: Sequence[Any]) -> jax.Array:
    """The last of what is pooled while the next is fetched; a device keeps the order of programs."""
    return [hot.pool(one) for one in hot.stream(asked, depth=DEPTH)][-1]


def _queries(pairs: int) -> int:
    return WARM + WINDOW * (pairs + 1)


def _in_turn(asked: Sequence[Any], run: Callable[[Any], Any]) -> Callable[[], Any]:
    """Runs the next window at each call, so that no query comes twice."""
    starts = iter(range(0, len(asked), WINDOW))

    def turn() -> Any:
        start = next(starts)
        return run(asked[start : start + WINDOW])

    return turn


def _agree(ours: jax.Array, others: dict[str, jax.Array]) -> None:
    """A contest of different sums would be none."""
    for name, one in others.items():
        np.testing.assert_allclose(np.asarray(one), np.asarray(ours), rtol=1e-3, atol=1e-3, err_msg=name)


def _faster(name: str, times: Times, peer: str, ours: str, against: str, target: float | None = None) -> dict[str, Any]:
    return results.time_ratio(name, times, peer, ours, against=against, better="higher", target=target)


CASES = {"resident": resident, "gpu_tiers": gpu_tiers, "gpu_pooled": gpu_pooled}
