"""Checkpoints of PyTorch networks, written in NumPy, against a forward pass in float64 with PyTorch's semantics."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxeff import models, quadratic, spec
from jaxeff.quadratic.interop import from_torch_state_dict, like_torch

PLAN = (4, "M", 6, "M")


def network(architecture):
    return models.Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer)


def quadralib(architecture):
    return spec.quadratize(architecture, "quadralib", branch_norm="batch")


# --- checkpoints: PyTorch's names and layouts -------------------------------------------------------------------------


class Checkpoint(dict):
    """A state dict that modules are added to, with parameters and running statistics far from their initial values."""

    def __init__(self, seed=0):
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape):
        return self.rng.normal(size=shape).astype(np.float32)

    def linear(self, name, features, inputs):
        self[f"{name}.weight"] = self.normal(features, inputs) / np.float32(inputs**0.5)
        self[f"{name}.bias"] = self.normal(features)

    def conv(self, name, features, inputs, size=3, bias=True):
        self[f"{name}.weight"] = self.normal(features, inputs, size, size) / np.float32((inputs * size**2) ** 0.5)
        if bias:
            self[f"{name}.bias"] = self.normal(features)

    def batch_norm(self, name, features):
        self[f"{name}.weight"] = 1 + 0.3 * self.normal(features)
        self[f"{name}.bias"] = 0.5 * self.normal(features)
        self[f"{name}.running_mean"] = 0.5 * self.normal(features)
        self[f"{name}.running_var"] = self.rng.uniform(0.5, 2, features).astype(np.float32)
        self[f"{name}.num_batches_tracked"] = np.array(7)

    def quadralib(self, name, features, inputs, bias):
        for i in (1, 2, 3):
            self.conv(f"{name}.conv{i}", features, inputs, bias=bias)
            self.batch_norm(f"{name}.bn{i}", features)

    def vgg(self, plan, quadratic=False, norm=True, inputs=3):
        position = 0
        for entry in plan:
            if entry != "M":
                layer = f"features.{position}"
                self.quadralib(layer, entry, inputs, True) if quadratic else self.conv(layer, entry, inputs)
                if norm:
                    self.batch_norm(f"features.{position + 1}", entry)
                position, inputs = position + 1 + norm, entry
            position += 1  # the activation, or the pooling
        return self

    def resnet(self, widths, blocks, quadratic=False, bias=False, shortcut="shortcut", head="linear"):
        self.conv("conv1", widths[0], 3, bias=False)
        self.batch_norm("bn1", widths[0])
        inputs = widths[0]
        for stage, width in enumerate(widths, 1):
            for block in range(blocks):
                name = f"layer{stage}.{block}"
                for i, arriving in ((1, inputs), (2, width)):
                    layer = f"{name}.conv{i}"
                    if quadratic:
                        self.quadralib(layer, width, arriving, bias)
                    else:
                        self.conv(layer, width, arriving, bias=bias)
                    self.batch_norm(f"{name}.bn{i}", width)
                if inputs != width:
                    self.conv(f"{name}.{shortcut}.0", width, inputs, 1, bias=False)
                    self.batch_norm(f"{name}.{shortcut}.1", width)
                inputs = width
        self.linear(head, 5, inputs)
        return self


# --- the oracle: PyTorch's operations on [N, C, H, W] in float64 ------------------------------------------------------


def conv2d(state, name, x, stride=1):
    weight = state[f"{name}.weight"].astype(np.float64)
    size = weight.shape[-1]
    pad = size // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    rows = np.stack(
        [
            x[:, :, i : i + size, j : j + size].reshape(len(x), -1)
            for i in range(0, x.shape[2] - size + 1, stride)
            for j in range(0, x.shape[3] - size + 1, stride)
        ],
        axis=-1,
    )
    y = np.einsum("of,nfp->nop", weight.reshape(len(weight), -1), rows)
    side = (x.shape[2] - size) // stride + 1
    return y.reshape(len(x), len(weight), side, -1) + state.get(f"{name}.bias", np.zeros(len(weight)))[:, None, None]


def batch_norm(state, name, x):
    weight, bias, mean, var = (
        state[f"{name}.{part}"].astype(np.float64)[:, None, None]
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def layer(state, name, x, stride=1):
    """A convolution, or QuadraLib's layer."""
    if f"{name}.weight" in state:
        return conv2d(state, name, x, stride)
    a, b, c = (batch_norm(state, f"{name}.bn{i}", conv2d(state, f"{name}.conv{i}", x, stride)) for i in (1, 2, 3))
    return a * b + c


def linear(state, name, x):
    return x @ state[f"{name}.weight"].astype(np.float64).T + state[f"{name}.bias"]


def relu(x):
    return np.maximum(x, 0)


def max_pool(x):
    return x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).max((3, 5))


def vgg_features(state, plan, x):
    position = 0
    for entry in plan:
        if entry == "M":
            x = max_pool(x)
        else:
            x = layer(state, f"features.{position}", x)
            position += 1
            if f"features.{position}.running_mean" in state:
                x = batch_norm(state, f"features.{position}", x)
                position += 1
            x = relu(x)
        position += 1
    return x


def resnet_logits(state, x, blocks, shortcut="shortcut", head="linear"):
    x = relu(batch_norm(state, "bn1", conv2d(state, "conv1", x)))
    for stage in (1, 2, 3):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = relu(batch_norm(state, f"{name}.bn1", layer(state, f"{name}.conv1", x, stride)))
            y = batch_norm(state, f"{name}.bn2", layer(state, f"{name}.conv2", y))
            if f"{name}.{shortcut}.0.weight" in state:
                x = batch_norm(state, f"{name}.{shortcut}.1", conv2d(state, f"{name}.{shortcut}.0", x, stride))
            x = relu(y + x)
    return linear(state, head, x.mean((2, 3)))


def images(side, seed=9):
    return np.random.default_rng(seed).normal(size=(3, side, side, 3)).astype(np.float32)


def nchw(x):
    return x.transpose(0, 3, 1, 2).astype(np.float64)


def assert_same_logits(architecture, state, x, expected):
    net = network(architecture)
    variables = from_torch_state_dict(state, net)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), variables) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    logits = jax.jit(net.apply)(variables, x)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_quadratic", [False, True])
def test_vgg_of_torchvision_and_quadralib(is_quadratic):
    state = Checkpoint().vgg(PLAN, is_quadratic)
    state.linear("classifier", 5, 6)
    architecture = models.vgg(PLAN, num_classes=5, input_shape=(4, 4, 3))
    x = images(4)
    expected = linear(state, "classifier", vgg_features(state, PLAN, nchw(x))[:, :, 0, 0])
    architecture = quadralib(architecture) if is_quadratic else architecture
    assert_same_logits(like_torch(architecture, state), state, x, expected)


def test_qvgg7_with_its_own_plan():
    plan = (2, 2, "M", 4, 4, "M", 8, "M", 16, "M", 16, "M")
    state = Checkpoint().vgg(plan, True)
    state.linear("classifier", 10, 16)
    architecture = quadralib(models.vgg("Q7", width=1 / 32, bias=True))
    x = images(32)
    expected = linear(state, "classifier", vgg_features(state, plan, nchw(x))[:, :, 0, 0])
    assert_same_logits(architecture, state, x, expected)


def test_hidden_dense_layers_after_a_map_larger_than_one_position():
    state = Checkpoint().vgg(PLAN, norm=False)
    state.linear("classifier.0", 7, 6 * 2 * 3)
    state.linear("classifier.3", 8, 7)
    state.linear("classifier.6", 5, 8)
    architecture = spec.Architecture(
        "vgg",
        (8, 12, 3),
        (
            *models.vgg(PLAN, input_shape=(8, 12, 3), norm=None).layers[:-2],
            spec.Flatten("flatten"),
            spec.Dense("dense1", 7, act="relu", role="body"),
            spec.Dropout("dropout1", 0.5),
            spec.Dense("dense2", 8, act="relu", role="body"),
            spec.Dropout("dropout2", 0.5),
            spec.Dense("head", 5),
        ),
    )
    x = np.random.default_rng(2).normal(size=(3, 8, 12, 3)).astype(np.float32)
    hidden = vgg_features(state, PLAN, nchw(x)).reshape(3, -1)
    for name in ("classifier.0", "classifier.3"):
        hidden = relu(linear(state, name, hidden))
    assert_same_logits(architecture, state, x, linear(state, "classifier.6", hidden))


@pytest.mark.parametrize(
    ("is_quadratic", "bias", "names"),
    [
        (False, False, {"shortcut": "downsample", "head": "fc"}),
        pytest.param(False, False, {}, marks=pytest.mark.slow),
        (True, True, {}),
        pytest.param(True, False, {}, marks=pytest.mark.slow),
    ],
)
def test_resnet_and_qresnet_with_and_without_biases(is_quadratic, bias, names):
    blocks = 1 if is_quadratic else 2
    state = Checkpoint().resnet((4, 6, 8), blocks, is_quadratic, bias, **names)
    architecture = models.resnet(6 * blocks + 2, num_classes=5, input_shape=(8, 8, 3), shortcut="projection")
    architecture = spec.shrink(architecture, WIDTHS[blocks])
    architecture = quadralib(architecture) if is_quadratic else architecture
    x = images(8)
    expected = resnet_logits(state, nchw(x), blocks, **names)
    assert_same_logits(like_torch(architecture, state), state, x, expected)


def widths(blocks):
    table = {"conv1": 4}
    for stage, width in enumerate((4, 6, 8), 1):
        for block in range(1, blocks + 1):
            table |= {f"stage{stage}_block{block}/conv{i}": width for i in (1, 2)}
        if stage > 1:
            table[f"stage{stage}_block1/shortcut"] = width
    return table


WIDTHS = {blocks: widths(blocks) for blocks in (1, 2)}


@pytest.mark.parametrize(("kind", "of"), [("t4", lambda u, v: u * v), ("t3", lambda u: u * u)])
def test_quadralibs_other_types(kind, of):
    state = Checkpoint()
    names = ["features.0.conv1", "features.0.conv2"][: of.__code__.co_argcount]
    for name in names:
        state.conv(name, 4, 3)
    state.linear("classifier", 5, 4)
    architecture = spec.quadratize(models.vgg((4,), num_classes=5, input_shape=(3, 3, 3), norm=None), kind)
    x = images(3)
    features = relu(of(*(conv2d(state, name, nchw(x)) for name in names)))
    assert_same_logits(architecture, state, x, linear(state, "classifier", features.mean((2, 3))))


def test_stock_layers_take_the_same_checkpoint():
    state = Checkpoint().vgg(PLAN)
    state.linear("classifier", 5, 6)
    architecture = like_torch(models.vgg(PLAN, num_classes=5, input_shape=(4, 4, 3)), state)
    stock = from_torch_state_dict(state, models.Network(architecture))
    ours = from_torch_state_dict(state, network(architecture))
    np.testing.assert_array_equal(
        stock["params"]["conv2"]["layer"]["kernel"], ours["params"]["conv2"]["layer"]["kernel_c"]
    )
    np.testing.assert_array_equal(stock["batch_stats"]["conv2"]["norm"]["var"], state["features.5.running_var"])


def test_prefixes_of_data_parallel_and_counters_are_left_out():
    state = Checkpoint().vgg(PLAN, True)
    state.linear("classifier", 5, 6)
    net = network(like_torch(quadralib(models.vgg(PLAN, num_classes=5, input_shape=(4, 4, 3))), state))
    wrapped = {f"module.{name}": value for name, value in state.items()}
    jax.tree.map(np.testing.assert_array_equal, from_torch_state_dict(wrapped, net), from_torch_state_dict(state, net))


class Tensor:
    """What PyTorch's tensors are to NumPy: arrays behind `__array__`, with a dtype that NumPy does not know."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, f"torch.{array.dtype}"

    def __array__(self, dtype=None, copy=None):
        return self.array.astype(dtype or self.array.dtype)


def test_tensors_are_taken_as_they_come():
    state = Checkpoint().vgg(PLAN)
    state.linear("classifier", 5, 6)
    net = network(like_torch(models.vgg(PLAN, num_classes=5, input_shape=(4, 4, 3)), state))
    tensors = {name: Tensor(value) for name, value in state.items()}
    jax.tree.map(np.testing.assert_array_equal, from_torch_state_dict(tensors, net), from_torch_state_dict(state, net))


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.fixture
def qvgg():
    state = Checkpoint().vgg(PLAN, True)
    state.linear("classifier", 5, 6)
    return state, quadralib(models.vgg(PLAN, num_classes=5, input_shape=(4, 4, 3), bias=True))


def test_everything_that_does_not_fit_is_listed_at_once(qvgg):
    state, architecture = qvgg
    del state["features.0.conv2.weight"], state["features.4.bn3.running_var"]
    state["features.4.conv1.weight"] = state["features.4.conv1.weight"][:, :2]
    state["classifier.bias"] = np.zeros(7, np.float32)
    state["features.9.weight"] = state["other"] = np.zeros(3, np.float32)
    state["features.0.conv1.weight"] = state["features.0.conv1.weight"].astype(np.int8)
    state["features.0.bn1.num_batches_tracked"] = 7
    with pytest.raises(ValueError) as error:
        from_torch_state_dict(state, network(architecture))
    text = str(error.value)
    assert "missing: features.0.conv2.weight, features.4.bn3.running_var\n" in text
    assert "extra: features.9.weight, other\n" in text
    assert "wrong shape: features.4.conv1.weight is (6, 2, 3, 3), expected (6, 4, 3, 3)" in text
    assert "wrong shape: classifier.bias is (7,), expected (5,)" in text
    assert "wrong dtype: features.0.conv1.weight is int8, expected floating point" in text


def test_biases_that_only_one_side_has_are_explained(qvgg):
    state, architecture = qvgg
    without = spec.edit(architecture, lambda layer: dataclasses.replace(layer, bias=None))
    with pytest.raises(ValueError, match="has biases in conv1, conv2: these layers .* need bias=True"):
        from_torch_state_dict(state, network(without))
    for name in [name for name in state if ".conv" in name and name.endswith(".bias")]:
        del state[name]
    with pytest.raises(ValueError, match="has no biases in conv1, conv2: these layers .* need bias=False"):
        from_torch_state_dict(state, network(architecture))


def test_padding_that_pytorch_computes_differently_is_refused():
    state = Checkpoint().resnet((4, 6, 8), 1)
    architecture = models.resnet(8, num_classes=5, input_shape=(8, 8, 3), shortcut="projection")
    architecture = spec.shrink(architecture, WIDTHS[1])
    with pytest.raises(ValueError, match=r"'SAME' of stage2_block1/conv1, stage3_block1/conv1 .*like_torch"):
        from_torch_state_dict(state, network(architecture))


def test_layers_that_such_checkpoints_do_not_have_are_named(qvgg):
    state, architecture = qvgg
    other = spec.quadratize(architecture, "fan", "conv2", branch_norm="group")
    with pytest.raises(ValueError, match="layer 'conv2': kind 'fan' is not among") as error:
        from_torch_state_dict(state, network(other))
    assert "branch_norm='group', expected None or 'batch'" in str(error.value)
    assert "params/conv2/layer/kernel_s" in str(error.value)
    with pytest.raises(ValueError, match="must be called stage<s>_block<i>"):
        block = spec.Residual("block", (spec.Conv("conv", 3),))
        like_torch(spec.Architecture("net", (4, 4, 3), (block,)), state)


def test_nested_checkpoints_doubled_names_and_other_modules(qvgg):
    state, architecture = qvgg
    with pytest.raises(ValueError, match=r"pass that: state_dict\['net'\]"):
        from_torch_state_dict({"net": state, "acc": 94.0}, network(architecture))
    with pytest.raises(ValueError, match="both 'classifier.bias' and 'module.classifier.bias'"):
        from_torch_state_dict({**state, "module.classifier.bias": state["classifier.bias"]}, network(architecture))
    with pytest.raises(TypeError, match=r"models\.Network\(architecture"):
        from_torch_state_dict(state, architecture)
