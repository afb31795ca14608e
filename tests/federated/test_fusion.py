"""Fusion by optimal transport: exact plans are those of linear programmes, equal units merge without a trace."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from jaxeff import federated, models, quadratic, spec
from jaxeff.federated import fusion
from tests.federated.networks import positive

X = jax.random.normal(jax.random.key(4), (4, 8, 8, 3))


def started(module, seed=0, x=X):
    """Variables of which no two units are alike, and no variance is negative."""
    variables = jax.jit(module.init)(jax.random.key(seed), x)
    return positive(variables, 0.1, seed + 1)


def mlp(*widths):
    return models.Network(models.mlp(widths, input_shape=(6,), num_classes=3))


def widened(params, times):
    """Every hidden unit of an MLP as many times as said, its outgoing weights divided among the copies."""
    layers = {name: {key: np.asarray(leaf) for key, leaf in layer["layer"].items()} for name, layer in params.items()}
    names = sorted(layers)  # dense1, dense2, head
    for own, after in itertools.pairwise(names):
        layers[own] = {key: np.repeat(leaf, times, -1) for key, leaf in layers[own].items()}
        layers[after]["kernel"] = np.repeat(layers[after]["kernel"], times, 0) / times
    return {name: {"layer": layer} for name, layer in layers.items()}


@pytest.mark.parametrize("reference", [0, 1])
def test_a_network_and_its_copy_of_doubled_units_become_the_same_function(reference):
    narrow, wide = mlp(4, 3), mlp(8, 6)
    x = jax.random.normal(jax.random.key(0), (5, 6))
    params = narrow.init(jax.random.key(1), x)
    double = {"params": widened(params["params"], 2)}
    np.testing.assert_allclose(wide.apply(double, x), narrow.apply(params, x), rtol=1e-5, atol=1e-6)
    seen = [fusion.layers(narrow.apply, params, x), fusion.layers(wide.apply, double, x)]
    shuffled = federated.permute(seen[1].found, double, federated.random_perms(seen[1].found, jax.random.key(2)))
    fused = jax.jit(lambda *trees: fusion.fuse(seen, trees, reference=reference))(params, shuffled)
    module, like = ((narrow, params), (wide, shuffled))[reference]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), fused, like)
    np.testing.assert_allclose(module.apply(fused, x), narrow.apply(params, x), rtol=1e-4, atol=1e-5)


def convolutional(width):
    return {
        "cnn": models.Network(models.cnn((4 * width, 6 * width), norm="batch", pools=1, input_shape=(8, 8, 3))),
        "resnet": models.Network(models.resnet(8, width=0.25 * width, input_shape=(8, 8, 3))),
        "mobilenet": models.Network(models.mobilenet(((8, 1), (12, 2)), width=width, input_shape=(8, 8, 3))),
        "quadratic": models.Network(
            spec.quadratize(models.cnn((4 * width, 6 * width), pools=1, input_shape=(8, 8, 3)), "t2"),
            conv=quadratic.conv_layer,
            dense=quadratic.dense_layer,
        ),
    }


@pytest.mark.parametrize(
    "name", ["cnn", "quadratic", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet", "mobilenet"))]
)
def test_other_widths_and_back_leave_a_network_what_it_was(name):
    """To twice the width units split, and back they merge."""
    narrow, wide = (convolutional(width)[name] for width in (1, 2))
    params, other = started(narrow), started(wide, 5)
    small, large = fusion.layers(narrow.apply, params, X), fusion.layers(wide.apply, other, X)
    up = jax.jit(lambda a, b: fusion.transport(small, large, a, b))(params, other)
    assert jax.tree.map(jnp.shape, up) == jax.tree.map(jnp.shape, other)
    np.testing.assert_allclose(jax.jit(wide.apply)(up, X), jax.jit(narrow.apply)(params, X), rtol=1e-4)
    back = jax.jit(lambda a, b: fusion.transport(large, small, a, b))(up, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), back, params)


def test_of_equal_widths_it_is_matching_and_averaging():
    module, x = mlp(7, 5), jnp.ones((2, 6))
    first = module.init(jax.random.key(0), x)
    seen = fusion.layers(module.apply, first, x)
    found = seen.found
    trees = [first]
    for seed in (1, 2):
        noise = jax.tree.map(lambda leaf, s=seed: 0.01 * jax.random.normal(jax.random.key(s), leaf.shape), first)
        moved = federated.permute(found, first, federated.random_perms(found, jax.random.key(seed)))
        trees.append(jax.tree.map(jnp.add, moved, noise))
    match = jax.jit(lambda tree: federated.permute(found, tree, federated.weight_match(found, first, tree)))
    matched = list(map(match, trees))
    weights = np.array([1.0, 2.0, 5.0])
    expected = jax.tree.map(lambda *leaves: np.tensordot(weights / 8, np.stack(leaves), 1), *matched)
    fused = fusion.fuse([seen] * 3, trees, weights=weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), fused, expected)


def test_layers_come_in_the_order_of_values_and_kernels_read_by_their_inputs():
    def apply(params, x):
        late = jax.nn.relu(x @ params["z"] + params["bias"])
        return jnp.tanh(late @ params["a"].T) @ params["m"]

    params = {"z": jnp.ones((3, 4)), "bias": jnp.ones(4), "a": jnp.ones((5, 4)), "m": jnp.ones((5, 2))}
    seen = fusion.layers(apply, params, jnp.ones((2, 3)))
    assert [seen.found.sizes[name] for name in seen.order] == [4, 5]
    assert seen.reads == {("z", 0), ("a", 1), ("m", 0)}


def test_of_a_product_of_parameters_the_second_reads_the_first():
    apply = lambda params, x: x @ (params["u"] @ params["v"])
    seen = fusion.layers(apply, {"u": jnp.ones((3, 2)), "v": jnp.ones((2, 4))}, jnp.ones((5, 3)))
    assert list(seen.found.sizes.values()) == [2]
    assert ("v", 0) in seen.reads and ("u", 1) not in seen.reads


@pytest.mark.parametrize(("n", "m"), [(3, 3), (2, 5), (6, 4)])
def test_exact_plans_cost_what_a_linear_programme_does(n, m):
    cost = np.random.default_rng(n).uniform(size=(n, m)).astype(np.float32)
    plan = np.asarray(fusion.exact(jnp.asarray(cost)))
    np.testing.assert_allclose(plan.sum(1), np.full(n, 1 / n), rtol=1e-5)
    np.testing.assert_allclose(plan.sum(0), np.full(m, 1 / m), rtol=1e-5)
    equations = [[float(k // m == i) for k in range(n * m)] for i in range(n)]
    equations += [[float(k % m == j) for k in range(n * m)] for j in range(m)]
    marginals = [1 / n] * n + [1 / m] * m
    best = linprog(cost.astype(np.float64).ravel(), A_eq=equations, b_eq=marginals, method="highs-ds").fun
    assert (plan * cost).sum() == pytest.approx(best, rel=1e-5)


def test_sinkhorn_has_the_marginals_and_comes_close_to_the_exact_plan_in_any_transform():
    costs = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 4, 6)).astype(np.float32))
    plans = jax.jit(jax.vmap(lambda cost: fusion.sinkhorn(cost, regularisation=0.02, iterations=500)))(costs)
    np.testing.assert_allclose(plans.sum(1), np.full((3, 6), 1 / 6), rtol=1e-5)
    np.testing.assert_allclose(plans.sum(2), np.full((3, 4), 1 / 4), rtol=1e-2)
    exact = jnp.stack([fusion.exact(cost) for cost in costs])
    price = lambda plan: (plan * costs).sum((1, 2))
    assert (price(plans) <= 1.05 * price(exact) + 1e-3).all() and (price(plans) > 0.999 * price(exact) - 1e-3).all()
    slope = jax.grad(lambda cost: (fusion.sinkhorn(cost) * cost).sum())(costs[0])
    assert np.isfinite(slope).all()


def test_sinkhorn_fuses_copies_too():
    module, x = mlp(4, 3), jax.random.normal(jax.random.key(0), (5, 6))
    params = module.init(jax.random.key(1), x)
    seen = fusion.layers(module.apply, params, x)
    copy = federated.permute(seen.found, params, federated.random_perms(seen.found, jax.random.key(2)))
    fused = jax.jit(lambda *trees: fusion.fuse([seen] * 2, trees, solver="sinkhorn"))(params, copy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), fused, params)


def test_clients_of_no_weight_may_hold_nan_and_types_are_kept():
    apply = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
    params = {"a": jnp.ones((3, 4), jnp.bfloat16), "b": jnp.ones((4, 2), jnp.bfloat16), "count": jnp.int32(3)}
    seen = fusion.layers(apply, params, jnp.ones((2, 3), jnp.bfloat16))
    spoiled = {**params, "a": params["a"] * jnp.nan, "count": jnp.int32(7)}
    fused = fusion.fuse([seen] * 2, [params, spoiled], weights=[1.0, 0.0])
    assert jax.tree.map(lambda leaf: leaf.dtype, fused) == jax.tree.map(lambda leaf: leaf.dtype, params)
    jax.tree.map(np.testing.assert_array_equal, fused, params)


def test_what_does_not_fit_is_refused():
    module, x = mlp(4, 3), jnp.ones((2, 6))
    params = module.init(jax.random.key(0), x)
    seen = fusion.layers(module.apply, params, x)
    with pytest.raises(ValueError, match="clients and params must be as many, and at least one, got 1 and 2"):
        fusion.fuse([seen], [params, params])
    with pytest.raises(ValueError, match=r"reference must be in 0..0, got 1"):
        fusion.fuse([seen], [params], reference=1)
    with pytest.raises(ValueError, match=r"weights must be of shape \(2,\), got \(3,\)"):
        fusion.fuse([seen] * 2, [params] * 2, weights=[1, 2, 3])
    with pytest.raises(ValueError, match="solver must be one of 'exact', 'sinkhorn', got 'greedy'"):
        fusion.transport(seen, seen, params, params, solver="greedy")
    deeper = mlp(4, 3, 3)
    other = deeper.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="one architecture, but only one has the layers params/dense3"):
        fusion.fuse([seen, fusion.layers(deeper.apply, other, x)], [params, other])
    more = models.Network(models.mlp((4, 3), input_shape=(6,), num_classes=5))
    other = more.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="differ in the widths of layers alone: 'params/head/layer/bias'"):
        fusion.fuse([seen, fusion.layers(more.apply, other, x)], [params, other])
    with pytest.raises(ValueError, match="regularisation must be above 0 and iterations at least 1, got 0 and 5"):
        fusion.sinkhorn(jnp.ones((2, 2)), regularisation=0, iterations=5)
