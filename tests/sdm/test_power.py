"""Hosts, watts, money and wear: the arithmetic by hand."""

import dataclasses
import math

import pytest

from jaxeff.sdm import power
from jaxeff.sdm.device import DeviceProfile
from jaxeff.sdm.power import Fleet, Host, Scenario

DRIVE = DeviceProfile("drive", (1,), (1e4,), 512, dwpd=3, watts=12, dollars_per_gb=0.5, capacity_bytes=400e9)
SMALL = Host("small", qps=100, power=200, dollars=5000, helpers=0.5, helper_power=50, helper_dollars=1000)


def test_published_scenarios_save_what_they_are_recalled_to_save():
    first, second, third = map(power.compare, power.PUBLISHED)
    assert first.base == (1200, 0, 1200, 0) and first.sdm.hosts == 2400
    assert first.sdm.power == pytest.approx(960) and first.saving == pytest.approx(0.20)
    assert second.base == Fleet(1500, 300, 1575, 0) and second.sdm == (1500, 0, 1500, 0)
    assert round(second.saving, 2) == 0.05
    assert 1 - third.saving == pytest.approx(0.63 / 0.90 * 1.01) and round(third.saving, 2) == 0.29
    assert {one.origin for one in power.PUBLISHED} == {"[recalled]"}


def test_a_fleet_rounds_up_and_counts_helpers():
    assert power.fleet(SMALL, 201) == (3, 2, 3 * 200 + 2 * 50, 3 * 5000 + 2 * 1000)
    assert power.fleet(SMALL, 200).hosts == 2
    assert power.fleet(SMALL, 0) == (0, 0, 0, 0)
    assert power.fleet(dataclasses.replace(SMALL, utilisation=0.5), 201).hosts == 5
    # 63000 / 0.63 is a little more than 100000 in binary: no host for that.
    assert power.fleet(Host("h", qps=1, power=1, utilisation=0.63), 63_000).hosts == 100_000


def test_drives_and_memory_add_watts_and_dollars():
    host = power.equipped(SMALL, qps=80, drive=DRIVE, drives=2, memory_gb=-64, memory_watts_per_gb=0.5,
                          memory_dollars_per_gb=3)  # fmt: skip
    assert host.qps == 80 and host.power == 200 + 2 * 12 - 32
    assert host.dollars == 5000 + 2 * 400 * 0.5 - 192
    assert host.name == "small, 2 x drive" and host.helpers == 0.5
    assert power.equipped(SMALL) == SMALL


def test_energy_costs_its_hours():
    assert power.energy_dollars(1000, dollars_per_kwh=0.1) == pytest.approx(876.6)
    assert power.energy_dollars(500, years=2, dollars_per_kwh=0.1, overhead=1.5) == pytest.approx(1.5 * 876.6)


def test_wear_is_shared_by_drives():
    hourly = power.wear(DRIVE, 2, update_bytes=100e9, interval_seconds=3600)
    assert hourly.needed == pytest.approx(24 * 100 / 800) and hourly.endures
    assert hourly.years == pytest.approx(5 * 3 / 3)
    assert not power.wear(DRIVE, 1, 100e9, 3600, write_amplification=1.5).endures
    assert power.wear(DRIVE, 1, 0, 3600).years == math.inf
    unworn = dataclasses.replace(DRIVE, dwpd=math.inf)
    assert power.wear(unworn, 1, 1e15, 60).endures


def test_scenarios_are_told_in_words():
    rows = power.scenario_table()
    assert [row["power saved"] for row in rows] == ["20 %", "5 %", "29 %"]
    assert rows[1]["hosts"] == "1,500 + 300 -> 1,500" and rows[1]["figures"] == "[recalled]"
    assert "energy of a year" not in rows[0] and "hosts cost" not in rows[0]
    mine = Scenario("mine", 200, SMALL, dataclasses.replace(SMALL, helpers=0.0, power=100))
    (row,) = power.scenario_table([mine], watts_per_unit=1, dollars_per_kwh=0.1)
    assert row == {
        "scenario": "mine",
        "QPS": "200",
        "hosts": "2 + 1 -> 2",
        "power": "450W -> 200W",
        "power saved": "56 %",
        "hosts cost": "$11k -> $10k",
        "energy of a year": "$394 -> $175",
        "figures": "given",
    }
    assert power.markdown([*rows, row]).count("\n") == 5
    assert power.markdown([{"a": "1"}, {"a": "2", "b": "3"}]).splitlines()[1:3] == ["| --- | ---: |", "| 1 |  |"]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Host("h", qps=0, power=1), "host 'h' must serve qps above 0"),
        (lambda: Host("h", qps=1, power=1, utilisation=1.2), "utilisation above 0 and at most 1"),
        (lambda: Host("h", qps=1, power=-1), "power of host 'h'"),
        (lambda: Scenario("s", -1, SMALL, SMALL), "qps of scenario 's'"),
        (lambda: power.fleet(SMALL, math.inf), "qps must be a finite number"),
        (lambda: power.equipped(SMALL, drives=1), "have a profile"),
        (lambda: power.equipped(SMALL, memory_gb=-1000, memory_watts_per_gb=1), "power of host 'small'"),
        (lambda: power.energy_dollars(1, dollars_per_kwh=0.1, overhead=0.9), "overhead at least 1"),
        (lambda: power.wear(DRIVE, 0, 1, 1), "drives must be at least 1"),
        (lambda: power.wear(DRIVE, 1, 1, 0), "interval_seconds"),
        (lambda: power.scenario_table(dollars_per_kwh=0.1), "dollars_per_kwh needs watts_per_unit"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
