"""Figures of tiered memory are drawn for one thing as for many."""

import numpy as np
import pytest

from jaxeff.sdm import figures, power
from jaxeff.sdm.demand import TableNeed
from jaxeff.sdm.device import PRESETS
from jaxeff.sdm.figures import Span
from jaxeff.sdm.placement import place


def drawn(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000


def test_devices(tmp_path):
    devices = list(PRESETS.values())
    assert drawn(figures.draw_devices(devices, tmp_path / "new" / "all.png", loads={"what is needed": 3e4}))
    assert drawn(figures.draw_devices(devices[:1], tmp_path / "one.png", depth=2))


def test_placements(tmp_path):
    tables = [TableNeed(str(t), 10**t, 100, 2.0, hit_rate=0.1 * t) for t in range(1, 5)]
    placements = {f"{budget} bytes": place(tables, budget) for budget in (0, 20_000, 10**7)}
    assert drawn(figures.draw_placement(placements, tmp_path / "three.png"))
    idle = [TableNeed("idle", 10, 4, 0.0)]
    assert drawn(figures.draw_placement({"nobody reads": place(idle, 0)}, tmp_path / "one.png"))


def test_hit_rates(tmp_path):
    sizes = np.geomspace(1e3, 1e6, 30)
    curves = {"LRU": (sizes, np.linspace(0, 0.9, 30)), "CLOCK": (np.array([0, 1e4]), np.array([0, 0.3]))}
    assert drawn(
        figures.draw_hit_rates(curves, tmp_path / "two.png", bounds={"first uses miss": 0.92}, total_bytes=1e7)
    )
    assert drawn(figures.draw_hit_rates({"one size": ([5e3], [0.5])}, tmp_path / "one.png", total_bytes=1e7))


def test_timeline(tmp_path):
    serial = [
        Span(q, stage, 2 * q + i, 2 * q + i + 1) for q in range(12) for i, stage in enumerate(("fetch", "compute"))
    ]
    overlapped = [Span(q, stage, q + i, q + i + 1) for q in range(12) for i, stage in enumerate(("fetch", "compute"))]
    assert drawn(figures.draw_timeline({"serial": serial, "overlapped": overlapped}, tmp_path / "two.png"))
    assert drawn(figures.draw_timeline({"short": [Span(0, "fetch", 0, 1e-5)]}, tmp_path / "one.png"))


def test_savings(tmp_path):
    comparisons = [power.compare(scenario) for scenario in power.PUBLISHED]
    assert drawn(figures.draw_savings(comparisons, tmp_path / "three.png"))
    worse = comparisons[0]._replace(base=comparisons[0].sdm, sdm=comparisons[0].base, saving=-0.25)
    assert drawn(figures.draw_savings([worse], tmp_path / "worse.png"))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda path: figures.draw_devices([], path), "devices must not be empty"),
        (lambda path: figures.draw_placement({}, path), "placements must not be empty"),
        (lambda path: figures.draw_hit_rates({"none": ([0], [0])}, path), "sizes above 0"),
        (lambda path: figures.draw_timeline({"empty": []}, path), "runs must not be empty"),
        (lambda path: figures.draw_timeline({"x": [Span(0, "wait", 0, 1)]}, path), "a span must be one of"),
        (lambda path: figures.draw_timeline({"x": [Span(0, "fetch", 1, 0)]}, path), "stop no earlier"),
        (lambda path: figures.draw_savings([], path), "comparisons must not be empty"),
    ],
)
def test_bad_input_is_named(tmp_path, call, match):
    with pytest.raises(ValueError, match=match):
        call(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
