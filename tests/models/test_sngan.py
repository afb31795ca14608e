"""The generator and the discriminator: shapes, ranges, and sizes counted by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import costs, quadratic, spec
from jaxeff.models import Network, sngan_discriminator, sngan_generator


def network(architecture):
    return Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer)


def size(architecture):
    """Parameters, and MACs of one example."""
    x = jax.ShapeDtypeStruct((1, *architecture.input_shape), jnp.float32)
    variables = jax.eval_shape(network(architecture).init, jax.random.key(0), x)
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    return params, costs.analyze(network(architecture).apply, variables, x, residuals=False).total.macs


@pytest.mark.parametrize(
    ("widths", "shape", "first"),
    [((4, 3, 2), (28, 28, 1), (7, 7, 4)), ((5, 4, 3, 2), (32, 32, 3), (4, 4, 5)), ((3, 2), (4, 6, 2), (2, 3, 3))],
)
def test_the_generator_doubles_its_first_map_up_to_the_image(widths, shape, first):
    table = spec.shapes(sngan_generator(widths, latent=8, output_shape=shape))
    assert table["map"].output == first
    assert table["image"].output == shape


def test_first_order_sizes_are_those_counted_by_hand():
    params, macs = size(sngan_generator((4, 3, 2), latent=5, output_shape=(8, 8, 1)))
    # dense 5 -> 2*2*4 with bias; 3x3 4 -> 3 and 3 -> 2 with norms, without bias; 3x3 2 -> 1 with bias.
    assert params == 5 * 16 + 16 + (9 * 4 * 3 + 6) + (9 * 3 * 2 + 4) + 9 * 2 + 1
    assert macs == 5 * 16 + 9 * 16 * 12 + 9 * 64 * 6 + 9 * 64 * 2
    params, _ = size(sngan_discriminator((3, 2), input_shape=(8, 8, 1)))
    assert params == 16 * 3 + 3 + 16 * 3 * 2 + 2 + 2 * 2 * 2 + 1


def test_quadratic_networks_have_three_kernels_in_place_of_one_and_the_same_ends():
    first = sngan_generator((4, 3, 2), latent=5, output_shape=(8, 8, 1))
    params, _ = size(spec.quadratize(first, branch_norm="batch"))
    kernels = 9 * 4 * 3 + 9 * 3 * 2
    # Every projection has a norm of its own, and the layer its norm as before.
    assert params == 5 * 16 + 16 + 3 * kernels + (3 + 1) * (6 + 4) + 9 * 2 + 1
    params, _ = size(spec.quadratize(sngan_discriminator((3, 2), input_shape=(8, 8, 1))))
    assert params == 3 * (16 * 3 + 3 + 16 * 3 * 2 + 2) + 2 * 2 * 2 + 1


def test_generated_images_are_between_minus_one_and_one_and_the_discriminator_gives_one_score_each():
    generator = network(spec.quadratize(sngan_generator((4, 3, 2), latent=5, output_shape=(8, 8, 1))))
    z = 5 * jax.random.normal(jax.random.key(0), (3, 5))
    images, _ = generator.init_with_output(jax.random.key(1), z)
    assert images.shape == (3, 8, 8, 1)
    assert np.abs(images).max() <= 1 and np.ptp(images) > 0
    scores, _ = network(sngan_discriminator((3, 2), input_shape=(8, 8, 1))).init_with_output(jax.random.key(2), images)
    assert scores.shape == (3, 1)


def test_upsampling_repeats_every_pixel():
    net = spec.Architecture("up", (2, 3, 2), (spec.Upsample("up", (2, 3)),))
    x = np.random.default_rng(0).normal(size=(2, 2, 3, 2)).astype(np.float32)
    expected = np.kron(x, np.ones((1, 2, 3, 1), np.float32))
    np.testing.assert_array_equal(Network(net).apply({}, x), expected)


def test_reshaping_keeps_the_order_of_the_values():
    net = spec.Architecture("map", (12,), (spec.Reshape("map", (2, 3, 2)),))
    x = np.arange(24, dtype=np.float32).reshape(2, 12)
    np.testing.assert_array_equal(Network(net).apply({}, x), x.reshape(2, 2, 3, 2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sngan_generator((8, 8, 8, 8), output_shape=(28, 28, 1)), "3 doublings .* divide by 8"),
        (lambda: sngan_generator((8,)), "at least one doubling"),
        (lambda: sngan_discriminator(()), "at least one convolution"),
    ],
)
def test_widths_that_do_not_fit_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
