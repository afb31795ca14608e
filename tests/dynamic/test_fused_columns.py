"""The kernel of sorted rows, interpreted, against the masked convolution and NumPy; and that it lowers for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.dynamic.engines import fused, fused_columns, geometry, out_size
from jaxeff.dynamic.engines.fused_columns import Columns, _plan
from jaxeff.dynamic.engines.geometry import convolve

SMALL = fused.Tile(16, 16, 16)


def chosen(rng, batch, kept, of):
    return np.sort(np.stack([rng.permutation(of)[:kept] for _ in range(batch)]), 1).astype(np.int32)


def mask_of(indices, size):
    mask = np.zeros((len(indices), size), bool)
    mask[np.arange(len(indices))[:, None], indices] = True
    return mask


@pytest.mark.parametrize(
    ("size", "channels", "features", "kernel", "strides", "padding", "drops"),
    [
        ((4, 5), 20, 24, 3, (1, 1), "SAME", "columns"),
        ((4, 5), 20, 24, 3, (1, 1), "SAME", "columns channels"),
        ((7, 6), 16, 16, 3, (2, 1), "SAME", "outputs"),
        ((6, 6), 17, 8, 1, (1, 2), "VALID", "columns channels outputs"),
        ((6, 7), 5, 3, 6, (1, 1), ((2, 1), (0, 3)), "columns outputs"),  # 36 taps: two words
        ((4, 4), 16, 16, 3, (1, 1), "SAME", ""),
    ],
)
def test_values_attention_and_gradients_are_those_of_masking(size, channels, features, kernel, strides, padding, drops):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, *size, channels)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(kernel, kernel, channels, features)) / kernel, jnp.float32)
    bias = jnp.asarray(rng.normal(size=features), jnp.float32)
    window = geometry(x.shape, k.shape, strides, padding)
    out = out_size(window, size, k.shape[:2])
    sizes = {"columns": size[0] * size[1], "channels": channels, "outputs": out[0] * out[1]}
    kept = Columns(**{name: jnp.asarray(chosen(rng, 3, sizes[name] // 2, sizes[name])) for name in drops.split()})
    masks = {name: mask_of(getattr(kept, name), sizes[name]) for name in drops.split()}
    inside, there = np.ones(x.shape, bool), np.ones((3, *out, 1), bool)
    if "columns" in masks:
        inside &= masks["columns"].reshape(3, *size, 1)
    if "channels" in masks:
        inside &= masks["channels"][:, None, None]
    if "outputs" in masks:
        there = masks["outputs"].reshape(3, *out, 1)

    def ours(x, k, bias):
        result = fused_columns(window, x, k, kept, bias, relu=True, tile=SMALL)
        return result.y, result

    def masked(x, k, bias):
        return jnp.where(there, jax.nn.relu(convolve(window, jnp.where(inside, x, 0), k) + bias), 0)

    y, pullback, result = jax.vjp(ours, x, k, bias, has_aux=True)
    expected, reference = jax.vjp(masked, x, k, bias)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(result.channels, expected.mean((1, 2)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.columns, expected.mean(-1), rtol=1e-5, atol=1e-5)
    g = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    for a, b in zip(pullback(g), reference(g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_what_is_dropped_may_be_nan():
    rng = np.random.default_rng(1)
    x, k = rng.normal(size=(2, 5, 5, 16)), rng.normal(size=(3, 3, 16, 16)) / 3
    columns = chosen(rng, 2, 9, 25)
    x = np.where(mask_of(columns, 25).reshape(2, 5, 5, 1), x, np.nan)
    window = geometry(x.shape, k.shape)
    y = fused_columns(
        window, jnp.asarray(x, jnp.float32), jnp.asarray(k, jnp.float32), Columns(jnp.asarray(columns)), tile=SMALL
    ).y
    expected = convolve(window, jnp.asarray(np.nan_to_num(x), jnp.float32), jnp.asarray(k, jnp.float32))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)


def test_sorting_leaves_little_more_than_what_is_kept():
    # Half of the columns at random: nine bits, 512 patterns, so that rows of one tile need nearly the same taps.
    rng = np.random.default_rng(2)
    x, k = jnp.zeros((16, 32, 32, 1)), jnp.zeros((3, 3, 1, 1))
    kept = Columns(jnp.asarray(chosen(rng, 16, 512, 1024)))
    plan = _plan(geometry(x.shape, k.shape), x, k, kept, (32, 32), 32)
    assert sorted(np.asarray(plan.order).ravel()) == list(range(16 * 1024))
    share = np.asarray(plan.needed).mean() / 9
    assert 0.45 < share < 0.62  # at the border taps find nothing anyway
    unsorted = np.asarray(plan.words)[0, 0]
    by_place = np.empty_like(unsorted)
    by_place[np.asarray(plan.order)[0]] = unsorted
    neighbours = np.bitwise_or.reduce(by_place.reshape(-1, 32), 1)
    assert np.mean([bin(word).count("1") for word in neighbours]) > 8.5


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_it_lowers_for_cuda(channels, sharded):
    rng = np.random.default_rng(0)
    x, k = jnp.zeros((2, 8, 8, 64), jnp.bfloat16), jnp.zeros((3, 3, 64, 64), jnp.bfloat16)
    kept = Columns(jnp.asarray(chosen(rng, 2, 32, 64)), jnp.asarray(chosen(rng, 2, 32, 64)) if channels else None)
    window = geometry(x.shape, k.shape)

    def run(x, k, kept):
        return fused_columns(window, x, k, kept, relu=True, interpret=False)

    if sharded:
        mesh, rows = jax.sharding.Mesh(jax.devices()[:1], ("batch",)), jax.P("batch")
        run = jax.shard_map(run, mesh=mesh, in_specs=(rows, jax.P(), rows), out_specs=rows)
    allowed = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    text = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=allowed)(x, k, kept).mlir_module()
    assert "gated_columns" in text and "triton" in text
