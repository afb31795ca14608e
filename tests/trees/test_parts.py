import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import trees

NETWORK = {
    "conv1": {"kernel": jnp.ones((3, 3)), "bias": jnp.zeros(3)},
    "conv2": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)},
    "head": (jnp.ones(4), None),
}


def test_map_named_gives_each_leaf_its_name_and_its_partners():
    result = trees.map_named(lambda name, x, y: f"{name}:{x + y}", {"a": 1, "b": (2,)}, {"a": 10, "b": (20,)})
    assert result == {"a": "a:11", "b": ("b/0:22",)}


def test_map_named_works_under_jit_and_grad():
    def loss(tree):
        scaled = trees.map_named(lambda name, x: x * (3.0 if name == "a" else 0.0), tree)
        return sum(jnp.sum(x) for x in jax.tree.leaves(scaled))

    gradient = jax.jit(jax.grad(loss))({"a": jnp.ones(2), "b": jnp.ones(2)})
    np.testing.assert_array_equal(gradient["a"], [3, 3])
    np.testing.assert_array_equal(gradient["b"], [0, 0])


def test_map_named_names_the_first_difference_in_structure():
    with pytest.raises(ValueError, match=r"'b' only in tree 2 of rest"):
        trees.map_named(lambda *_: 0, {"a": 1}, {"a": 1}, {"a": 1, "b": 2})


def test_select_keeps_what_the_glob_names():
    assert trees.paths(trees.select(NETWORK, "*/bias")) == ("conv1/bias", "conv2/bias")
    assert trees.paths(trees.select(NETWORK, ["head/*", "conv1/*"])) == ("conv1/bias", "conv1/kernel", "head/0")
    assert trees.paths(trees.select(NETWORK, "conv[12]/k*")) == ("conv1/kernel", "conv2/kernel")


def test_select_by_predicate_sees_name_and_leaf():
    assert trees.paths(trees.select(NETWORK, lambda name, leaf: leaf.ndim == 2)) == ("conv1/kernel", "conv2/kernel")


@pytest.mark.parametrize("pattern", ["haed/*", ["*/bias", "haed/*"], "CONV1/*"])
def test_a_glob_without_a_match_is_an_error_that_lists_the_leaves(pattern):
    with pytest.raises(ValueError, match=r"matches no leaf; the leaves are 'conv1/bias', 'conv1/kernel'"):
        trees.partition(NETWORK, pattern)


def test_a_predicate_may_select_nothing():
    selected, rest = trees.partition(NETWORK, lambda name, leaf: False)
    assert jax.tree.leaves(selected) == []
    assert trees.paths(rest) == trees.paths(NETWORK)


@settings(deadline=None, max_examples=30)
@given(st.sets(st.sampled_from(trees.paths(NETWORK))), st.sets(st.sampled_from(trees.paths(NETWORK))))
def test_merge_undoes_partition_also_when_parts_are_split_again(first, second):
    selected, rest = trees.partition(NETWORK, lambda name, leaf: name in first)
    one, two = trees.partition(rest, lambda name, leaf: name in second)
    whole = trees.merge(two, selected, one)
    assert jax.tree.structure(whole) == jax.tree.structure(NETWORK)
    assert all(x is y for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(NETWORK), strict=True))


def test_gradient_of_one_part_leaves_the_other_alone():
    trained, frozen = trees.partition(NETWORK, "conv1/*")

    @jax.jit
    def gradient(trained, frozen):
        return jax.grad(lambda part: optax.tree.sum(jax.tree.map(jnp.square, trees.merge(part, frozen))))(trained)

    result = gradient(trained, frozen)
    assert trees.paths(result) == ("conv1/bias", "conv1/kernel")
    np.testing.assert_array_equal(result["conv1"]["kernel"], 2 * np.ones((3, 3)))


def test_an_optimiser_takes_a_part_as_its_whole_tree():
    trained, frozen = trees.partition(NETWORK, "head/*")
    optimiser = optax.adam(0.1)
    updates, _ = optimiser.update(trained, optimiser.init(trained), trained)
    moved = trees.merge(optax.apply_updates(trained, updates), frozen)
    assert trees.first_mismatch(moved, NETWORK) is None
    assert moved["conv1"]["kernel"] is NETWORK["conv1"]["kernel"]


def test_merge_refuses_parts_that_overlap():
    with pytest.raises(ValueError, match=r"2 parts hold the leaf 'conv1/bias'"):
        trees.merge(trees.select(NETWORK, "*/bias"), trees.select(NETWORK, "conv1/*"))


def test_merge_refuses_parts_of_different_trees():
    with pytest.raises(ValueError, match=r"part 1 is structured unlike part 0"):
        trees.merge({"a": 1, "b": None}, {"a": None})


def test_merge_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one part"):
        trees.merge()


def test_labels_come_from_the_first_rule_that_matches():
    result = trees.labels(NETWORK, [("conv1/*", "slow"), ("*/bias", "no_decay"), ("*", "decay")])
    assert trees.flatten_names(result) == {
        "conv1/bias": "slow",
        "conv1/kernel": "slow",
        "conv2/bias": "no_decay",
        "conv2/kernel": "decay",
        "head/0": "decay",
    }


def test_labels_list_the_leaves_without_a_rule():
    with pytest.raises(ValueError, match=r"no rule matches 'conv1/kernel', 'conv2/kernel', 'head/0'; the rules are"):
        trees.labels(NETWORK, {"*/bias": "no_decay"})


def test_labels_drive_optax_multi_transform():
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    optimiser = optax.multi_transform(
        {"moves": optax.sgd(1.0), "stays": optax.set_to_zero()}, trees.labels(params, {"w": "moves", "*": "stays"})
    )
    updates, _ = optimiser.update(params, optimiser.init(params), params)
    np.testing.assert_array_equal(updates["w"], [-1, -1])
    np.testing.assert_array_equal(updates["b"], [0, 0])
