"""The kernel of slabs, interpreted with its races watched, against masking; that it lowers for CUDA; what it refuses.

The interpreter of Mosaic GPU has no public name in jax 0.10.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import dynamic
from jaxeff.dynamic import DynamicSpec
from jaxeff.dynamic.engines import convolve, geometry, output_tiles, slabs

INTERPRETER = "jax._src.pallas.mosaic_gpu.interpret"


@pytest.fixture(scope="module")
def watched():
    """Parameters of the interpreter that finds races."""
    return pytest.importorskip(f"{INTERPRETER}.params").InterpretGPUParams(detect_races=True)


def operands(batch, size, channels, group_size, kept, features, kernel, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, *size, channels)), dtype)
    k = jnp.asarray(rng.normal(size=(*kernel, channels, features)) / 10, dtype)
    groups = np.sort(np.stack([rng.permutation(channels // group_size)[:kept] for _ in range(batch)]), 1)
    mask = np.zeros((batch, channels // group_size), bool)
    mask[np.arange(batch)[:, None], groups] = True
    bias = jnp.asarray(rng.normal(size=features), jnp.float32)
    return x, k, jnp.asarray(groups, jnp.int32), np.repeat(mask, group_size, 1), bias


def convolved(x, k, padding, dilation):
    """A convolution in float64, tap by tap."""
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    high, wide = (padded.shape[1 + axis] - (k.shape[axis] - 1) * dilation for axis in (0, 1))
    return sum(
        padded[:, i * dilation : i * dilation + high, j * dilation : j * dilation + wide] @ k[i, j]
        for i in range(k.shape[0])
        for j in range(k.shape[1])
    )


@pytest.mark.parametrize(
    ("size", "channels", "group_size", "kept", "features", "kernel", "padding", "dilation", "tile"),
    [
        ((3, 9), 64, 16, 2, 40, (3, 3), ((1, 1), (1, 1)), 1, (64, 64, 4)),
        ((4, 5), 64, 32, 1, 130, (1, 3), ((0, 1), (3, 1)), 2, (64, 128, 2)),
        ((2, 17), 128, 64, 2, 16, (1, 1), ((0, 0), (0, 0)), 1, (128, 64, 8)),
    ],
)
def test_values_and_attention_are_those_of_masking(
    watched, size, channels, group_size, kept, features, kernel, padding, dilation, tile
):
    x, k, groups, mask, bias = operands(2, size, channels, group_size, kept, features, kernel)
    window = geometry(x.shape, k.shape, (1, 1), padding, (dilation, dilation))
    result = slabs.group_slabs(
        window, group_size, x, k, groups, bias, relu=True, tile=slabs.SlabTile(*tile), interpret=watched
    )
    assert not importlib.import_module(f"{INTERPRETER}.gpu_callbacks").get_races().races_found
    kept_of_x = np.where(mask[:, None, None], np.asarray(x, np.float64), 0)
    expected = np.maximum(convolved(kept_of_x, np.asarray(k, np.float64), padding, dilation) + np.asarray(bias), 0)
    assert result.y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(result.y, np.float64), expected, rtol=2**-8, atol=1e-4)
    np.testing.assert_allclose(result.channels, expected.mean((1, 2)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.columns, expected.mean(-1), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_masking(watched):
    x, k, groups, mask, bias = operands(2, (2, 3), 32, 16, 1, 8, (1, 1))
    window = geometry(x.shape, k.shape)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 3, 8)), jnp.bfloat16)

    def ours(x, k, bias):
        tile = slabs.SlabTile(64, 64, 2)
        return slabs.group_slabs(window, 16, x, k, groups, bias, relu=True, tile=tile, interpret=watched).y

    def masked(x, k, bias):
        return jax.nn.relu(jnp.where(mask[:, None, None], x, 0) @ k[0, 0] + bias)

    y, pullback = jax.vjp(ours, x, k, bias)
    wide = (a.astype(jnp.float32) for a in (x, k, bias))
    _, reference = jax.vjp(masked, *wide)
    for a, b in zip(pullback(g), reference(g.astype(jnp.float32)), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-6, atol=2e-2)


@pytest.mark.parametrize(
    ("count", "size", "channels", "features", "kernel", "dilation"),
    [(3, (6, 6), 32, 40, (3, 3), 1), (9, (4, 7), 80, 16, (1, 3), 2)],
)
def test_small_maps_lie_side_by_side(watched, count, size, channels, features, kernel, dilation):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(count, *size, channels)), jnp.bfloat16)
    k = jnp.asarray(rng.normal(size=(*kernel, channels, features)) / 10, jnp.bfloat16)
    bias = jnp.asarray(rng.normal(size=features), jnp.float32)
    window = geometry(x.shape, k.shape, (1, 1), "VALID", (dilation, dilation))
    result = slabs.tile_slabs(window, x, k, bias, relu=True, tile=slabs.SlabTile(64, 64, 2), interpret=watched)
    assert not importlib.import_module(f"{INTERPRETER}.gpu_callbacks").get_races().races_found
    wide = (np.asarray(a, np.float64) for a in (x, k))
    expected = np.maximum(convolved(*wide, ((0, 0), (0, 0)), dilation) + np.asarray(bias), 0)
    np.testing.assert_allclose(np.asarray(result.y, np.float64), expected, rtol=2**-8, atol=1e-4)
    np.testing.assert_allclose(result.channels, expected.mean((1, 2)), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(result.columns, expected.mean(-1), rtol=1e-5, atol=1e-5)


def test_kept_tiles_are_convolved_by_slabs_as_by_masking(watched):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 16)), jnp.bfloat16)
    k = jnp.asarray(rng.normal(size=(3, 3, 16, 8)) / 10, jnp.bfloat16)
    window, tiles = geometry(x.shape, k.shape), jnp.array([[0, 3], [1, 2]], jnp.int32)
    form = lambda *call: slabs.tile_slabs(*call, tile=slabs.SlabTile(64, 64, 2), interpret=watched).y
    run = lambda form: jax.vjp(lambda x, k: output_tiles(window, (8, 8), 4, x, k, tiles, form), x, k)
    (y, pullback), (expected, reference) = run(form), run(convolve)
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (y, expected)), rtol=2**-7, atol=1e-3)
    assert not np.asarray(y[0, :4, 4:], np.float32).any() and np.asarray(y[0, :4, :4], np.float32).any()
    for ours, theirs in zip(pullback(y), reference(y), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_slabs_of_tiles_lower_for_cuda():
    x, k = jnp.zeros((24, 10, 10, 128), jnp.bfloat16), jnp.zeros((3, 3, 128, 96), jnp.bfloat16)
    run = jax.jit(lambda x, k: slabs.tile_slabs(geometry(x.shape, k.shape, padding="VALID"), x, k, relu=True))
    allowed = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    assert "mosaic_gpu" in jax.export.export(run, platforms=["cuda"], disabled_checks=allowed)(x, k).mlir_module()


def test_slabs_of_tiles_say_what_does_not_fit():
    x, k = jnp.zeros((8, 6, 6, 24), jnp.bfloat16), jnp.zeros((3, 3, 24, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="24 channels, where slabs need a multiple of 16; take engine 'output_tiles'"):
        slabs.tile_slabs(geometry(x.shape, k.shape, padding="VALID"), x, k)
    with pytest.raises(ValueError, match=r"padding must be 0, got \(\(1, 1\), \(1, 1\)\)"):
        slabs.tile_slabs(geometry((8, 6, 6, 16), (3, 3, 16, 8)), x[..., :16], k[:, :, :16])
    with pytest.raises(ValueError, match="engine 'tile_slabs' needs a GPU; elsewhere take 'output_tiles'"):
        settings = DynamicSpec(outputs=0.5, tile=2, engine="tile_slabs")
        dynamic.conv(x[..., :16], k[:, :, :16], settings)


@pytest.mark.parametrize(("group_size", "sharded"), [(16, False), (64, False), (64, True)])
def test_it_lowers_for_cuda(group_size, sharded):
    x, k = jnp.zeros((2, 28, 28, 128), jnp.bfloat16), jnp.zeros((3, 3, 128, 96), jnp.bfloat16)
    groups, window = jnp.zeros((2, 1), jnp.int32), geometry(x.shape, k.shape)

    def run(x, k, groups):
        return slabs.group_slabs(window, group_size, x, k, groups, relu=True)

    if sharded:
        mesh, rows = jax.sharding.Mesh(jax.devices()[:1], ("batch",)), jax.P("batch")
        run = jax.shard_map(run, mesh=mesh, in_specs=(rows, jax.P(), rows), out_specs=rows)
    run = jax.jit(run)
    allowed = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    assert (
        "mosaic_gpu" in jax.export.export(run, platforms=["cuda"], disabled_checks=allowed)(x, k, groups).mlir_module()
    )


@pytest.mark.parametrize(
    ("strides", "group_size", "dtype", "message"),
    [
        (2, 16, jnp.bfloat16, r"strides \(2, 2\), where slabs need \(1, 1\); take"),
        (1, 8, jnp.bfloat16, "group_size=8, where slabs need a multiple of 16"),
        (1, 16, jnp.float32, "float32, where slabs need bfloat16 or float16"),
    ],
)
def test_what_does_not_fit_is_refused(strides, group_size, dtype, message):
    x, k = jnp.zeros((1, 4, 4, 32), dtype), jnp.zeros((1, 1, 32, 8), dtype)
    window = geometry(x.shape, k.shape, (strides, strides))
    with pytest.raises(ValueError, match=message):
        slabs.group_slabs(window, group_size, x, k, jnp.zeros((1, 1), jnp.int32))


def test_engines_that_do_not_fit_are_named():
    x, k = jnp.zeros((1, 4, 4, 32), jnp.bfloat16), jnp.zeros((3, 3, 32, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"engine 'slabs' does not fit: strides \(2, 2\), .*; take 'mask', or 'auto'"):
        dynamic.conv(x, k, DynamicSpec(channels=0.5, group_size=16, engine="slabs"), strides=2)
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match="engine 'fused' does not fit: float64, where the kernel"),
    ):
        x, k = (jnp.zeros(a.shape, jnp.float64) for a in (x, k))
        dynamic.conv(x, k, DynamicSpec(channels=0.5, engine="fused"))


def test_without_a_gpu_the_engine_says_what_to_take():
    settings = DynamicSpec(channels=0.5, group_size=16, engine="slabs")
    with pytest.raises(ValueError, match="engine 'slabs' needs a GPU; elsewhere take 'grouped'"):
        dynamic.conv(jnp.zeros((1, 4, 4, 32), jnp.bfloat16), jnp.zeros((3, 3, 32, 8), jnp.bfloat16), settings)
