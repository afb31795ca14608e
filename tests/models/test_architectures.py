"""Parameters and multiply-accumulates of the architectures against published and audited numbers."""

import dataclasses
import math

import jax
import pytest
from jax import numpy as jnp

from jaxeff import costs, quadratic
from jaxeff.models import ZOO, Network, architecture, cnn, mlp, mobilenet, resnet, vgg, vgg9
from jaxeff.ops import conv_impl
from jaxeff.spec import Conv, Dense, Pool, edit, quadratize, shapes, walk


def network(net):
    return Network(net, conv=quadratic.conv_layer)


def abstract(net):
    inputs = jax.ShapeDtypeStruct((1, *net.input_shape), jnp.float32)
    return inputs, jax.eval_shape(network(net).init, jax.random.key(0), inputs)


def parameters(net):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(net)[1]["params"]))


def macs(net):
    inputs, variables = abstract(net)
    return costs.analyze(network(net).apply, variables, inputs, residuals=False).total.macs


def head_macs(net):
    return net.layers[-1].features * [layer for _, layer in walk(net) if isinstance(layer, Conv)][-1].features


def quadralib(net, **changes):
    """Quadratic with branch norm, as QuadraLib's layer; `changes` are made to the layers that become quadratic."""
    return quadratize(edit(net, lambda layer: dataclasses.replace(layer, **changes)), branch_norm="batch")


RESNET14 = resnet(14, shortcut="projection")
# Audited from the code of github.com/zarekxu/QuadraLib; VGG-9 from FedMA.
PARAMETERS = {
    "vgg16": (vgg("D", bias=True), 14_728_266),
    "vgg13": (vgg("B", bias=True), 9_416_010),
    "quadratic vgg7": (quadralib(vgg("Q7", bias=True)), 12_304_330),
    "quadratic vgg16": (quadralib(vgg("D", bias=True)), 44_182_986),
    "resnet32": (resnet(32, shortcut="projection"), 466_906),
    "quadratic resnet14": (quadralib(RESNET14), 518_938),
    "quadratic resnet14 with biases": (quadralib(RESNET14, bias=True), 520_282),
    "vgg9": (vgg9(), 3_491_530),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    net, expected = PARAMETERS[name]
    assert parameters(net) == expected


@pytest.mark.parametrize(("size", "expected"), [(32, 313_196_544), (224, 15_346_630_656)])
def test_macs_of_the_convolutions_of_vgg16(size, expected):
    net = vgg("D", input_shape=(size, size, 3))
    assert macs(net) - head_macs(net) == expected


def test_macs_of_resnet56_without_its_classifier():
    assert macs(resnet(56)) - 640 == 125_485_056


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (quadralib(vgg("Q7")), 430.0),
        (vgg("B"), 228.3),
        (resnet(32, shortcut="projection"), 69.1),
        (quadralib(RESNET14), 78.6),
    ],
)
def test_macs_in_millions_to_the_audited_digit(net, expected):
    assert round(macs(net) / 1e6, 1) == expected


def test_mobilenet_counts_its_depthwise_taps():
    # The stem, then for each block the depthwise taps and the pointwise products, then the head.
    side, channels = 32, 32
    expected = side**2 * 9 * 3 * channels
    for features, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (1024, 2)):
        side //= stride
        expected += side**2 * channels * (9 + features)
        channels = features
    expected += 1024 * 10
    assert macs(mobilenet()) == expected  # on CPU the taps are computed element by element
    with conv_impl("lax"):
        assert macs(mobilenet()) == expected


# --- structure --------------------------------------------------------------------------------------------------------


def widths(net):
    return [layer.features for _, layer in walk(net) if isinstance(layer, Conv | Dense)]


def names(net):
    return [layer.name for layer in net.layers]


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_model_of_the_zoo_can_be_made_for_other_classes(name):
    net = architecture(name, num_classes=7)
    assert net.layers[-1].features == 7 and net.layers[-1].role == "head"
    assert shapes(net)["head"].output == (7,)


def test_vgg_of_ones_own_plan():
    net = vgg((8, "M", 12), num_classes=3, width=0.5, dropout=0.1)
    assert names(net) == ["conv1", "pool1", "conv2", "mean", "dropout", "head"]
    assert widths(net) == [4, 6, 3]
    assert {layer.norm for layer in net.layers if isinstance(layer, Conv)} == {"batch"}


def test_resnet_has_its_shortcuts_where_the_shape_changes():
    blocks = [layer for layer in resnet(20, shortcut="projection").layers if layer.name.startswith("stage")]
    projected = [block.name for block in blocks if isinstance(block.shortcut, Conv)]
    assert len(blocks) == 9 and projected == ["stage2_block1", "stage3_block1"]
    assert {block.shortcut for block in blocks if block.name not in projected} == {"identity"}


def test_cnn_and_mlp():
    net = cnn((4, 5), num_classes=3, hidden=(6,), pools=2, input_shape=(8, 8, 1))
    assert names(net) == ["conv1", "pool1", "conv2", "pool2", "flatten", "dense1", "head"]
    assert widths(net) == [4, 5, 6, 3]
    assert sum(isinstance(layer, Pool) for layer in cnn().layers) == 2
    assert widths(mlp((7, 8), input_shape=(5,))) == [7, 8, 10]


def test_the_head_and_the_stem_stay_first_order():
    for name in ("resnet20", "mobilenet"):
        kinds = {
            path: layer.kind for path, layer in walk(quadratize(architecture(name))) if isinstance(layer, Conv | Dense)
        }
        assert kinds["conv1"] == kinds["head"] == "first_order" and "quadralib" in kinds.values()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vgg("E"), "plan must be a sequence or one of 'A', 'B', 'D', 'Q7', got 'E'"),
        (lambda: vgg("D", input_shape=(16, 16, 3)), "layer 'pool5' .*larger than its input"),
        (lambda: resnet(18), "depth must be 6n \\+ 2 .*got 18"),
        (lambda: resnet(2), "depth must be 6n \\+ 2 .*got 2"),
        (lambda: resnet(20, shortcut="identity"), "'pad' or 'projection', got 'identity'"),
        (lambda: cnn(()), "widths must name at least one convolution"),
        (lambda: vgg9(input_shape=(4, 4, 3)), "layer 'pool3' .*larger than its input"),
    ],
)
def test_what_cannot_be_made_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
