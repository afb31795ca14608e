"""The parts of `launch.recommend`: features, training, stores, and what serving a trace from tiers takes."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxeff import data, dlrm, sdm, training
from jaxeff.dlrm import click_files, features, lookup
from jaxeff.sdm import demand, figures, forecast, placement, tiers
from jaxeff.sdm.figures import Span
from jaxeff.sdm.io.reader import LADDER
from jaxeff.sdm.table import BLOCKS
from launch import classifier

DATASETS = ("movielens", "criteo", "avazu", "file", "trace")
SECTIONS = {
    "model": ("preset", "dim"),
    "file": ("train", "test", "layout", "rows"),
    "training": ("epochs", "batch_size", "optimizer", "table_rate"),
    "store": ("kinds", "block", "packing"),
    "memory": ("share", "cache_share", "split_rows", "pooled_share"),
    "serving": ("examples", "depth", "lookahead", "reader", "queue_depth", "measured"),
}
# Queries of which the timeline is drawn, and sizes of caches for which hit rates are.
SHOWN, SIZES = 12, 24


class Problem(NamedTuple):
    """What is learned and what is asked.

    Attributes:
      architecture: of the model.
      names: of the tables.
      train: batches from a step on, or None where nothing is learned.
      steps: of training.
      test: batches for evaluation.
      queries: what is served, each with its dense features [B, n_d].
      labels: float32 [examples] of the queries, or None.
      bags: of each table in a query, 1 or B.
      notes: what a summary says about the data.
    """

    architecture: dlrm.Architecture
    names: tuple[str, ...]
    train: Callable[[int], Iterator[dict[str, np.ndarray]]] | None
    steps: int
    test: Callable[[], Iterable[dict[str, np.ndarray]]]
    queries: list[tuple[sdm.Query, np.ndarray]]
    labels: np.ndarray | None
    bags: tuple[int, ...]
    notes: dict[str, Any]


def check(config: Mapping[str, Any]) -> None:
    """Finds what is wrong in a config.

    Raises:
      ValueError: naming the field.
    """
    if config["dataset"] not in DATASETS:
        raise ValueError(f"dataset={config['dataset']!r} is unknown; there are {', '.join(DATASETS)}")
    for section, fields in SECTIONS.items():
        classifier.check_fields(section, config[section], fields)
    for name in ("share", "cache_share", "pooled_share"):
        if not 0 <= config["memory"][name] <= 1:
            raise ValueError(f"memory.{name} must be 0 .. 1, got {config['memory'][name]}")
    if unknown := sorted(set(config["store"]["kinds"]) - set(sdm.KINDS)):
        raise ValueError(f"store.kinds: {unknown[0]!r} is unknown; there are {', '.join(sdm.KINDS)}")
    if config["device"] != "measured" and config["device"] not in sdm.PRESETS:
        raise ValueError(f"device={config['device']!r} is unknown; there are measured, {', '.join(sdm.PRESETS)}")
    if config["trace"]["popularity"] not in dlrm.PUBLISHED:
        raise ValueError(f"trace.popularity must be one of {', '.join(dlrm.PUBLISHED)}")
    for section, name, allowed in (
        ("model", "preset", tuple(dlrm.PRESETS)),
        ("store", "packing", demand.PACKINGS),
        ("store", "block", BLOCKS),
        ("serving", "reader", ("auto", *LADDER)),
    ):
        if config[section][name] not in allowed:
            raise ValueError(
                f"{section}.{name}={config[section][name]!r} must be one of {', '.join(map(str, allowed))}"
            )
    for section, name, least in (
        ("serving", "examples", 1),
        ("serving", "measured", 1),
        ("serving", "lookahead", 0),
        ("serving", "queue_depth", 1),
        ("training", "epochs", 1),
        ("training", "batch_size", 1),
        ("trace", "queries", 2),
    ):
        if config[section][name] < least:
            raise ValueError(f"{section}.{name} must be at least {least}, got {config[section][name]}")
    if not 1 <= config["serving"]["depth"] < tiers.BUFFERS:
        raise ValueError(f"serving.depth must be 1 .. {tiers.BUFFERS - 1}, got {config['serving']['depth']}")
    for name, given in (("store.kinds", config["store"]["kinds"]), ("seeds", config["seeds"])):
        if not len(given):
            raise ValueError(f"{name} must not be empty")
    if not config["memory"]["share"]:
        raise ValueError("memory.share must be above 0: what is not in memory still needs a cache")


# ---- data ------------------------------------------------------------------------------------------------------------


def problem(config: Mapping[str, Any], seed: int) -> Problem:
    """The data of an experiment for one seed.

    Raises:
      ValueError, FileNotFoundError: for data that are not there or of another kind.
    """
    if config["dataset"] == "trace":
        return _of_trace(config, seed)
    if config["dataset"] == "file":
        return _of_file(config, seed)
    if config["dataset"] == "movielens":
        train, test = features.of_ratings(data.load("movielens", "train"), split=config["split"], seed=seed)
    else:
        train = features.of_clicks(data.load(config["dataset"], "train"))
        test = features.of_clicks(data.load(config["dataset"], "test"))
    # One architecture for both: the longest bag may be in either.
    arrays = {name: np.concatenate([array, test.arrays[name]]) for name, array in train.arrays.items()}
    both = dataclasses.replace(train, arrays=arrays)
    architecture = both.architecture(config["model"]["preset"], config["model"]["dim"])
    batches = data.Batches(train.arrays, config["training"]["batch_size"], seed=seed)
    return _problem(
        config,
        architecture,
        train.tables,
        batches.starting_at,
        config["training"]["epochs"] * batches.steps_per_epoch,
        lambda: data.padded_batches(test.arrays, config["eval_batch_size"]),
        test.arrays,
        {"name": config["dataset"], "train": len(train), "test": len(test)},
    )


def _of_file(config: Mapping[str, Any], seed: int) -> Problem:
    """A click log of the user's own: training streams it, once an epoch; lines that fill no batch are left out."""
    section, size = config["file"], config["training"]["batch_size"]

    def batches(path: str, count: int, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        return click_files.read_clicks(path, section["layout"], section["rows"], count, start=start)

    test = list(batches(section["test"], config["serving"]["examples"]))
    per_epoch = sum(1 for _ in batches(section["train"], size))
    for name, found, count in (("test", test, config["serving"]["examples"]), ("train", per_epoch, size)):
        if not found:
            raise ValueError(f"file.{name}: {section[name]} has fewer than {count} lines, which make no batch")
    arrays = {name: np.concatenate([batch[name] for batch in test]) for name in test[0]}
    rows = (section["rows"],) * arrays["ids"].shape[1]
    architecture = dlrm.preset(
        config["model"]["preset"], dense=arrays["dense"].shape[1], rows=rows, dim=config["model"]["dim"]
    )

    def train(start: int) -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield from batches(section["train"], size, start % per_epoch)
            start = 0

    names = click_files.LAYOUTS[section["layout"]].tables
    return _problem(
        config,
        architecture,
        names,
        train,
        config["training"]["epochs"] * per_epoch,
        lambda: data.padded_batches(arrays, config["eval_batch_size"]),
        arrays,
        {"name": section["train"], "train": per_epoch * size, "test": len(arrays["label"])},
    )


def _problem(config, architecture, names, train, steps, test, arrays, notes) -> Problem:
    size = config["serving"]["examples"]
    whole = len(arrays["label"]) // size
    if whole < 2:
        raise ValueError(
            f"serving.examples={size} makes {whole} queries of {len(arrays['label'])} examples; 2 are needed"
        )
    parts = [slice(at * size, (at + 1) * size) for at in range(whole)]
    queries = [(lookup.query_of(arrays["ids"][at], arrays["lengths"][at]), arrays["dense"][at]) for at in parts]
    bags = (size,) * len(names)
    return Problem(
        architecture, tuple(names), train, steps, test, queries, arrays["label"][: whole * size], bags, notes
    )


def _of_trace(config: Mapping[str, Any], seed: int) -> Problem:
    """Generated look-ups of a model that is not trained."""
    section, items = config["trace"], config["serving"]["examples"]
    wanted = [
        dlrm.Feature(f"{side}_{number}", section[f"{side}_rows"], section[f"{side}_pooling"], side, "geometric")
        for side in ("user", "item")
        for number in range(section[f"{side}_tables"])
    ]
    trace = dlrm.generate(
        wanted, section["queries"], batch_items=items, popularity=dlrm.PUBLISHED[section["popularity"]],
        session_queries=section["session_queries"], seed=seed,
    )  # fmt: skip
    architecture = dlrm.preset(config["model"]["preset"], rows=[one.rows for one in wanted], dim=config["model"]["dim"])
    rng = np.random.default_rng(seed)
    queries = [
        (sdm.query(trace[number]), rng.normal(size=(items, architecture.dense)).astype(np.float32))
        for number in range(len(trace))
    ]
    statistics = trace.statistics()
    notes = {
        "name": "trace",
        "queries": len(trace),
        "lookups": statistics.accesses,
        "distinct_rows": statistics.distinct_rows,
        "mean_reuse": statistics.mean_reuse,
        "hit_bound": statistics.hit_bound,
    }
    bags = tuple(trace.bags(table) for table in trace.tables)
    names = tuple(one.name for one in wanted)
    return Problem(architecture, names, None, 0, lambda: (), queries, None, bags, notes)


# ---- training --------------------------------------------------------------------------------------------------------


def trained(config: Mapping[str, Any], found: Problem, seed: int, folder: pathlib.Path) -> tuple[Any, Any, list[Any]]:
    """Parameters of the core, tables by name, and the metrics of training; random ones where nothing is learned."""
    key = jax.random.key(seed)
    if found.train is None:
        shapes = jnp.zeros((1, found.architecture.dense)), jnp.zeros((1, len(found.names), found.architecture.dim))
        core, tables = jax.random.split(key)
        params = dlrm.DLRM(found.architecture).init(core, *shapes)["params"]
        return params, dlrm.init_tables(tables, found.architecture), []
    section = config["training"]
    method = dlrm.recommendation(
        found.architecture,
        optax.chain(training.optimizer_from(section["optimizer"], steps=found.steps)),
        dlrm.rowwise_adagrad(section["table_rate"]),
    )
    result = training.fit(
        method,
        lambda start: data.prefetch(found.train(start)),  # type: ignore[misc]
        steps=found.steps,
        key=key,
        workdir=folder,
        evaluate_on=found.test,
        eval_every=max(1, found.steps // 5),
        log_every=config["log_every"],
        checkpoint_every=max(1, found.steps // 4),
    )
    return result.state.params, result.state.tables, result.history


# ---- planning --------------------------------------------------------------------------------------------------------


class Use(NamedTuple):
    """What queries do to tables, found once.

    Attributes:
      queries: int64 [n], of each look-up.
      tables: int32 [n].
      rows: int64 [n].
      measured: of each table.
    """

    queries: np.ndarray
    tables: np.ndarray
    rows: np.ndarray
    measured: tuple[forecast.Measured, ...]

    @property
    def repeated(self) -> float:
        """Share of the distinct rows of queries that an earlier query had read: no cache hits more."""
        each = sum(one.popularity.distinct for one in self.measured) * (int(self.queries.max()) + 1)
        keys = sdm.row_keys(self.tables, self.rows)
        return 1 - len(np.unique(keys)) / each


def use_of(found: Problem) -> Use:
    """Counts the look-ups of all queries."""
    tables = np.concatenate([np.repeat(asked.tables, asked.lengths) for asked, _ in found.queries])
    rows = np.concatenate([asked.indices for asked, _ in found.queries])
    queries = np.repeat(np.arange(len(found.queries)), [len(asked.indices) for asked, _ in found.queries])
    return Use(queries, tables, rows, forecast.measure(queries, tables, rows, len(found.names)))


class Chosen(NamedTuple):
    """Where tables lie, as `sdm.Tiers` takes it.

    Attributes:
      plan: of whole tables, or of rows.
      tiers: of each table by name.
      pinned: ids of rows in memory by table.
      needs: of the tables in files, with the hit rates that are expected.
      settings: of `sdm.Tiers`.
    """

    plan: placement.Placement | placement.RowSplit
    tiers: dict[str, str]
    pinned: dict[str, np.ndarray]
    needs: tuple[sdm.TableNeed, ...]
    settings: dict[str, Any]


def chosen(config: Mapping[str, Any], store: sdm.Store, used: Use) -> Chosen:
    """Places the tables of a store under the budget of memory.

    Raises:
      ValueError: for a budget that is too small.
    """
    section = config["memory"]
    specs = [table.spec for table in store.tables]
    budget = section["share"] * sum(spec.rows * spec.format.row_bytes for spec in specs)
    cache_bytes, pooled_bytes = (int(section[name] * budget) for name in ("cache_share", "pooled_share"))
    needs = [
        sdm.TableNeed(
            spec.name, spec.rows, spec.format.row_bytes, one.lookups,
            distinct=one.popularity.distinct / one.lookups if one.lookups else 1.0,
        )
        for spec, one in zip(specs, used.measured, strict=True)
    ]  # fmt: skip
    rates = hit_rates(used, needs, cache_bytes)
    with_rates = [dataclasses.replace(need, hit_rate=rate) for need, rate in zip(needs, rates, strict=True)]
    others = {"cache_bytes": cache_bytes + pooled_bytes}
    pinned: dict[str, np.ndarray] = {}
    plan: placement.Placement | placement.RowSplit
    if section["split_rows"]:
        counts = {
            spec.name: np.bincount(used.rows[used.tables == number], minlength=spec.rows)
            for number, spec in enumerate(specs)
        }
        plan = sdm.split_rows(needs, counts, budget, entry_bytes=8, **others)
        tiers = dict.fromkeys(counts, "cached")
        pinned = {
            spec.name: placement.hottest(counts[spec.name], rows)
            for spec, rows in zip(specs, plan.rows, strict=True)
            if rows
        }
    else:
        plan = sdm.place(with_rates, budget, **others)
        tiers = plan.tiers
    slow = [number for number, spec in enumerate(specs) if tiers[spec.name] != "memory"]
    left = np.isin(used.tables, slow)
    for name, ids in pinned.items():
        number = store.index(name)
        left &= ~((used.tables == number) & np.isin(used.rows, ids))
    # Where all that is used is in memory, nothing is read.
    remaining = [dataclasses.replace(needs[number], pooling=0.0) for number in slow]
    rest = Use(used.queries[left], used.tables[left], used.rows[left], used.measured)
    if len(rest.rows):
        again = forecast.measure(rest.queries, rest.tables, rest.rows, len(specs))
        rates = hit_rates(rest, needs, cache_bytes)
        remaining = [
            dataclasses.replace(
                needs[number], pooling=again[number].lookups, hit_rate=rates[number],
                distinct=again[number].popularity.distinct / again[number].lookups if again[number].lookups else 1.0,
            )
            for number in slow
        ]  # fmt: skip
    settings = {
        "placement": tiers,
        "pinned": pinned,
        "cache_bytes": cache_bytes,
        "pooled_bytes": pooled_bytes,
        "lookahead": config["serving"]["lookahead"] > 0,
        "reader": config["serving"]["reader"],
        "queue_depth": config["serving"]["queue_depth"],
    }
    return Chosen(plan, tiers, pinned, tuple(remaining), settings)


def hit_rates(used: Use, needs: Iterable[sdm.TableNeed], cache_bytes: float) -> list[float]:
    """Hit rate of each table in a cache of least recently used rows that all share, by the stack distances."""
    sizes = [need.row_bytes for need in needs]
    return forecast.trace_hit_rates(used.queries, used.tables, used.rows, sizes, [cache_bytes])[:, 0].tolist()


def hit_curve(used: Use, needs: Iterable[sdm.TableNeed], total: float) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of a cache for all tables, and its hit rate over all distinct rows of queries."""
    row_bytes = [need.row_bytes for need in needs]
    sizes = np.geomspace(total / 1000, total, SIZES)
    rates = forecast.trace_hit_rates(used.queries, used.tables, used.rows, row_bytes, sizes)
    unique = np.array([one.popularity.distinct for one in used.measured])
    return sizes, (rates * unique[:, None]).sum(0) / unique.sum()


# ---- serving ---------------------------------------------------------------------------------------------------------


class Served(NamedTuple):
    """What serving the queries took.

    Attributes:
      logits: float32 [examples], of all queries.
      qps: queries per second of the second half, fetched ahead.
      latency: seconds of each query that was served alone.
      compute: seconds of these in the model.
      host: seconds of these in planning and caches, without reading.
      busy: seconds of these of a core, for all that the calling thread does to fetch.
      counters: of the queries that were fetched ahead.
      spans: of the last of these.
      fast_bytes: memory of tables, rows and caches.
    """

    logits: np.ndarray
    qps: float
    latency: np.ndarray
    compute: np.ndarray
    host: np.ndarray
    busy: np.ndarray
    counters: sdm.Counters
    spans: list[Span]
    fast_bytes: int


def served(config: Mapping[str, Any], found: Problem, params: Any, tiers: sdm.Tiers) -> Served:
    """Serves queries, fetched ahead, and the last ones one by one, which the cache has not seen before."""
    section = config["serving"]
    score = lookup.scorer(found.architecture, found.bags, section["examples"])
    ahead = {"depth": section["depth"], "lookahead": section["lookahead"] if tiers.lookahead else 0}
    alone = min(section["measured"], len(found.queries) // 2)
    for asked, dense in found.queries[:2]:  # compiles
        staged = tiers.fetch(tiers.plan(asked))
        score(params, dense, staged.arrays, staged.layout)[0].block_until_ready()
    before = dataclasses.replace(tiers.counters)
    logits, stages = [], []
    for staged, scores in lookup.serve(tiers, score, params, found.queries[: len(found.queries) - alone], **ahead):
        logits.append(np.asarray(scores))
        stages.append((staged.started, staged.started + staged.fetched, time.perf_counter()))
    # Of the second half, when programs are compiled and the cache is warm.
    half = len(stages) // 2
    qps = (len(stages) - half) / (stages[-1][-1] - stages[half - 1][-1]) if half else 1 / (stages[0][-1] - stages[0][0])
    counters = tiers.counters.since(before)
    latency, compute, host, busy = [], [], [], []
    for asked, dense in found.queries[len(found.queries) - alone :]:
        start, used = time.perf_counter(), time.thread_time()
        staged = tiers.fetch(tiers.plan(asked))
        fetched = time.perf_counter()
        busy.append(time.thread_time() - used)
        scores, pooled = score(params, dense, staged.arrays, staged.layout)
        tiers.read_by(staged, pooled)
        logits.append(np.asarray(scores))
        compute.append(time.perf_counter() - fetched)
        latency.append(time.perf_counter() - start)
        host.append(fetched - start - staged.read)
        tiers.remember(staged, pooled)
    spans = figures.spans(stages[-SHOWN:])
    return Served(
        np.concatenate(logits), qps, np.array(latency), np.array(compute), np.array(host),
        np.array(busy), counters, spans, tiers.fast_bytes,
    )  # fmt: skip


class Shown(NamedTuple):
    """What figures show of one format.

    Attributes:
      plan: where tables or rows lie.
      spans: of the last queries.
      curve: sizes of a cache and hit rates.
      device: on which predictions rest.
    """

    plan: placement.Placement | placement.RowSplit
    spans: list[Span]
    curve: tuple[np.ndarray, np.ndarray]
    device: sdm.DeviceProfile


def compared(
    config: Mapping[str, Any], found: Problem, params: Any, store: sdm.Store, used: Use
) -> tuple[dict[str, Any], Shown]:
    """Serves a store under the budget of memory and whole in memory: a row of the comparison, and what is drawn.

    Raises:
      RuntimeError: if the two do not give the same bits.
    """
    choice = chosen(config, store, used)
    with sdm.Tiers(store, "memory", canonical=choice.settings["pooled_bytes"] > 0) as tiers:
        memory = served(config, found, params, tiers)
    with sdm.Tiers(store, **choice.settings) as tiers:
        ours = served(config, found, params, tiers)
        block = tiers.reader.block
    # On an accelerator the two are different programs around the same vectors.
    if jax.default_backend() == "cpu" and not np.array_equal(memory.logits, ours.logits):
        raise RuntimeError(f"{store}: tiers and memory give other scores; please report this")
    largest = max(store.tables, key=lambda table: table.size)
    device = sdm.PRESETS[config["device"]] if config["device"] != "measured" else sdm.calibrate(largest.path.parent)
    cores = len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else None
    predicted = sdm.predict(
        choice.needs, device, compute_seconds=float(ours.compute.mean()), host_seconds=float(ours.host.mean()),
        busy_seconds=float(ours.busy.mean()), cores=cores,
        depth=config["serving"]["queue_depth"], block=block, packing=store.packing,
    )  # fmt: skip
    total = sum(table.spec.rows * table.spec.format.row_bytes for table in store.tables)
    needs = [sdm.TableNeed(table.spec.name, table.spec.rows, table.spec.format.row_bytes, 1) for table in store.tables]
    counted = ours.counters
    row = {
        "kind": store.tables[0].spec.format.kind,
        "table_bytes": total,
        "fast_bytes": ours.fast_bytes,
        "qps": ours.qps,
        "qps_in_memory": memory.qps,
        "qps_foretold": predicted.qps,
        "bound": predicted.bound,
        "p50": float(np.quantile(ours.latency, 0.5)),
        "p99": float(np.quantile(ours.latency, 0.99)),
        "p99_in_memory": float(np.quantile(memory.latency, 0.99)),
        "hit_rate": counted.hit_rate,
        "pooled_hit_rate": counted.pooled_hits / max(1, counted.bags),
        "reads": counted.requests / counted.queries,
        "reads_foretold": predicted.reads.requests,
        "bytes": counted.bytes / counted.queries,
        "tiers": choice.tiers,
        "pinned_rows": {name: len(ids) for name, ids in choice.pinned.items()},
    }
    return row, Shown(choice.plan, ours.spans, hit_curve(used, needs, total), device)


def accuracy(found: Problem, params: Any, folder: pathlib.Path, examples: int) -> dlrm.Evaluation:
    """How good the queries' scores are with the tables of a store."""
    score = lookup.scorer(found.architecture, found.bags, examples)
    with sdm.open_store(folder) as store, sdm.Tiers(store, "memory") as tiers:
        logits = [np.asarray(one) for _, one in lookup.serve(tiers, score, params, found.queries)]
    return dlrm.score(np.concatenate(logits), found.labels)
