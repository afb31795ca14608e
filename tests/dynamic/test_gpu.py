"""The kernels compiled for a GPU."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxeff import dynamic
from jaxeff.dynamic import DynamicSpec, engines
from jaxeff.dynamic.convolution import candidates

pytestmark = pytest.mark.gpu


DROPS = {
    "channels": {"channels": 0.5},
    "groups": {"channels": 0.5, "group_size": 16},
    "columns": {"columns": 0.5},
    "both": {"channels": 0.5, "columns": 0.5},
    "outputs": {"outputs": 0.5, "tile": 7},
}
KERNELS = {
    "channels": {"fused"},
    "groups": {"fused"},
    "columns": {"fused_columns"},
    "both": {"fused", "fused_columns", "fused_channels_and_columns"},
    "outputs": {"fused_outputs"},
}
SLABS = {"groups": {"slabs"}, "outputs": {"tile_slabs"}}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dropped", DROPS)
@pytest.mark.parametrize("strides", [1, 2])
def test_engines_equal_masking(dtype, dropped, strides):
    x = jnp.maximum(jax.random.normal(jax.random.key(0), (4, 28, 28, 128), dtype), 0)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 128, 96), dtype) / 24
    drops = DynamicSpec(**DROPS[dropped])
    window = engines.geometry(x.shape, kernel.shape, (strides, strides))
    names = candidates(drops, x, window)
    kernels = KERNELS[dropped] | (SLABS.get(dropped, set()) if dtype == jnp.bfloat16 and strides == 1 else set())
    assert {name for name in names if dynamic.ENGINES[name].gpu} == kernels

    def run(engine):
        settings = dataclasses.replace(drops, engine=engine)
        y, pullback = jax.vjp(lambda x, k: dynamic.conv(x, k, settings, strides=strides), x, kernel)
        return y, *pullback(y)

    expected = jax.jit(lambda: run("mask"))()
    for engine in names:
        for a, b in zip(jax.jit(lambda engine=engine: run(engine))(), expected, strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            # Products of float32 run in TF32 here, with ten bits.
            assert np.linalg.norm(a - b) < 2e-2 * np.linalg.norm(b), engine
