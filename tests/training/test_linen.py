import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.training import from_linen


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.75)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


def test_running_statistics_move_in_training_and_stay_in_evaluation():
    model = from_linen(Normalised())
    variables = model.init(jax.random.key(0), X)
    assert set(variables) == {"params", "batch_stats"}
    _, after = model.apply(variables, X, True, jax.random.key(1))
    dense = X @ np.asarray(variables["params"]["Dense_0"]["kernel"])
    np.testing.assert_allclose(after["batch_stats"]["BatchNorm_0"]["mean"], 0.25 * dense.mean(0), rtol=1e-4, atol=1e-6)
    _, unchanged = model.apply(variables, X, False, None)
    assert unchanged["batch_stats"] is variables["batch_stats"]


def test_dropout_follows_the_key_in_training_and_is_off_in_evaluation():
    model = from_linen(Normalised())
    variables = model.init(jax.random.key(0), X)
    draw = lambda seed: model.apply(variables, X, True, jax.random.key(seed))[0]
    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))
    assert not np.any(np.asarray(model.apply(variables, X, False, None)[0]) == 0)


def test_initial_values_are_those_of_the_module():
    model, module = from_linen(Normalised()), Normalised()
    expected = module.init(jax.random.key(5), X)
    for found, value in zip(
        jax.tree.leaves(model.init(jax.random.key(5), X)), jax.tree.leaves(dict(expected)), strict=True
    ):
        np.testing.assert_allclose(found, value, rtol=1e-6)


def test_initialisation_may_be_traced_and_mapped():
    model = from_linen(Plain())
    abstract = jax.eval_shape(model.init, jax.random.key(0), X)
    assert abstract["params"]["Dense_0"]["kernel"].shape == (3, 2)
    clients = jax.vmap(model.init, in_axes=(0, None))(jax.random.split(jax.random.key(0), 4), X)
    assert clients["params"]["Dense_0"]["kernel"].shape == (4, 3, 2)


def test_a_module_without_modes_or_other_variables_works():
    model = from_linen(Plain())
    variables = model.init(jax.random.key(0), X)
    outputs, state = model.apply(variables, X, True, jax.random.key(0))
    assert outputs.shape == (6, 2)
    assert state == {}


def test_training_without_a_key_is_an_error():
    model = from_linen(Normalised())
    with pytest.raises(ValueError, match="key: a PRNG key is needed when train=True"):
        model.apply(model.init(jax.random.key(0), X), X, True, None)


def test_what_is_no_linen_module_is_refused():
    with pytest.raises(TypeError, match=r"expected an instance of flax.linen.Module, got function"):
        from_linen(lambda x: jnp.sum(x))
