"""Activation matching: units are found again by what they answer, in any network, and by which values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxeff import federated, models, quadratic, spec
from jaxeff.federated.activation_matching import activation_match, activations
from tests.federated.networks import Grouped, disturbed, permuted

X = jax.random.normal(jax.random.key(4), (16, 8, 8, 3))


def network(name):
    if name == "quadratic":
        architecture = spec.quadratize(models.cnn((4, 6), pools=1, input_shape=(8, 8, 3)), "t2", branch_norm="batch")
        return models.Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer)
    architectures = {
        "mlp": lambda: models.mlp((12, 8), input_shape=(8, 8, 3)),
        "vgg9": lambda: models.vgg9(input_shape=(8, 8, 3), width=0.1),
        "resnet8": lambda: models.resnet(8, width=0.25, input_shape=(8, 8, 3)),
        "resnet20": lambda: models.resnet(20, width=0.25, input_shape=(8, 8, 3)),
        "mobilenet": lambda: models.mobilenet(((8, 1), (12, 2), (16, 1)), width=1.0, input_shape=(8, 8, 3)),
    }
    return models.Network(architectures[name]())


def started(module, x=X):
    return disturbed(jax.jit(module.init)(jax.random.key(0), x))


@pytest.mark.parametrize("measure", ["products", "correlation"])
@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "resnet8",
        "quadratic",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("vgg9", "resnet20", "mobilenet")),
    ],
)
def test_permuted_copies_are_put_back(name, measure):
    module = network(name)
    variables = started(module)
    found = federated.derive(module.apply, variables, X)
    planted = federated.random_perms(found, jax.random.key(2))
    copy = permuted(found, variables, planted)
    match = jax.jit(lambda a, b, x: activation_match(found, module.apply, a, b, x, measure=measure))
    back = match(variables, copy, X)
    for part, perm in planted.items():
        np.testing.assert_array_equal(perm[back[part]], np.arange(len(perm)), part)


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["a"] + params["b"])
    return hidden @ params["c"]


def of_mlp(seed=0, width=5):
    draw = lambda key, *shape: jax.random.normal(jax.random.fold_in(jax.random.key(seed), key), shape)
    return {"a": draw(0, 3, width), "b": draw(1, width), "c": draw(2, width, 2)}


def test_values_are_those_before_or_after_the_nonlinearity():
    params, x = of_mlp(), np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    found = federated.derive(mlp, params, x)
    (name,) = found.sizes
    product = np.asarray(x @ params["a"])
    (made,) = activations(found, mlp, params, x)[name]
    (read,) = activations(found, mlp, params, x, values="read")[name]
    np.testing.assert_allclose(made, product, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(read, np.maximum(product + params["b"], 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("measure", ["products", "correlation"])
def test_the_assignment_is_the_best_of_the_similarities(measure):
    """Of two networks that have nothing to do with each other, against NumPy."""
    first, second, x = of_mlp(0), of_mlp(1), jax.random.normal(jax.random.key(3), (20, 3))
    found = federated.derive(mlp, first, x)
    a, b = (np.maximum(np.asarray(x @ p["a"] + p["b"], np.float64), 0) for p in (first, second))
    if measure == "correlation":
        similarity = np.nan_to_num(np.corrcoef(a.T, b.T)[:5, 5:])
    else:
        similarity = a.T @ b
    (perm,) = activation_match(found, mlp, first, second, x, measure=measure, values="read").values()
    np.testing.assert_array_equal(perm, linear_sum_assignment(similarity, maximize=True)[1])


def test_positions_are_rows_and_flattened_maps_keep_their_units():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5)(nn.Conv(4, (3, 3), name="conv")(x).reshape(len(x), -1))

    variables = started(Flat())
    found = federated.derive(Flat().apply, variables, X)
    made, read = (activations(found, Flat().apply, variables, X, values=values) for values in ("made", "read"))
    ((before,),), ((after,),) = made.values(), read.values()
    assert before.shape == after.shape == (16 * 8 * 8, 4)
    bias = variables["params"]["conv"]["bias"]
    np.testing.assert_allclose(after, before + bias, rtol=1e-5, atol=1e-5)


def test_what_may_be_permuted_besides_is_averaged_over():
    """Channels within groups do not depend on the order of the groups."""

    variables = started(Grouped())
    found = federated.derive(Grouped().apply, variables, X)
    planted = federated.random_perms(found, jax.random.key(1))
    copy = federated.permute(found, variables, planted)
    back = activation_match(found, Grouped().apply, variables, copy, X)
    for part, perm in planted.items():
        np.testing.assert_array_equal(perm[back[part]], np.arange(len(perm)), part)


def test_units_that_answer_alike_and_those_of_nan_stay():
    params, x = of_mlp(), jnp.ones((4, 3))
    found = federated.derive(mlp, params, x)
    silent = {**params, "b": jnp.full(5, -100.0)}
    for measure in ("products", "correlation"):
        (perm,) = activation_match(found, mlp, silent, silent, x, measure=measure, values="read").values()
        np.testing.assert_array_equal(perm, np.arange(5))
        spoiled = {**params, "a": params["a"].at[0, 2].set(jnp.nan)}
        (perm,) = activation_match(found, mlp, params, spoiled, x, measure=measure).values()
        np.testing.assert_array_equal(perm, np.arange(5))


def test_clients_are_matched_all_at_once():
    params, x = of_mlp(), jax.random.normal(jax.random.key(3), (20, 3))
    found = federated.derive(mlp, params, x)
    keys = jax.random.split(jax.random.key(5), 3)
    clients = jax.vmap(lambda key: federated.permute(found, params, federated.random_perms(found, key)))(keys)
    perms = jax.jit(jax.vmap(lambda client: activation_match(found, mlp, params, client, x)))(clients)
    back = jax.vmap(lambda client, perms: federated.permute(found, client, perms))(clients, perms)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.broadcast_to(b, a.shape)), back, params)


def test_what_does_not_fit_is_refused():
    params, x = of_mlp(), jnp.ones((4, 3))
    found = federated.derive(mlp, params, x)
    with pytest.raises(ValueError, match="measure must be one of 'products', 'correlation', got 'cosine'"):
        activation_match(found, mlp, params, params, x, measure="cosine")
    with pytest.raises(ValueError, match="values must be one of 'made', 'read', got 'all'"):
        activations(found, mlp, params, x, values="all")
    with pytest.raises(ValueError, match="solver must be one of"):
        activation_match(found, mlp, params, params, x, solver="greedy")
    with pytest.raises(ValueError, match=r"params: paths are not those of `found`: \['c'\]"):
        activations(found, mlp, {"a": params["a"], "b": params["b"]}, x)
    with pytest.raises(ValueError, match="'a' has other axes in this function"):
        activations(found, mlp, of_mlp(width=6), x)
