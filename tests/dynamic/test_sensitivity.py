"""The sensitivity sweep against one evaluation at a time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import data, dynamic, models
from jaxeff.dynamic import DynamicSpec

PLAN = models.cnn((8, 16, 16), pools=2, input_shape=(8, 8, 1), norm=None)


@pytest.fixture(scope="module")
def trained():
    """A small network that knows most digits, with their images and labels."""
    digits = data.load("digits", "train")
    images, labels = jnp.asarray(digits.arrays["image"], jnp.float32) / 16 - 0.5, jnp.asarray(digits.arrays["label"])
    network = models.Network(PLAN)
    variables = jax.jit(network.init)(jax.random.key(0), images[:1])
    tx = optax.adam(3e-3)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            rows = jax.random.choice(key, len(images), (64,))

            def loss(params):
                logits = network.apply({"params": params}, images[rows])
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(1), 150))[0][0]

    return {"params": train(variables["params"])}, images[:512], labels[:512]


def gated(**settings):
    architecture = dynamic.gate(PLAN, DynamicSpec(channels=0.5, **settings))
    return models.Network(architecture, gate=dynamic.gate_layer)


def accuracy(network, variables, images, labels):
    return float((jax.jit(network.apply)(variables, images).argmax(-1) == labels).mean())


def test_the_sweep_is_one_evaluation_for_each_block_ratio_and_dimension(trained):
    variables, images, labels = trained
    network, grid = gated(), (0.0, 0.5, 0.75)
    paths = dynamic.block_paths(network.architecture)
    found = dynamic.sensitivity(network.apply, variables, images, labels, paths, grid=grid, batch_size=128)
    assert found.accuracy.shape == (2, len(paths), 3) and found.names == ("block 1", "block 2")
    for dimension, block, i in itertools.product((0, 1), (0, 1), (0, 2)):
        table = np.zeros((2, 2))
        table[block, dimension] = grid[i]
        one = models.Network(dynamic.with_ratios(network.architecture, table), gate=dynamic.gate_layer)
        assert found.accuracy[dimension, block, i] == pytest.approx(accuracy(one, variables, images, labels), abs=3e-3)


def test_the_whole_grid_is_one_compilation(trained):
    variables, images, labels = trained
    network, calls = gated(), []

    def apply(variables, images):
        calls.append(1)
        return network.apply(variables, images)

    paths = dynamic.block_paths(network.architecture)
    dynamic.sensitivity(apply, variables, images, labels, paths, grid=(0.0, 0.2, 0.4, 0.6))
    assert len(calls) == 1


def test_attention_ranks_better_than_chance_and_its_inverse_worse(trained):
    variables, images, labels = trained
    rankings = ("attention", "random", "inverse")
    best, chance, worst = (accuracy(gated(ranking=ranking), variables, images, labels) for ranking in rankings)
    assert best > chance + 0.05 > worst + 0.05


def test_bounds_are_the_last_ratio_before_accuracy_falls():
    accuracy = np.array(
        [[[0.9, 0.9, 0.85, 0.9], [0.9, 0.5, 0.9, 0.9]], [[0.9, 0.89, 0.88, 0.88], [0.9, 0.9, 0.9, 0.9]]]
    )
    found = dynamic.Sensitivity((0.0, 0.2, 0.4, 0.6), accuracy, ("a", "b"))
    np.testing.assert_array_equal(found.bounds(0.02), [[0.2, 0.6], [0.0, 0.6]])
    np.testing.assert_array_equal(found.bounds(1.0), [[0.6, 0.6], [0.6, 0.6]])


def test_bad_input_is_refused(trained):
    variables, images, labels = trained
    network = gated()
    paths = dynamic.block_paths(network.architecture)
    for grid in ((0.1, 0.2), (0.0, 0.5, 0.5), (0.0, 1.0), ()):
        with pytest.raises(ValueError, match="grid must ascend from 0 to below 1"):
            dynamic.sensitivity(network.apply, variables, images, labels, paths, grid=grid)
    with pytest.raises(ValueError, match=r"images and labels must be \[N, H, W, C\] and \[N\]"):
        dynamic.sensitivity(network.apply, variables, images, labels[:3], paths)
