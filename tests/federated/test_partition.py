"""Partitions: exact, the same for one seed, skewed as asked for, and clear about what cannot be dealt."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import data, federated
from jaxeff.federated import figures

LABELS = np.random.default_rng(0).integers(0, 10, 600)
RECIPES = {
    "iid": lambda labels, clients, seed: federated.iid(labels, clients, seed=seed, num_classes=10),
    "by_classes": lambda labels, clients, seed: federated.by_classes(labels, clients, 10, seed=seed, num_classes=10),
    "dirichlet": lambda labels, clients, seed: federated.dirichlet(
        labels, clients, 0.5, seed=seed, least=0, num_classes=10
    ),
    "quantity": lambda labels, clients, seed: federated.quantity(
        labels, clients, 0.5, seed=seed, least=0, num_classes=10
    ),
    "by_key": lambda labels, clients, seed: federated.by_key(
        np.random.default_rng(seed).integers(0, clients, len(labels)).astype(str), labels, num_classes=10
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=20, deadline=None)
@given(clients=st.integers(1, 12), examples=st.integers(400, 600), seed=st.integers(0, 99))
def test_every_example_goes_to_one_client_and_is_counted(recipe, clients, examples, seed):
    labels = np.random.default_rng(seed).integers(0, 10, examples)
    part = RECIPES[recipe](labels, clients, seed)
    assert sorted(np.concatenate(part.indices)) == list(range(examples))
    for indices, counts in zip(part.indices, part.class_counts, strict=True):
        assert (np.diff(indices) > 0).all()
        assert [int((labels[indices] == c).sum()) for c in range(10)] == counts.tolist()
    assert part.sizes.tolist() == [len(indices) for indices in part.indices]
    again = RECIPES[recipe](labels, clients, seed)
    assert all(np.array_equal(a, b) for a, b in zip(part.indices, again.indices, strict=True))


def test_iid_parts_are_of_equal_size_and_differ_by_seed():
    first, second = (federated.iid(LABELS, 7, seed=seed) for seed in (0, 1))
    assert np.ptp(first.sizes) <= 1
    assert not np.array_equal(first.indices[0], second.indices[0])


@settings(max_examples=40, deadline=None)
@given(clients=st.integers(1, 30), each=st.integers(1, 10), seed=st.integers(0, 99))
def test_every_client_holds_so_many_classes_and_classes_have_owners_alike(clients, each, seed):
    labels = np.arange(600) % 10
    if clients * each < 10:
        with pytest.raises(ValueError, match="would be owned by nobody"):
            federated.by_classes(labels, clients, each, seed=seed)
        return
    part = federated.by_classes(labels, clients, each, seed=seed)
    assert ((part.class_counts > 0).sum(1) == each).all()
    assert np.ptp((part.class_counts > 0).sum(0)) <= 1
    for c in range(10):  # a class is split equally among its owners
        held = part.class_counts[part.class_counts[:, c] > 0, c]
        assert np.ptp(held) <= 1


def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution():
    labels, clients, alpha = np.repeat(np.arange(2000), 50), 4, 0.5
    shares = federated.dirichlet(labels, clients, alpha, seed=0, least=0).class_counts / 50
    mean = 1 / clients
    variance = mean * (1 - mean) / (clients * alpha + 1)
    np.testing.assert_allclose(shares.mean(1), mean, atol=0.02)
    np.testing.assert_allclose(shares.var(1), variance, rtol=0.1)


@pytest.mark.parametrize("recipe", [federated.dirichlet, federated.quantity])
def test_every_client_has_as_many_examples_as_asked_for(recipe):
    part = recipe(LABELS, 10, 1.0, seed=3, least=10)
    assert part.sizes.min() >= 10
    assert np.ptp(part.sizes) > 30
    with pytest.raises(ValueError, match="always had fewer than 60 examples; let alpha be higher"):
        recipe(LABELS, 10, 0.01, seed=0, least=60)
    with pytest.raises(ValueError, match="least=61 examples for each of 10 clients are more than the 600 there are"):
        recipe(LABELS, 10, 0.5, seed=0, least=61)


def test_natural_clients_come_in_the_order_of_their_keys():
    part = federated.by_key(np.array([30, 4, 30, 11]), np.array([0, 1, 2, 0]))
    assert [indices.tolist() for indices in part.indices] == [[1], [3], [0, 2]]


@pytest.mark.data
def test_users_of_movielens_are_natural_clients():
    ratings = data.load("movielens", "train")
    users, stars = ratings.arrays["user"], (2 * ratings.arrays["rating"]).astype(int)
    part = federated.by_key(users, stars)
    assert len(part.indices) == len(set(users.tolist()))
    assert all(len(set(users[indices].tolist())) == 1 for indices in part.indices)


def test_noise_grows_from_client_to_client_and_is_the_same_for_one_key():
    levels = federated.noise_levels(4, 0.2)
    np.testing.assert_allclose(levels, [0.05, 0.1, 0.15, 0.2], rtol=1e-6)
    images = np.ones((4, 50, 50, 1), np.float32)
    noisy = federated.with_noise(jax.random.key(0), images, levels)
    np.testing.assert_allclose(np.asarray(noisy - 1).std((1, 2, 3)), levels, rtol=0.1)
    np.testing.assert_array_equal(noisy, federated.with_noise(jax.random.key(0), images, levels))
    assert federated.with_noise(jax.random.key(0), images, 0.1).shape == images.shape


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: federated.iid(np.ones(3), 2, seed=0), TypeError, "labels must be integers, got float64"),
        (lambda: federated.iid(np.ones((3, 1), int), 2, seed=0), ValueError, r"at least one, got shape \(3, 1\)"),
        (lambda: federated.iid([0, 1], 3, seed=0), ValueError, r"clients must be in 1\.\.2, as each needs an example"),
        (lambda: federated.iid([0, 5], 1, seed=0, num_classes=3), ValueError, r"labels must be in 0\.\.2, got 0\.\.5"),
        (lambda: federated.by_classes(LABELS, 3, 11, seed=0), ValueError, r"classes_per_client must be in 1\.\.10"),
        (lambda: federated.by_classes([0, 1, 1], 3, 2, seed=0), ValueError, "class 0 has 1 examples for 3 owners"),
        (lambda: federated.dirichlet(LABELS, 3, 0.0, seed=0), ValueError, "alpha .* must be positive, got 0.0"),
        (lambda: federated.by_key([1, 2], [0, 0, 0]), ValueError, r"keys must be of shape \(3,\)"),
        (lambda: federated.noise_levels(3, -1.0), ValueError, "sigma not negative"),
        (lambda: federated.with_noise(jax.random.key(0), np.ones(3, int), 1.0), TypeError, "got int"),
    ],
)
def test_what_cannot_be_dealt_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_figure_is_written(tmp_path):
    part = federated.by_classes(LABELS, 5, 3, seed=0)
    assert figures.draw_partition(part, tmp_path / "parts" / "held.png").stat().st_size > 1000


def test_a_class_without_examples_has_no_owner():
    with pytest.raises(ValueError, match="class 3 has 0 examples"):
        federated.by_classes([0, 0, 1, 1, 2, 2], 3, 2, seed=0, num_classes=4)
