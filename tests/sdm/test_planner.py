"""Demand of tables and bounds of a host: closed forms, and blocks counted one by one."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.sdm import demand, forecast, planner
from jaxeff.sdm.demand import HitCurve, TableNeed
from jaxeff.sdm.device import PRESETS, DeviceProfile
from jaxeff.sdm.io.blocks import MAX_REQUEST

USER = TableNeed("user", rows=1000, row_bytes=128, pooling=30, hit_rate=0.9)
ITEM = TableNeed("item", rows=500, row_bytes=64, pooling=2, batch_items=100)


# Reads take 100 microseconds until 40 are outstanding, and then share 400,000 per second.
DEVICE = DeviceProfile("line", (1, 40), (1e4, 4e5), 512, dwpd=3, watts=10, dollars_per_gb=0.1, capacity_bytes=1e12)


def test_a_host_that_computes_too_loses_what_fetching_takes():
    table = TableNeed("t", 1000, 256, 10.0)
    alone = planner.predict([table], PRESETS["optane"], compute_seconds=2e-3, host_seconds=1e-3)
    shared = planner.predict([table], PRESETS["optane"], compute_seconds=2e-3, host_seconds=1e-3, cores=4)
    assert alone.bound == "compute" and alone.qps == pytest.approx(500)
    assert shared.bound == "cores" and shared.qps == pytest.approx(1 / (2e-3 + 1e-3 / 4))
    busy = planner.predict([table], PRESETS["optane"], compute_seconds=2e-3, cores=2, busy_seconds=4e-3)
    assert busy.qps == pytest.approx(250)
    with pytest.raises(ValueError, match="cores"):
        planner.predict([table], PRESETS["optane"], compute_seconds=1.0, cores=0)


def test_demand_follows_the_formulas():
    assert demand.bandwidth(ITEM, 50) == 50 * 100 * 2 * 64
    assert demand.row_rate(USER, 50) == 1500
    assert demand.slow_rate([USER, ITEM], 50) == pytest.approx(50 * (30 * 0.1 + 200))
    assert demand.bus_rate([USER], 50, 4096) == pytest.approx(50 * 30 * 0.1 * 4096)
    assert USER.size == 128_000 and USER.misses == pytest.approx(3)
    assert dataclasses.replace(ITEM, distinct=0.25).unique == 50


def test_read_amplification_of_the_devices():
    assert demand.read_amplification(128, 4096) == 32
    assert demand.read_amplification(128, 512) == 4
    assert demand.read_amplification(128, 64) == 1


@settings(max_examples=60, deadline=None)
@given(row_bytes=st.integers(1, 700), block=st.sampled_from([1, 64, 100, 512]))
def test_blocks_of_a_row_are_those_counted_over_a_period(row_bytes, block):
    starts = np.arange(block // math.gcd(block, row_bytes)) * row_bytes
    touched = (starts + row_bytes - 1) // block - starts // block + 1
    assert demand.blocks_of_a_row(row_bytes, block) == pytest.approx(touched.mean())
    assert demand.blocks_of_a_row(row_bytes, block, "block") == -(-row_bytes // block)


@pytest.mark.parametrize(("row_bytes", "block"), [(72, 512), (128, 512), (40, 64), (700, 512)])
@pytest.mark.parametrize("packing", demand.PACKINGS)
@pytest.mark.parametrize("read", [1, 20, 150, 500])
def test_expected_reads_are_those_counted(row_bytes, block, packing, read):
    rows = 500
    rng = np.random.default_rng(0)
    starts = np.arange(rows) * row_bytes
    if packing == "block":
        per = max(1, block // row_bytes)
        starts = np.arange(rows) // per * (-(-row_bytes // block) * block) + np.arange(rows) % per * row_bytes
    counted = []
    for _ in range(60):
        ids = rng.choice(rows, read, replace=False)
        first, last = starts[ids] // block, (starts[ids] + row_bytes - 1) // block
        blocks = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]))
        counted.append((1 + np.count_nonzero(np.diff(blocks) > 1), len(blocks)))
    found = demand.expected_reads(read, rows, row_bytes, block, packing, longest=1 << 30)
    requests, blocks = np.mean(counted, 0)
    assert found.blocks == pytest.approx(blocks, rel=0.05) and found.bytes == found.blocks * block
    # Where most blocks are touched runs are few, and a share of them says little.
    assert found.requests == pytest.approx(requests, rel=0.1, abs=2.5)


def test_a_table_read_whole_is_as_many_requests_as_the_longest_needs():
    found = demand.expected_reads(8192, 8192, 128, 512)
    assert found.blocks == 2048 and found.requests == 2048 * 512 / MAX_REQUEST == 8
    assert demand.expected_reads(0, 10, 128, 512) == (0, 0, 0)
    assert demand.expected_reads(0.01, 10**6, 128, 512).requests == pytest.approx(0.01, rel=1e-3)


def test_seconds_of_reads_in_waves_and_in_a_full_queue():
    assert planner.read_seconds(DEVICE, 100, 40) == pytest.approx(100 / 400e3)
    assert planner.read_seconds(DEVICE, 100, 40, waves=True) == pytest.approx(3 * 100e-6)
    assert planner.read_seconds(DEVICE, 80, 40, waves=True) == pytest.approx(2 * 100e-6)
    assert planner.read_seconds(DEVICE, 3, 40) == pytest.approx(100e-6)
    assert planner.read_seconds(DEVICE, 0.5, 40) == pytest.approx(50e-6)
    assert planner.read_seconds(DEVICE, 0, 40) == 0


def test_reads_hide_behind_the_longer_of_items_and_bottom():
    assert planner.hidden_margin(3e-3, 4e-3, 1e-3) == pytest.approx(1e-3)
    assert planner.hidden_margin(3e-3, 1e-3, 2e-3, slack=0.5e-3) == pytest.approx(-0.5e-3)


def test_the_least_bound_binds():
    big = dataclasses.replace(USER, rows=10**8, hit_rate=0.0)
    compute = planner.predict([big], DEVICE, compute_seconds=0.01)
    assert compute.bound == "compute" and compute.qps == pytest.approx(100)
    assert compute.rows == 30 and compute.reads.requests == pytest.approx(30, rel=1e-3)
    assert compute.bounds["fetch"] == pytest.approx(1 / compute.read_seconds)
    assert compute.seconds == pytest.approx(0.01 + 100e-6, rel=1e-3)

    fetch = planner.predict([big], DEVICE, compute_seconds=1e-6, host_seconds=1e-3)
    assert fetch.bound == "fetch" and fetch.qps == pytest.approx(1 / 1.1e-3, rel=1e-3)

    many = planner.predict([dataclasses.replace(big, pooling=400)], DEVICE, compute_seconds=1e-6, streams=8)
    assert many.bound == "iops" and many.qps == pytest.approx(400e3 / 400, rel=1e-3)

    bus = planner.predict([big], DEVICE, compute_seconds=1e-6, bus_bytes_per_second=30 * 512 * 7)
    assert bus.bound == "bus" and bus.qps == pytest.approx(7, rel=1e-3)

    serial = planner.predict([big], DEVICE, compute_seconds=1e-4, overlap=False)
    assert serial.bound == "serial" and serial.qps == pytest.approx(5000, rel=1e-3)

    nothing = planner.predict([], DEVICE, compute_seconds=0.01)
    assert nothing.qps == 100 and nothing.bounds["iops"] == math.inf and nothing.rows == 0


def test_queries_within_their_time_load_the_device_no_deeper():
    big = dataclasses.replace(USER, rows=10**8, hit_rate=0.0)
    asked = {"compute_seconds": 1e-5, "streams": 64}
    # 30 reads at once, each 2e-4 s where 80 are outstanding: that depth is reached at all 400,000 reads per second.
    loose = planner.predict([big], DEVICE, sla_seconds=2.1e-4, **asked)
    assert loose.bounds["latency"] == pytest.approx(400e3 / 30, rel=1e-3)
    tight = planner.predict([big], DEVICE, sla_seconds=1.0e-4, **asked)
    assert tight.bound == "latency" and tight.qps == 0
    unloaded = planner.predict([dataclasses.replace(big, pooling=2)], DEVICE, sla_seconds=1.1e-4 + 1e-9, **asked)
    assert unloaded.bounds["latency"] == pytest.approx(400e3 / 2, rel=1e-2)
    slow_tail = planner.predict([big], DEVICE, sla_seconds=2.1e-4, tail=2.0, **asked)
    assert slow_tail.bounds["latency"] == 0


def test_independent_work_hides_reads():
    big = dataclasses.replace(USER, rows=10**8, hit_rate=0.0)
    found = planner.predict([big], DEVICE, compute_seconds=1e-3, independent_seconds=4e-4)
    assert found.seconds == pytest.approx(1e-3)


def test_hit_rates_of_a_shared_cache_come_from_what_was_measured():
    rng = np.random.default_rng(0)
    queries, ids = np.repeat(np.arange(200), 10), rng.zipf(1.3, 2000) % 300
    measured = dict(zip("ab", forecast.measure(queries, np.arange(2000) % 2, ids, 2), strict=True))
    tables = [TableNeed(name, rows=300, row_bytes=64, pooling=1) for name in "ab"]
    found = planner.with_hit_rates(tables, 5000, measured=measured, entry_bytes=8)
    lru = forecast.forecast_lru([measured[name].popularity for name in "ab"], [72, 72], [5000])
    for table, misses in zip(found, lru.misses[:, 0], strict=True):
        assert table.pooling == 5 and table.misses == pytest.approx(misses)


def test_curves_count_for_hits_and_what_was_measured_for_look_ups():
    (measured,) = forecast.measure([0, 0, 0, 1], [0, 0, 0, 0], [7, 7, 8, 7], 1)
    curve = HitCurve([10], [0.5])
    (found,) = planner.with_hit_rates([ITEM], 10, measured={"item": measured}, curves=curve)
    assert found.lookups == pytest.approx(2) and found.unique == pytest.approx(1.5)
    assert found.misses == pytest.approx(0.75)


def test_hit_rates_of_curves():
    curve = HitCurve(np.array([100.0, 300.0]), np.array([0.4, 0.8]))
    assert [curve.at(size) for size in (0, 50, 200, 1000)] == pytest.approx([0, 0.2, 0.6, 0.8])
    shared = planner.with_hit_rates([USER, ITEM], 200, curves=curve)
    assert [table.hit_rate for table in shared] == pytest.approx([0.6, 0.6])
    own = planner.with_hit_rates([USER, ITEM], {"user": 0, "item": 100}, curves={"user": curve, "item": curve})
    assert [table.hit_rate for table in own] == pytest.approx([0, 0.4])


def test_a_cold_cache_costs_the_area_above_the_warm_one():
    assert planner.warm_up_seconds([0, 10, 20], [0.3, 0.1, 0.1]) == pytest.approx(1.0)
    assert planner.capacity_while_warming(50, 200, 0.1) == pytest.approx(0.925)


def test_wear_and_the_interval_that_it_allows_are_inverse():
    needed = planner.drive_writes_per_day(1e11, 3600, 4e11, write_amplification=2)
    assert needed == pytest.approx(24 * 0.25 * 2)
    interval = planner.shortest_update_interval(1e11, 4e11, 3, write_amplification=2)
    assert planner.drive_writes_per_day(1e11, interval, 4e11, write_amplification=2) == pytest.approx(3)
    assert planner.shortest_update_interval(1e11, 4e11, math.inf) == 0


def test_an_incremental_update_writes_the_blocks_that_change():
    table = TableNeed("t", rows=10**6, row_bytes=128, pooling=1)
    assert demand.updated_bytes(table, 1, 4096) == table.size
    assert demand.updated_bytes(table, 0, 4096) == 0
    # 32 rows share a block: it is spared where none of them changes.
    expected = table.size * (1 - 0.99**32)
    assert demand.updated_bytes(table, 0.01, 4096) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: TableNeed("t", 0, 1, 1), "rows of table 't'"),
        (lambda: TableNeed("t", 1, -4, 1), "row_bytes of table 't'"),
        (lambda: TableNeed("t", 1, 1, math.nan), "pooling"),
        (lambda: TableNeed("t", 1, 1, 1, hit_rate=1.1), "hit_rate of table 't' must be from 0 to 1, got 1.1"),
        (lambda: HitCurve([1, 2], [0.1, 1.2]), "hit_rates must be from 0 to 1"),
        (lambda: HitCurve([2, 1], [0.1, 0.2]), "sizes must ascend"),
        (lambda: HitCurve([1, 2], [0.1]), "one length"),
        (lambda: demand.bandwidth(USER, -1), "qps"),
        (lambda: demand.blocks_of_a_row(1, 1, "loose"), "packing"),
        (lambda: demand.blocks_of_a_row(0, 1), "row_bytes"),
        (lambda: demand.expected_reads(11, 10, 1, 1), "read must be from 0 to rows"),
        (lambda: planner.read_seconds(DEVICE, -1, 4), "requests"),
        (lambda: planner.read_seconds(DEVICE, 1, 0), "depth"),
        (lambda: planner.with_hit_rates([USER], 1), "a forecast needs measured"),
        (lambda: planner.with_hit_rates([USER], 1, measured={}), r"measured must .* nothing for \['user'\]"),
        (lambda: planner.with_hit_rates([USER], {"user": 1}, curves={}), r"nothing for \['user'\]"),
        (lambda: planner.predict([USER], DEVICE, compute_seconds=-1), "compute_seconds"),
        (lambda: planner.predict([USER], DEVICE, compute_seconds=1, independent_seconds=2), "independent_seconds"),
        (lambda: planner.predict([USER], DEVICE, compute_seconds=1, depth=0), "depth"),
        (lambda: planner.predict([USER], DEVICE, compute_seconds=1, tail=0.5), "tail"),
        (lambda: planner.warm_up_seconds([0, 0], [1, 1]), "moments must ascend"),
        (lambda: planner.capacity_while_warming(3, 2, 0.5), "cold_qps"),
        (lambda: planner.capacity_while_warming(1, 2, 1.5), "part"),
        (lambda: planner.drive_writes_per_day(1, 0, 1), "interval_seconds"),
        (lambda: planner.drive_writes_per_day(1, 1, 1, write_amplification=0.5), "write_amplification"),
        (lambda: planner.shortest_update_interval(1, 1, 0), "rated_dwpd"),
        (lambda: demand.updated_bytes(USER, 2, 512), "share"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
