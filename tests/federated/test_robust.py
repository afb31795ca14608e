"""Robust aggregates against NumPy and brute force, with clients that are not counted and groups of owners."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.federated import aggregates, robust


def clients(seed, count):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=(count, *shape)), jnp.float32) for name, shape in (("a", (3,)), ("b", ()))
    }


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def of_counted(stacked, counted, function):
    return {name: function(np.asarray(leaf, np.float64)[np.asarray(counted)]) for name, leaf in stacked.items()}


def by_brute_force(rows, f, select):
    """Numbers of the clients that Krum selects."""
    scores = []
    for i in range(len(rows)):
        distances = sorted(((rows[i] - rows[j]) ** 2).sum() for j in range(len(rows)) if j != i)
        scores.append(sum(distances[: max(1, len(rows) - f - 2)]))
    return np.argsort(scores, kind="stable")[:select]


def rows_of(stacked):
    return np.concatenate([np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in stacked.values()], 1)


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 7), seed=st.integers(0, 50), share=st.sampled_from([0.0, 0.2, 0.34, 0.49]))
def test_medians_and_trimmed_means_are_those_of_numpy_over_who_is_counted(count, seed, share):
    stacked, counted = clients(seed, 7), np.arange(7) < count
    stacked = jax.tree.map(lambda leaf: leaf.at[6].set(jnp.nan if count < 7 else leaf[6]), stacked)
    counted = np.random.default_rng(seed).permutation(counted) if count == 7 else counted
    close(jax.jit(robust.median)(stacked, counted), of_counted(stacked, counted, lambda v: np.median(v, 0)))

    def trimmed(values):
        cut = int(share * len(values) + 1e-9)
        return np.sort(values, 0)[cut : len(values) - cut].mean(0)

    close(robust.trimmed_mean(stacked, counted, share), of_counted(stacked, counted, trimmed))


@pytest.mark.parametrize("select", [1, 3])
def test_krum_selects_what_brute_force_does_and_not_who_is_far_away(select):
    for seed in range(5):
        stacked = jax.tree.map(lambda leaf: leaf.at[2].add(50.0), clients(seed, 9))
        counted = np.arange(9) != 5
        chosen = by_brute_force(rows_of(stacked)[counted], 1, select)
        expected = of_counted(stacked, counted, lambda v, chosen=chosen: v[chosen].mean(0))
        found = robust.krum(stacked, counted, 1, select=select)
        close(found, expected)
        assert np.abs(found["a"]).max() < 10
    stacked = jax.tree.map(lambda leaf: leaf.at[5].set(jnp.nan), stacked)
    assert np.isfinite(robust.krum(stacked, counted, 1)["a"]).all()


def test_bulyan_is_its_formula():
    for seed in range(3):
        stacked = jax.tree.map(lambda leaf: leaf.at[0].add(30.0), clients(seed, 9))
        counted, f = np.arange(9) != 8, 1
        rows, left, chosen = rows_of(stacked)[:8], list(range(8)), []
        for _ in range(8 - 2 * f):
            pick = left[by_brute_force(rows[left], f, 1)[0]]
            chosen.append(pick)
            left.remove(pick)

        def around(values, chosen=chosen, f=f):
            picked = values[chosen]
            order = np.argsort(np.abs(picked - np.median(picked, 0)), 0, kind="stable")[: 8 - 4 * f]
            return np.take_along_axis(picked, order, 0).mean(0)

        found = robust.bulyan(stacked, counted, f)
        close(found, of_counted(stacked, counted, around))
        assert np.abs(found["a"]).max() < 10


def test_clipping_keeps_the_direction_and_what_is_near():
    reference = {"a": jnp.ones(3), "b": jnp.zeros(())}
    stacked = clients(1, 4)
    found = robust.clipped(stacked, reference, 0.5)
    before, after = (rows_of(tree) - rows_of(jax.tree.map(lambda x: x[None], reference)) for tree in (stacked, found))
    length = np.linalg.norm(before, axis=1, keepdims=True)
    np.testing.assert_allclose(after, before * np.minimum(1, 0.5 / length), rtol=1e-5, atol=1e-6)
    close(robust.clipped(stacked, reference, 1e6), stacked)


def test_groups_are_aggregated_over_their_owners():
    rng = np.random.default_rng(0)
    stacked = {
        "trunk": jnp.asarray(rng.normal(size=(5, 2)), jnp.float32),
        "conv": jnp.asarray(rng.normal(size=(5, 4, 3))),
    }
    previous = {"trunk": jnp.zeros(2), "conv": jnp.full((4, 3), 7.0)}
    owned = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]])
    counted = np.array([True, True, True, True, False])
    found = robust.by_group(robust.median, stacked, {"trunk": None, "conv": 1}, owned, counted, previous)
    np.testing.assert_allclose(found["trunk"], np.median(np.asarray(stacked["trunk"])[:4], 0), rtol=1e-6)
    for g in range(2):
        own = np.asarray(stacked["conv"])[:, :, g][counted & (owned[:, g] > 0)]
        np.testing.assert_allclose(found["conv"][:, g], np.median(own, 0), rtol=1e-6)
    np.testing.assert_array_equal(found["conv"][:, 2], 7.0)


def test_clients_that_are_not_finite_are_found():
    stacked = clients(0, 4)
    spoiled = {"a": stacked["a"].at[1, 2].set(jnp.nan), "b": stacked["b"].at[3].set(jnp.inf), "n": jnp.arange(4)}
    assert robust.finite_clients(spoiled).tolist() == [True, False, True, False]
    assert robust.finite_clients({"n": jnp.arange(2)}).tolist() == [True, True]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: robust.krum(s, np.ones(4, bool), 1), ValueError, r"krum: 1 byzantine .* 2 \* 1 \+ 3 .* there are 4"),
        (lambda s: robust.krum(s, np.arange(6) < 4, 1), ValueError, "there are 4"),
        (lambda s: robust.krum(s, np.ones(6, bool), 1, select=6), ValueError, r"select must be in 1\.\.5"),
        (lambda s: robust.bulyan(s, np.ones(6, bool), 1), ValueError, r"bulyan: 1 byzantine .* 4 \* 1 \+ 3"),
        (lambda s: robust.trimmed_mean(s, np.ones(6, bool), 0.5), ValueError, r"must be in \[0, 0.5\), got 0.5"),
        (lambda s: robust.median({"n": jnp.arange(6)}, np.ones(6, bool)), TypeError, "floating point, got int32"),
    ],
)
def test_what_cannot_be_robust_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(clients(0, 6))


def test_a_client_far_beyond_all_numbers_is_not_chosen():
    """Its squared distance is infinite, and was once taken for none."""
    stacked = {"w": jnp.ones((9, 4)).at[3].set(1e25) + 0.01 * jnp.arange(9.0)[:, None]}
    for found in (
        robust.krum(stacked, jnp.ones(9, bool), 1),
        robust.krum(stacked, jnp.ones(9, bool), 1, select=8),
        robust.bulyan(stacked, jnp.ones(9, bool), 1),
    ):
        assert float(jnp.abs(found["w"] - 1).max()) < 0.2


@pytest.mark.parametrize("bad", [0, 2])
def test_who_is_counted_may_be_traced(bad):
    """Of nineteen clients eleven are counted: the same as if the others were not there."""
    values = 1 + 0.1 * np.random.default_rng(0).normal(size=(19, 3))
    counted = np.isin(np.arange(19), np.random.default_rng(1).permutation(19)[:11])
    values[np.flatnonzero(counted)[:bad]] = 1.6
    stacked = {"w": jnp.asarray(values, jnp.float32)}
    alone = {"w": stacked["w"][counted]}
    for rule in (
        lambda tree, who: robust.krum(tree, who, 2),
        lambda tree, who: robust.krum(tree, who, 2, select=9),
        lambda tree, who: robust.bulyan(tree, who, 2),
    ):
        np.testing.assert_allclose(jax.jit(rule)(stacked, counted)["w"], rule(alone, np.ones(11, bool))["w"], rtol=1e-6)


def test_more_than_can_be_averaged_are_not():
    stacked = {"w": jnp.ones((10, 1))}
    counted = jnp.arange(10) < 5
    stacked = {"w": jnp.where(counted[:, None], stacked["w"], 0.0)}
    found = jax.jit(lambda tree, who: robust.krum(tree, who, 1, select=8))(stacked, counted)
    np.testing.assert_allclose(found["w"], 1.0)


def test_groups_of_too_few_owners_are_refused_or_stay():
    omega = np.array([[1, 0], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1]])
    krum = lambda stacked, counted: robust.krum(stacked, counted, 1)
    with pytest.raises(ValueError, match=r"these have fewer: 1 \(5\)"):
        aggregates.robust(krum, least=6, group_axes={"g": 0}, omega=omega)
    made = aggregates.robust(krum, least=5, group_axes={"g": 0}, omega=omega)
    members = aggregates.Member(jnp.arange(6), jnp.ones(6), jnp.ones(6).at[5].set(0.0), jnp.zeros(6, jnp.int32))
    found = jax.jit(made.combine)({"g": jnp.full((6, 2), 3.0)}, members, {"g": jnp.array([7.0, 8.0])})
    np.testing.assert_allclose(found["g"], [3.0, 8.0])
