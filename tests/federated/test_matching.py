"""Weight matching: permuted copies are put back exactly, and what it gains is what brute force finds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import federated, models, quadratic, spec
from jaxeff.federated import fed2, symmetry
from jaxeff.federated.matching import weight_match
from tests.federated.networks import disturbed, permuted

X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))


def network(name):
    if name == "quadratic":
        architecture = spec.quadratize(models.cnn((4, 6), pools=1, input_shape=(8, 8, 3)), "t2", branch_norm="batch")
        return models.Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer)
    if name == "vgg9":
        return models.Network(models.vgg9(input_shape=(8, 8, 3), width=0.1))
    if name == "short mobilenet":
        return models.Network(models.mobilenet(((8, 1), (12, 2)), input_shape=(8, 8, 3), num_classes=4))
    options = {
        "mlp": {},
        "mobilenet": {"width": 0.25},
        "resnet8": {"depth": 8, "width": 0.5},
        "resnet20": {"depth": 20, "width": 0.5},
    }[name]
    kind = name.rstrip("0123456789")
    return models.Network(models.architecture(kind, num_classes=4, input_shape=(8, 8, 3), **options))


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "resnet8",
        "short mobilenet",
        "quadratic",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg9", "resnet20", "mobilenet")),
    ],
)
def test_permuted_copies_are_put_back(name):
    module = network(name)
    variables = disturbed(jax.jit(module.init)(jax.random.key(0), X))
    found = federated.derive(module.apply, variables, X)
    copy = permuted(found, variables, federated.random_perms(found, jax.random.key(2)))
    perms = jax.jit(lambda a, b: federated.weight_match(found, a, b))(variables, copy)
    jax.tree.map(np.testing.assert_array_equal, permuted(found, copy, perms), variables)


MAP = (0, 2, 1, 0, 2, 2)  # neither in order nor of one size
IN_GROUPS = {
    "cnn": (models.cnn((5, 6, 24), num_classes=6, input_shape=(8, 8, 3), norm="group"), "conv3"),
    "vgg9": (models.vgg9(width=0.1, input_shape=(8, 8, 3), num_classes=6), "conv5"),
    "resnet": (models.resnet(8, width=0.5, input_shape=(8, 8, 3), num_classes=6), "stage3_block1"),
    "mobilenet": (
        models.mobilenet(((6, 1), (18, 2)), width=1.0, input_shape=(8, 8, 3), num_classes=6),
        "block2_depthwise",
    ),
    "mlp": (models.mlp((9, 9), input_shape=(5,), num_classes=6), "dense2"),
}


def in_groups(name, entry="split"):
    base, first = IN_GROUPS[name]
    module = fed2.GroupedNetwork(fed2.adapt(base, first, class_to_group=MAP, entry=entry))
    x = jax.random.normal(jax.random.key(0), (4, *base.input_shape))
    variables = disturbed(jax.jit(module.init)(jax.random.key(1), x), 0.3)
    return module, variables, x, symmetry.within_groups(module, variables, x)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        pytest.param(name, entry, marks=[pytest.mark.slow] if name in ("vgg9", "resnet") else [])
        for name in IN_GROUPS
        for entry in fed2.ENTRIES
        if (name, entry) != ("resnet", "all")
    ],
)
def test_every_group_permutes_its_own_units(name, entry):
    """Each group by another permutation, and the output is the same."""
    module, variables, x, found = in_groups(name, entry)
    perms = found.random(jax.random.key(5))
    assert any((perm != perm[0]).any() for part, perm in perms.items() if part in found.own)
    found.verify(module.apply, variables, x, key=jax.random.key(6), tolerance=1e-5)
    moved = found.permute(variables, perms)
    kernels = [tree["params"]["groups"]["head"]["layer"]["kernel"] for tree in (variables, moved)]
    assert (kernels[0] != kernels[1]).any()
    # What a group holds stays in its place: the same numbers in another order.
    for before, after in zip(*(jax.tree.leaves(tree["params"]["groups"]) for tree in (variables, moved)), strict=True):
        for g in range(3):
            np.testing.assert_array_equal(np.sort(before[g], None), np.sort(after[g], None))


def test_channels_of_a_split_trunk_belong_to_the_groups_and_those_of_a_whole_one_to_all():
    *_, split = in_groups("mlp")
    *_, whole = in_groups("mlp", "all")
    assert sorted(split.shapes.values()) == [(3, 3), (3, 3)] and set(split.own) == set(split.shapes)
    assert sorted(whole.shapes.values()) == [(3, 3), (9,)] and len(whole.own) == 1
    _, variables, _, found = in_groups("mlp")
    name = "params/groups/dense2/layer/kernel[0]"
    perm = np.array([[2, 0, 1], [0, 1, 2], [1, 0, 2]])
    moved = found.permute(variables, {name: perm})
    trunk, groups = (moved["params"][part] for part in ("trunk", "groups"))
    old_trunk, old_groups = (variables["params"][part] for part in ("trunk", "groups"))
    order = (perm + 3 * np.arange(3)[:, None]).ravel()
    np.testing.assert_array_equal(trunk["dense1"]["layer"]["bias"], old_trunk["dense1"]["layer"]["bias"][order])
    for g in range(3):
        kernel = old_groups["dense2"]["layer"]["kernel"][g]
        np.testing.assert_array_equal(groups["dense2"]["layer"]["kernel"][g], kernel[perm[g]])


@pytest.mark.parametrize(("name", "entry"), [("mlp", "split"), ("mlp", "all"), ("cnn", "split"), ("mobilenet", "all")])
def test_permuted_groups_are_put_back_each_in_itself(name, entry):
    _, variables, _, found = in_groups(name, entry)
    copy = found.permute(variables, found.random(jax.random.key(2)))
    perms = jax.jit(lambda a, b: weight_match(found, a, b))(variables, copy)
    assert {part: perm.shape for part, perm in perms.items()} == found.shapes
    jax.tree.map(np.testing.assert_array_equal, found.permute(copy, perms), variables)


def test_matching_within_groups_is_that_of_every_group_alone():
    """The trunk known, a group is an ordinary network."""
    module, variables, _, found = in_groups("mlp", "all")
    other = disturbed(variables, 0.5, seed=9)
    perms = weight_match(found, variables, other, names=found.own)
    assert set(perms) == set(found.own)
    alone = models.Network(module.grouped.group)
    of_group = lambda tree, g: {"params": jax.tree.map(lambda leaf: leaf[g], tree["params"]["groups"])}
    entering = jnp.ones((1, 9))
    spec_of_one = federated.derive(alone.apply, of_group(variables, 0), entering)
    for g in range(3):
        (expected,) = federated.weight_match(spec_of_one, of_group(variables, g), of_group(other, g)).values()
        (got,) = perms.values()
        np.testing.assert_array_equal(got[g], expected)


def test_a_group_of_nan_leaves_the_others_matched():
    _, variables, _, found = in_groups("mlp")
    copy = found.permute(variables, found.random(jax.random.key(2)))
    spoiled = jax.tree.map(jnp.array, copy)
    spoiled["params"]["groups"] = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), copy["params"]["groups"])
    perms = weight_match(found, variables, spoiled)
    assert all((np.sort(perm, -1) == np.arange(perm.shape[-1])).all() for perm in perms.values())
    back = found.permute(copy, perms)
    for leaf, original in zip(*(jax.tree.leaves(tree["params"]["groups"]) for tree in (back, variables)), strict=True):
        np.testing.assert_array_equal(leaf[::2], original[::2])


def test_many_problems_are_assigned_at_once():
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    values[1, 2, 0, 0] = np.inf
    best = lambda one: max(itertools.permutations(range(4)), key=lambda p: one[range(4), list(p)].sum())
    expected = np.array([[best(one) if np.isfinite(one).all() else range(4) for one in row] for row in values])
    for solver in ("scipy", "optax"):
        np.testing.assert_array_equal(federated.assign(jnp.asarray(values), solver), expected)
        mapped = jax.jit(jax.vmap(lambda row, solver=solver: federated.assign(row, solver)))
        np.testing.assert_array_equal(mapped(jnp.asarray(values)), expected)


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
    module = network("short mobilenet")
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
    with pytest.raises(ValueError, match="names: c: none of"):
        federated.weight_match(found, params, params, names=["c"])
    with pytest.raises(ValueError, match="sweeps must be at least 1, got 0"):
        federated.weight_match(found, params, params, sweeps=0)
    with pytest.raises(ValueError, match=r"similarity must be \[..., n, n\], got \(2, 3\)"):
        federated.assign(jnp.ones((2, 3)))


def test_permutations_that_are_not_of_the_groups_are_refused():
    module, variables, x, found = in_groups("mlp")
    name = next(iter(found.own))
    with pytest.raises(ValueError, match=r"must be of shape \(3, 3\), got \(3,\)"):
        found.permute(variables, {name: np.arange(3)})
    with pytest.raises(ValueError, match="'c' is none of"):
        found.permute(variables, {"c": np.arange(3)})
    numbers = jnp.arange(9.0).reshape(3, 3)
    biases = lambda variables: variables["params"]["groups"]["dense2"]["layer"]["bias"]
    wrong = lambda variables, x: module.apply(variables, x) + (biases(variables) * numbers).sum()
    with pytest.raises(ValueError, match="they are no symmetry"):
        found.verify(wrong, variables, x, key=jax.random.key(0))
