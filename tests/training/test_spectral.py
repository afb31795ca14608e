"""Spectral normalisation against NumPy's singular value decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import quadratic, spec, training
from jaxeff.models import Network, sngan_discriminator

RNG = np.random.default_rng(0)


def largest(kernel):
    return np.linalg.svd(np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]), compute_uv=False)[0]


def parameters():
    return {
        "conv": {"kernel_a": RNG.normal(size=(3, 3, 2, 4)), "bias_a": RNG.normal(size=4)},
        "head": {"kernel": RNG.normal(size=(7, 1))},
    }


def as_arrays(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def normalised(params, iterations=100, **options):
    vectors = training.spectral_vectors(jax.random.key(0), params, **options)
    return training.spectral_normalise(params, vectors, iterations=iterations, **options)


def test_kernels_are_divided_by_their_largest_singular_value_and_nothing_else_changes():
    params = as_arrays(parameters())
    result, _ = normalised(params)
    for kernel, before in (
        (result["conv"]["kernel_a"], params["conv"]["kernel_a"]),
        (result["head"]["kernel"], params["head"]["kernel"]),
    ):
        np.testing.assert_allclose(kernel, np.asarray(before, np.float64) / largest(before), rtol=1e-4)
    np.testing.assert_array_equal(result["conv"]["bias_a"], params["conv"]["bias_a"])


def test_one_iteration_a_call_arrives_there_too():
    params = as_arrays(parameters())
    vectors = training.spectral_vectors(jax.random.key(1), params)
    step = jax.jit(training.spectral_normalise)
    for _ in range(100):
        result, vectors = step(params, vectors)
    assert largest(result["conv"]["kernel_a"]) == pytest.approx(1, rel=1e-4)
    # The vector is the right singular vector, up to its sign.
    right = np.linalg.svd(np.asarray(params["conv"]["kernel_a"]).reshape(-1, 4))[2][0]
    assert abs(right @ vectors["conv/kernel_a"]) == pytest.approx(1, rel=1e-4)


def test_it_acts_on_every_projection_of_a_quadratic_network():
    architecture = spec.quadratize(sngan_discriminator((3, 2), input_shape=(8, 8, 1)))
    net = Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer)
    params = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    result, vectors = jax.jit(normalised)(params)
    assert len(vectors) == 3 + 3 + 1
    for name in vectors:
        leaf = result
        for part in name.split("/"):
            leaf = leaf[part]
        assert largest(leaf) == pytest.approx(1, rel=1e-3), name


def test_the_gradient_is_that_of_the_paper():
    # Miyato et al., equation 12: (g - <g, W/s> u v^T) / s, with s the singular value and u, v its vectors.
    weights = RNG.normal(size=(5, 3))
    g = RNG.normal(size=(5, 3))
    u, s, v = np.linalg.svd(weights)
    expected = (g - (g * weights / s[0]).sum() * np.outer(u[:, 0], v[0])) / s[0]
    gradient = jax.grad(lambda p: (normalised(p)[0]["kernel"] * g).sum())(as_arrays({"kernel": weights}))
    np.testing.assert_allclose(gradient["kernel"], expected, rtol=1e-3, atol=1e-4)


def test_a_kernel_of_zeros_stays_one_until_it_moves():
    zeros = {"kernel": jnp.zeros((3, 2))}
    result, vectors = normalised(zeros)
    np.testing.assert_array_equal(result["kernel"], np.zeros((3, 2)))
    gradient = jax.grad(lambda p: training.spectral_normalise(p, vectors)[0]["kernel"].sum())(zeros)
    np.testing.assert_array_equal(gradient["kernel"], np.ones((3, 2)))
    weights = RNG.normal(size=(3, 2))
    result, _ = training.spectral_normalise(as_arrays({"kernel": weights}), vectors, iterations=50)
    np.testing.assert_allclose(result["kernel"], weights / np.linalg.norm(weights, 2), rtol=1e-5)


def test_select_leaves_other_kernels_alone():
    params = as_arrays(parameters())
    result, vectors = normalised(params, select="conv/*kernel*")
    assert set(vectors) == {"conv/kernel_a"}
    np.testing.assert_array_equal(result["head"]["kernel"], params["head"]["kernel"])


def test_mistakes_are_named():
    params = as_arrays(parameters())
    vectors = training.spectral_vectors(jax.random.key(0), params)
    with pytest.raises(ValueError, match=r"'conv/bias_a' has shape \(4,\); a kernel has at least two axes"):
        training.spectral_vectors(jax.random.key(0), params, "*")
    with pytest.raises(ValueError, match="matches no leaf"):
        training.spectral_vectors(jax.random.key(0), params, "weights")
    with pytest.raises(ValueError, match="nothing is selected"):
        training.spectral_vectors(jax.random.key(0), params, lambda name, leaf: False)
    with pytest.raises(ValueError, match="state: has vectors for .* make it with spectral_vectors"):
        training.spectral_normalise(params, vectors, "head/*")
    with pytest.raises(ValueError, match=r"expected a vector \(1,\)"):
        training.spectral_normalise(params, {**vectors, "head/kernel": jnp.ones(2)})
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        training.spectral_normalise(params, vectors, iterations=0)
