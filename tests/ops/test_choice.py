"""Sums of maps and choices in compiled code, against NumPy in float64 and a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.ops import choice

missing = choice.unavailable()
pytestmark = pytest.mark.skipif(bool(missing), reason=str(missing))

TERMS = {"mean": lambda x: x, "abs_mean": np.abs, "l2": np.square}
FINISH = {"mean": lambda x: x, "abs_mean": lambda x: x, "l2": np.sqrt}


@pytest.mark.parametrize("term", choice.TERMS)
@pytest.mark.parametrize(("over", "axis"), [("positions", -2), ("channels", -1)])
@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 3, 67), (3, 2, 9, 40), (3, 1030, 70), (0, 4, 3), (2, 130, 4)])
def test_means_equal_numpy(term, over, axis, shape):
    x = np.random.default_rng(0).normal(size=shape)
    means = jax.jit(lambda x: choice.map_means(x, over, term))(x.astype(np.float32))
    expected = FINISH[term](TERMS[term](x).mean(axis))
    assert means.shape == expected.shape
    np.testing.assert_allclose(means, expected, rtol=1e-4, atol=1e-6)


def test_means_of_groups():
    x = np.random.default_rng(0).normal(size=(2, 7, 12))
    expected = np.sqrt(np.square(x).mean(1)).reshape(2, 4, 3).mean(-1)
    np.testing.assert_allclose(choice.map_means(x.astype(np.float32), "positions", "l2", 3), expected, rtol=1e-5)


@pytest.mark.parametrize("term", choice.TERMS)
@pytest.mark.parametrize(("over", "group"), [("positions", 1), ("positions", 2), ("channels", 1)])
def test_means_have_gradients_and_are_mapped(term, over, group):
    x = np.random.default_rng(1).normal(size=(3, 2, 4, 6)).astype(np.float32)
    axis = -2 if over == "positions" else -1
    plain = {"mean": lambda x: x, "abs_mean": jnp.abs, "l2": jnp.square}[term]
    finish = {"l2": jnp.sqrt}.get(term, lambda x: x)

    def squared(means):
        return lambda x: (means(x) ** 2).sum()

    def expected(x):
        means = finish(plain(x).mean(axis))
        return means.reshape(*means.shape[:-1], -1, group).mean(-1)

    ours = jax.vmap(jax.grad(squared(lambda x: choice.map_means(x, over, term, group))))(x)
    np.testing.assert_allclose(ours, jax.grad(squared(expected))(x), rtol=1e-4, atol=1e-5)


def test_means_of_large_maps_keep_their_digits():
    x = np.full((1, 512 * 512, 3), 0.1, np.float32)
    np.testing.assert_allclose(choice.map_means(x, "positions", "mean"), np.float64(x[:, 0]), rtol=1e-6)


VALUES = st.sampled_from([0.0, -0.0, 1.0, -2.0, 0.5, np.inf, -np.inf, np.nan])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 5, 33]).flatmap(lambda n: st.lists(VALUES, min_size=n, max_size=n)), st.floats(0, 1))
def test_the_highest_come_first_and_the_lower_index_among_equals(row, share):
    k = max(1, round(share * len(row)))
    lowest = [-np.inf if np.isnan(value) else value for value in row]
    expected = sorted(sorted(range(len(row)), key=lambda i: (-lowest[i], i))[:k])
    np.testing.assert_array_equal(choice.highest(jnp.asarray(row, jnp.float32), k), expected)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 5, 33]).flatmap(lambda n: st.lists(VALUES, min_size=n, max_size=n)), st.integers(-1, 40))
def test_masks_are_of_the_same_choice(row, k):
    mask = np.asarray(choice.highest_mask(jnp.asarray(row, jnp.float32), k))
    count = min(max(k, 0), len(row))
    assert mask.sum() == count
    if count:
        np.testing.assert_array_equal(np.flatnonzero(mask), choice.highest(jnp.asarray(row, jnp.float32), count))


def test_masks_of_traced_numbers_one_for_each_row():
    scores = np.random.default_rng(2).normal(size=(4, 3, 9)).astype(np.float32)
    masks = jax.jit(jax.vmap(choice.highest_mask))(scores, jnp.arange(4)[:, None, None])
    np.testing.assert_array_equal(masks.sum(-1), np.arange(4)[:, None].repeat(3, 1))


@pytest.mark.parametrize("groups", [0, 3, 12])
@pytest.mark.parametrize("columns", [0, 7])
def test_what_is_kept_and_its_gradients(groups, columns):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 2, 7, 12)).astype(np.float32)
    x[0, 0, 0] = np.nan  # is zero where it is dropped
    by_group = np.float32(rng.normal(size=(2, 2, groups)))
    by_column = np.float32(rng.normal(size=(2, 2, columns)))
    by_column[0, 0, :1] = -9
    mask = np.ones(x.shape, bool)
    if groups:
        kept = np.argsort(np.argsort(-by_group)) < 2
        mask &= kept.repeat(12 // groups, -1)[..., None, :]
    if columns:
        mask &= (np.argsort(np.argsort(-by_column)) < 3)[..., None]
    keep = lambda x: choice.keep_highest(x, by_group, by_column, (2, 3))
    np.testing.assert_array_equal(jax.jit(keep)(x), np.where(mask, x, 0))
    mapped = jax.vmap(lambda x, a, b: choice.keep_highest(x, a, b, (2, 3)))
    np.testing.assert_array_equal(mapped(x, by_group, by_column), np.where(mask, x, 0))
    g = rng.normal(size=x.shape).astype(np.float32)
    pullback = lambda g: jax.vjp(keep, x)[1](g)[0]
    np.testing.assert_array_equal(pullback(g), np.where(mask, g, 0))
    np.testing.assert_array_equal(jax.vjp(pullback, g)[1](g)[0], np.where(mask, g, 0))


def test_listed_channels_are_kept_and_others_refused():
    x = np.random.default_rng(4).normal(size=(2, 3, 5)).astype(np.float32)
    channels = np.int32([[0, 2], [1, 4]])
    mask = np.zeros((2, 1, 5), bool)
    mask[[0, 0, 1, 1], 0, channels.reshape(-1)] = True
    np.testing.assert_array_equal(choice.keep_channels(x, channels), np.where(mask, x, 0))
    gradient = jax.grad(lambda x: (choice.keep_channels(x, channels) ** 2).sum())(x)
    np.testing.assert_allclose(gradient, np.where(mask, 2 * x, 0), rtol=1e-6)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="out of range"):
        jax.block_until_ready(choice.keep_channels(x, channels + 1))


@pytest.mark.parametrize("only_nan", [False, True])
def test_means_without_what_is_dropped(only_nan):
    x = np.random.default_rng(5).normal(size=(2, 4, 6)).astype(np.float32)
    x[0, 1, 3] = np.nan
    scores = x.mean(1)
    kept = np.zeros((2, 6), bool)
    np.put_along_axis(kept, np.argsort(-np.where(np.isnan(scores), -np.inf, scores), -1)[:, :4], True, -1)
    assert not kept[0, 3]
    counted = (kept | ~np.isnan(scores)) if only_nan else kept
    expected = np.where(counted[:, None], x, 0).mean(-1)
    found = choice.means_of_kept(x, jnp.asarray(scores), 4, "mean", only_nan=only_nan)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_every_row_has_its_own():
    scores = np.random.default_rng(2).normal(size=(2, 3, 40)).astype(np.float32)
    chosen = jax.vmap(lambda rows: choice.highest(rows, 7))(scores)
    assert chosen.shape == (2, 3, 7) and chosen.dtype == jnp.int32
    np.testing.assert_array_equal(chosen, np.sort(np.argsort(-scores, axis=-1)[..., :7]))


def test_it_is_had_for_float32_on_cpu_alone(monkeypatch):
    assert choice.available(jnp.ones(3)) and not choice.available(jnp.ones(3, jnp.bfloat16))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not choice.available(jnp.ones(3))


def test_what_does_not_fit_is_refused():
    one = lambda *shape: jnp.ones(shape, jnp.float32)
    refused = pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="fit|more than there are")
    for call in (
        lambda: choice.highest(one(5), 6),
        lambda: choice.keep_highest(one(4, 3, 8), one(1, 8), one(4, 0), (4, 3)),
        lambda: choice.keep_highest(one(1, 3, 8), one(1, 8), one(1, 0), (-1, 3)),
        lambda: choice.keep_highest(one(1, 3, 8), one(1, 8), one(1, 0), (9, 3)),
        lambda: choice.keep_channels(one(4, 3, 8), jnp.zeros((1, 2), jnp.int32)),
        lambda: choice.means_of_kept(one(4, 3, 8), one(1, 8), 4, "mean", only_nan=False),
    ):
        with refused:
            jax.block_until_ready(call())
