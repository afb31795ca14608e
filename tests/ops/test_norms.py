"""Norms against NumPy in float64."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxeff.ops import NORMS, Norm
from jaxeff.ops.norms import checked_norm, largest_divisor

EPSILON = 1e-5


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = 3 * normal(0, 4, 5, 6, 8) + np.arange(8, dtype=np.float32)
SCALE, BIAS = normal(1, 8), normal(2, 8)


def standardised(x, axes):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + EPSILON)


def by_numpy(kind, x):
    x = x.astype(np.float64)
    if kind == "batch":
        return standardised(x, (0, 1, 2))
    if kind == "group":
        return standardised(x.reshape(*x.shape[:-1], 4, 2), (1, 2, 4)).reshape(x.shape)
    if kind == "layer":
        return standardised(x, (-1,))
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)


def variables_with(norm, x, scale=SCALE, bias=BIAS):
    variables = jax.eval_shape(norm.init, jax.random.key(0), x)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    stats = {"batch_stats": {"mean": jnp.zeros(8), "var": jnp.ones(8)}} if "batch_stats" in variables else {}
    return stats | {"params": {name: params[name] for name in variables["params"]}}


@pytest.mark.parametrize("kind", NORMS)
def test_norm_equals_numpy(kind):
    norm = Norm(kind, groups=4)
    y, _ = jax.jit(partial(norm.apply, train=True, mutable=["batch_stats"]))(variables_with(norm, X), X)
    expected = by_numpy(kind, X) * SCALE + (BIAS if kind != "rms" else 0)
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_parameters_are_scale_and_bias_and_nothing_around_them():
    for kind in NORMS:
        variables = jax.eval_shape(Norm(kind).init, jax.random.key(0), X)
        assert set(variables["params"]) == ({"scale"} if kind == "rms" else {"scale", "bias"})
        assert all(value.shape == (8,) for value in variables["params"].values())
        assert set(variables) == ({"params", "batch_stats"} if kind == "batch" else {"params"})


def test_batch_norm_updates_its_running_statistics_only_while_training():
    norm = Norm("batch")
    variables = norm.init(jax.random.key(0), X)
    _, changed = norm.apply(variables, X, train=True, mutable=["batch_stats"])
    mean, var = X.astype(np.float64).mean((0, 1, 2)), X.astype(np.float64).var((0, 1, 2))
    np.testing.assert_allclose(changed["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(changed["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-5)
    _, kept = norm.apply({**variables, **changed}, X, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], changed["batch_stats"])


def test_batch_norm_uses_its_running_statistics_outside_training():
    norm = Norm("batch")
    stats = {"mean": jnp.arange(8.0), "var": jnp.arange(1.0, 9.0)}
    y = norm.apply({**variables_with(norm, X), "batch_stats": stats}, X)
    expected = (X - np.arange(8)) / np.sqrt(np.arange(1, 9) + EPSILON) * SCALE + BIAS
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_batch_norm_shares_statistics_over_a_mapped_axis():
    norm = Norm("batch", axis_name="clients")
    variables = norm.init(jax.random.key(0), X[:2])

    def one(x):
        return norm.apply(variables, x, train=True, mutable=["batch_stats"])

    y, changed = jax.jit(jax.vmap(one, axis_name="clients"))(X.reshape(2, 2, 5, 6, 8))
    np.testing.assert_allclose(y.reshape(X.shape), by_numpy("batch", X), atol=1e-4)
    np.testing.assert_allclose(changed["batch_stats"]["mean"][1], 0.1 * X.mean((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("kind", NORMS)
def test_bfloat16_activations_have_float32_parameters_and_statistics(kind):
    norm = Norm(kind, groups=4, dtype=jnp.bfloat16)
    half = jnp.asarray(X, jnp.bfloat16)
    variables = jax.jit(norm.init)(jax.random.key(0), half)
    y, changed = jax.jit(partial(norm.apply, train=True, mutable=["batch_stats"]))(variables, half)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, changed))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(np.asarray(y, np.float64), by_numpy(kind, np.asarray(half, np.float32)), atol=0.05)


def test_groups_are_lowered_to_a_divisor_of_the_channels():
    assert [largest_divisor(size, 8) for size in (64, 12, 7, 1, 22)] == [8, 6, 7, 1, 2]
    x = normal(0, 3, 4, 12)
    y = Norm("group", groups=8).apply({"params": {"scale": jnp.ones(12), "bias": jnp.zeros(12)}}, x)
    expected = standardised(x.astype(np.float64).reshape(3, 4, 6, 2), (1, 3)).reshape(x.shape)
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_initialisers_are_used():
    norm = Norm("group", scale_init=nn.initializers.zeros, bias_init=nn.initializers.ones)
    np.testing.assert_array_equal(norm.init_with_output(jax.random.key(0), X)[0], np.ones_like(X))


def test_unknown_names_are_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="'batch', 'group', 'layer', 'rms', got 'instance'"):
        Norm("instance").init(jax.random.key(0), X)
    assert checked_norm(None) is None and checked_norm("rms") == "rms"


def test_none_is_no_norm():
    y, variables = Norm(None).init_with_output(jax.random.key(0), X)
    np.testing.assert_array_equal(y, X)
    assert not variables
