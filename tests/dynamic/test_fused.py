"""The fused kernel, interpreted, against the masked convolution and NumPy; and that it lowers for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.dynamic.engines import fused, geometry
from jaxeff.dynamic.engines.geometry import convolve

SMALL = fused.Tile(16, 16, 16)


def operands(seed, batch, size, channels, kept, features, kernel=3, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, *size, channels))
    k = rng.normal(size=(kernel, kernel, channels, features)) / kernel
    indices = np.sort(np.stack([rng.permutation(channels)[:kept] for _ in range(batch)]), 1).astype(np.int32)
    mask = np.zeros((batch, 1, 1, channels), bool)
    mask[np.arange(batch)[:, None], 0, 0, indices] = True
    return (
        jnp.asarray(x, dtype),
        jnp.asarray(k, dtype),
        jnp.asarray(indices),
        jnp.asarray(mask),
        rng.normal(size=features),
    )


@pytest.mark.parametrize(
    ("size", "channels", "kept", "features", "kernel", "strides", "padding"),
    [
        ((5, 6), 20, 9, 24, 3, (1, 1), "SAME"),
        ((7, 6), 16, 16, 16, 3, (2, 1), "SAME"),
        ((6, 6), 40, 33, 8, 1, (1, 2), "VALID"),
        ((6, 7), 5, 1, 3, 5, (1, 1), ((2, 1), (0, 3))),
    ],
)
def test_values_attention_and_gradients_are_those_of_masking(size, channels, kept, features, kernel, strides, padding):
    x, k, indices, mask, bias = operands(0, 2, size, channels, kept, features, kernel)
    window, bias = geometry(x.shape, k.shape, strides, padding), jnp.asarray(bias, jnp.float32)

    def ours(x, k, bias):
        result = fused.fused_channels(window, x, k, indices, bias, relu=True, tile=SMALL)
        return result.y, result

    def masked(x, k, bias):
        return jax.nn.relu(convolve(window, jnp.where(mask, x, 0), k) + bias)

    y, pullback, result = jax.vjp(ours, x, k, bias, has_aux=True)
    expected, reference = jax.vjp(masked, x, k, bias)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(result.channels, expected.mean((1, 2)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.columns, expected.mean(-1), rtol=1e-5, atol=1e-5)
    g = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.float32)
    for a, b in zip(pullback(g), reference(g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_summed_in_float32():
    x, k, indices, mask, _ = operands(3, 1, (4, 4), 64, 48, 16, 1, jnp.bfloat16)
    window = geometry(x.shape, k.shape)
    y = fused.fused_channels(window, x, k, indices, tile=SMALL).y
    expected = np.where(mask, np.asarray(x, np.float64), 0) @ np.asarray(k, np.float64)[0, 0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=2e-2)


@pytest.mark.parametrize("sharded", [False, True])
def test_it_lowers_for_cuda(sharded):
    x, k, indices, _, _ = operands(0, 2, (8, 8), 64, 32, 64, dtype=jnp.bfloat16)
    window = geometry(x.shape, k.shape)

    def run(x, k, i):
        return fused.fused_channels(window, x, k, i, relu=True, interpret=False)

    if sharded:
        mesh, rows = jax.sharding.Mesh(jax.devices()[:1], ("batch",)), jax.P("batch")
        run = jax.shard_map(run, mesh=mesh, in_specs=(rows, jax.P(), rows), out_specs=rows)
    run = jax.jit(run)
    allowed = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    text = jax.export.export(run, platforms=["cuda"], disabled_checks=allowed)(x, k, indices).mlir_module()
    assert "gated_convolution" in text and "triton" in text
