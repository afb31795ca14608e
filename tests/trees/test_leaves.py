import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import trees


class Moments(NamedTuple):
    mu: Any
    nu: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    params: Any
    step: Any
    name: str = dataclasses.field(default="", metadata={"static": True})


@jax.tree_util.register_pytree_node_class
class Unnamed:
    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


NETWORK = {"conv1": {"kernel": np.ones((3, 3)), "bias": np.zeros(3)}, "head": [np.ones(2), (np.ones(4),)]}


def test_paths_join_keys_fields_and_positions():
    tree = State({"a": [1.0, Moments(2.0, 3.0)], "b": Unnamed(4.0)}, 5)
    assert trees.paths(tree) == ("params/a/0", "params/a/1/mu", "params/a/1/nu", "params/b/0", "step")


def test_paths_follow_the_order_of_jax_tree_leaves():
    flat = trees.flatten_names(NETWORK)
    assert list(flat) == list(trees.paths(NETWORK))
    assert all(x is y for x, y in zip(flat.values(), jax.tree.leaves(NETWORK), strict=True))


def test_paths_of_a_single_leaf_of_nothing_and_of_none():
    assert trees.paths(1.0) == ("",)
    assert trees.paths({}) == ()
    assert trees.paths({"a": None}) == ()
    assert trees.paths({"a": None}, is_leaf=lambda node: node is None) == ("a",)


def test_paths_of_an_optimiser_state_end_in_the_parameter_names():
    params = {"conv1": {"kernel": jnp.ones(2)}}
    assert "0/mu/conv1/kernel" in trees.paths(optax.adam(1e-3).init(params))


def test_flatten_names_refuses_names_that_collide():
    with pytest.raises(ValueError, match=r"share the names 'a/b'.*must not contain '/'"):
        trees.flatten_names({"a/b": 1.0, "a": {"b": 2.0}})


@settings(deadline=None, max_examples=30)
@given(
    st.recursive(
        st.integers(0, 9),
        lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
        max_leaves=8,
    )
)
def test_nested_dictionaries_survive_flatten_and_unflatten(tree):
    assert trees.unflatten_names(trees.flatten_names(tree)) == tree


def test_unflatten_names_like_restores_every_container_in_any_order():
    tree = State({"a": [1.0, Moments(2.0, 3.0)], "n": None}, 5, name="net")
    flat = dict(reversed(trees.flatten_names(tree).items()))
    restored = trees.unflatten_names(flat, like=tree)
    assert restored == tree


def test_unflatten_names_like_lists_missing_and_unexpected_names():
    with pytest.raises(ValueError, match=r"missing 'b'; unexpected 'c'"):
        trees.unflatten_names({"a": 1, "c": 2}, like={"a": 0, "b": 0})


@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}])
def test_unflatten_names_refuses_a_leaf_that_holds_leaves(flat):
    with pytest.raises(ValueError, match="'a' is a leaf and also holds other leaves"):
        trees.unflatten_names(flat)


def test_size_and_nbytes_count_arrays_abstract_arrays_and_numbers():
    tree = {
        "a": np.zeros((2, 3), np.float32),
        "b": jax.ShapeDtypeStruct((4,), jnp.bfloat16),
        "c": 1,
        "d": np.zeros((0, 7), np.int8),
    }
    assert trees.size(tree) == 6 + 4 + 1 + 0
    assert trees.nbytes(tree) == 24 + 8 + 4 + 0


def test_size_agrees_with_optax_on_real_arrays():
    assert trees.size(NETWORK) == optax.tree.size(NETWORK)


def test_size_refuses_what_is_no_array():
    with pytest.raises(TypeError, match=r"leaves must be arrays or numbers, got 'decay'"):
        trees.size({"a": "decay"})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite_sees_one_bad_value(bad):
    check = jax.jit(trees.all_finite)
    tree = {"a": np.zeros(3, np.float32), "b": np.arange(3), "k": jax.random.key(0), "m": np.array([True])}
    assert check(tree)
    assert not check({**tree, "a": np.array([0, bad, 0], np.float32)})


def test_all_finite_under_vmap_judges_each_member():
    stacked = {"a": jnp.array([[1.0, 2.0], [jnp.nan, 0.0]]), "b": jnp.array([1.0, 1.0])}
    np.testing.assert_array_equal(jax.vmap(trees.all_finite)(stacked), [True, False])


def test_all_finite_of_a_tree_without_floats_is_true():
    assert trees.all_finite({"n": np.arange(2)}) and trees.all_finite({})


def test_first_mismatch_of_alike_trees_is_none_and_ignores_values():
    assert trees.first_mismatch(NETWORK, jax.tree.map(lambda x: x + 1, NETWORK)) is None
    abstract = jax.eval_shape(lambda: {"a": jnp.ones(3)})
    assert trees.first_mismatch(abstract, {"a": jnp.zeros(3)}) is None


NAMES = ("the checkpoint", "the model")


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        (
            {"w": np.ones((3, 3))},
            {"w": np.ones((5, 5))},
            "'w' has shape (3, 3) in the checkpoint and (5, 5) in the model",
        ),
        (
            {"w": np.ones(3, np.float32)},
            {"w": np.ones(3, np.float16)},
            "'w' has dtype float32 in the checkpoint and float16 in the model",
        ),
        ({"w": 1.0, "x": 1.0}, {"w": 1.0, "y": 1.0}, "'x' only in the checkpoint; 'y' only in the model"),
        ({"w": [1.0]}, {"w": (1.0,)}, "the container 'w' is a list in the checkpoint and a tuple in the model"),
        ([1.0], (1.0,), "the outermost container is a list in the checkpoint and a tuple in the model"),
        (
            {"w": None, "x": 1.0},
            {"w": {}, "x": 1.0},
            "the container 'w' is a NoneType in the checkpoint and a dict in the model",
        ),
    ],
)
def test_first_mismatch_names_the_difference(a, b, sentence):
    assert trees.first_mismatch(a, b, NAMES) == sentence


def test_first_mismatch_names_the_container_whose_static_fields_differ():
    sentence = trees.first_mismatch({"s": State(1.0, 2, "one")}, {"s": State(1.0, 2, "two")})
    assert sentence is not None
    assert sentence.startswith("the container 's' has other keys or static fields: ")
    assert "one" in sentence and "two" in sentence


def test_first_mismatch_of_long_trees_stays_one_short_sentence():
    many = {f"layer{i}": 1.0 for i in range(100)}
    sentence = trees.first_mismatch(many, {})
    assert sentence is not None
    assert sentence.endswith("and 92 more only in the first") and len(sentence) < 200
