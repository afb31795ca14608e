"""Pooling against NumPy loops and lax's own pooling gradient."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax import numpy as jnp

from jaxeff.ops import avg_pool, global_avg_pool, max_pool


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_loops(x, window, reduce):
    height, width = window
    out = np.zeros((x.shape[0], x.shape[1] // height, x.shape[2] // width, x.shape[3]))
    for i, j in np.ndindex(*out.shape[1:3]):
        out[:, i, j] = reduce(x[:, i * height : (i + 1) * height, j * width : (j + 1) * width], axis=(1, 2))
    return out


def stock_max_pool(x, window):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *window, 1), "VALID")


SIZES = st.sampled_from([(4, 6), (5, 7), (3, 3)])
WINDOWS = st.sampled_from([(2, 2), (3, 1), (1, 1), (2, 3)])


@settings(deadline=None, max_examples=6)
@given(SIZES, WINDOWS)
def test_pooling_equals_loops_and_drops_what_does_not_fill_a_window(size, window):
    x = normal(0, 2, *size, 3)
    greatest, mean = jax.jit(lambda x: (max_pool(x, window), avg_pool(x, window)))(x)
    np.testing.assert_array_equal(greatest, by_loops(x, window, np.max))
    np.testing.assert_allclose(mean, by_loops(x, window, np.mean), atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=6)
@given(SIZES, WINDOWS, st.booleans())
def test_gradient_of_max_goes_where_that_of_lax_goes_also_under_ties(size, window, ties):
    x = normal(0, 2, *size, 3)
    x = np.sign(x) if ties else x
    g = normal(1, 2, size[0] // window[0], size[1] // window[1], 3)
    (actual,) = jax.jit(lambda x: jax.vjp(lambda x: max_pool(x, window), x)[1](g))(x)
    (expected,) = jax.jit(lambda x: jax.vjp(lambda x: stock_max_pool(x, window), x)[1](g))(x)
    np.testing.assert_array_equal(actual, expected)


def test_gradient_of_max_takes_the_first_of_equals_in_row_major_order():
    x = np.ones((1, 2, 2, 1), np.float32)
    np.testing.assert_array_equal(jax.grad(lambda x: max_pool(x).sum())(x)[0, :, :, 0], [[1, 0], [0, 0]])
    x[0, 0, 0, 0] = 0
    np.testing.assert_array_equal(jax.grad(lambda x: max_pool(x).sum())(x)[0, :, :, 0], [[0, 1], [0, 0]])


def test_gradient_of_the_mean_is_spread_evenly():
    dx = jax.grad(lambda x: avg_pool(x, (2, 3)).sum())(np.ones((1, 3, 3, 1), np.float32))
    np.testing.assert_allclose(dx[0, :, :, 0], [[1 / 6] * 3, [1 / 6] * 3, [0] * 3], rtol=1e-6)


def test_minus_infinity_and_nan_come_through():
    x = np.full((1, 2, 4, 1), -np.inf, np.float32)
    x[0, 0, 2:, 0] = np.nan, 3
    y = np.asarray(max_pool(x))[0, 0, :, 0]
    assert y[0] == -np.inf and np.isnan(y[1])
    dx = np.asarray(jax.jit(jax.grad(lambda x: max_pool(x).sum()))(x))
    np.testing.assert_array_equal(dx[0, :, :2, 0], [[1, 0], [0, 0]])
    assert np.isnan(np.asarray(avg_pool(x))[0, 0, 1, 0])


def test_pooling_under_vmap_and_in_bfloat16():
    x = normal(0, 3, 2, 4, 4, 2)
    grad = jax.grad(lambda x: jnp.sum(max_pool(x) ** 2))
    np.testing.assert_array_equal(jax.jit(jax.vmap(grad))(x)[1], jax.jit(grad)(x[1]))
    half = jnp.asarray(x[0], jnp.bfloat16)
    for pool in (max_pool, avg_pool, global_avg_pool):
        assert jax.eval_shape(pool, half).dtype == jnp.bfloat16
    assert jax.eval_shape(jax.grad(lambda x: max_pool(x).sum()), half).dtype == jnp.bfloat16


def test_global_mean():
    x = normal(0, 2, 3, 5, 4)
    np.testing.assert_allclose(global_avg_pool(x), x.astype(np.float64).mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("pool", [max_pool, avg_pool])
@pytest.mark.parametrize(
    ("shape", "window", "message"),
    [
        ((4, 4, 3), (2, 2), r"x must be \[N, H, W, C\], got shape \(4, 4, 3\)"),
        ((1, 1, 4, 3), (2, 2), r"\(1, 1, 4, 3\) is smaller than the pooling window \(2, 2\)"),
        ((1, 4, 4, 3), (0, 2), r"window must be two sizes >= 1, got \(0, 2\)"),
        ((1, 4, 4, 3), (2,), r"window must be two sizes >= 1, got \(2,\)"),
    ],
)
def test_what_does_not_fit_is_an_error(pool, shape, window, message):
    with pytest.raises(ValueError, match=message):
        pool(np.ones(shape, np.float32), window)
