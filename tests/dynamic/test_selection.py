"""What a gate keeps of a map, against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.dynamic import (
    DynamicSpec,
    Kept,
    Reader,
    channel_attention,
    column_attention,
    keep_count,
    masked,
    masked_by_ratio,
    select,
)
from jaxeff.dynamic.engines import geometry
from jaxeff.ops import choice

X = np.random.default_rng(0).normal(size=(2, 4, 6, 8)).astype(np.float32)
REDUCED = {"mean": np.mean, "abs_mean": lambda a: np.mean(np.abs(a)), "l2": lambda a: np.sqrt(np.mean(np.square(a)))}


def attention(x, reduce):
    """Channel and column attention by loops in float64."""
    x = x.astype(np.float64)
    n, height, width, channels = x.shape
    by_channel = [[REDUCED[reduce](x[b, :, :, c]) for c in range(channels)] for b in range(n)]
    by_column = [[[REDUCED[reduce](x[b, h, w]) for w in range(width)] for h in range(height)] for b in range(n)]
    return np.array(by_channel), np.array(by_column)


def gated(x, spec):
    """The gated map by loops in float64: sums over groups and tiles, the highest kept."""
    n, height, width, channels = x.shape
    g, t = spec.group_size, spec.tile
    result = np.zeros_like(x)
    for b in range(n):
        by_channel = attention(x[b : b + 1], spec.reduce)[0][0]
        groups = [by_channel[i : i + g].sum() for i in range(0, channels, g)]
        kept = sorted(range(len(groups)), key=lambda i: -groups[i])[: round((1 - spec.channels) * len(groups))]
        by_group = np.zeros(channels, bool)
        for i in kept:
            by_group[i * g : (i + 1) * g] = True
        ranked = x[b] * by_group if spec.order == "channel_first" else x[b]
        by_column = attention(ranked[None], spec.reduce)[1][0]
        corners = [(h, w) for h in range(0, height, t) for w in range(0, width, t)]
        tiles = [by_column[h : h + t, w : w + t].sum() for h, w in corners]
        for i in sorted(range(len(tiles)), key=lambda i: -tiles[i])[: round((1 - spec.columns) * len(tiles))]:
            h, w = corners[i]
            result[b, h : h + t, w : w + t] = x[b, h : h + t, w : w + t] * by_group
    return result


SPECS = [
    DynamicSpec(channels=0.5),
    DynamicSpec(columns=0.75, reduce="abs_mean"),
    DynamicSpec(channels=0.25, columns=0.5, reduce="l2"),
    DynamicSpec(channels=0.5, columns=0.5, group_size=2, tile=2),
    DynamicSpec(channels=0.75, columns=0.5, order="channel_first", reduce="abs_mean"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_gate_keeps_what_loops_keep(spec):
    expected = gated(X, spec)
    np.testing.assert_array_equal(masked(X, select(X, spec), spec), expected)
    np.testing.assert_array_equal(masked_by_ratio(X, spec.channels, spec.columns, spec), expected)


def test_attention_of_every_reduction():
    for reduce in REDUCED:
        by_channel, by_column = attention(X, reduce)
        np.testing.assert_allclose(channel_attention(X, reduce), by_channel, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(column_attention(X, reduce), by_column, rtol=1e-5, atol=1e-6)


def test_attention_in_half_precision_is_summed_in_float32():
    x = jnp.full((1, 64, 64, 1), 1.01, jnp.bfloat16)
    assert channel_attention(x).dtype == jnp.float32
    np.testing.assert_allclose(channel_attention(x), float(x[0, 0, 0, 0]), rtol=1e-6)


def test_traced_ratios_keep_as_many_as_static_ones():
    x = np.random.default_rng(1).normal(size=(1, 5, 3, 40)).astype(np.float32)
    counts = jax.jit(lambda a, b: (masked_by_ratio(x, a, 0, DynamicSpec()), masked_by_ratio(x, 0, b, DynamicSpec())))
    for ratio in np.round(np.arange(0, 1, 0.05), 2):
        channels, columns = counts(ratio, ratio)
        assert np.any(channels, (1, 2)).sum() == keep_count(float(ratio), 40), ratio
        assert np.any(columns, 3).sum() == keep_count(float(ratio), 15), ratio


def test_nothing_is_selected_where_nothing_is_dropped():
    assert select(X, DynamicSpec()) == Kept()
    np.testing.assert_array_equal(masked(X, Kept(), DynamicSpec()), X)


def test_a_nan_selects_nothing_and_does_not_pass_through_the_mask():
    x = np.abs(X)
    x[0, 1, 2, 3] = np.nan
    spec = DynamicSpec(channels=0.5, columns=0.5)
    kept = select(x, spec)
    assert 3 not in kept.channels[0]
    # Columns are judged without that channel, and where all channels are kept a column that holds a NaN comes last.
    without = select(np.where(np.arange(8) == 3, 0, np.abs(X)), spec)
    np.testing.assert_array_equal(kept.columns[0], without.columns[0])
    assert 1 * 6 + 2 not in select(x, DynamicSpec(columns=0.5)).columns[0]
    assert np.isfinite(masked(x, kept, spec)).all()
    # Kept channels that hold one pass it on, so that it is found: here all do.
    assert np.isnan(masked(np.full_like(x, np.nan), select(np.full_like(x, np.nan), spec), spec)).any()


@pytest.mark.parametrize("ranking", ["attention", "inverse"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_nan_selects_no_output_that_reads_it(ranking, sign):
    x = sign * np.abs(X)
    x[0, 0, 0, 0] = np.nan
    reader = Reader(geometry(x.shape, (3, 3, x.shape[-1], 1)), (3, 3))
    kept = select(x, DynamicSpec(outputs=0.5, ranking=ranking), reader).outputs[0]
    assert not {0, 1, x.shape[2], x.shape[2] + 1} & set(np.asarray(kept).tolist())


def test_a_tile_that_does_not_divide_a_map_keeps_its_columns_under_traced_ratios():
    settings, odd = DynamicSpec(channels=0.5, tile=4), X[:, :3, :5]
    ours = jax.jit(lambda columns: masked_by_ratio(odd, 0.5, columns, settings))(0.5)
    np.testing.assert_array_equal(ours, masked(odd, select(odd, settings), settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 1.0}, r"channels is the share that is dropped, in \[0, 1\), got 1.0"),
        ({"columns": -0.5}, r"columns is the share that is dropped, in \[0, 1\), got -0.5"),
        ({"group_size": 0}, "group_size must be an integer of at least 1, got 0"),
        ({"tile": 1.5}, "tile must be an integer of at least 1, got 1.5"),
        ({"order": "both"}, "order must be one of 'parallel', 'channel_first', got 'both'"),
        ({"reduce": "max"}, "reduce must be one of 'mean', 'abs_mean', 'l2', got 'max'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DynamicSpec(**settings)


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="group_size=3 does not divide the 8 channels"):
        select(X, DynamicSpec(channels=0.5, group_size=3))
    with pytest.raises(ValueError, match="tile=4 does not divide the columns of 4 x 6 positions"):
        select(X, DynamicSpec(columns=0.5, tile=4))
    with pytest.raises(TypeError, match="attention needs floating-point feature maps, got int32"):
        select(X.astype(np.int32), DynamicSpec(channels=0.5))
    with pytest.raises(ValueError, match=r"a gate works on feature maps \[N, H, W, C\], got shape \(2, 8\)"):
        select(X[:, 0, 0], DynamicSpec(channels=0.5))


@pytest.mark.parametrize("order", ["parallel", "channel_first"])
@pytest.mark.parametrize("native", [True, False])
def test_a_channel_of_nan_does_not_decide_which_columns_are_kept(order, native, monkeypatch):
    monkeypatch.setattr("jaxeff.ops.choice.available", choice.available if native else lambda array: False)
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 6)).astype(np.float32)
    settings = DynamicSpec(channels=0.5, columns=0.5, order=order)
    without = x.copy()
    x[0, :, :, 2] = np.nan
    without[0, :, :, 2] = 0 if order == "parallel" else -99
    found = select(jnp.asarray(x), settings)
    assert 2 not in np.asarray(found.channels)[0]
    np.testing.assert_array_equal(found.columns, select(jnp.asarray(without), settings).columns)
    half = jax.jit(lambda x, r: masked_by_ratio(x, r, r, settings))(x, 0.5)
    np.testing.assert_array_equal(half != 0, masked(jnp.asarray(x), found, settings) != 0)
