"""What is measured is remembered, and only what was measured is used."""

import json

import jax
import pytest
from jax import numpy as jnp

from jaxeff import models, quadratic, spec
from jaxeff.ops import autotune
from jaxeff.quadratic import projections


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEFF_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
def test_layers_use_what_tuning_found(monkeypatch):
    architecture = spec.quadratize(models.cnn((4,), input_shape=(6, 6, 1)), branch_norm="batch")
    network = models.Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer)
    x = jnp.zeros((2, 6, 6, 1))
    found = quadratic.tune(network, x)
    assert len(found) == 1 and set(found.values()) <= {"separate", "stacked"}
    assert json.loads(autotune.table_path().read_text()) == found
    for form, calls in (("separate", 0), ("stacked", 1)):
        autotune.remember(dict.fromkeys(found, form))
        used = []
        monkeypatch.setattr(
            projections, "_stacked", lambda *args, f=projections._stacked, u=used: u.append(1) or f(*args)
        )
        jax.eval_shape(network.init, jax.random.key(0), x)
        assert len(used) == calls
        monkeypatch.undo()
        monkeypatch.setenv("JAXEFF_CACHE_DIR", str(autotune.table_path().parent))


def test_a_choice_holds_for_pieces_of_the_batch_and_for_the_dtype_that_a_layer_computes_in(monkeypatch):
    layer = quadratic.QuadraticConv(4, branch_norm="batch", save="x")
    x = jnp.zeros((6, 5, 5, 4), jnp.bfloat16)
    monkeypatch.setattr(autotune, "fastest", lambda *_: "stacked")
    quadratic.tune(layer, x)
    used = []
    monkeypatch.setattr(projections, "_stacked", lambda *args, f=projections._stacked: used.append(1) or f(*args))
    variables = layer.init(jax.random.key(0), x)
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params, x):
        return layer.apply({"params": params, **rest}, x, True, mutable=["batch_stats"])[0].sum()

    monkeypatch.setattr("jaxeff.quadratic.backward.PIECE_BYTES", 900)
    used.clear()
    jax.eval_shape(jax.grad(loss), variables["params"], x)
    assert len(used) >= 3  # forward, recomputed and in the loop over pieces
