"""Robust aggregates against NumPy and brute force, with clients that are not counted and groups of owners."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.federated import robust


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
