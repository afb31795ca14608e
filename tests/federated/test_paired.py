"""Feature-paired averaging against loops in float64, and the properties that it must have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import federated, trees

AXES = {"trunk": None, "conv": {"kernel": 0, "bias": 0}, "turned": 1}


def clients(seed, count, groups, dtype=np.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    tree = lambda *lead: {
        "trunk": draw(*lead, 3, 2),
        "conv": {"kernel": draw(*lead, groups, 2, 3), "bias": draw(*lead, groups, 3)},
        "turned": draw(*lead, 2, groups),
    }
    return tree(count), tree()


def by_loops(stacked, omega, weights, previous):
    def mean(values, w, before):
        return sum(a * np.asarray(v, np.float64) for a, v in zip(w, values, strict=True)) / sum(w) if sum(w) else before

    found = {"trunk": mean(stacked["trunk"], weights, previous["trunk"]), "conv": {}}
    for name in ("kernel", "bias"):
        pairs = [(stacked["conv"][name][:, g], previous["conv"][name][g]) for g in range(omega.shape[1])]
        found["conv"][name] = np.stack([mean(own, omega[:, g], before) for g, (own, before) in enumerate(pairs)])
    turned = [mean(stacked["turned"][:, :, g], omega[:, g], previous["turned"][:, g]) for g in range(omega.shape[1])]
    return {**found, "turned": np.stack(turned, 1)}


@settings(max_examples=8, deadline=None)
@given(count=st.integers(1, 6), groups=st.integers(1, 4), seed=st.integers(0, 99))
def test_it_equals_loops_over_clients_and_groups(count, groups, seed):
    rng = np.random.default_rng(seed)
    stacked, previous = clients(seed, count, groups)
    omega = rng.integers(0, 4, (count, groups)).astype(np.float32)
    weights = rng.integers(0, 4, count).astype(np.float32)
    found = jax.jit(lambda *args: federated.paired_average(args[0], AXES, *args[1:]))(stacked, omega, weights, previous)
    expected = by_loops(stacked, omega, weights, previous)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_with_one_group_that_all_own_it_is_fedavg_bit_for_bit():
    stacked, previous = clients(0, 5, 1)
    weights = np.array([3, 1, 4, 1, 5], np.float32)
    shared = federated.paired_average(stacked, None, weights[:, None], weights, previous)
    paired = federated.paired_average(stacked, AXES, weights[:, None], weights, previous)
    mean = trees.weighted_mean(stacked, weights)
    jax.tree.map(np.testing.assert_array_equal, shared, mean)
    jax.tree.map(np.testing.assert_array_equal, paired, mean)


def test_equal_clients_are_a_fixed_point_and_order_does_not_matter():
    stacked, previous = clients(1, 4, 3)
    rng = np.random.default_rng(0)
    omega, weights = rng.random((4, 3)).astype(np.float32), rng.random(4).astype(np.float32)
    same = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (4, *leaf.shape)), previous)
    found = federated.paired_average(same, AXES, omega, weights, stacked_zero := jax.tree.map(jnp.zeros_like, previous))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, previous)
    order, groups = np.array([2, 0, 3, 1]), np.array([1, 2, 0])
    moved = federated.paired_average(trees.take(stacked, order), AXES, omega[order], weights[order], stacked_zero)
    whole = federated.paired_average(stacked, AXES, omega, weights, stacked_zero)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), moved, whole)

    def regrouped(tree, lead=0):
        conv = {name: jnp.take(leaf, groups, lead) for name, leaf in tree["conv"].items()}
        return {**tree, "conv": conv, "turned": jnp.take(tree["turned"], groups, lead + 1)}

    turned = federated.paired_average(regrouped(stacked, 1), AXES, omega[:, groups], weights, stacked_zero)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), turned, regrouped(whole))


def test_clients_that_own_nothing_of_a_group_have_no_influence_on_it_not_even_nan():
    stacked, previous = clients(2, 3, 2)
    omega, weights = np.array([[1, 0], [0, 2], [3, 0]], np.float32), np.ones(3, np.float32)

    def of_group(kernel, group):
        tree = {**stacked, "conv": {**stacked["conv"], "kernel": kernel}}
        return federated.paired_average(tree, AXES, omega, weights, previous)["conv"]["kernel"][group].sum()

    for group in range(2):
        slope = np.asarray(jax.grad(of_group)(stacked["conv"]["kernel"], group))
        share = omega[:, group] / omega[:, group].sum()
        np.testing.assert_allclose(slope[:, group], np.broadcast_to(share[:, None, None], (3, 2, 3)), rtol=1e-6)
        assert not slope[:, 1 - group].any()
    spoiled = stacked["conv"]["kernel"].at[1, 0].set(np.nan)
    assert np.isfinite(of_group(spoiled, 0)) and of_group(spoiled, 0) == of_group(stacked["conv"]["kernel"], 0)


def test_what_nobody_owns_stays_and_what_is_no_number_is_not_averaged():
    stacked, previous = clients(3, 2, 2)
    nobody = np.zeros((2, 2), np.float32)
    found = federated.paired_average(stacked, AXES, nobody, np.zeros(2, np.float32), previous)
    jax.tree.map(np.testing.assert_array_equal, found, previous)
    keys, steps = jax.random.split(jax.random.key(1), 2), jnp.array([7, 9], jnp.int32)
    found = federated.paired_average(
        {"key": keys, "step": steps}, None, nobody, np.array([1.0, 0.0]), {"key": keys[0], "step": jnp.int32(3)}
    )
    assert found["key"] == keys[0] and found["step"] == 7 and found["step"].dtype == jnp.int32


def test_sums_are_accumulated_in_float32_and_cast_back():
    stacked, previous = clients(4, 64, 2, jnp.bfloat16)
    omega, weights = np.ones((64, 2), np.float32), np.ones(64, np.float32)
    found = federated.paired_average(stacked, AXES, omega, weights, previous)
    expected = by_loops(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stacked), omega, weights, previous)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-8, atol=1e-5), found, expected
    )


def test_weights_of_groups():
    counts, owner = np.array([[5, 0, 2, 0], [0, 0, 3, 1]]), (0, 0, 1, 1)
    np.testing.assert_array_equal(federated.group_weights(counts, owner, 2), [[5, 2], [0, 4]])
    np.testing.assert_array_equal(federated.group_weights(counts, owner, 2, "uniform"), [[1, 1], [0, 1]])
    np.testing.assert_array_equal(federated.group_weights(counts, owner, 2, "size"), [[7, 7], [0, 4]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, p: federated.group_weights([[1]], [0], 1, "rank"), "by must be one of 'class_counts'"),
        (lambda s, p: federated.group_weights([[1, 2]], [0], 1), "one group for each of the classes"),
        (lambda s, p: federated.group_weights([[1, 2]], [0, 0], 2), "every one of the 2 groups needs a class"),
        (lambda s, p: federated.paired_average(s, AXES, np.ones((2, 2)), np.ones(3), p), "must be of the .2. clients"),
        (lambda s, p: federated.paired_average(s, AXES, np.ones((2, 3)), np.ones(2), p), "has 2 groups along axis 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*clients(0, 2, 2))


def test_the_highest_counter_is_that_of_who_is_counted():
    """Neither a client of weight 0 nor what was before is."""
    stacked, previous = {"count": jnp.array([3, 9])}, {"count": jnp.array(5)}
    found = federated.paired_average(stacked, None, np.zeros((2, 1)), np.array([1.0, 0.0]), previous)
    assert int(found["count"]) == 3
