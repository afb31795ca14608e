"""What a host can bear: seconds of a query, queries per second and the bound that binds, warm-up and wear.

All functions are pure; times are in seconds, sizes in bytes, and whatever is "of a query" is an average. What tables
demand is in `jaxeff.sdm.demand`; what a cache will hit comes from a measured curve or from `jaxeff.sdm.forecast`:

    tables = with_hit_rates(tables, cache_bytes, measured=measured)
    found = predict(tables, device, compute_seconds=0.002)
    found.qps, found.bound, found.reads.requests

The bounds follow "Supporting Massive DLRM Inference Through Software Defined Memory" (arXiv 2110.11489) as recalled;
how the curves of a device make seconds of a query is ours.

Letters: K moments.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxeff.sdm.demand import HitCurve, Reads, TableNeed, check_least, check_positive, check_share, expected_reads
from jaxeff.sdm.device import DeviceProfile
from jaxeff.sdm.forecast import Measured, forecast_lru

DAY = 86400.0


class Prediction(NamedTuple):
    """What a host does with a query.

    Attributes:
      rows: distinct rows of a query that are read from slow memory.
      reads: what the device does for them.
      read_seconds: of them, the device otherwise idle.
      seconds: of a query, on an idle host.
      qps: queries per second that the host sustains: the least bound.
      bound: the name of that bound.
      bounds: queries per second that each bound alone would allow, by name: "compute", "fetch" (the reads of one query
        after those of another), "serial" in place of both where they do not overlap, "cores" of a host that fetches and
        computes, "iops", "bus" and "latency".
      tables: as given, with the hit rates that were used.
    """

    rows: float
    reads: Reads
    read_seconds: float
    seconds: float
    qps: float
    bound: str
    bounds: Mapping[str, float]
    tables: tuple[TableNeed, ...]


def read_seconds(device: DeviceProfile, requests: float, depth: int, *, waves: bool = False) -> float:
    """Seconds that a device, otherwise idle, needs for the reads of a query.

    Args:
      device: with its loaded-latency curve.
      requests: of the query; below 1 where not every query reads.
      depth: most that may be outstanding.
      waves: True if `depth` more begin only when all of the last have come, the form that we recall of the paper; False
        for a queue that is kept full.

    Raises:
      ValueError: for negative requests or a depth below 1.
    """
    check_least("requests", requests)
    check_least("depth", depth, 1)
    outstanding = min(max(requests, 1.0), depth)
    turns = requests / outstanding
    return (math.ceil(turns - 1e-9) if waves else turns) * device.latency(outstanding)


def hidden_margin(user_seconds: float, item_seconds: float, bottom_seconds: float, slack: float = 0.0) -> float:
    """Seconds by which reads of slow memory hide behind what runs beside them; negative where they do not.

    Args:
      user_seconds: of the tables in slow memory.
      item_seconds: of those in fast memory.
      bottom_seconds: of the bottom MLP.
      slack: by which a query may be longer.
    """
    for name, value in (("user_seconds", user_seconds), ("item_seconds", item_seconds)):
        check_least(name, value)
    check_least("bottom_seconds", bottom_seconds)
    return max(item_seconds, bottom_seconds) + check_least("slack", slack) - user_seconds


def with_hit_rates(
    tables: Sequence[TableNeed],
    cache_bytes: float | Mapping[str, float],
    *,
    measured: Mapping[str, Measured] | None = None,
    curves: HitCurve | Mapping[str, HitCurve] | None = None,
    entry_bytes: int = 0,
) -> tuple[TableNeed, ...]:
    """Tables as a trace uses them, with the hit rates that a cache gives them.

    Args:
      tables: of slow memory, those that use the cache.
      cache_bytes: of the one cache that they share; or of the part of each, by name.
      measured: how a trace uses each table, by name, of `jaxeff.sdm.forecast.measure`: pooling and repeats are taken
        from it, and without curves the hit rates of an LRU cache that they share are forecast.
      curves: hit rates against bytes, of all tables alike or of each by name; None for the forecast.
      entry_bytes: that the cache of the forecast keeps beside each row.

    Raises:
      ValueError: for neither measured nor curves, parts of a cache without curves, tables that are not named, or names
        of no table.
    """
    names = [table.name for table in tables]
    if measured is not None:
        _check_names("measured", measured, names)
        tables = [_as_measured(table, measured[table.name]) for table in tables]
    if curves is None:
        if measured is None or isinstance(cache_bytes, Mapping):
            raise ValueError("a forecast needs measured, and cache_bytes of one cache that all share; else give curves")
        if not tables:
            return ()
        rates = forecast_lru(
            [measured[name].popularity for name in names],
            [table.row_bytes + entry_bytes for table in tables],
            [cache_bytes],
        ).hit_rates[:, 0]
        return tuple(dataclasses.replace(one, hit_rate=float(rate)) for one, rate in zip(tables, rates, strict=True))
    parts = cache_bytes if isinstance(cache_bytes, Mapping) else dict.fromkeys(names, cache_bytes)
    known = curves if isinstance(curves, Mapping) else dict.fromkeys(names, curves)
    _check_names("curves", known, names)
    _check_names("cache_bytes", parts, names)
    return tuple(dataclasses.replace(table, hit_rate=known[table.name].at(parts[table.name])) for table in tables)


def predict(
    tables: Sequence[TableNeed],
    device: DeviceProfile,
    *,
    compute_seconds: float,
    independent_seconds: float = 0.0,
    host_seconds: float = 0.0,
    depth: int = 128,
    streams: int = 1,
    block: int | None = None,
    packing: str = "dense",
    overlap: bool = True,
    bus_bytes_per_second: float = math.inf,
    sla_seconds: float | None = None,
    tail: float = 1.0,
    cores: int | None = None,
    busy_seconds: float | None = None,
) -> Prediction:
    """Predicts reads, time and queries per second of a host whose slow memory holds some tables.

    Args:
      tables: of slow memory, with their hit rates: of `with_hit_rates`, or known.
      device: that they lie on.
      compute_seconds: of a query, in which the model runs.
      independent_seconds: of these, what needs no row of slow memory and may run beside its own reads: the bottom MLP,
        and the bags in fast memory.
      host_seconds: of a query, in which the host looks up its cache and prepares reads; part of the fetch.
      depth: most reads outstanding.
      streams: queries that fetch at the same time.
      block: bytes of the smallest read; None for the granularity of the device.
      packing: of rows in blocks, as of `blocks_of_a_row`.
      overlap: whether the rows of the next query are fetched while one is computed.
      bus_bytes_per_second: of the bus of the device.
      sla_seconds: that a query may take at most; None for no such bound.
      tail: how many times the mean the slow queries are that must meet it.
      cores: of the host where it computes the model, too, on all of them: fetching then takes from computing. None
        where an accelerator computes.
      busy_seconds: of one core for fetching a query, the submission of reads included; None for `host_seconds`.

    Returns:
      The prediction. A host that an agreement of `sla_seconds` can never meet has a latency bound of 0.

    Raises:
      ValueError: for negative times or rates, depth or streams below 1, or what `blocks_of_a_row` refuses.
    """
    for name, value in (("compute_seconds", compute_seconds), ("independent_seconds", independent_seconds)):
        check_least(name, value)
    for name, value in (("host_seconds", host_seconds), ("bus_bytes_per_second", bus_bytes_per_second)):
        check_least(name, value)
    for name, value in (("depth", depth), ("streams", streams), ("tail", tail)):
        check_least(name, value, 1)
    if independent_seconds > compute_seconds:
        raise ValueError(
            f"independent_seconds is a part of compute_seconds, got {independent_seconds} of {compute_seconds}"
        )
    block = device.granularity if block is None else block
    each = [
        expected_reads(min(table.misses, table.rows), table.rows, table.row_bytes, block, packing) for table in tables
    ]
    reads = Reads(*(float(sum(values)) for values in zip(*each, strict=True))) if each else Reads(0.0, 0.0, 0.0)
    alone = read_seconds(device, reads.requests, depth)
    fetch = host_seconds + alone
    # All streams together have no more than `depth` outstanding, and share what the device gives at that depth.
    together = min(float(depth), streams * max(1.0, reads.requests))
    bounds = {
        "iops": _rate(reads.requests, device.iops(together)),
        "bus": _rate(reads.bytes, bus_bytes_per_second),
    }
    if overlap:
        bounds |= {"compute": _rate(compute_seconds), "fetch": streams * _rate(fetch)}
    else:
        bounds["serial"] = _rate(compute_seconds + fetch)
    busy = check_least("busy_seconds", host_seconds if busy_seconds is None else busy_seconds)
    if cores is not None:
        check_least("cores", cores, 1)
        bounds["cores"] = _rate(compute_seconds + busy / cores)
    if sla_seconds is not None:
        check_least("sla_seconds", sla_seconds)
        rest = host_seconds + compute_seconds - independent_seconds

        def slowest(depth_in_use: float) -> float:
            turns = reads.requests / min(max(reads.requests, 1.0), depth)
            return tail * (rest + max(independent_seconds, turns * device.latency(depth_in_use)))

        bounds["latency"] = _within(slowest, sla_seconds, reads.requests, device, depth)
    bound = min(bounds, key=lambda name: bounds[name])
    return Prediction(
        rows=sum(table.misses for table in tables),
        reads=reads,
        read_seconds=alone,
        seconds=host_seconds + max(alone, independent_seconds) + compute_seconds - independent_seconds,
        qps=bounds[bound],
        bound=bound,
        bounds=bounds,
        tables=tuple(tables),
    )


def warm_up_seconds(moments: Any, seconds: Any) -> float:
    """Seconds of work that an empty cache costs a host beyond those of a warm one.

    Args:
      moments: [K], queries served since the load or update, ascending.
      seconds: [K], that the host needs for a query then; the last is that of a warm cache. From misses of
        `jaxeff.sdm.forecast.forecast_warm_up` it is 1 / qps of `predict`.

    Raises:
      ValueError: for arrays of different length, or moments that do not ascend.
    """
    moments, seconds = np.asarray(moments, np.float64), np.asarray(seconds, np.float64)
    if moments.shape != seconds.shape or moments.ndim != 1 or len(moments) < 2 or not (np.diff(moments) > 0).all():
        raise ValueError(
            f"moments must ascend, with seconds of each, at least 2, got {moments.shape} and {seconds.shape}"
        )
    return float(np.trapezoid(seconds - seconds[-1], moments))


def capacity_while_warming(cold_qps: float, warm_qps: float, part: float) -> float:
    """Share of a fleet's queries per second that is left while a part of its hosts is cold.

    Args:
      cold_qps: of a host with an empty cache.
      warm_qps: of a warm host.
      part: of the hosts, 1/n in a rolling update of n steps.

    Raises:
      ValueError: for a part outside 0 to 1, or a cold host that is faster than a warm one.
    """
    check_share("part", part)
    if not 0 <= cold_qps <= warm_qps or warm_qps <= 0:
        raise ValueError(f"cold_qps must be from 0 to warm_qps, got {cold_qps} and {warm_qps}")
    return 1 - part * (1 - cold_qps / warm_qps)


def drive_writes_per_day(
    update_bytes: float, interval_seconds: float, capacity_bytes: float, *, write_amplification: float = 1.0
) -> float:
    """How often the capacity of a device is written in a day.

    Args:
      update_bytes: of one update.
      interval_seconds: between updates.
      capacity_bytes: of all drives that share the writes.
      write_amplification: bytes that the medium writes for each byte of an update.

    Raises:
      ValueError: for sizes or intervals that are not positive, or an amplification below 1.

    >>> drive_writes_per_day(1e12, 3600, 2e12)
    12.0
    """
    check_least("update_bytes", update_bytes)
    check_positive("interval_seconds", interval_seconds)
    check_positive("capacity_bytes", capacity_bytes)
    check_least("write_amplification", write_amplification, 1)
    return DAY / interval_seconds * update_bytes * write_amplification / capacity_bytes


def shortest_update_interval(
    update_bytes: float, capacity_bytes: float, rated_dwpd: float, *, write_amplification: float = 1.0
) -> float:
    """Seconds between updates that a device with so many drive writes per day endures.

    Args:
      update_bytes: of one update.
      capacity_bytes: of all drives that share the writes.
      rated_dwpd: drive writes per day for which the device is rated; infinite where writing does not wear it.
      write_amplification: as of `drive_writes_per_day`.

    Raises:
      ValueError: as `drive_writes_per_day`.
    """
    at_one_a_day = drive_writes_per_day(update_bytes, DAY, capacity_bytes, write_amplification=write_amplification)
    if not rated_dwpd > 0:
        raise ValueError(f"rated_dwpd must be above 0, got {rated_dwpd}")
    return DAY * at_one_a_day / rated_dwpd


def _within(seconds_at: Any, limit: float, requests: float, device: DeviceProfile, depth: int) -> float:
    """Queries per second at the deepest queue with which a query takes no longer than the limit."""
    alone = min(max(requests, 1.0), depth)
    if seconds_at(alone) > limit:
        return 0.0
    if seconds_at(float(depth)) <= limit:
        return _rate(requests, device.iops(depth))
    low, high = alone, float(depth)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds_at(middle) <= limit else (low, middle)
    return _rate(requests, device.iops(low))


def _rate(each: float, per_second: float = 1.0) -> float:
    """Queries per second where each takes so much of what there is per second."""
    return per_second / each if each > 0 else math.inf


def _as_measured(table: TableNeed, measured: Measured) -> TableNeed:
    if not measured.lookups:
        return dataclasses.replace(table, pooling=0.0, distinct=1.0)
    if not table.batch_items:
        raise ValueError(f"table {table.name!r} has no bags (batch_items is 0), but the trace reads it")
    # Rounding may leave a little more distinct rows than rows.
    distinct = min(1.0, measured.popularity.distinct / measured.lookups)
    return dataclasses.replace(table, pooling=measured.lookups / table.batch_items, distinct=distinct)


def _check_names(argument: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    unknown, missing = sorted(set(given) - set(names)), sorted(set(names) - set(given))
    if unknown or missing:
        raise ValueError(f"{argument} must name each table once: no table {unknown}, nothing for {missing}")
