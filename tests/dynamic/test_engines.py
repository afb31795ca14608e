"""Every engine against loops in NumPy in float64, in output and gradient."""

import dataclasses
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import dynamic
from jaxeff.dynamic import ENGINES, DynamicSpec, Kept
from jaxeff.dynamic.engines import geometry
from jaxeff.ops import conv_impl, gathered_conv

# Slabs run in half precision on a GPU: tests/dynamic/test_slabs.py. Widths are nothing that attention chooses.
NATIVE = pytest.mark.skipif(bool(missing := gathered_conv.unavailable(np.float32)), reason=str(missing))
EXACT = [
    pytest.param(name, marks=NATIVE if name.startswith("native") else ())
    for name, engine in ENGINES.items()
    if engine.exact and name not in ("slabs", "tile_slabs", "width_slices")
]


def having(condition):
    """Those of the exact engines whose name meets a condition."""
    return [param for param in EXACT if condition(param.values[0])]


def highest(scores, ratio):
    """Indices of the kept: round half up, lower index first among equals."""
    count = max(1, int((1 - Fraction(str(ratio))) * len(scores) + Fraction(1, 2)))
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def tiled(scores, tile, ratio):
    """Mask of the kept tiles of a map of scores."""
    corners = list(itertools.product(range(0, scores.shape[0], tile), range(0, scores.shape[1], tile)))
    kept = highest([scores[h : h + tile, w : w + tile].mean() for h, w in corners], ratio)
    mask = np.zeros(scores.shape)
    for h, w in (corners[i] for i in kept):
        mask[h : h + tile, w : w + tile] = 1
    return mask


def windows(shape, kernel, strides, padding):
    """(output position, tap, input position) of every product of a convolution of one sample."""
    if padding == "SAME":
        outputs = [-(-size // s) for size, s in zip(shape, strides, strict=True)]
        total = [max((o - 1) * s + k - n, 0) for o, s, k, n in zip(outputs, strides, kernel, shape, strict=True)]
        low = [t // 2 for t in total]
    else:
        low = [pair[0] for pair in padding]
        outputs = [(n + sum(pair) - k) // s + 1 for n, pair, k, s in zip(shape, padding, kernel, strides, strict=True)]
    found = []
    for o in itertools.product(*map(range, outputs)):
        for tap in itertools.product(*map(range, kernel)):
            at = tuple(a * s + t - b for a, s, t, b in zip(o, strides, tap, low, strict=True))
            if all(0 <= a < n for a, n in zip(at, shape, strict=True)):
                found.append((o, tap, at))
    return found, tuple(outputs)


def mean_of(values, reduce):
    if reduce == "l2":
        return np.sqrt((values**2).mean())
    return (np.abs(values) if reduce == "abs_mean" else values).mean()


def column_scores(sample, reduce):
    return np.array([[mean_of(column, reduce) for column in row] for row in sample])


def gated(x, kernel, spec, strides=(1, 1), padding="SAME"):
    """Output of the gated convolution, and its gradients for an output gradient of its own values."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    products, size = windows(x.shape[1:3], kernel.shape[:2], strides, padding)
    y = np.zeros((len(x), *size, kernel.shape[-1]))
    dx, dk, masks = np.zeros_like(x), np.zeros_like(kernel), []
    for n, sample in enumerate(x):
        by_channel = np.array([mean_of(channel, spec.reduce) for channel in np.moveaxis(sample, -1, 0)])
        by_group = by_channel.reshape(-1, spec.group_size).mean(1)
        channels = np.zeros(len(by_group))
        channels[highest(by_group, spec.channels)] = 1
        mask = np.repeat(channels, spec.group_size) * np.ones_like(sample)
        by_column = column_scores(sample * (mask if spec.order == "channel_first" else 1), spec.reduce)
        if spec.columns:
            mask = mask * tiled(by_column, spec.tile, spec.columns)[..., None]
        read = np.zeros(size)
        for o, _, at in products:
            read[o] += by_column[at]
        outputs = tiled(read, spec.tile, spec.outputs) if spec.outputs else np.ones(size)
        for o, tap, at in products:
            y[n][o] += outputs[o] * ((mask * sample)[at] @ kernel[tap])
        masks.append((mask, outputs))
    for n, (mask, outputs) in enumerate(masks):
        for o, tap, at in products:
            g = outputs[o] * y[n][o]
            dx[n][at] += mask[at] * (kernel[tap] @ g)
            dk[tap] += np.outer((mask * x[n])[at], g)
    return y, dx, dk


def check(x, kernel, spec, strides=(1, 1), padding="SAME"):
    def run(x, kernel):
        y, pullback = jax.vjp(lambda *a: dynamic.conv(*a, spec, strides=strides, padding=padding), x, kernel)
        return y, *pullback(y)

    found = jax.jit(run)(x, kernel)
    for ours, expected in zip(found, gated(x, kernel, spec, strides, padding), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * max(1, np.abs(expected).max()))


def sample(seed, batch, size, channels, features, kernel, levels=None):
    """Maps after a ReLU, with some dead channels, and a kernel; with `levels`, of so few values that there are ties."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(batch, *size, channels)), 0)
    if levels:
        x = np.round(x * levels / 4) * 4 / levels
    x[:, :, :, rng.random(channels) < 0.2] = 0
    return x.astype(np.float32), rng.normal(size=(kernel, kernel, channels, features)).astype(np.float32)


def dropped_by(name, ratio):
    return {axis: ratio for axis in ENGINES[name].saves} or {"channels": ratio, "columns": ratio}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    ("batch", "size", "kernel", "strides", "padding"),
    [
        (3, (4, 6), 3, (1, 1), "SAME"),
        (1, (6, 4), 5, (2, 2), "SAME"),
        (2, (5, 6), 3, (2, 1), ((0, 1), (2, 0))),
        (5, (4, 4), 1, (1, 1), "SAME"),
    ],
)
def test_engines_equal_loops(name, batch, size, kernel, strides, padding):
    x, k = sample(0, batch, size, 8, 5, kernel)
    check(x, k, DynamicSpec(**dropped_by(name, 0.5), engine=name), strides, padding)


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=4, deadline=None)
@given(
    batch=st.integers(1, 9),
    tile=st.sampled_from([1, 2]),
    tiles=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    group_size=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),  # divided by these, equal scores stay equal
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    ratio=st.sampled_from([0.1, 0.5, 0.9]),
    levels=st.sampled_from([None, 4]),
    order=st.sampled_from(["parallel", "channel_first"]),
    reduce=st.sampled_from(["mean", "abs_mean", "l2"]),
    seed=st.integers(0, 99),
)
def test_engines_equal_loops_for_any_shape(
    name, batch, tile, tiles, group_size, groups, kernel, stride, ratio, levels, order, reduce, seed
):
    size = tuple(tile * stride * n for n in tiles)
    # Sums of few values tie exactly; roots, and means of a group of thirds, only nearly.
    exact = reduce != "l2" and (group_size == 1 or tiles[0] * tiles[1] in (1, 2, 4))
    x, k = sample(seed, batch, size, group_size * groups, 3, kernel, levels if exact else None)
    spec = DynamicSpec(
        **dropped_by(name, ratio), group_size=group_size, tile=tile, engine=name, order=order, reduce=reduce
    )
    check(x, k, spec, (stride, stride))


@pytest.mark.parametrize("name", EXACT)
def test_output_channels_that_are_not_asked_for_are_zero(name):
    (x, k), spec = sample(3, 3, (4, 4), 8, 6, 3), DynamicSpec(**dropped_by(name, 0.5), engine=name)
    features = np.array([[0, 1, 5], [2, 3, 4], [0, 4, 5]], np.int32)
    there = np.zeros((3, 1, 1, 6))
    np.put_along_axis(there, features[:, None, None], 1, 3)
    reader = dynamic.Reader(geometry(x.shape, k.shape), (3, 3))

    def run(x, k):
        kept = dynamic.select(x, spec, reader)._replace(features=jnp.asarray(features))
        y, pullback = jax.vjp(lambda x, k: dynamic.conv(x, k, spec, kept=kept), x, k)
        return y, *pullback(y)

    y, dx, dk = jax.jit(run)(x, k)
    np.testing.assert_allclose(y, there * gated(x, k, spec)[0], rtol=1e-5, atol=1e-4)

    def masked(x, k):
        kept = dynamic.select(x, spec, reader)
        return there * dynamic.conv(x, k, dataclasses.replace(spec, engine="mask"), kept=kept)

    expected, pullback = jax.vjp(masked, x, k)
    for ours, theirs in zip((dx, dk), pullback(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@settings(max_examples=6, deadline=None)
@given(
    widths=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_width_slices_equal_loops_for_any_shape(widths, size, kernel, stride, seed):
    x, k = sample(seed, len(widths), size, 8, 3, kernel)
    spec, kept = DynamicSpec(group_size=2, engine="width_slices"), dynamic.Kept(widths=jnp.asarray(widths))
    run = jax.jit(lambda x, k: dynamic.conv(x, k, spec, strides=stride, kept=kept))
    y, pullback = jax.vjp(run, x, k)
    mask = (np.arange(8) // 2 < np.array(widths)[:, None]).astype(np.float32)[:, None, None]
    expected, by_x, by_kernel = gated(x * mask, k, DynamicSpec(), (stride, stride))
    for ours, theirs in ((y, expected), (pullback(y)[0], by_x * mask), (pullback(y)[1], by_kernel)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * max(1, np.abs(theirs).max()))


@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(1, 5),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.sampled_from([1, 3]),
    ratio=st.sampled_from([0.25, 0.5, 0.75]),
    seed=st.integers(0, 99),
)
def test_shared_channels_equal_loops_over_what_the_batch_votes_for(batch, size, kernel, ratio, seed):
    x, k = sample(seed, batch, size, 4, 3, kernel)
    votes, by_sample = np.zeros(4), x.astype(np.float64).mean((1, 2))
    for scores in by_sample:
        votes[highest(scores, ratio)] += 1
    order = sorted(range(4), key=lambda i: (-votes[i], -by_sample[:, i].mean(), i))
    kept = np.isin(np.arange(4), order[: round(4 * (1 - ratio))])
    y = dynamic.conv(x, k, DynamicSpec(channels=ratio, engine="shared_channels"))
    np.testing.assert_allclose(y, gated(x * kept, k, DynamicSpec())[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_groups_and_tiles(name):
    x, k = sample(1, 3, (4, 8), 8, 4, 3)
    check(x, k, DynamicSpec(**dropped_by(name, 0.5), group_size=2, tile=2, engine=name))
    if name in ("output_columns", "output_tiles"):
        check(x, k, DynamicSpec(outputs=0.5, tile=2, engine=name), strides=(2, 2))


@pytest.mark.parametrize(
    "name",
    having(["mask", "channels", "grouped", "columns", "native_channels", "native_columns", "output_tiles"].count),
)
def test_what_an_engine_does_not_save_it_masks(name):
    x, k = sample(2, 2, (4, 4), 6, 4, 3)
    check(x, k, DynamicSpec(channels=0.5, columns=0.25, outputs=0.5, engine=name))


@pytest.mark.parametrize("name", EXACT)
def test_one_thing_kept_and_all_kept(name):
    x, k = sample(3, 2, (3, 3), 4, 2, 3)
    for ratio in (0.95, 0.01):
        check(x, k, DynamicSpec(**dropped_by(name, ratio), engine=name))


@pytest.mark.parametrize("name", EXACT)
def test_maps_of_zeros_keep_the_first(name):
    x, k = sample(4, 2, (3, 3), 4, 2, 3)
    check(0 * x, k, DynamicSpec(**dropped_by(name, 0.5), engine=name))


@pytest.mark.parametrize("columns", [0.0, 0.5])
def test_shared_channels_are_those_that_most_samples_keep(columns):
    x, k = sample(5, 3, (4, 4), 6, 4, 3)
    votes, by_sample = np.zeros(6), x.mean((1, 2))
    for scores in by_sample:
        votes[highest(scores, 0.5)] += 1
    kept = np.zeros(6, np.float32)
    kept[sorted(range(6), key=lambda i: (-votes[i], -by_sample[:, i].mean()))[:3]] = 1
    spec = DynamicSpec(channels=0.5, columns=columns, engine="shared_channels")
    masked = np.stack([m * (tiled(m.mean(-1), 1, columns)[..., None] if columns else 1) for m in x]) * kept
    np.testing.assert_allclose(dynamic.conv(x, k, spec), gated(masked, k, DynamicSpec())[0], rtol=1e-5, atol=1e-5)


def test_shared_channels_follow_the_indices_of_another_gate():
    x, k = sample(5, 3, (4, 4), 6, 4, 3)
    x[..., 5] = np.nan
    kept = dynamic.Kept(channels=jnp.array([[0, 3], [3, 4], [1, 3]]))
    y = dynamic.conv(x, k, DynamicSpec(group_size=1, engine="shared_channels"), kept=kept)
    alone = np.where(np.isin(np.arange(6), [3, max([0, 1, 4], key=lambda i: x[..., i].mean())]), x, 0)
    np.testing.assert_allclose(y, gated(alone, k, DynamicSpec())[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["mask", "width_slices"])
def test_width_slices_take_the_first_channels_of_each_sample(engine):
    x, k = sample(6, 5, (4, 4), 8, 3, 3)
    widths = np.array([0, 1, 4, 2, 4])
    spec, kept = DynamicSpec(group_size=2, engine=engine), dynamic.Kept(widths=jnp.asarray(widths))
    y, pullback = jax.vjp(lambda *a: dynamic.conv(*a, spec, kept=kept), x, k)
    dx, dk = pullback(y)
    mask = (np.arange(8) // 2 < widths[:, None]).astype(np.float32)[:, None, None]
    expected, by_x, by_kernel = gated(x * mask, k, DynamicSpec())
    for ours, theirs in ((y, expected), (dx, by_x * mask), (dk, by_kernel)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_indices_of_another_gate():
    x, k = sample(7, 2, (3, 3), 4, 2, 3)
    kept = dynamic.Kept(channels=jnp.array([[0, 3], [1, 2]]))
    mask = np.array([[1, 0, 0, 1], [0, 1, 1, 0]], np.float32)[:, None, None]
    for name in ("mask", "channels", "grouped", *([] if missing else ["native_channels"])):
        y = dynamic.conv(x, k, DynamicSpec(engine=name), kept=kept)
        np.testing.assert_allclose(y, gated(x * mask, k, DynamicSpec())[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_engines_under_vmap(name):
    x, k = sample(12, 4, (4, 4), 4, 3, 3)
    spec = DynamicSpec(**dropped_by(name, 0.5), engine=name)
    mapped = jax.jit(jax.vmap(lambda x, k: dynamic.conv(x, k, spec)))
    y = mapped(x.reshape(2, 2, *x.shape[1:]), jnp.stack([k, 2 * k]))
    np.testing.assert_allclose(y[0], gated(x[:2], k, spec)[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(y[1], 2 * gated(x[2:], k, spec)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_engines_on_shards_of_a_batch(name):
    x, k = sample(13, 2, (4, 4), 4, 3, 3)
    spec = DynamicSpec(**dropped_by(name, 0.5), engine=name)
    mesh, rows, whole = jax.sharding.Mesh(jax.devices()[:1], ("batch",)), jax.P("batch"), jax.P()

    def run(x, k):
        checked = not name.startswith("fused")  # the interpreter of kernels cannot: tests/dynamic/test_fused.py
        specs = {"in_specs": (rows, whole), "out_specs": rows, "check_vma": checked}
        y, pullback = jax.vjp(jax.shard_map(lambda *a: dynamic.conv(*a, spec), mesh=mesh, **specs), x, k)
        return y, *pullback(y)

    for ours, expected in zip(jax.jit(run)(x, k), gated(x, k, spec), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


def test_groups_are_found_in_a_program_of_64_bits():
    x, k = sample(2, 3, (4, 4), 8, 3, 3)
    with jax.enable_x64(True):
        check(x.astype(np.float64), k.astype(np.float64), DynamicSpec(channels=0.5, group_size=2, engine="grouped"))


@pytest.mark.parametrize("name", having(lambda name: name.startswith("fused")))
def test_interpreted_kernels_say_why_they_do_not_run_in_a_checked_shard_map(name):
    x, k = sample(13, 2, (4, 4), 4, 3, 3)
    spec = DynamicSpec(**dropped_by(name, 0.5), engine=name)
    mesh, rows = jax.sharding.Mesh(jax.devices()[:1], ("batch",)), jax.P("batch")
    run = jax.shard_map(lambda *a: dynamic.conv(*a, spec), mesh=mesh, in_specs=(rows, jax.P()), out_specs=rows)
    with pytest.raises(ValueError, match="the fused kernels need a GPU inside shard_map"):
        jax.eval_shape(run, x, k)


@pytest.mark.parametrize("name", having(lambda name: not name.startswith("native")))
def test_engines_in_bfloat16(name):
    x, k = (jnp.asarray(a, jnp.bfloat16) for a in sample(8, 2, (4, 4), 8, 4, 3))
    spec = DynamicSpec(**dropped_by(name, 0.5), engine=name)
    y, expected = dynamic.conv(x, k, spec), gated(np.asarray(x, np.float32), np.asarray(k, np.float32), spec)[0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0, atol=2e-2 * np.abs(expected).max())


@pytest.mark.parametrize("name", having(lambda name: ENGINES[name].saves in ((), ("channels",))))
@pytest.mark.parametrize("channel", [0, 4])
def test_nan_in_a_dropped_channel_reaches_no_output(name, channel):
    x, k = sample(9, 2, (4, 4), 6, 3, 3)
    x[:, 1, 2, channel] = np.nan
    assert np.isfinite(dynamic.conv(x, k, DynamicSpec(channels=0.5, engine=name))).all()


@pytest.mark.parametrize("name", ["channels", "channels_and_columns", "grouped"])
def test_gradients_of_a_large_batch_in_bfloat16_lose_nothing_in_their_sum(name):
    x, k = (jnp.asarray(a, jnp.bfloat16) for a in sample(11, 256, (2, 2), 4, 2, 1))
    x = abs(x)
    spec = DynamicSpec(**dropped_by(name, 0.5), engine=name)
    ours = jax.grad(lambda k: dynamic.conv(x, k, spec).astype(jnp.float32).sum())(k)
    assert ours.dtype == jnp.bfloat16
    x, k = (a.astype(jnp.float32) for a in (x, k))
    spec = DynamicSpec(**dropped_by(name, 0.5), engine="mask")
    expected = jax.grad(lambda k: dynamic.conv(x, k, spec).sum())(k)
    np.testing.assert_allclose(ours.astype(np.float32), expected, rtol=1e-2)


def test_bad_input_is_refused():
    x, k = sample(10, 2, (4, 4), 6, 3, 3)
    with pytest.raises(TypeError, match="needs floating-point maps, got int32"):
        dynamic.conv(x.astype(np.int32), k, DynamicSpec(channels=0.5))
    with pytest.raises(TypeError, match="x is float32, but the kernel float16"):
        dynamic.conv(x, k.astype(np.float16), DynamicSpec(channels=0.5))
    with pytest.raises(ValueError, match=r"x must be \[N, H, W, C\] and kernel \[kh, kw, C, O\], got"):
        dynamic.conv(x, k[:, :, :4], DynamicSpec(channels=0.5))
    with pytest.raises(ValueError, match="engine must be 'auto' or one of 'mask', .*got 'magic'"):
        dynamic.conv(x, k, DynamicSpec(channels=0.5, engine="magic"))
    with pytest.raises(ValueError, match="engine 'columns' leaves out columns, but none are dropped: take another"):
        dynamic.conv(x, k, DynamicSpec(channels=0.5, engine="columns"))
    with pytest.raises(ValueError, match="tile=3 does not divide the outputs of 4 x 4 positions"):
        dynamic.conv(x, k, DynamicSpec(outputs=0.5, tile=3))
    with pytest.raises(ValueError, match="padding of a gated convolution must not be negative"):
        dynamic.conv(x, k, DynamicSpec(channels=0.5), padding=((0, -1), (0, 0)))
    with pytest.raises(ValueError, match="strides and dilation are one number or two, at least 1, got 0"):
        dynamic.conv(x, k, DynamicSpec(channels=0.5), strides=0)
    with pytest.raises(ValueError, match=r"x is empty, of shape \(0, 4, 4, 6\)"):
        dynamic.conv(x[:0], k, DynamicSpec(channels=0.5))


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        ({"channels": np.zeros((3, 1), int)}, ValueError, r"kept.channels must be of shape \[2, 1..6\], got \(3, 1\)"),
        ({"channels": np.zeros(2, int)}, ValueError, r"kept.channels must be of shape \[2, 1..6\], got \(2,\)"),
        ({"columns": np.zeros((2, 0), int)}, ValueError, r"kept.columns must be of shape \[2, 1..16\], got \(2, 0\)"),
        ({"outputs": np.zeros((2, 17), int)}, ValueError, r"kept.outputs must be of shape \[2, 1..16\], got \(2, 17\)"),
        ({"channels": np.zeros((2, 1))}, TypeError, "kept.channels must be integers, got float64"),
        ({"widths": np.zeros((2, 1), int)}, ValueError, r"kept.widths must be of shape \[2\], got \(2, 1\)"),
        ({"widths": np.zeros(2, int), "channels": np.zeros((2, 1), int)}, ValueError, "give one of them"),
    ],
)
def test_indices_that_do_not_fit_are_refused(kept, error, message):
    x, k = sample(10, 2, (4, 4), 6, 3, 3)
    with pytest.raises(error, match=message):
        dynamic.conv(x, k, DynamicSpec(engine="mask"), kept=dynamic.Kept(**kept))


@pytest.mark.parametrize("settings", [DynamicSpec(channels=0.5), DynamicSpec(columns=0.5), DynamicSpec()])
def test_forward_mode_goes_through_gates_under_lax(settings):
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(2, 2, 4, 4, 6)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 6, 4)).astype(np.float32)
    kept = None if settings.channels or settings.columns else Kept(features=jnp.array([[0, 2], [1, 3]]))
    form = lambda x: dynamic.conv(x, kernel, settings, kept=kept)
    with conv_impl("lax"):
        _, slope = jax.jvp(form, (x,), (t,))
        # The convolution is linear in what is kept.
        nudged = (form(x + 1e-3 * t) - form(x - 1e-3 * t)) / 2e-3
    np.testing.assert_allclose(slope, nudged, rtol=1e-2, atol=1e-2)
