"""Restrained training: what is restrained, and that with gamma 0 it is first-order training."""

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from jaxeff import models, quadratic, spec
from jaxeff.quadratic import QuadraticDense, relinear

X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
ARCHITECTURE = spec.quadratize(models.cnn((4, 4), input_shape=(8, 8, 1)), branch_norm="batch", select="conv2")


def network_params():
    module = models.Network(ARCHITECTURE, conv=quadratic.conv_layer, dense=quadratic.dense_layer)
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]


def test_groups_of_a_network():
    groups = relinear.groups(network_params(), ARCHITECTURE)
    assert groups["conv2"]["layer"] == {
        **{f"kernel_{p}": "twin" if p == "c" else "quadratic" for p in "abc"},
        **{f"norm_{p}": dict.fromkeys(("scale", "bias"), "twin" if p == "c" else "quadratic") for p in "abc"},
        "norm_out": {"scale": "rest", "bias": "rest"},
    }
    assert groups["conv1"]["layer"]["kernel_c"] == "twin"
    assert set(jax.tree.leaves(groups["head"])) <= {"twin", "rest"}


@pytest.mark.parametrize("kind", ["quadralib", "t4", "fan", "qres", "ncp(order=2)"])
def test_without_pace_training_is_that_of_the_first_order_twin(kind):
    settings = dict(initialization="relinear", use_bias=True)
    ours, twin = (QuadraticDense(4, kind=k, **settings) for k in (kind, "first_order"))
    params = ours.init(jax.random.key(0), X)["params"]
    own = {"t4": "b", "fan": "a", "qres": "a", "ncp(order=2)": "u2"}.get(kind, "c")
    first = {"kernel_c": params[f"kernel_{own}"], "bias_c": params.get(f"bias_{own}", params.get("offset"))}
    restrained = optax.chain(optax.adam(0.05), relinear.restrain(relinear.groups(params, kind), gamma=0.0))

    def train(module, params, tx):
        @jax.jit
        def step(params, state):
            def loss(params):
                return jnp.mean(jnp.sin(module.apply({"params": params}, X)) ** 2)

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(5):
            params, state = step(params, state)
        return params

    if kind.startswith("ncp"):
        # Its bias is an extra behind the mix, and extras are restrained: the twin has no bias to train.
        ours, twin = ours.clone(use_bias=False), twin.clone(use_bias=False)
        params.pop("offset")
        first.pop("bias_c")
        restrained = optax.chain(optax.adam(0.05), relinear.restrain(relinear.groups(params, kind), gamma=0.0))
    trained = train(ours, params, restrained)
    expected = train(twin, first, optax.adam(0.05))
    np.testing.assert_allclose(trained[f"kernel_{own}"], expected["kernel_c"], atol=1e-6)
    assert np.abs(expected["kernel_c"] - first["kernel_c"]).max() > 0.1


def test_kinds_without_a_twin_are_quadratic_all_through_and_projections_can_be_told_apart():
    assert relinear.groups({"kernel_a": X, "bias_a": X}, "t3") == {"kernel_a": "quadratic", "bias_a": "quadratic"}
    params = {f"kernel_{p}": X for p in "abs"}
    assert relinear.groups(params, "fan", only=["s"]) == {
        "kernel_a": "twin",
        "kernel_b": "rest",
        "kernel_s": "quadratic",
    }


@pytest.mark.parametrize("out_norm", [None, "batch"])
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("kind", ["quadralib", "t4", "fan", "qres", "ccp(order=2)", "ncp(order=2)", "emitting(rank=3)"])
def test_shrinking_alone_leaves_the_first_order_function(kind, norm, out_norm):
    layer = QuadraticDense(4, kind=kind, initialization="relinear", branch_norm=norm, out_norm=out_norm)
    variables = layer.init(jax.random.key(0), X)
    params = variables["params"]
    tx = relinear.restrain(relinear.groups(params, kind), gamma=0.0, shrink=0.5)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(layer.apply({**variables, "params": params}, X), layer.apply(variables, X), atol=1e-5)


def test_restraint_scales_and_shrinks_only_quadratic_parameters():
    params = {
        "kernel_a": jnp.ones(3),
        "kernel_b": jnp.ones(3),
        "kernel_c": jnp.ones(3),
        "norm_out": {"scale": jnp.ones(3)},
    }
    labels = relinear.groups(params, "quadralib")
    tx = relinear.restrain(labels, gamma=lambda step: 0.5**step, shrink=0.9)
    state = tx.init(params)
    for step in range(2):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
        np.testing.assert_allclose(updates["kernel_a"], 0.9 * (1 + 0.5**step) - 1, rtol=1e-6)
        np.testing.assert_array_equal(updates["kernel_c"], 1)
        np.testing.assert_array_equal(updates["norm_out"]["scale"], 1)


def test_an_extra_called_as_a_parameter_of_norms_is_not_taken_for_one():
    norm = {"scale": X, "bias": X}
    layer = {"kernel_c": X, "kernel_q": X, "norm_c": norm, "norm_q": norm, "scale": X, "norm_out": norm}
    twin, rest = ({name: group for name in norm} for group in ("twin", "rest"))
    expected = {"kernel_c": "twin", "kernel_q": "twin", "norm_c": twin, "norm_q": twin, "norm_out": rest}
    expected["scale"] = "quadratic"
    everywhere = relinear.groups({"block": {"conv": layer, "bn": norm}, "scale": X}, "emitting(rank=2)")
    assert everywhere == {"block": {"conv": expected, "bn": rest}, "scale": "rest"}
    assert relinear.groups(layer, "emitting(rank=2)") == expected


def test_restraint_can_be_traced():
    params, labels = {"kernel_a": jnp.ones(3), "kernel_c": jnp.ones(3)}, {"kernel_a": "quadratic", "kernel_c": "twin"}

    @jax.jit
    def step(gamma, shrink):
        tx = relinear.restrain(labels, gamma=gamma, shrink=shrink)
        return tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)[0]

    np.testing.assert_allclose(step(0.5, 0.9)["kernel_a"], 0.9 * 1.5 - 1, rtol=1e-6)
    known = jnp.float32(0.5)
    closed = jax.jit(lambda u: relinear.restrain(labels, gamma=known, shrink=known).init(u))(params)
    assert closed.step == 0
    np.testing.assert_array_equal(step(0.5, 0.9)["kernel_c"], 1)


def test_settings_that_cannot_be_are_an_error():
    with pytest.raises(ValueError, match="gamma must be at least 0 .*, got -1"):
        relinear.restrain({}, gamma=np.float32(-1))
    with pytest.raises(ValueError, match=r"shrink must be in \[0, 1\] .*, got 1.5"):
        relinear.restrain({}, shrink=1.5)
    with pytest.raises(ValueError, match="unknown kind 't9'"):
        relinear.groups({"kernel_a": X}, "t9")
    with pytest.raises(ValueError, match=r"only=\['z'\] must be some of the projections and extras \['a', 'b'\]"):
        relinear.groups({"kernel_a": X}, "t4", only=["z"])
    tx = relinear.restrain({"kernel_a": "quadratic"}, shrink=0.5)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update({"kernel_a": X}, tx.init({"kernel_a": X}))
