"""Weight matching: permuted copies are put back exactly, and what it gains is what brute force finds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import federated, models, quadratic, spec

X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))


def network(name):
    if name == "quadratic":
        architecture = spec.quadratize(models.cnn((4, 6), pools=1, input_shape=(8, 8, 3)), "t2", branch_norm="batch")
        return models.Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer)
    if name == "vgg9":
        return models.Network(models.vgg9(input_shape=(8, 8, 3), width=0.1))
    options = {"mlp": {}, "mobilenet": {"width": 0.25}, "resnet": {"depth": 8, "width": 0.5}}[name]
    return models.Network(models.architecture(name, num_classes=4, input_shape=(8, 8, 3), **options))


@pytest.mark.parametrize("name", ["mlp", "vgg9", "resnet", "mobilenet", "quadratic"])
def test_permuted_copies_are_put_back(name):
    module = network(name)
    variables = jax.jit(module.init)(jax.random.key(0), X)
    keys = iter(jax.random.split(jax.random.key(1), 300))
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), variables)
    found = federated.derive(module.apply, variables, X)
    copy = federated.permute(found, variables, federated.random_perms(found, jax.random.key(2)))
    perms = jax.jit(lambda a, b: federated.weight_match(found, a, b))(variables, copy)
    jax.tree.map(np.testing.assert_array_equal, federated.permute(found, copy, perms), variables)


@pytest.mark.parametrize("solver", ["scipy", "optax"])
def test_assignments_are_the_best_of_all(solver):
    for seed in range(5):
        values = np.random.default_rng(seed).normal(size=(5, 5)).astype(np.float32)
        best = max(itertools.permutations(range(5)), key=lambda p: values[range(5), list(p)].sum())
        assert federated.assign(jnp.asarray(values), solver).tolist() == list(best)
    spoiled = jnp.asarray(values).at[1, 2].set(jnp.nan)
    assert federated.assign(spoiled, solver).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("solver", ["scipy", "optax"])
def test_clients_are_matched_to_one_reference_all_at_once(solver):
    apply = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    reference = {"a": draw(0, 3, 6), "b": draw(1, 6, 2)}
    found = federated.derive(apply, reference, jnp.ones((2, 3)))
    shuffled = jax.vmap(lambda key: federated.permute(found, reference, federated.random_perms(found, key)))(
        jax.random.split(jax.random.key(5), 4)
    )
    noisy = jax.tree.map(lambda leaf: leaf + 0.01 * jax.random.normal(jax.random.key(6), leaf.shape), shuffled)
    match = lambda client: federated.permute(
        found, client, federated.weight_match(found, reference, client, solver=solver)
    )
    matched = jax.jit(jax.vmap(match))(noisy)
    for name in reference:
        np.testing.assert_allclose(matched[name], np.broadcast_to(reference[name], matched[name].shape), atol=0.06)


def test_matching_never_lowers_the_similarity_and_equals_stay():
    module = network("vgg9")
    first, second = (jax.jit(module.init)(jax.random.key(seed), X) for seed in (0, 1))
    found = federated.derive(module.apply, first, X)
    product = lambda a, b: sum(float((x * y).sum()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
    perms = federated.weight_match(found, first, second)
    assert product(first, federated.permute(found, second, perms)) > product(first, second)
    again = federated.weight_match(found, first, first)
    assert all((np.asarray(perm) == np.arange(len(perm))).all() for perm in again.values())


def test_what_does_not_fit_is_refused():
    apply = lambda params, x: (x @ params["a"]) @ params["b"]
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    found = federated.derive(apply, params, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"reference: paths are not those of `found`: \['b'\]"):
        federated.weight_match(found, {"a": jnp.ones((2, 3))}, params)
    with pytest.raises(ValueError, match="solver must be one of 'scipy', 'optax', got 'greedy'"):
        federated.weight_match(found, params, params, solver="greedy")
