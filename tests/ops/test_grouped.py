"""Group-major layers against lax's grouped convolution and block-diagonal matrices."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax import numpy as jnp

from jaxeff.ops import channel_major, group_major, group_major_kernel, grouped_conv, grouped_dense


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_near(actual, expected, tolerance=2e-5):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


CASES = {
    "same": dict(),
    "stride2-valid": dict(strides=(2, 2), padding="VALID"),
    "dilated-asymmetric": dict(dilation=(2, 1), padding=((0, 2), (1, 0)), strides=(1, 2)),
}


@pytest.mark.parametrize("impl", ["separate", "matmul"])
@pytest.mark.parametrize("name", CASES)
def test_convolution_and_its_gradients_equal_feature_group_count(name, impl):
    options, groups = CASES[name], 3
    x, k = normal(0, 2, 6, 7, 6), normal(1, 3, 2, 2, 12)

    def stock(x, k):
        return lax.conv_general_dilated(
            x, k, options.get("strides", (1, 1)), options.get("padding", "SAME"), rhs_dilation=options.get("dilation"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    def ours(x, k):
        return channel_major(grouped_conv(group_major(x, groups), group_major_kernel(k, groups), **options, impl=impl))

    def with_gradients(fn):
        y, vjp = jax.vjp(fn, x, k)
        return y, *vjp(jnp.cos(y))

    for actual, expected in zip(
        jax.jit(lambda: with_gradients(ours))(), jax.jit(lambda: with_gradients(stock))(), strict=True
    ):
        assert_near(actual, expected)


def test_auto_is_one_of_the_two():
    x, k = normal(0, 2, 1, 4, 4, 3), normal(1, 2, 3, 3, 3, 2)
    assert_near(grouped_conv(x, k), grouped_conv(x, k, impl="matmul"))


@settings(deadline=None, max_examples=5)
@given(st.sampled_from([1, 2, 5]), st.sampled_from([1, 3]), st.booleans())
def test_dense_is_a_block_diagonal_matrix(groups, width, bias):
    x, k, b = normal(0, 4, groups * width), normal(1, groups, width, 2), normal(2, groups, 2) if bias else None
    matrix = np.zeros((groups * width, groups * 2))
    for g in range(groups):
        matrix[g * width : (g + 1) * width, 2 * g : 2 * g + 2] = k[g]
    expected = x @ matrix + (b.reshape(-1) if bias else 0)
    assert_near(channel_major(grouped_dense(group_major(jnp.asarray(x), groups), k, b)), expected)


@settings(deadline=None, max_examples=5)
@given(st.sampled_from([(2, 6), (2, 4, 6), (2, 3, 4, 6)]), st.sampled_from([1, 2, 6]))
def test_layouts_go_back_and_forth(shape, groups):
    x = jnp.asarray(normal(0, *shape))
    grouped = group_major(x, groups)
    assert grouped.shape == (groups, *shape[:-1], 6 // groups)
    np.testing.assert_array_equal(channel_major(grouped), x)
    for g, channels in enumerate(np.split(np.asarray(x), groups, axis=-1)):
        np.testing.assert_array_equal(grouped[g], channels)


def test_kernel_layout_keeps_the_outputs_of_a_group_together():
    k = normal(0, 3, 3, 2, 6)
    grouped = group_major_kernel(jnp.asarray(k), 3)
    assert grouped.shape == (3, 3, 3, 2, 2)
    for g in range(3):
        np.testing.assert_array_equal(grouped[g], k[..., 2 * g : 2 * g + 2])


X, K = np.ones((2, 1, 4, 4, 3), np.float32), np.ones((2, 3, 3, 3, 2), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grouped_conv(X[0], K), r"x must be \[G, N, H, W, I/G\].*got \(1, 4, 4, 3\)"),
        (lambda: grouped_conv(X, K[:1]), "x has 2 groups and the kernel 1"),
        (lambda: grouped_conv(X, K[:, :, :, :2]), "x has 3 channels but each group of the kernel takes 2"),
        (lambda: grouped_conv(X, K, impl="fast"), "'separate', 'matmul', 'auto', got 'fast'"),
        (lambda: grouped_dense(X, K), r"x must be \[G, N, I/G\]"),
        (lambda: grouped_dense(X[:, :, 0, 0], K[:, 0, 0, :2]), "takes 2"),
        (lambda: group_major(X, 2), "groups=2 must divide the 3 channels"),
        (lambda: group_major(X, 0), "groups=0 must divide"),
        (lambda: group_major_kernel(K, 4), "groups=4 must divide the 2 output features"),
    ],
)
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
