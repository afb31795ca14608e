"""The benchmarks of software-defined memory run on small files and traces, and name the cases of record."""

import jax
import numpy as np
import pytest

from launch.bench import results, sdm, storage, tiered


def test_every_case_of_the_room_has_a_name_of_its_own():
    wanted = {"cold_gather_ceiling", "cold_gather_memmap", "cold_gather_default_memmap", "cold_gather_rocksdb"}
    wanted |= {"cold_gather_cpu_us", "cold_gather_amplification", "cache_clock", "cache_lookahead"}
    wanted |= {"pooled.jax", "pooled.native", "pooled.int8", "layout", "tiered", "planner", "accuracy"}
    assert wanted <= set(sdm.CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cold_gather_amplification", "cold_gather_memmap", "cold_gather_cpu_us"])
def test_reading_is_measured_on_a_small_file(name):
    cases = list(storage.CASES[name](2, size=2**24, reads=200))
    for case in cases:
        results.check(case)
    assert all(case["value"] > 0 for case in cases)


@pytest.mark.parametrize(("length", "block"), [(72, 512), (256, 512), (512, 512), (1100, 512), (1100, 4096)])
def test_blocks_of_rows_are_counted_as_in_a_loop(length, block):
    rows = np.random.default_rng(length).integers(0, 400, 150)
    expected = {at // block for row in rows for at in range(row * length, (row + 1) * length)}
    assert storage.blocks_of(rows * length, length, block) == len(expected)


@pytest.mark.parametrize("predicted", [50.0, 200.0])
def test_a_prediction_that_is_half_or_twice_is_off_by_two(predicted):
    case = tiered._off("planner.qps", "queries per second", predicted, [100.0] * 3, target=1.2, against="measured")
    results.check(case)
    assert (case["value"], case["spread"], case["n"], case["better"]) == (2.0, [2.0, 2.0], 3, "lower")
    assert case["against"] == f"predicted / measured {predicted / 100:.3f}; measured"


def test_a_prediction_is_off_by_the_larger_ratio_of_each_pair():
    case = tiered._off("planner.qps", "queries per second", 100.0, [80.0, 100.0, 160.0], target=1.2, against="")
    assert case["value"] == 1.25 and case["spread"] == [1.125, 1.425]


def test_what_queries_need_of_the_device_is_a_share_of_its_ceiling():
    case = tiered.need_of(30.0, [400.0, 500.0, 600.0], 50_000.0)
    results.check(case)
    assert (case["case"], case["value"], case["spread"], case["n"]) == ("tiered_need", 0.3, [0.27, 0.33], 3)
    assert (case["better"], case["target"]) == ("lower", 0.5)


@pytest.mark.slow
def test_a_small_workload_scores_the_same_from_both_tiers():
    with tiered.Workload(queries=30, user_rows=300, item_rows=50) as work:
        with work.in_memory() as memory, work.tiered(share=0.3) as tiers:
            for one in (memory, tiers):
                assert work.run(one, 0, 10) > 0
                fetch, compute = work.one_by_one(one, 10, 20)
                assert len(fetch) == len(compute) == 10
            scores = []
            for one in (memory, tiers):
                staged = one.fetch(one.plan(work.queries[20]))
                scores.append(jax.device_get(work.score(work.params, work.dense, staged.arrays, staged.layout)[0]))
            np.testing.assert_array_equal(*scores)
            assert tiers.counters.hit_rate > 0 and tiers.fast_bytes <= 0.3 * work.table_bytes
