"""Figures are written and hold what they were given."""

import numpy as np
import pytest

from jaxeff import dynamic
from jaxeff.dynamic import figures

pytest.importorskip("matplotlib")


def test_figures_are_written(tmp_path):
    times = {"dense": 2e-3, "mask": 2.1e-3, "engine": 1e-3}
    rows = [dynamic.LayerSpeed(f"conv{i}/layer", "", "ops", "channels", times, 2.0, 1.0 + i / 8) for i in range(1, 8)]
    accuracy = np.linspace(0.9, 0.1, 2 * 5 * 4).reshape(2, 5, 4)
    found = dynamic.Sensitivity((0.0, 0.3, 0.6, 0.9), accuracy, tuple(f"block {i}" for i in range(5)))
    for path in (
        figures.draw_speed(dynamic.SpeedReport(tuple(rows)), tmp_path / "new" / "speed.png"),
        figures.draw_sensitivity(found, tmp_path / "new" / "sensitivity.png"),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")
