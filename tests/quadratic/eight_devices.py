"""Policies on eight devices that share the statistics of their batch; run as tests/parallel/eight_devices.py is."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec

from jaxeff.quadratic import dense_block

ROWS, INPUTS, OUTPUTS = 24, 5, 6


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def params_of(biases):
    params = {f"kernel_{p}": normal(i, INPUTS, OUTPUTS) for i, p in enumerate("abc")}
    for i, name in enumerate(("a", "b", "c", "out")):
        params[f"norm_{name}"] = {"scale": 1 + 0.3 * normal(i, OUTPUTS), "bias": 0.3 * normal(9 + i, OUTPUTS)}
    return params | ({f"bias_{p}": normal(20 + i, OUTPUTS) for i, p in enumerate("abc")} if biases else {})


def run(params, x, save, axis_name=None):
    norms = {"branch_norm": "batch", "out_norm": "batch", "act": "gelu"}
    return dense_block(params, x, save=save, axis_name=axis_name, **norms)[0]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("save", ["all", "ab", "x"])
@pytest.mark.parametrize("biases", [False, True])
def test_gradients_over_devices_equal_those_of_the_whole_batch(save, check_vma, biases):
    params, x, g = params_of(biases), normal(30, ROWS, INPUTS), normal(31, ROWS, OUTPUTS)
    expected = jax.grad(lambda params, x: jnp.sum(g * run(params, x, "all")), (0, 1))(params, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(everywhere, rows, rows),
        out_specs=(everywhere, rows),
        check_vma=check_vma,
    )
    def gradients(params, x, g):
        if not check_vma:

            def share(params, x):
                return jnp.sum(g * run(params, x, save, "data"))

            # The share's gradient flows to the other devices through their statistics, as they sum it up themselves.
            by_params, by_x = jax.grad(share, (0, 1))(params, x)
            return jax.lax.psum(by_params, "data"), by_x

        def loss(params, x):
            return jax.lax.psum(jnp.sum(g * run(params, x, save, "data")), "data")

        return jax.grad(loss, (0, 1))(params, x)

    found = jax.jit(gradients)(params, x, g)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * largest), found, expected)
