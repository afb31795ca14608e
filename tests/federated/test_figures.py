"""Figures of federated learning are drawn for one client or class as for many."""

import numpy as np
import pytest

from jaxeff.federated import figures


def drawn(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000


def runs(seeds, rounds=3):
    one = lambda seed: {
        "accuracy": [(r + 1, 0.1 * r + 0.01 * seed) for r in range(rounds)],
        "bytes_per_round": 1e6,
    }
    return {name: [one(seed) for seed in range(seeds)] for name in ("fed_avg", "fed2")}


@pytest.mark.parametrize("seeds", [1, 3])
def test_convergence(tmp_path, seeds):
    assert drawn(figures.draw_rounds(runs(seeds), 2, tmp_path / "new" / "rounds.png"))
    partitions = {"two_classes": runs(seeds), "iid": runs(seeds, 40)}
    assert drawn(figures.draw_comparison(partitions, tmp_path / "comparison.png"))
    assert drawn(figures.draw_comparison({"iid": runs(seeds)}, tmp_path / "alone.png"))


def test_classes(tmp_path):
    assert drawn(figures.draw_classes({"fed_avg": [0.5, 1.0]}, tmp_path / "two.png"))
    many = {"fed_avg": np.linspace(0, 1, 12)}
    assert drawn(figures.draw_classes(many, tmp_path / "many.png", [f"class {i}" for i in range(12)]))


@pytest.mark.parametrize("classes", [3, 14])
def test_features(tmp_path, classes):
    maps = {"before": np.arange(2 * classes).reshape(2, classes) % classes, "after": np.zeros((2, 5), int)}
    assert drawn(figures.draw_features(maps, tmp_path / "features.png"))
    assert drawn(figures.draw_features(maps, tmp_path / "named.png", [f"c{i}" for i in range(classes)]))


def test_variance(tmp_path):
    variances = {"conv1": 0.1, "conv2": 0.2, "head": 0.9}
    assert drawn(figures.draw_variance(variances, tmp_path / "variance.png", first="head"))
    assert drawn(figures.draw_variance(variances, tmp_path / "undivided.png"))
