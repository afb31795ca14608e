"""Ratios under a budget against trying all of them, with counted costs and with measured ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import costs, dynamic, models, spec
from jaxeff.dynamic import DynamicSpec

PLAN = models.cnn((4, 8, 8), pools=2, input_shape=(8, 8, 1), norm=None)
GATED = dynamic.gate(PLAN, DynamicSpec())
# Two blocks (conv1 and conv2 are read by conv2 and conv3), two dimensions, three ratios.
FOUND = dynamic.Sensitivity(
    (0.0, 0.5, 0.75), np.array([[[0.9, 0.8, 0.5], [0.9, 0.88, 0.85]], [[0.9, 0.89, 0.6], [0.9, 0.91, 0.7]]]), ("a", "b")
)


@pytest.fixture(scope="module")
def report():
    network, images = models.Network(PLAN), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    return costs.analyze(network.apply, variables, images)


def test_choices_under_a_budget_are_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = [sorted(rng.integers(1, 30, 4).tolist(), reverse=True) for _ in range(4)]
        losses = [sorted(rng.random(4).round(3).tolist()) for _ in range(4)]
        budget = float(rng.integers(sum(min(row) for row in costs), sum(max(row) for row in costs) + 1))
        every = itertools.product(range(4), repeat=4)
        best = min(
            sum(loss[i] for loss, i in zip(losses, option, strict=True))
            for option in every
            if sum(cost[i] for cost, i in zip(costs, option, strict=True)) <= budget
        )
        # Whole costs and as many steps as the budget has units: nothing is rounded.
        steps = max(1, int(budget - sum(min(row) for row in costs)))
        chosen = dynamic.choose_ratios(costs, losses, budget, steps=steps)
        assert sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) <= budget
        assert sum(loss[i] for loss, i in zip(losses, chosen, strict=True)) == pytest.approx(best)
        rough = dynamic.choose_ratios(costs, losses, budget, steps=7)
        assert sum(cost[i] for cost, i in zip(costs, rough, strict=True)) <= budget


def test_losses_are_what_accuracy_falls():
    expected = [[[0, 0.1, 0.4], [0, 0.02, 0.05]], [[0, 0.01, 0.3], [0, 0.0, 0.2]]]
    np.testing.assert_allclose(FOUND.losses, expected, atol=1e-12)


@pytest.mark.parametrize("dimensions", [("channels",), ("columns",), ("channels", "columns")])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.45])
def test_ratios_within_macs_lose_the_least_of_all(report, dimensions, share):
    def loss(table):
        places = [[FOUND.grid.index(ratio) for ratio in row] for row in table]
        return sum(FOUND.losses[d, b, places[b][d]] for b in (0, 1) for d in (0, 1))

    def left(table):
        total = dynamic.counted_macs(dynamic.with_ratios(GATED, table), report)["total"]
        return total.counted / total.dense

    ratios = [FOUND.grid if name in dimensions else (0.0,) for name in ("channels", "columns")]
    every = [np.reshape(table, (2, 2)) for table in itertools.product(*ratios, *ratios)]
    best = min(loss(table.tolist()) for table in every if left(table) <= share)
    chosen = dynamic.ratios_within_macs(GATED, report, FOUND, share, dimensions=dimensions)
    assert left(chosen) <= share and loss(chosen.tolist()) == pytest.approx(best)


def test_ratios_within_a_time_are_those_of_the_grid():
    network = models.Network(GATED, gate=dynamic.gate_layer)
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    chosen = dynamic.ratios_within_seconds(network, images, GATED, FOUND, 1.0, rounds=1)
    # Without gates it takes its whole time, which is within the budget and loses nothing.
    np.testing.assert_array_equal(chosen, np.zeros((2, 2)))


def test_gates_snap_to_the_last_count_that_is_no_slower(monkeypatch):
    architecture = dynamic.gate(PLAN, {"conv1": DynamicSpec(channels=0.5), "conv2": DynamicSpec(channels=0.5)})
    network = models.Network(architecture, gate=dynamic.gate_layer)

    def staircase(call, pairs, rounds, footprint):
        kept = [call.settings.groups_kept(call.x.shape[-1]) for _ in pairs[:1]]
        kept += [round((1 - channels) * call.x.shape[-1]) for channels, _ in pairs[1:]]
        return [-(-n // 8) * 1.0 for n in kept], 9.0

    monkeypatch.setattr("jaxeff.dynamic.budget._layer_seconds", staircase)
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    snapped = dict(spec.walk(dynamic.snap_ratios(network, images, architecture)))
    # They keep 2 of 4 channels and 4 of 8: no multiple is within a quarter of them.
    assert [snapped[name].gate.channels for name in ("conv2", "conv3")] == [0.5, 0.5]
    wide = dynamic.gate(models.cnn((40, 8), pools=1, input_shape=(4, 4, 1)), DynamicSpec(channels=0.725))
    network = models.Network(wide, gate=dynamic.gate_layer)
    images = jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32)
    # 11 of 40 channels are kept; 12 and 16 take as long, 32 would not.
    assert dict(spec.walk(dynamic.snap_ratios(network, images, wide)))["conv2"].gate.groups_kept(40) == 16


def test_bad_input_is_refused(report):
    with pytest.raises(ValueError, match="budget=3 cannot be met: the cheapest options together cost 4"):
        dynamic.choose_ratios([[2, 5], [2, 3]], [[1, 0], [1, 0]], 3)
    with pytest.raises(
        ValueError, match=r"share=0.01 of the multiply-accumulates cannot be met: the least is 0\.[0-9]+"
    ):
        dynamic.ratios_within_macs(GATED, report, FOUND, 0.01)
    with pytest.raises(ValueError, match=r"dimensions are of 'channels', 'columns', got \['rows'\]"):
        dynamic.ratios_within_macs(GATED, report, FOUND, 0.5, dimensions=("rows",))
    network = models.Network(GATED, gate=dynamic.gate_layer)
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    with pytest.raises(ValueError, match=r"share=1e-06 of the dense time cannot be met: the least is [0-9.]+"):
        dynamic.ratios_within_seconds(network, images, GATED, FOUND, 1e-6, rounds=1)


def test_a_budget_of_the_cheapest_leaves_no_choice():
    assert dynamic.choose_ratios([[1e-7, 3e-7]], [[1.0, 0.0]], 1e-7) == (0,)
    assert dynamic.choose_ratios([[10**7, 10**7 + 1]], [[1.0, 0.0]], 10**7) == (0,)
    assert dynamic.choose_ratios([[0.1], [0.2], [0.3]], [[0.0]] * 3, 0.6) == (0, 0, 0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        dynamic.choose_ratios([[1.0, 2.0]], [[1.0, 0.0]], 1.5, steps=0)
