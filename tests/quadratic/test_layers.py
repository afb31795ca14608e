"""The Flax layers: branch norms, initialisation, defaults, precision, transformations."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from jaxeff.quadratic import QuadraticConv, QuadraticDense, conv, dense

KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(0, 3, 5, 6, 4)


def init(layer, x=X):
    return jax.jit(layer.init)(KEY, x)


def shapes(layer, x=X):
    return jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(layer.init, KEY, x))


def random_variables(layer):
    return jax.tree.map(lambda leaf: normal(leaf.size, *leaf.shape), jax.eval_shape(layer.init, KEY, X))


# --- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_of_each_projection():
    tree = shapes(QuadraticConv(6, (3, 2), feature_group_count=2))["params"]
    assert tree == {f"kernel_{p}": (3, 2, 2, 6) for p in "abc"} | {f"bias_{p}": (6,) for p in "abc"}
    assert shapes(QuadraticDense(6, kind="t4", use_bias=False))["params"] == {"kernel_a": (4, 6), "kernel_b": (4, 6)}


@pytest.mark.parametrize(
    ("use_bias", "branch_norm", "has_bias"),
    [(None, None, True), (None, "group", False), (True, "group", True), (False, None, False)],
)
def test_a_bias_is_there_by_default_only_without_branch_norm(use_bias, branch_norm, has_bias):
    tree = shapes(QuadraticDense(8, use_bias=use_bias, branch_norm=branch_norm))["params"]
    assert ("bias_a" in tree) == has_bias
    assert ("norm_a" in tree) == bool(branch_norm)


def test_layers_are_the_functions_on_their_parameters():
    layer = QuadraticConv(6, (3, 3), (2, 1), "VALID", (1, 2), 2)
    variables = init(layer)
    expected = conv(variables["params"], X, strides=(2, 1), padding="VALID", dilation=(1, 2), groups=2)
    np.testing.assert_array_equal(layer.apply(variables, X), expected)
    flat = QuadraticDense(6, kind="t3")
    variables = init(flat)
    np.testing.assert_array_equal(flat.apply(variables, X), dense(variables["params"], X, kind="t3"))


def test_layers_take_another_convolution():
    called = []

    def spy(*args, **kwargs):
        called.append(kwargs["feature_group_count"])
        return lax.conv_general_dilated(*args, **kwargs)

    QuadraticConv(4, kind="t4", feature_group_count=2, conv_general_dilated=spy).init(KEY, X)
    assert called == [2, 2]


# --- branch norm and activation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [None, "relu"])
def test_branch_batch_norm_is_the_product_of_normalised_branches(act):
    layer = QuadraticConv(2, (1, 1), branch_norm="batch", branch_act=act)
    variables = random_variables(layer)
    y, changed = jax.jit(lambda v: layer.apply(v, X, train=True, mutable=["batch_stats"]))(variables)
    branch = {}
    for p in "abc":
        params = variables["params"]
        z = np.einsum("nhwi,io->nhwo", X.astype(np.float64), params[f"kernel_{p}"][0, 0])
        z_hat = (z - z.mean((0, 1, 2))) / np.sqrt(z.var((0, 1, 2)) + 1e-5)
        branch[p] = z_hat * params[f"norm_{p}"]["scale"] + params[f"norm_{p}"]["bias"]
        branch[p] = np.maximum(branch[p], 0) if act else branch[p]
        expected = 0.9 * variables["batch_stats"][f"norm_{p}"]["mean"] + 0.1 * z.mean((0, 1, 2))
        np.testing.assert_allclose(changed["batch_stats"][f"norm_{p}"]["mean"], expected, atol=1e-5)
    np.testing.assert_allclose(y, branch["a"] * branch["b"] + branch["c"], atol=1e-4)


@pytest.mark.parametrize("norm", ["group", "layer", "rms"])
def test_other_branch_norms_do_not_look_at_other_examples(norm):
    layer = QuadraticDense(8, branch_norm=norm)
    variables = random_variables(layer)
    assert set(variables) == {"params"}
    one, all_of_them = jax.jit(lambda v: (layer.apply(v, X[:1], train=True), layer.apply(v, X)))(variables)
    np.testing.assert_allclose(one, all_of_them[:1], atol=1e-4)


# --- initialisation ---------------------------------------------------------------------------------------------------


KINDS = ("first_order", "t2", "t3", "t4", "t2_t4", "fan", "quadralib", "qres", "reduced", "t1_low_rank(rank=3)")
FAMILIES = ("bergstra(rank=2)", "bergstra(rank=2, root=True)", "ccp(order=3)", "ncp(order=3)", "emitting(rank=2)")


@pytest.mark.parametrize("kind", [*KINDS, *FAMILIES])
def test_kaiming_gives_unit_variance_on_rectified_normal_inputs(kind):
    x = np.maximum(normal(0, 400, 300), 0)
    y, variables = jax.jit(QuadraticDense(300, kind=kind, initialization="kaiming").init_with_output)(KEY, x)
    assert 0.85 < np.var(y) < 1.15
    assert all(np.all(value == 0) for name, value in variables["params"].items() if name.startswith("bias"))


TWINS = [
    (QuadraticConv, "quadralib", None, None),
    (QuadraticConv, "quadralib", "batch", None),
    (QuadraticConv, "t4", None, True),
    (QuadraticDense, "quadralib", "group", None),
    (QuadraticDense, "quadralib", "layer", None),
    (QuadraticDense, "quadralib", "rms", None),
    (QuadraticDense, "quadralib", None, False),
    (QuadraticDense, "quadralib", "batch", True),
    (QuadraticDense, "t4", "batch", None),
    (QuadraticDense, "t4", "layer", None),
    (QuadraticDense, "fan", None, None),
    (QuadraticDense, "fan", "batch", None),
    (QuadraticConv, "qres", None, None),
    (QuadraticDense, "reduced", None, False),
    (QuadraticDense, "t1_linear", None, None),
]


@pytest.mark.parametrize(("layer", "kind", "norm", "bias"), TWINS)
def test_relinear_starts_exactly_as_the_first_order_twin(layer, kind, norm, bias):
    settings = dict(branch_norm=norm, use_bias=bias, initialization="relinear")
    ours, twin = layer(8, kind=kind, **settings), layer(8, kind="first_order", **settings)
    own = {"quadralib": "c", "t4": "b", "fan": "a", "qres": "a"}.get(kind, "c")

    @jax.jit
    def both():
        variables = ours.init(KEY, X)
        renamed = {
            collection: {f"{name[:-1]}c": value for name, value in tree.items() if name.endswith(own)}
            for collection, tree in variables.items()
        }

        def loss(params):
            y = ours.apply({**variables, "params": params}, X)
            return jnp.sum(jnp.sin(y)), y

        grads, y = jax.grad(loss, has_aux=True)(variables["params"])
        return y, twin.apply(renamed, X), grads

    y, expected, grads = both()
    np.testing.assert_array_equal(y, expected)
    assert np.std(y) > 0.1
    off = {"fan": "b", "qres": "b", "reduced": "s"}.get(kind, "a")
    switched_off = grads[f"norm_{off}"]["scale"] if norm else grads[f"kernel_{off}"]
    assert np.abs(switched_off).max() > 1e-3


def test_the_twin_is_the_stock_convolution():
    layer = QuadraticConv(8, initialization="relinear")
    variables = init(layer)
    params = {"kernel": variables["params"]["kernel_c"], "bias": np.zeros(8, np.float32)}
    np.testing.assert_array_equal(layer.apply(variables, X), nn.Conv(8, (3, 3)).apply({"params": params}, X))


def test_relinear_kernels_have_the_scale_of_the_twin():
    params = init(QuadraticDense(300, initialization="relinear"), np.ones((1, 400)))["params"]
    assert np.all(params["kernel_a"] == 0)
    for p in "bc":
        np.testing.assert_allclose(np.std(params[f"kernel_{p}"]), np.sqrt(2 / 400), rtol=0.02)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (QuadraticDense(2, kind="t2", initialization="relinear"), "kind 't2' .*cannot start as a first-order layer"),
        (QuadraticDense(2, kind="t3", initialization="relinear"), "kind 't3' .*cannot start as a first-order layer"),
        (QuadraticDense(2, kind="t4", initialization="relinear", use_bias=False), "needs an offset: use_bias=True"),
        (
            QuadraticDense(2, kind="t4", initialization="relinear", branch_norm="rms"),
            "needs an offset: .*'rms' has none",
        ),
        (QuadraticDense(2, initialization="relinear", branch_act="relu"), "needs branch_act=None, got 'relu'"),
        (QuadraticDense(2, initialization="xavier"), "initialization must be 'kaiming' or 'relinear', got 'xavier'"),
        (QuadraticDense(2, kind="cubic"), "unknown kind 'cubic'; known: first_order"),
        (QuadraticDense(2, branch_norm="instance"), "norm must be None or one of 'batch', .*got 'instance'"),
        (QuadraticDense(2, branch_act="step"), "act must be None or one of 'relu', .*, got 'step'"),
        (QuadraticDense(2, save="b"), "save must be one of 'all', 'ab', 'x', got 'b'"),
        (QuadraticConv(6, feature_group_count=4), "feature_group_count=4 must divide the 4 input channels and the 6"),
        (QuadraticConv(6, feature_group_count=0), "feature_group_count=0 must divide"),
    ],
)
def test_settings_that_cannot_be_are_an_error(layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, KEY, X)


def test_inputs_of_another_rank_are_an_error():
    with pytest.raises(ValueError, match=r"x must be \[N, H, W, C\], got shape \(5, 6, 4\)"):
        QuadraticConv(2).init(KEY, X[0])


# --- precision and transformations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [None, "batch"])
def test_bfloat16_keeps_float32_parameters_and_stays_finite_on_large_inputs(norm):
    layer, exact = QuadraticConv(4, branch_norm=norm, dtype=jnp.bfloat16), QuadraticConv(4, branch_norm=norm)
    x = 30 * X
    variables = init(layer, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    y, expected = (
        jax.jit(lambda v, m=m: m.apply(v, x, train=True, mutable=["batch_stats"])[0])(variables) for m in (layer, exact)
    )
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=0, atol=0.03 * np.abs(expected).max())


def test_dtype_follows_input_and_parameters():
    layer = QuadraticDense(2, param_dtype=jnp.bfloat16)
    variables = init(layer)
    assert variables["params"]["kernel_a"].dtype == jnp.bfloat16
    assert layer.apply(variables, X).dtype == jnp.float32
    assert layer.apply(variables, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_training_of_stacked_clients_in_a_scan_equals_a_loop():
    layer, clients, steps = QuadraticConv(3, strides=(2, 2)), 2, 2
    x = normal(1, clients, steps, 2, 5, 5, 2)
    each = [jax.tree.map(lambda leaf, c=c: leaf + 0.1 * c, init(layer, x[0, 0])) for c in range(clients)]

    def step(params, x):
        loss, grads = jax.value_and_grad(lambda params: jnp.mean(layer.apply(params, x) ** 2))(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), loss

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    params, losses = jax.jit(jax.vmap(partial(lax.scan, step)))(stacked, x)
    one = jax.jit(step)
    for c in range(clients):
        expected = each[c]
        for s in range(steps):
            expected, loss = one(expected, x[c, s])
            np.testing.assert_allclose(losses[c, s], loss, rtol=1e-4)
        jax.tree.map(lambda a, e, c=c: np.testing.assert_allclose(a[c], e, atol=1e-5), params, expected)
