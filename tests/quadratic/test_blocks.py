"""QuadraNet's block against its formula."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxeff.quadratic.blocks import QuadraNetBlock

X = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype(np.float32)


def test_the_block_is_its_formula():
    block = QuadraNetBlock((3, 3), expansion=2)
    variables = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(block.init, jax.random.key(0), X),
    )
    p = {k: jax.tree.map(lambda a: a.astype(np.float64), v) for k, v in variables["params"].items()}

    def layer_norm(x, q):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * q["scale"] + q["bias"]

    def depthwise(x, name):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [
            padded[:, i : i + 6, j : j + 6] * p["spatial"][f"kernel_{name}"][i, j, 0]
            for i in range(3)
            for j in range(3)
        ]
        return sum(taps) + p["spatial"][f"bias_{name}"]

    z = layer_norm(X.astype(np.float64), p["norm1"])
    x = X + p["scale1"] * (depthwise(z, "a") * depthwise(z, "b") + depthwise(z, "c"))
    hidden = layer_norm(x, p["norm2"]) @ p["expand"]["kernel"] + p["expand"]["bias"]
    gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    expected = x + p["scale2"] * (gelu @ p["reduce"]["kernel"] + p["reduce"]["bias"])
    np.testing.assert_allclose(block.apply(variables, X), expected, rtol=1e-4, atol=1e-3)


def test_it_starts_as_the_identity_and_drops_whole_examples():
    block = QuadraNetBlock((3, 3), drop_path=0.5, layer_scale=None)
    variables = block.init(jax.random.key(0), X)
    scaled = QuadraNetBlock((3, 3))
    np.testing.assert_allclose(scaled.apply(scaled.init(jax.random.key(0), X), X), X, atol=1e-4)
    many = jnp.tile(X[:1], (32, 1, 1, 1))
    y = block.apply(variables, many, train=True, rngs={"dropout": jax.random.key(1)})
    untouched = np.all(np.isclose(y, many), (1, 2, 3))
    assert 0 < untouched.sum() < 32
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\), got 1"):
        QuadraNetBlock(drop_path=1.0).init(jax.random.key(0), X)
