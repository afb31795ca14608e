"""The Frechet distance against closed forms and SciPy, and features against a forward pass written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxeff import models, training
from jaxeff.spec import Architecture, Conv, Dense, GlobalPool
from jaxeff.training import FeatureMoments, feature_moments, frechet_distance

RNG = np.random.default_rng(0)


def test_diagonal_gaussians_have_a_closed_form():
    a, b = RNG.uniform(0.1, 3, (2, 6))
    m, n = RNG.normal(size=(2, 6))
    expected = ((m - n) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    got = frechet_distance(FeatureMoments(m, np.diag(a)), FeatureMoments(n, np.diag(b)))
    assert got == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("examples", [50, 4], ids=["full rank", "singular"])
def test_moments_and_distance_are_those_of_numpy_and_scipy(examples):
    x, y = RNG.normal(size=(examples, 6)) @ RNG.normal(size=(6, 6)), RNG.normal(size=(50, 6)) + 1
    a, b = feature_moments(x), feature_moments(y)
    np.testing.assert_allclose(a.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(a.mean, x.mean(0), rtol=1e-12)
    # The trace of the root from the eigenvalues of the product itself, which is not symmetric.
    root = np.sqrt(np.abs(scipy.linalg.eigvals(a.covariance @ b.covariance))).sum()
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-5)


def test_a_shift_costs_its_square_and_nothing_costs_nothing():
    x = RNG.normal(size=(40, 3))
    a = feature_moments(x)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, feature_moments(x + [3.0, 0, 4.0])) == pytest.approx(25)


def test_moments_are_taken_in_float64():
    # In float32 the variance of 1e4 + {0, 1} is lost.
    x = np.array([[1e4], [1e4 + 1]] * 50, np.float32)
    assert feature_moments(x).covariance[0, 0] == pytest.approx(25 / 99, rel=1e-9)


def test_features_are_what_the_last_layer_is_given():
    net = models.Network(
        Architecture("tiny", (4, 4, 1), (Conv("conv", 3, norm="batch"), GlobalPool("mean"), Dense("head", 2)))
    )
    images = RNG.integers(0, 256, (5, 4, 4, 1)).astype(np.uint8)
    variables = net.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    found = training.features(net, variables, images, batch_size=2)
    assert found.shape == (5, 3)
    head = variables["params"]["head"]["layer"]
    logits = net.apply(variables, jnp.asarray(images, jnp.float32) / 255)
    np.testing.assert_allclose(found @ head["kernel"] + head["bias"], logits, rtol=1e-5, atol=1e-6)


def test_mistakes_are_named():
    a = feature_moments(RNG.normal(size=(5, 3)))
    with pytest.raises(ValueError, match="a has 3 features and b 2"):
        frechet_distance(a, feature_moments(RNG.normal(size=(5, 2))))
    with pytest.raises(ValueError, match=r"N of at least 2, got shape \(1, 3\)"):
        feature_moments(np.ones((1, 3)))
    with pytest.raises(ValueError, match="1 rows hold NaN"):
        feature_moments([[1.0, 2.0], [np.nan, np.nan]])
    net = models.Network(Architecture("flat", (4, 4, 1), (Conv("conv", 1),)))
    with pytest.raises(ValueError, match=r"its last layer 'conv' is given has shape \(2, 4, 4, 1\)"):
        training.features(net, {}, np.zeros((2, 4, 4, 1), np.uint8))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        training.features(net, {}, np.zeros((2, 4, 4, 1), np.uint8), batch_size=0)
