import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import trees


def clients(count, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [
        {"w": rng.normal(size=(3, 2)).astype(dtype), "b": (rng.normal(size=2).astype(dtype),)} for _ in range(count)
    ]


def oracle(members, weights, mean=False):
    total = {
        "w": sum(weight * m["w"].astype(np.float64) for weight, m in zip(weights, members, strict=True)),
        "b": (sum(weight * m["b"][0].astype(np.float64) for weight, m in zip(weights, members, strict=True)),),
    }
    return jax.tree.map(lambda x: x / np.sum(weights), total) if mean else total


def assert_close(actual, expected, **tolerances):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(np.asarray(a, np.float64), e, **tolerances), actual, expected)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 4))
def test_unstack_undoes_stack(count):
    members = clients(count)
    stacked = trees.stack(members)
    assert stacked["w"].shape == (count, 3, 2)
    for one, other in zip(trees.unstack(stacked), members, strict=True):
        assert_close(one, other, rtol=0)


def test_unstack_along_another_axis():
    halves = trees.unstack({"w": np.arange(6).reshape(3, 2)}, axis=-1)
    np.testing.assert_array_equal(halves[1]["w"], [1, 3, 5])


def test_stack_holds_random_keys():
    stacked = trees.stack([{"k": jax.random.key(i)} for i in range(3)])
    assert jax.random.key_data(trees.take(stacked, 2)["k"]).tolist() == jax.random.key_data(jax.random.key(2)).tolist()


def test_stack_refuses_trees_that_differ_and_says_where():
    with pytest.raises(
        ValueError, match=r"stack: trees must be alike: 'w' has shape \(2,\) in tree 0 and \(3,\) in tree 2"
    ):
        trees.stack([{"w": np.ones(2)}, {"w": np.ones(2)}, {"w": np.ones(3)}])


def test_stack_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="got no trees"):
        trees.stack([])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": np.ones((3, 2)), "b": np.ones((4, 2)), "c": np.ones((3, 1))}, "'b' has 4, others 3"),
        ({"a": np.ones(3), "b": np.float32(1)}, r"'b' of shape \(\) has no axis 0"),
        ({}, "no leaves"),
    ],
)
def test_unstack_refuses_what_is_not_a_stack(tree, message):
    with pytest.raises(ValueError, match=message):
        trees.unstack(tree)


@pytest.mark.parametrize("i", [0, 2, -1, np.int32(1)])
def test_take_picks_a_member(i):
    members = clients(3)
    assert_close(trees.take(trees.stack(members), i), members[i], rtol=0)


def test_take_with_an_array_picks_a_cohort():
    members = clients(4)
    cohort = trees.take(trees.stack(members), np.array([3, 1]))
    assert_close(cohort, trees.stack([members[3], members[1]]), rtol=0)


def test_take_works_with_a_traced_index_and_compiles_once():
    traced = []

    @jax.jit
    def pick(stacked, i):
        traced.append(i)
        return trees.take(stacked, i)

    members = clients(3)
    for i in range(3):
        assert_close(pick(trees.stack(members), i), members[i], rtol=0)
    assert len(traced) == 1


@pytest.mark.parametrize("i", [3, -4, [0, 3]])
def test_take_refuses_an_index_outside_the_stack(i):
    with pytest.raises(ValueError, match="is outside the 3 members"):
        trees.take(trees.stack(clients(3)), np.array(i))


def test_take_refuses_an_index_that_is_no_integer():
    with pytest.raises(TypeError, match="must be an integer"):
        trees.take(trees.stack(clients(3)), 1.0)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3))
def test_weighted_sum_of_a_list_and_of_a_stack_equal_float64(weights):
    members = clients(3)
    expected = oracle(members, weights)
    assert_close(trees.weighted_sum(members, weights), expected, atol=1e-6)
    assert_close(trees.weighted_sum(trees.stack(members), weights), expected, atol=1e-6)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, 1000), min_size=3, max_size=3))
def test_weighted_mean_equals_float64_and_needs_no_normalised_weights(counts):
    members = clients(3)
    expected = oracle(members, counts, mean=True)
    assert_close(trees.weighted_mean(members, counts), expected, atol=1e-6)
    assert_close(trees.weighted_mean(trees.stack(members), counts), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("as_list", [True, False])
def test_low_precision_leaves_are_accumulated_in_float32(dtype, as_list):
    # 256 + 1 is 256 in bfloat16, 1024 ones are 8 in float8_e4m3: adding in the leaf's dtype would stop early.
    members = [{"w": jnp.ones(2, dtype)} for _ in range(300)]
    result = trees.weighted_mean(members if as_list else trees.stack(members), np.ones(300))
    assert result["w"].dtype == dtype
    np.testing.assert_array_equal(result["w"].astype(np.float32), 1.0)


def test_float64_leaves_keep_their_precision():
    with jax.enable_x64(True):
        members = [{"w": np.full(2, 1 + 1e-12)}, {"w": np.full(2, 1 - 1e-12)}]
        result = trees.weighted_sum(members, [0.5, -0.5])
        assert result["w"].dtype == np.float64
        np.testing.assert_allclose(result["w"], 1e-12, rtol=1e-3)


def test_integer_leaves_are_rounded_not_truncated():
    result = trees.weighted_mean([{"step": np.int32(5)}] * 3, [1 / 3, 1 / 3, 1 / 3])
    assert result["step"].dtype == np.int32 and result["step"] == 5


def test_complex_leaves_keep_their_phase():
    result = trees.weighted_sum([{"z": np.array([1 + 2j], np.complex64)}, {"z": np.array([1j], np.complex64)}], [2, 1])
    np.testing.assert_allclose(result["z"], [2 + 5j])


def test_weighted_mean_under_jit_vmap_and_grad_of_the_weights():
    stacked = {"w": jnp.array([[1.0, 2.0], [3.0, 5.0]])}
    sets = jnp.array([[1.0, 1.0], [1.0, 3.0]])
    result = jax.jit(jax.vmap(trees.weighted_mean, in_axes=(None, 0)))(stacked, sets)
    np.testing.assert_allclose(result["w"], [[2.0, 3.5], [2.5, 4.25]])
    # d/dw_0 of (w_0 a + w_1 b) / (w_0 + w_1) = w_1 (a - b) / (w_0 + w_1)^2
    slope = jax.grad(lambda weights: trees.weighted_mean(stacked, weights)["w"][1])(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(slope, [3 * (2 - 5) / 16, 1 * (5 - 2) / 16], rtol=1e-6)


def test_weights_may_be_a_list_with_traced_numbers():
    result = jax.jit(lambda x: trees.weighted_sum([{"w": x}, {"w": x}], [x, 1.0]))(jnp.float32(3))
    assert result["w"] == 12


def test_a_stacked_tree_that_is_a_list_is_understood_when_said_so():
    layers = [np.ones((3, 2), np.float32), np.ones((3, 4), np.float32)]
    result = trees.weighted_sum(layers, [1, 2, 3], stacked=True)
    assert isinstance(result, list) and [leaf.tolist() for leaf in result] == [[6, 6], [6, 6, 6, 6]]


def test_a_tuple_is_one_stacked_tree():
    result = trees.weighted_sum((np.ones((2, 3)), np.ones((2, 1))), [1, 1])
    assert isinstance(result, tuple) and [leaf.shape for leaf in result] == [(3,), (1,)]


@pytest.mark.parametrize("function", [trees.weighted_sum, trees.weighted_mean])
def test_the_number_of_weights_must_be_that_of_the_members(function):
    with pytest.raises(ValueError, match=r"weights must have shape \(3,\).*got \(2,\)"):
        function(clients(3), [1.0, 2.0])
    with pytest.raises(ValueError, match=r"weights must have shape \(3,\).*got \(\)"):
        function(trees.stack(clients(3)), 1.0)


@pytest.mark.parametrize("weights", [[0, 0], [0.0, -1.0], [2.0, -1.0]])
def test_weighted_mean_refuses_weights_without_a_mean(weights):
    with pytest.raises(ValueError, match="non-negative with a positive sum"):
        trees.weighted_mean(clients(2), weights)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="must be finite"):
        trees.weighted_sum(clients(2), [np.nan, 1.0])


def test_a_traced_total_of_zero_gives_nan():
    result = jax.jit(trees.weighted_mean)(trees.stack(clients(2)), jnp.zeros(2))
    assert np.isnan(result["w"]).all()


@pytest.mark.parametrize("leaf", [np.array([True, False]), jax.random.key(0)])
def test_leaves_without_a_sum_are_named(leaf):
    with pytest.raises(TypeError, match=r"weighted_sum: 'm' is .*, which has no weighted sum"):
        trees.weighted_sum([{"m": leaf}] * 2, [1, 1])
