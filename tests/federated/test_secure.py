"""Secure aggregation: masks vanish exactly, and what is left is the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxeff import federated
from jaxeff.federated import aggregates, secure
from tests.federated.quadratics import run, task

KEY = jax.random.key(3)
summed = jax.jit(lambda values, reported: secure.receive(secure.send(values, KEY), reported))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.booleans(), min_size=5, max_size=5), st.integers(0, 99))
def test_masks_vanish_exactly_whoever_drops_out(reported, seed):
    rng = np.random.default_rng(seed)
    values = {"a": rng.integers(0, 2**32, (5, 3), np.uint32), "b": rng.integers(0, 2**32, 5, np.uint32)}
    got = summed(jax.tree.map(jnp.asarray, values), jnp.array(reported))
    for name, value in values.items():
        expected = (value[np.array(reported)].astype(object).sum(0)) % 2**32 if any(reported) else 0 * value[0]
        np.testing.assert_array_equal(np.asarray(got[name]).astype(object), expected)


def test_what_a_client_sends_looks_like_noise():
    sent = secure.send(jnp.zeros((3, 4096), jnp.uint32), KEY)
    for row in np.asarray(sent.values) / 2.0**32:
        assert stats.kstest(row, "uniform").pvalue > 1e-3


def test_a_client_alone_has_no_mask():
    np.testing.assert_array_equal(secure.send(jnp.full((1, 3), 7, jnp.uint32), KEY).values, [[7, 7, 7]])


def stacked(clients, seed=0):
    rng = np.random.default_rng(seed)
    tree = {"w": rng.normal(size=(clients, 3, 2)), "g": rng.normal(size=(clients, 2, 4))}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


@pytest.mark.parametrize("absent", [False, True])
def test_a_feature_paired_mean_is_what_it_is_in_the_clear(absent):
    axes = {"w": None, "g": 0}
    omega = np.array([[3.0, 0.0], [2.0, 5.0], [0.0, 1.0], [4.0, 4.0]])
    tree, previous = stacked(4), jax.tree.map(lambda leaf: leaf[0] * 0 + 9, stacked(4))
    counted = jnp.array([1.0, 0.0, 1.0, 1.0]) if absent else jnp.ones(4)
    if absent:  # what it would have sent does not matter
        tree = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), tree)
    members = federated.Member(jnp.arange(4), jnp.array([3.0, 7.0, 1.0, 8.0]), counted, jnp.zeros(4, jnp.int32))
    hidden = secure.secure(KEY, bound=8.0, total=19.0, group_axes=axes, omega=omega)
    got = jax.jit(hidden.combine)(tree, members, previous)
    expected = aggregates.paired(axes, omega).combine(tree, members, previous)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)


def test_masks_are_others_in_another_round():
    a, b = (secure.secret(jax.random.fold_in(KEY, i), 0, 1, jnp.zeros(8, jnp.uint32)) for i in (0, 1))
    assert (np.asarray(a) != np.asarray(b)).all()
    np.testing.assert_array_equal(
        secure.secret(KEY, 2, 1, jnp.zeros(8, jnp.uint32)), secure.secret(KEY, 1, 2, jnp.zeros(8, jnp.uint32))
    )


def test_rounds_give_what_they_give_in_the_clear():
    hidden = federated.fed_avg(task(), optax.sgd(0.1), aggregate=secure.secure(KEY, bound=16.0, total=10.0))
    how = federated.Participation(dropout=0.4)
    plain = federated.fed_avg(task(), optax.sgd(0.1))
    np.testing.assert_allclose(run(hidden, 4, participation=how)[0], run(plain, 4, participation=how)[0], atol=1e-5)


def test_values_beyond_the_bound_are_cut():
    members = federated.Member(jnp.arange(2), jnp.ones(2), jnp.ones(2), jnp.zeros(2, jnp.int32))
    got = secure.secure(KEY, bound=1.0, total=2.0).combine({"w": jnp.array([5.0, 0.5])}, members, {"w": jnp.zeros(())})
    np.testing.assert_allclose(got["w"], 0.75, atol=1e-6)


def test_bounds_must_be_positive():
    with pytest.raises(ValueError, match="bound and total"):
        secure.secure(KEY, bound=0.0, total=1.0)


def test_a_bound_on_the_weights_that_does_not_hold_is_refused():
    hidden = federated.fed_avg(task(), optax.sgd(0.1), aggregate=secure.secure(KEY, bound=16.0, total=9.0))
    with pytest.raises(ValueError, match="these add up to 10, more than 9"):
        run(hidden, 1)
