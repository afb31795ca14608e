"""The one module that runs every architecture, against plain jax and with factories of one's own."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from jaxeff import quadratic, spec
from jaxeff.models import Network, architecture, cnn, first_order_conv, resnet, vgg

KEY = jax.random.key(0)
TINY_VGG = vgg((4, "M", 6), num_classes=3, input_shape=(6, 5, 2))
TINY_CNN = cnn((3, 4), num_classes=2, input_shape=(4, 4, 1), norm=None)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def scattered(variables, seed=0):
    """Variables of the same structure with random values, positive where they are variances."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(variables)
    values = [
        np.abs(normal(seed + i, *leaf.shape)) + 0.5 if path[-1].key == "var" else normal(seed + i, *leaf.shape)
        for i, (path, leaf) in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, values)


def variables_of(network, seed=0):
    inputs = jax.ShapeDtypeStruct((1, *network.architecture.input_shape), jnp.float32)
    return scattered(jax.eval_shape(network.init, KEY, inputs), seed)


# --- against plain jax ------------------------------------------------------------------------------------------------


def convolved(x, params, strides=(1, 1), padding="SAME"):
    y = lax.conv_general_dilated(x, params["kernel"], strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + params.get("bias", 0)


def normalised(x, params, stats):
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


def step(x, name, variables, strides=(1, 1)):
    params, stats = variables["params"][name], variables["batch_stats"][name]
    return normalised(convolved(x, params["layer"], strides), params["norm"], stats["norm"])


def classified(x, variables):
    head = variables["params"]["head"]["layer"]
    return x.mean((1, 2)) @ head["kernel"] + head["bias"]


def test_a_vgg_in_plain_jax():
    network, x = Network(TINY_VGG), normal(9, 2, 6, 5, 2)
    variables = variables_of(network)
    assert set(variables["params"]) == {"conv1", "conv2", "head"}
    hidden = jax.nn.relu(step(x, "conv1", variables))
    hidden = lax.reduce_window(hidden, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    expected = classified(jax.nn.relu(step(hidden, "conv2", variables)), variables)
    np.testing.assert_allclose(jax.jit(network.apply)(variables, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shortcut", ["pad", "projection", "identity"])
def test_a_residual_block_in_plain_jax(shortcut):
    features, strides = (4, (1, 1)) if shortcut == "identity" else (8, (2, 2))
    projection = spec.Conv("shortcut", features, (1, 1), strides, act=None, role="shortcut", norm="batch")
    block = spec.Residual(
        "block",
        (
            spec.Conv("conv1", features, strides=strides, norm="batch"),
            spec.Conv("conv2", features, act=None, norm="batch"),
        ),
        projection if shortcut == "projection" else shortcut,
    )
    network = Network(spec.Architecture("net", (5, 6, 4), (block,)))
    variables, x = variables_of(network), normal(9, 2, 5, 6, 4)
    inside = {collection: tree["block"] for collection, tree in variables.items()}
    branch = step(jax.nn.relu(step(x, "conv1", inside, strides)), "conv2", inside)
    short = x
    if shortcut == "pad":
        short = np.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
    elif shortcut == "projection":
        short = step(x, "shortcut", inside, strides)
    np.testing.assert_allclose(jax.jit(network.apply)(variables, x), jax.nn.relu(branch + short), rtol=1e-4, atol=1e-4)


def test_other_layers_in_plain_jax():
    layers = (
        spec.Conv("conv", 4, (2, 3), (1, 2), ((0, 1), (2, 0)), groups=2, act="gelu", bias=True),
        spec.Conv("deep", 8, groups=spec.DEPTHWISE, padding="VALID", act=None),
        spec.Pool("pool", (2, 1), "avg"),
        spec.Flatten("flatten"),
        spec.Dropout("dropout", 0.5),
        spec.Dense("head", 3, act="tanh"),
    )
    network = Network(spec.Architecture("net", (6, 7, 2), layers))
    variables, x = variables_of(network), normal(9, 2, 6, 7, 2)
    params = {name: value["layer"] for name, value in variables["params"].items()}

    def grouped(x, name, groups, *window):
        numbers = ("NHWC", "HWIO", "NHWC")
        k = params[name]["kernel"]
        y = lax.conv_general_dilated(x, k, *window, dimension_numbers=numbers, feature_group_count=groups)
        return y + params[name]["bias"]

    y = jax.nn.gelu(grouped(x, "conv", 2, (1, 2), ((0, 1), (2, 0))))
    y = grouped(y, "deep", 4, (1, 1), "VALID")
    y = (y[:, 0::2] + y[:, 1::2]) / 2
    expected = np.tanh(y.reshape(2, -1) @ params["head"]["kernel"] + params["head"]["bias"])
    np.testing.assert_allclose(jax.jit(network.apply)(variables, x), expected, rtol=1e-4, atol=1e-4)


# --- norms, dropout, precision ----------------------------------------------------------------------------------------


def test_batch_statistics_change_only_while_training():
    network, x = Network(TINY_VGG), normal(9, 3, 6, 5, 2)
    variables = variables_of(network)
    _, changed = jax.jit(partial(network.apply, train=True, mutable=["batch_stats"]))(variables, x)
    hidden = convolved(x, variables["params"]["conv1"]["layer"])
    stats = changed["batch_stats"]["conv1"]["norm"]
    expected = 0.9 * variables["batch_stats"]["conv1"]["norm"]["mean"] + 0.1 * hidden.mean((0, 1, 2))
    np.testing.assert_allclose(stats["mean"], expected, rtol=1e-4, atol=1e-5)
    _, kept = jax.jit(partial(network.apply, mutable=["batch_stats"]))(variables, x)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("norm", ["group", None])
def test_other_norms_keep_no_statistics_and_biases_stand_only_where_no_norm_follows(norm):
    network = Network(vgg((4, "M", 6), num_classes=3, input_shape=(6, 5, 2), norm=norm))
    shapes = jax.eval_shape(network.init, KEY, jnp.ones((1, 6, 5, 2)))
    assert set(shapes) == {"params"}
    conv = shapes["params"]["conv1"]
    assert set(conv) == ({"layer", "norm"} if norm else {"layer"})
    assert set(conv["layer"]) == ({"kernel"} if norm else {"kernel", "bias"})
    asked = Network(vgg((4,), input_shape=(6, 5, 2), norm=norm, bias=True))
    assert "bias" in jax.eval_shape(asked.init, KEY, jnp.ones((1, 6, 5, 2)))["params"]["conv1"]["layer"]


@pytest.mark.parametrize(
    ("branch_norm", "bias", "expected"), [(None, None, True), ("batch", None, False), (None, False, False)]
)
def test_biases_of_quadratic_projections_end_at_a_branch_norm_only(branch_norm, bias, expected):
    net = spec.quadratize(vgg((4,), num_classes=3, input_shape=(6, 5, 2), bias=bias), "t4", branch_norm=branch_norm)
    params = variables_of(Network(net, conv=quadratic.conv_layer))["params"]["conv1"]
    assert {"bias_a", "bias_b"} <= set(params["layer"]) if expected else not {"bias_a", "bias_b"} & set(params["layer"])


def test_a_later_norm_does_not_replace_the_biases_inside_a_product():
    """(a.x + p) (b.x + q) and (a.x) (b.x) differ by a linear part, which is still there after a batch norm."""
    net = spec.quadratize(vgg((4,), num_classes=3, input_shape=(6, 5, 2)), "t4")
    network, x = Network(net, conv=quadratic.conv_layer), normal(9, 3, 6, 5, 2)
    variables = variables_of(network)

    def loss(params):
        y, _ = network.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y**3)

    gradient = jax.jit(jax.grad(loss))(variables["params"])["conv1"]["layer"]
    assert min(np.abs(gradient[name]).max() for name in ("bias_a", "bias_b")) > 1e-2


def test_dropout_acts_only_while_training():
    layers = (spec.Flatten("flatten"), spec.Dropout("dropout", 0.5))
    network, x = Network(spec.Architecture("net", (100,), layers)), np.ones((2, 100), np.float32)
    np.testing.assert_array_equal(network.apply({}, x), x)
    y = network.apply({}, x, train=True, rngs={"dropout": KEY})
    assert set(np.unique(y)) == {0, 2}


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_outside():
    seen = []

    class Watch(nn.Module):
        @nn.compact
        def __call__(self, lhs, *args, **kwargs):
            seen.append(lhs.dtype)
            return lax.conv_general_dilated(lhs, *args, **kwargs)

    gated = spec.gate(TINY_VGG, True, "*")
    exact, half = Network(TINY_VGG), Network(gated, gate=lambda layer: Watch, dtype=jnp.bfloat16)
    variables, x = variables_of(exact), normal(9, 2, 6, 5, 2)
    made = jax.eval_shape(half.init, KEY, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    y, changed = jax.jit(partial(half.apply, train=True, mutable=["batch_stats"]))(variables, x)
    assert set(seen) == {jnp.dtype("bfloat16")} and y.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(changed)} == {jnp.dtype("float32")}
    expected, _ = jax.jit(partial(exact.apply, train=True, mutable=["batch_stats"]))(variables, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=0.05 * np.abs(expected).max())


def test_networks_run_over_stacked_parameters():
    network, x = Network(TINY_CNN), normal(9, 2, 4, 4, 1)
    each = [variables_of(network, seed) for seed in (0, 100)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *each)

    def loss(variables, x):
        return jnp.mean(network.apply(variables, x) ** 2)

    values, grads = jax.jit(jax.vmap(jax.value_and_grad(loss), (0, None)))(stacked, x)
    one = jax.jit(jax.value_and_grad(loss))
    for i, variables in enumerate(each):
        value, grad = one(variables, x)
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        jax.tree.map(lambda a, e, i=i: np.testing.assert_allclose(a[i], e, rtol=1e-4, atol=1e-4), grads, grad)


# --- factories --------------------------------------------------------------------------------------------------------


class Halve(nn.Module):
    """A gate that halves its input."""

    @nn.compact
    def __call__(self, lhs, *args, **kwargs):
        return lax.conv_general_dilated(lhs / 2, *args, **kwargs)


@pytest.mark.parametrize("conv", [first_order_conv, quadratic.conv_layer])
def test_the_gate_factory_is_called_for_gated_layers_with_their_description(conv):
    called = []

    def factory(layer):
        called.append((layer.name, layer.gate))
        return Halve

    plain, gated = (
        Network(TINY_CNN, conv=conv),
        Network(spec.gate(TINY_CNN, {"ratio": 0.5}, "conv1"), conv, gate=factory),
    )
    variables, x = variables_of(plain), normal(9, 2, 4, 4, 1)
    np.testing.assert_allclose(jax.jit(gated.apply)(variables, x), jax.jit(plain.apply)(variables, x / 2), rtol=1e-5)
    assert called == [("conv1", {"ratio": 0.5})]


def test_a_gate_without_a_factory_is_an_error():
    with pytest.raises(ValueError, match="layer 'conv2' has a gate, but the network has no gate factory: pass gate="):
        jax.eval_shape(Network(spec.gate(TINY_CNN, True, "conv2")).init, KEY, jnp.ones((1, 4, 4, 1)))


@pytest.mark.parametrize(("select", "argument"), [("conv*", "conv"), ("head", "dense")])
def test_first_order_factories_refuse_other_kinds(select, argument):
    network = Network(spec.quadratize(TINY_CNN, "t4", select))
    with pytest.raises(ValueError, match=f"is of kind 't4', .*pass {argument}=jaxeff.quadratic.{argument}_layer"):
        jax.eval_shape(network.init, KEY, jnp.ones((1, 4, 4, 1)))


def test_quadratic_factories_make_first_order_layers_too():
    network = Network(TINY_CNN, conv=quadratic.conv_layer, dense=quadratic.dense_layer)
    variables, x = variables_of(Network(TINY_CNN)), normal(9, 2, 4, 4, 1)
    renamed = {
        name: {"layer": {f"{array}_c": value for array, value in tree["layer"].items()}}
        for name, tree in variables["params"].items()
    }
    expected = jax.jit(Network(TINY_CNN).apply)(variables, x)
    np.testing.assert_allclose(jax.jit(network.apply)({"params": renamed}, x), expected, rtol=1e-6)


def test_a_quadratic_network_trains():
    net = spec.quadratize(vgg((4,), num_classes=3, input_shape=(4, 4, 2)), branch_norm="batch")
    network, x, labels = Network(net, conv=quadratic.conv_layer), normal(9, 6, 4, 4, 2), np.arange(6) % 3
    variables = jax.jit(network.init)(KEY, x)

    @jax.jit
    def train(variables):
        def loss(params):
            logits, changed = network.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(6), labels]), changed

        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return {**changed, "params": jax.tree.map(lambda p, g: p - 0.5 * g, variables["params"], grads)}, value

    losses = []
    for _ in range(60):
        variables, value = train(variables)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 3


# --- errors -----------------------------------------------------------------------------------------------------------


def tiny(**changes):
    return spec.edit(TINY_CNN, lambda layer: dataclasses.replace(layer, **changes), "conv1")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Network(tiny(act="swish")), "act must be None or one of 'relu', .*'tanh', got 'swish'"),
        (Network(tiny(norm="instance")), "norm must be None or one of 'batch', .*'rms', got 'instance'"),
        (
            Network(tiny(kind="cubic"), conv=quadratic.conv_layer),
            "unknown kind 'cubic'; known: first_order, .*, quadralib",
        ),
    ],
)
def test_unknown_names_are_an_error_that_lists_the_known(network, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.init, KEY, jnp.ones((1, 4, 4, 1)))


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (4, 4, 1), (2, 16), (2, 5, 4, 1)])
def test_inputs_of_another_shape_are_an_error(shape):
    with pytest.raises(ValueError, match=r"'cnn' takes inputs \[N, 4, 4, 1\], got"):
        Network(TINY_CNN).apply(variables_of(Network(TINY_CNN)), np.ones(shape, np.float32))


def test_an_unknown_model_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="unknown model 'resnet18'; known: cnn, mlp, mobilenet, resnet, .*vgg9"):
        architecture("resnet18")
    assert architecture("resnet14", width=0.5) == resnet(14, width=0.5)
