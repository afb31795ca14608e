"""Architectures as data: shapes, order, and every edit as a pure function."""

import dataclasses

import pytest

from jaxeff import models, spec
from jaxeff.spec import (
    DEPTHWISE,
    Architecture,
    Conv,
    Dense,
    Dropout,
    Flatten,
    GlobalPool,
    Pool,
    Reshape,
    Residual,
    Shape,
    Upsample,
    edit,
    gate,
    group,
    quadratize,
    remove,
    selected,
    shapes,
    shrink,
    walk,
)

SEPARABLE = Architecture(
    "separable",
    (8, 8, 3),
    (
        Conv("stem", 4, role="stem"),
        Conv("deep", 8, groups=DEPTHWISE, strides=(2, 2)),  # two features per channel
        Conv("wide", 6, (1, 1)),
        Conv("deep2", 6, groups=DEPTHWISE),
        GlobalPool("mean"),
        Dense("head", 10),
    ),
)


def residual(shortcut="identity", features=4, strides=(1, 1), name="block"):
    return Residual(name, (Conv("conv1", features, strides=strides), Conv("conv2", features, act=None)), shortcut)


PROJECTION = Conv("shortcut", 8, (1, 1), (2, 2), act=None, role="shortcut")
NET = Architecture(
    "net",
    (9, 8, 3),
    (
        Conv("stem", 4, role="stem"),
        residual(),
        residual(PROJECTION, 8, (2, 2), "block2"),
        residual("pad", 12, (2, 2), "block3"),
        Pool("pool"),
        Flatten("flatten"),
        Dropout("dropout", 0.5),
        Dense("hidden", 5, role="body"),
        Dense("head", 10),
    ),
)


def layers(architecture):
    return dict(walk(architecture))


def widths(architecture):
    return {path: layer.features for path, layer in walk(architecture) if isinstance(layer, Conv | Dense)}


def differing(one, other):
    return sorted(path for path, layer in walk(other) if layers(one)[path] != layer and not isinstance(layer, Residual))


def one_layer(layer, shape=(8, 8, 4)):
    return Architecture("net", shape, (layer,))


# --- shapes and order -------------------------------------------------------------------------------------------------


def test_walk_is_in_order_and_goes_into_blocks():
    assert [path for path, _ in walk(NET)] == [
        *("stem", "block", "block/conv1", "block/conv2"),
        *("block2", "block2/conv1", "block2/conv2", "block2/shortcut"),
        *("block3", "block3/conv1", "block3/conv2"),
        *("pool", "flatten", "dropout", "hidden", "head"),
    ]


def test_shapes_of_every_layer():
    table = shapes(NET)
    assert list(table) == [path for path, _ in walk(NET)]
    assert table["block2"] == Shape((9, 8, 4), (5, 4, 8))
    assert table["block2/conv2"] == Shape((5, 4, 8), (5, 4, 8))
    assert table["block2/shortcut"] == Shape((9, 8, 4), (5, 4, 8))
    assert table["block3"] == Shape((5, 4, 8), (3, 2, 12))
    assert table["pool"].output == (1, 1, 12)
    assert table["flatten"].output == table["dropout"].output == (12,)
    assert table["head"] == Shape((5,), (10,))


def test_shapes_of_a_generator():
    layers = (Dense("d", 48), Reshape("map", (4, 3, 4)), Upsample("up", (2, 3)), Conv("c", 8, groups=DEPTHWISE))
    net = Architecture("net", (5,), layers)
    assert [shape.output for shape in shapes(net).values()] == [(48,), (4, 3, 4), (8, 9, 4), (8, 9, 8)]
    with pytest.raises(ValueError, match=r"layer 'u' .*needs an input \(H, W, C\), got \(5,\)"):
        Architecture("net", (5,), (Upsample("u"),))
    # The depthwise layer gets its channels from the new shape, not from the latent vector.
    assert shrink(net, {"d": 48}).layers[-1].features == 8


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (Conv("c", 2, (3, 3), padding="VALID"), (6, 5, 2)),
        (Conv("c", 2, (4, 1), (3, 2), "VALID"), (2, 4, 2)),
        (Conv("c", 2, (3, 2), (3, 2)), (3, 4, 2)),
        (Conv("c", 2, (3, 3), (2, 1), ((0, 1), (-1, 0))), (4, 4, 2)),
        (Conv("c", 8, groups=2), (8, 7, 8)),
        (Conv("c", 8, groups=DEPTHWISE), (8, 7, 8)),
    ],
)
def test_shape_of_a_convolution(conv, expected):
    assert shapes(one_layer(conv, (8, 7, 4)))["c"].output == expected


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Conv("c", 0), "layer 'c' of 'net' has features=0"),
        (Conv("c", 4, groups=3), "layer 'c' of 'net': groups=3 must divide its 4 input channels and 4 features"),
        (Conv("c", 6, groups=DEPTHWISE), "groups=4 must divide its 4 input channels and 6 features"),
        (Conv("c", 4, groups=-1), "layer 'c' .*groups must be at least 1, or 0 for depthwise, got -1"),
        (Conv("c", 4, (9, 9), padding="VALID"), "layer 'c' .* kernel with padding 'VALID' does not fit"),
        (Conv("c", 4, strides=(0, 1)), r"layer 'c' .*strides must be two sizes >= 1, got \(0, 1\)"),
        (Conv("c", 4, kernel=(3,)), r"layer 'c' .*kernel must be two sizes >= 1, got \(3,\)"),
        (Conv("c", 4, padding="FULL"), "layer 'c' .*padding must be 'SAME', 'VALID' or two .*got 'FULL'"),
        (Conv("c", 4, padding=((1, 1),)), "layer 'c' .*padding must be"),
        (Pool("p", (9, 2)), r"layer 'p' .*window \(9, 2\) is larger than its input"),
        (Pool("p", (0, 2)), "layer 'p' .*window must be two sizes >= 1"),
        (Pool("p", reduce="sum"), "layer 'p' .*reduce must be 'max' or 'avg', got 'sum'"),
        (Dense("d", 3), "layer 'd' .*needs a flat input, got .*GlobalPool or Flatten"),
        (Reshape("r", (3, 5)), r"layer 'r' .*shape=\(3, 5\) holds 15 values, but its input \(8, 8, 4\) has 256"),
        (Reshape("r", (-1, 4)), r"layer 'r' .*shape=\(-1, 4\)"),
        (Upsample("u", (2, 0)), r"layer 'u' .*factor must be two whole numbers >= 1, got \(2, 0\)"),
        (Dropout("d", 1.0), r"layer 'd' .*rate must be in \[0, 1\), got 1.0"),
        (
            residual(features=8),
            r"layer 'block' .*adds a branch of shape \(8, 8, 8\) to a shortcut of shape \(8, 8, 4\)",
        ),
        (residual("pad", 2), "layer 'block' .*adds a branch"),
        (residual("skip"), "layer 'block' .*'identity', 'pad' or a Conv, got 'skip'"),
        (Residual("r", (Conv("x", 4), Conv("x", 4))), "two layers named 'r/x'"),
        (Residual("r", (Conv("x", 4, (4, 4), padding="VALID"),), "pad"), "layer 'r' .*adds a branch"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_layer(layer, message):
    with pytest.raises(ValueError, match=message):
        one_layer(layer)


def test_other_architectures_that_cannot_be():
    with pytest.raises(ValueError, match="two layers named 'c'"):
        Architecture("net", (8, 8, 4), (Conv("c", 4), Conv("c", 4)))
    with pytest.raises(ValueError, match=r"layer 'c' .*needs an input \(H, W, C\), got \(4,\)"):
        one_layer(Conv("c", 4), (4,))
    with pytest.raises(TypeError, match="layer 'odd' .*is a Odd"):
        one_layer(dataclasses.make_dataclass("Odd", ["name"])("odd"))


def test_architectures_are_values():
    assert dataclasses.replace(NET) == NET and hash(dataclasses.replace(NET)) == hash(NET)
    with pytest.raises(dataclasses.FrozenInstanceError):
        NET.name = "other"


# --- selection --------------------------------------------------------------------------------------------------------


def test_by_default_edits_touch_the_body():
    edited = quadratize(NET)
    body = [f"{block}/{conv}" for block in ("block", "block2", "block3") for conv in ("conv1", "conv2")]
    assert differing(NET, edited) == sorted([*body, "hidden"])


@pytest.mark.parametrize(
    ("select", "touched"),
    [
        ("block2/*", ["block2/conv1", "block2/conv2", "block2/shortcut"]),
        ("*/conv1", ["block/conv1", "block2/conv1", "block3/conv1"]),
        ("head", ["head"]),
        (lambda path, layer: isinstance(layer, Dense), ["head", "hidden"]),
        (lambda path, layer: layer.role == "stem", ["stem"]),
    ],
)
def test_selection_by_glob_and_by_predicate(select, touched):
    assert differing(NET, edit(NET, lambda layer: dataclasses.replace(layer, kind="t4"), select)) == touched
    assert sorted(selected(NET, select)) == touched


def test_a_selection_that_matches_nothing_is_an_error_that_lists_the_layers():
    for change in (
        lambda: quadratize(NET, select="stage*"),
        lambda: group(NET, 2, "stage*"),
        lambda: selected(NET, "stage*"),
    ):
        with pytest.raises(ValueError, match=r"select='stage\*' matches no layer of 'net'; .*block2/shortcut"):
            change()


# --- edits ------------------------------------------------------------------------------------------------------------


def test_edits_leave_their_argument_as_it_is():
    before = dataclasses.replace(NET)
    for edited in (quadratize(NET), gate(NET, 1), group(NET, 2, "block/*"), shrink(NET, 2.0), remove(NET, "block")):
        assert edited != NET and NET == before


def test_edits_compose():
    edited = shrink(
        gate(group(quadratize(NET, "t4", branch_norm="batch"), 2, "block/*"), {"ratio": 0.5}, "block/*"), 2.0
    )
    conv = layers(edited)["block/conv1"]
    assert (conv.kind, conv.branch_norm, conv.groups, conv.gate, conv.features) == ("t4", "batch", 2, {"ratio": 0.5}, 8)
    assert layers(edited)["stem"].kind == "first_order"
    assert layers(gate(edited, None, "block/*"))["block/conv1"].gate is None


def test_edit_changes_any_field():
    edited = edit(NET, lambda layer: dataclasses.replace(layer, act="gelu", norm="group"), "block/conv1")
    assert differing(NET, edited) == ["block/conv1"]
    with pytest.raises(ValueError, match="layer 'block' of 'net' adds a branch"):
        edit(NET, lambda layer: dataclasses.replace(layer, features=5), "block/conv2")


def test_group_passes_over_dense_layers_and_names_what_it_cannot_split():
    convolutions = [path for path, layer in walk(NET) if isinstance(layer, Conv) and layer.role == "body"]
    assert differing(NET, group(NET, 2, None)) == sorted(convolutions)
    with pytest.raises(ValueError, match="layer 'stem' of 'net': groups=2 must divide its 3 input channels"):
        group(NET, 2, "stem")


def test_shrink_by_a_factor_keeps_the_last_layer():
    assert widths(shrink(NET, 0.5)) == {
        **{"stem": 2, "block/conv1": 2, "block/conv2": 2},
        **{"block2/conv1": 4, "block2/conv2": 4, "block2/shortcut": 4, "block3/conv1": 6, "block3/conv2": 6},
        **{"hidden": 2, "head": 10},
    }
    assert min(widths(shrink(NET, 1e-6)).values()) == 1


def test_shrink_by_a_factor_of_selected_layers():
    assert widths(shrink(NET, 0.25, "*/conv1")) == {
        **widths(NET),
        **{"block/conv1": 1, "block2/conv1": 2, "block3/conv1": 3},
    }


def test_shrink_to_given_widths():
    assert widths(shrink(NET, {"block/conv1": 7, "head": 3})) == {**widths(NET), "block/conv1": 7, "head": 3}
    # Both sides of a sum at once: each alone would not fit.
    both = shrink(NET, {"block2/conv2": 6, "block2/shortcut": 6})
    assert shapes(both)["block2"].output == (5, 4, 6)


def test_depthwise_layers_follow_their_input_and_keep_their_features_per_channel():
    assert widths(shrink(SEPARABLE, 0.5)) == {"stem": 2, "deep": 4, "wide": 3, "deep2": 3, "head": 10}
    assert widths(shrink(SEPARABLE, {"stem": 5, "wide": 7})) == {
        "stem": 5,
        "deep": 10,
        "wide": 7,
        "deep2": 7,
        "head": 10,
    }
    assert widths(remove(SEPARABLE, "wide"))["deep2"] == 8
    inside = Architecture(
        "net",
        (8, 8, 3),
        (Conv("stem", 4), Residual("r", (Conv("deep", 4, groups=DEPTHWISE),), Conv("s", 4, groups=DEPTHWISE))),
    )
    assert widths(shrink(inside, {"stem": 6})) == {"stem": 6, "r/deep": 6, "r/s": 6}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"conv9": 3}, r"widths name unknown layers \['conv9'\]; known: block/conv1"),
        ({"block/conv2": 3}, "layer 'block' of 'net' adds a branch"),
        ({"block/conv1": 0}, "layer 'block/conv1' of 'net' has features=0"),
        (0.0, "positive factor or a mapping.*got 0.0"),
        (float("nan"), "positive factor or a mapping.*got nan"),
        (-1, "positive factor or a mapping.*got -1"),
    ],
)
def test_widths_that_cannot_be_are_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        shrink(NET, given)


def test_the_width_of_a_depthwise_layer_cannot_be_given():
    with pytest.raises(ValueError, match="'deep2' 5 features, but it is depthwise and follows its input"):
        shrink(SEPARABLE, {"deep2": 5})


def test_remove():
    assert [layer.name for layer in remove(NET, "block", "dropout").layers] == [
        *("stem", "block2", "block3", "pool", "flatten", "hidden", "head")
    ]
    assert shapes(remove(NET, "pool"))["flatten"].output == (3 * 2 * 12,)


def test_what_cannot_be_removed():
    with pytest.raises(ValueError, match=r"cannot remove \['block/conv1'\]; the top-level layers are: stem, block"):
        remove(NET, "block/conv1")
    with pytest.raises(ValueError, match="layer 'hidden' of 'net' needs a flat input"):
        remove(NET, "flatten")


def test_cut_gives_two_networks_one_after_the_other():
    net = models.vgg9(width=0.1)
    before, after = spec.cut(net, "dense1")
    assert [layer.name for layer in before.layers][-1] == "conv6"
    assert [layer.name for layer in after.layers][:3] == ["pool3", "flatten", "dense1"]
    assert before.layers + after.layers == net.layers
    assert spec.shapes(before)["conv6"].output == after.input_shape == spec.shapes(net)["pool3"].input
    with pytest.raises(ValueError, match="no top-level layer 'stem'"):
        spec.cut(net, "stem")
    with pytest.raises(ValueError, match="nothing before 'conv1'"):
        spec.cut(net, "conv1")


def test_shrink_for_another_input():
    _, rest = spec.cut(models.resnet(8), "stage3_block1")
    widths = {path: 8 for path, layer in spec.walk(rest) if isinstance(layer, spec.Conv)}
    narrow = spec.shrink(rest, widths, input_shape=(16, 16, 4))
    assert spec.shapes(narrow)["stage3_block1"] == ((16, 16, 4), (8, 8, 8))
