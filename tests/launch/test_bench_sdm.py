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
                scores.append(jax.device_get(work.score(work.params, work.dense, staged.arrays, staged.layout)))
            np.testing.assert_array_equal(*scores)
            assert tiers.counters.hit_rate > 0 and tiers.fast_bytes <= 0.3 * work.table_bytes
