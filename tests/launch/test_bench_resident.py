"""The benchmarks of resident rows run on small tables, and the contestants agree."""

import pytest

from launch.bench import resident, results, sdm

SMALL = {"tables": 3, "rows": 2000, "dim": 64, "batch": 16}


def test_its_cases_are_of_the_room():
    assert set(resident.CASES) <= set(sdm.CASES)
    assert {"gpu_tiers", "gpu_pooled"} <= set(sdm.GPU) and "resident" not in sdm.GPU


@pytest.mark.slow
def test_rows_that_stay_are_not_sent_again():
    moved, time = resident.resident(1, **SMALL)
    for case in (moved, time):
        results.check(case)
    assert 0 < moved["value"] < 0.5


@pytest.mark.slow
def test_what_a_gpu_is_asked_runs_anywhere():
    cases = list(resident.gpu_tiers(1, **SMALL))
    assert [case["case"] for case in cases[:3]] == ["gpu_tiers", "gpu_tiers.with_planning", "gpu_tiers.on_device"]
    cases += resident.gpu_pooled(1, rows=512, bags=(8, 16), length=4)
    for case in cases:
        results.check(case)
    assert sum(case["target"] == 0.6 for case in cases) == 2
