"""Profiles against closed forms, and a calibration against a device that is known."""

import dataclasses
import math
import os

import numpy as np
import pytest

from jaxeff.sdm import device
from jaxeff.sdm.device import PRESETS, DeviceProfile, calibrate


def profile(depths=(1, 4, 16), rates=(1e4, 3e4, 6e4), **changes):
    given = {"granularity": 512, "dwpd": 1, "watts": 10, "dollars_per_gb": 0.1, "capacity_bytes": 1e12}
    return DeviceProfile("some", depths, rates, **{**given, **changes})


def test_between_known_depths_the_curve_is_straight_on_logarithmic_scales():
    some = profile()
    assert [some.iops(depth) for depth in (1, 4, 16)] == pytest.approx([1e4, 3e4, 6e4])
    assert some.iops(2) == pytest.approx(math.sqrt(1e4 * 3e4))
    assert some.iops(0.5) == 5e3 and some.latency(0.5) == some.latency(1) == pytest.approx(1e-4)
    assert some.iops(160) == pytest.approx(6e4) and some.latency(160) == pytest.approx(160 / 6e4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_obey_the_laws_of_queues(name):
    one = PRESETS[name]
    depths = np.geomspace(1, 4096, 40)
    rates, waits = np.array([one.iops(d) for d in depths]), np.array([one.latency(d) for d in depths])
    np.testing.assert_allclose(rates * waits, depths)
    assert np.all(np.diff(rates) >= -1e-6 * rates[1:]) and np.all(np.diff(waits) >= -1e-12)
    assert one.latency(1) <= 4 * one.latency(0.01) and one.peak == pytest.approx(one.iops(4096))
    assert one.granularity in (64, 512, 4096) and "ours" in one.origin


def test_presets_are_ordered_as_the_technologies_are():
    order = ("nand", "znand", "optane", "optane_dimm")
    waits = [PRESETS[name].latency(1) for name in order]
    wear = [PRESETS[name].dwpd for name in order]
    prices = [PRESETS[name].dollars_per_gb for name in order]
    assert waits == sorted(waits, reverse=True) and wear == sorted(wear) and prices == sorted(prices)


def test_a_curve_of_two_numbers_starts_at_the_latency_and_ends_at_the_rate():
    rates = device.curve(1e-3, 1e5, (1e-3, 1, 1e5))
    assert rates == pytest.approx((1.0, 1000, 1e5), rel=1e-3)


def test_the_knee_is_the_least_depth_that_gives_the_share():
    some = profile()
    assert [some.knee(share) for share in (0.1, 0.5, 0.51, 1)] == [1, 4, 16, 16]
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, got 0"):
        some.knee(0)


BAD = {
    "depths and rates must be equally many, got 3 and 2": {"rates": (1, 2)},
    "depths must be above 0 and increase": {"depths": (1, 1, 2)},
    "rates must be above 0, got -1": {"rates": (-1, 2, 3)},
    "dwpd must be above 0, got 0": {"dwpd": 0},
    "watts must not be negative, got -1": {"watts": -1},
    "dollars_per_gb must not be negative, got nan": {"dollars_per_gb": float("nan")},
}


@pytest.mark.parametrize("message", BAD)
def test_profiles_that_make_no_sense_are_refused(message):
    with pytest.raises(ValueError, match=f"some: {message}"):
        profile(**BAD[message])


def test_no_depth_has_no_rate():
    with pytest.raises(ValueError, match="depth must be above 0 outstanding reads, got 0"):
        profile().iops(0)


class Clock:
    """Time in which a device that is known reads: each read takes 1 ms alone, and 8 at a time are as fast as one."""

    def __init__(self):
        self.now = 0.0
        self.sizes = []

    def reader(self, paths, *, queue_depth, **_):
        outer = self

        class Reader:
            name, direct, block = "known", True, 4096

            def gather(self, files, offsets, length, out):
                assert len(np.unique(offsets // 8192)) == len(offsets) and not np.any(offsets % 8192)
                outer.sizes.append(len(files))
                outer.now += len(files) * 1e-3 / min(queue_depth, 8)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        return Reader()


def test_calibration_finds_the_curve_of_a_known_device(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(device, "open_reader", clock.reader)
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock.now)
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 2**28)
    found = calibrate(path, depths=(1, 2, 8, 32), seconds=0.1, repeats=2, like=PRESETS["optane"])
    assert found.rates == pytest.approx((1000, 2000, 8000, 8000))
    assert (found.name, found.granularity, found.dwpd) == ("measured", 4096, PRESETS["optane"].dwpd)
    assert found.origin.startswith("measured by known, directly") and "3DXP Optane SSD" in found.origin
    assert found.knee() == 8
    # No more is read than the time takes.
    assert max(clock.sizes) <= 8000 * 0.1 + 1


@pytest.mark.parametrize("direct", ["auto", False])
def test_calibration_in_a_folder_leaves_nothing_behind(tmp_path, direct):
    found = calibrate(tmp_path, depths=(1, 4), seconds=1e-4, repeats=1, size=2**21, direct=direct)
    assert found.depths == (1, 4) and min(found.rates) > 0
    assert not list(tmp_path.iterdir())
    assert dataclasses.replace(found, name="mine").name == "mine"


def test_calibration_refuses_what_it_cannot_measure(tmp_path):
    (tmp_path / "small").write_bytes(b"x" * 5000)
    with pytest.raises(ValueError, match=r"path must be a file of at least \d+ bytes to measure, got 5000"):
        calibrate(tmp_path / "small")
    with pytest.raises(ValueError, match=r"depths must be at least one, from 1 up and increasing, got \(4, 2\)"):
        calibrate(tmp_path, depths=(4, 2))
    with pytest.raises(ValueError, match="repeats must be at least 1 and seconds above 0, got 0 and 0.1"):
        calibrate(tmp_path, repeats=0)
