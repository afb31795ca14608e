"""The auto-builder: exact starts, scores against a plain loop, reductions that keep networks in one piece."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxeff import costs, models, quadratic, spec
from jaxeff.quadratic import convert

KEY = jax.random.key(0)
SHAPE = (6, 6, 2)
NETS = {
    "vgg": models.vgg((4, 4, "M", 8, 8), num_classes=3, input_shape=SHAPE),
    "resnet": models.resnet(14, num_classes=3, input_shape=SHAPE, shortcut="projection", width=0.25),
    "mobilenet": models.mobilenet(((8, 1), (8, 2), (8, 1)), num_classes=3, input_shape=SHAPE, width=0.25),
}
TWINS = ["quadralib", "t4", "fan", "qres", "reduced", "t1_linear", "emitting(rank=3)", "ccp(order=3)", "ncp(order=2)"]


slow = partial(pytest.param, marks=pytest.mark.slow)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def of_ours(architecture, **settings):
    return models.Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer, **settings)


def random_variables(network, seed=0):
    """Variables with random values as of a trained network, positive where they are variances."""
    inputs = jax.ShapeDtypeStruct((1, *network.architecture.input_shape), jnp.float32)
    leaves, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(network.init, KEY, inputs))
    values = [
        np.abs(normal(seed + i, *leaf.shape)) + 0.5 if path[-1].key == "var" else normal(seed + i, *leaf.shape)
        for i, (path, leaf) in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, values)


def outputs(network, variables, train):
    """Logits and changed statistics on a batch, train or not."""
    x = normal(99, 5, *network.architecture.input_shape)

    def run(variables):
        return network.apply(variables, x, train, mutable=["batch_stats"] if train else False)

    return jax.jit(run)(variables)[0] if train else jax.jit(run)(variables)


def quadratised(architecture, kind, branch_norm=None, keep_norm=True):
    net = convert.quadratize(architecture, kind, branch_norm=branch_norm)
    if keep_norm:
        return net
    return spec.edit(net, lambda layer: dataclasses.replace(layer, norm=None))


# --- transplanting ----------------------------------------------------------------------------------------------------


def settled(network, variables):
    """With the running statistics of the batch of `outputs`, as a network that has been trained on it long enough."""
    x = normal(99, 5, *network.architecture.input_shape)
    stats = variables.get("batch_stats", {})
    moved = jax.jit(lambda v: network.apply(v, x, True, mutable=["batch_stats"])[1])(variables).get("batch_stats", {})
    return {**variables, "batch_stats": jax.tree.map(lambda new, old: 10 * new - 9 * old, moved, stats)}


def check_equal_logits(source, target, tolerance=1e-5):
    variables = settled(source, random_variables(source))
    start = random_variables(target, seed=1000)
    moved = convert.transplant(variables, source.architecture, start, target.architecture)
    assert jax.tree.map(np.shape, moved) == jax.tree.map(np.shape, start)
    assert convert.fresh_layers(source.architecture, target.architecture) == ()
    for train in (False, True):
        expected, got = outputs(source, variables, train), outputs(target, moved, train)
        assert np.std(expected) > 0.1
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("kind", [TWINS[0], *map(slow, TWINS[1:])])
def test_every_kind_with_a_twin_starts_with_the_logits_of_the_first_order_network(kind):
    check_equal_logits(of_ours(NETS["vgg"]), of_ours(quadratised(NETS["vgg"], kind)))


@pytest.mark.parametrize("kind", ["quadralib", "t4", "fan", "emitting(rank=1)"])
@pytest.mark.parametrize("keep_norm", [True, False])
@pytest.mark.slow
def test_kinds_with_a_batch_norm_on_every_projection_start_with_the_same_logits(kind, keep_norm):
    check_equal_logits(of_ours(NETS["vgg"]), of_ours(quadratised(NETS["vgg"], kind, "batch", keep_norm)))


@pytest.mark.parametrize("norm", [slow("group"), slow("layer"), "rms", slow(None)])
def test_other_norms_may_stay_or_move_behind_the_twin(norm):
    net = models.vgg((4, 8), num_classes=3, input_shape=SHAPE, norm=norm)
    check_equal_logits(of_ours(net), of_ours(quadratised(net, "quadralib")))
    if norm is not None:
        check_equal_logits(of_ours(net), of_ours(quadratised(net, "quadralib", norm, keep_norm=False)))


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
@pytest.mark.parametrize("branch_norm", [None, "batch"])
@pytest.mark.slow
def test_residual_and_depthwise_networks_start_with_the_same_logits(name, branch_norm):
    check_equal_logits(of_ours(NETS[name]), of_ours(quadratised(NETS[name], "quadralib", branch_norm)))


@pytest.mark.parametrize("branch_norm", [None, "batch"])
def test_networks_of_stock_flax_layers_can_be_the_source(branch_norm):
    check_equal_logits(models.Network(NETS["vgg"]), of_ours(quadratised(NETS["vgg"], "quadralib", branch_norm)))


def test_dense_layers_are_transplanted_with_their_biases():
    net = models.mlp((6, 5), num_classes=3, input_shape=(4,))
    check_equal_logits(of_ours(net), of_ours(quadratised(net, "ccp(order=2)")))
    check_equal_logits(models.Network(net), of_ours(quadratised(net, "quadralib")))


@pytest.mark.slow
def test_a_transplanted_network_learns_in_its_quadratic_part():
    target = of_ours(quadratised(NETS["vgg"], "quadralib"))
    source = of_ours(NETS["vgg"])
    moved = convert.transplant(random_variables(source), NETS["vgg"], random_variables(target), target.architecture)

    def loss(params):
        return jnp.sum(jnp.sin(target.apply({**moved, "params": params}, normal(0, 4, *SHAPE))))

    grads = jax.jit(jax.grad(loss))(moved["params"])
    for name in ("conv1", "conv2", "conv3", "conv4"):
        assert np.all(moved["params"][name]["layer"]["kernel_a"] == 0)
        assert np.abs(grads[name]["layer"]["kernel_a"]).max() > 1e-6


def test_two_batch_norms_differ_in_training_by_no_more_than_is_said():
    """One channel, by hand: the batch has another variance than the running statistics."""
    net = models.vgg((1,), num_classes=1, input_shape=(4, 4, 1))
    source, target = of_ours(net), of_ours(quadratised(net, "quadralib", "batch"))
    variables = random_variables(source)
    variables["params"]["conv1"]["layer"]["kernel_c"] *= 0.02
    variables["batch_stats"]["conv1"]["layer"]["norm_out"]["var"] = running = np.float32([0.004])
    variables["params"]["conv1"]["layer"]["norm_out"]["bias"] *= 0
    moved = convert.transplant(variables, net, random_variables(target, 7), target.architecture)
    expected, got = outputs(source, variables, True), outputs(target, moved, True)
    x, kernel = normal(99, 5, 4, 4, 1), variables["params"]["conv1"]["layer"]["kernel_c"]
    z = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    v = np.var(np.asarray(z, np.float64))
    head = variables["params"]["head"]["layer"]["bias_c"]
    error = 0.5e-5 * (1 / v - 1 / running)
    assert 1e-4 < np.abs(error)
    np.testing.assert_allclose((got - head) / (expected - head) - 1, np.broadcast_to(error, (5, 1)), rtol=0.05)


def test_layers_of_another_width_keep_their_new_values_and_the_others_are_copied():
    old = quadratised(NETS["vgg"], "quadralib")
    new = spec.remove(old, "conv3")
    source, target = of_ours(old), of_ours(new)
    variables, start = random_variables(source), random_variables(target, seed=50)
    moved = convert.transplant(variables, old, start, new)
    assert convert.fresh_layers(old, new) == ("conv4",)
    for name, origin in {"conv1": variables, "conv2": variables, "conv4": start, "head": variables}.items():
        for collection in origin:
            if name in moved[collection]:
                jax.tree.map(np.testing.assert_array_equal, moved[collection][name], origin[collection][name])


@pytest.mark.parametrize("branch_norm", [None, "batch"])
def test_a_layer_that_becomes_first_order_keeps_its_linear_part(branch_norm):
    old = quadratised(NETS["vgg"], "quadralib", branch_norm)
    source, target = of_ours(old), of_ours(NETS["vgg"])
    variables = random_variables(source)
    for name in ("conv1", "conv2", "conv3", "conv4"):  # without its products a network is its linear part
        layer = variables["params"][name]["layer"]
        layer.update({"kernel_a": 0 * layer["kernel_a"]} if branch_norm is None else {})
        layer.update({"bias_a": 0 * layer["bias_a"]} if "bias_a" in layer else {})
        if branch_norm:
            layer["norm_a"] = jax.tree.map(np.zeros_like, layer["norm_a"])
    moved = convert.transplant(variables, old, random_variables(target, 9), NETS["vgg"])
    expected = outputs(source, variables, False)
    np.testing.assert_allclose(outputs(target, moved, False), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kind="t3"), r"kind 't3' .* cannot start as a first-order layer.*: first_order, .*quadralib"),
        (dict(norm=None), r"norm='batch', branch_norm=None .* cannot be kept by norm=None, branch_norm=None .*exact"),
        (dict(branch_norm="group"), "cannot be kept by norm='batch', branch_norm='group'"),
        (dict(kind="t4", bias=False), "starts with a = 1, which needs an offset: bias=True"),
    ],
)
def test_what_cannot_start_as_the_first_order_network_is_an_error_that_names_the_layer(change, message):
    new = spec.edit(NETS["vgg"], lambda layer: dataclasses.replace(layer, **{"kind": "quadralib", **change}), "conv2")
    start = random_variables(of_ours(new))
    with pytest.raises(ValueError, match=message):
        convert.transplant(random_variables(of_ours(NETS["vgg"])), NETS["vgg"], start, new)


def test_a_bias_without_a_place_is_an_error():
    old = models.vgg((4,), num_classes=3, input_shape=SHAPE, norm=None)
    new = spec.edit(old, lambda layer: dataclasses.replace(layer, kind="quadralib", bias=False))
    start = random_variables(of_ours(new))
    with pytest.raises(ValueError, match="layer 'conv1': 'bias_c' is not zero and has no place"):
        convert.transplant(random_variables(of_ours(old)), old, start, new)


def test_variables_of_another_network_are_an_error():
    with pytest.raises(ValueError, match="variables have no parameters of layer 'conv3'"):
        some = models.vgg((4, 4), num_classes=3, input_shape=SHAPE)
        start = random_variables(of_ours(NETS["vgg"]))
        convert.transplant(random_variables(of_ours(some)), NETS["vgg"], start, NETS["vgg"])


# --- scores -----------------------------------------------------------------------------------------------------------


def test_a_mask_sets_its_share_of_one_layer_to_zero_and_rescales_nothing():
    net = of_ours(models.vgg((16, 32), num_classes=3, input_shape=SHAPE))
    variables = random_variables(net)
    masked = convert.mask(variables, "conv2", 0.3, KEY)
    old, new = (v["params"]["conv2"]["layer"]["kernel_c"] for v in (variables, masked))
    kept = new != 0
    np.testing.assert_array_equal(new[kept], old[kept])
    assert abs(kept.mean() - 0.7) < 0.03  # 4608 weights: 4 standard deviations
    rest = convert.mask(masked, "conv2", 0.0, KEY)
    jax.tree.map(np.testing.assert_array_equal, rest, masked)
    np.testing.assert_array_equal(masked["params"]["conv1"]["layer"]["kernel_c"], old_kernel(variables, "conv1"))
    assert not np.any(old_kernel(convert.mask(variables, "conv1", 1.0, KEY), "conv1"))


def old_kernel(variables, name):
    return variables["params"][name]["layer"]["kernel_c"]


@pytest.mark.parametrize("name", ["vgg", slow("resnet"), slow("mobilenet")])
def test_scores_are_those_of_a_plain_loop_over_layers_and_masks(name):
    net = convert.quadratize(NETS[name], select=lambda path, layer: layer.role == "body")
    network = of_ours(net)
    # Six quadratic blocks of random weights leave float32; smaller weights make the other networks constant.
    scale = 0.4 if name == "resnet" else 1.0
    variables = jax.tree.map(lambda leaf: scale * leaf, random_variables(network))
    images, labels = normal(5, 20, *SHAPE), np.arange(20) % 3
    masks = 2
    # Of the residual network its stem too, whose name layers inside of blocks have as well.
    roles = ("body", "stem") if name == "resnet" else ("body",)
    settings = {"ratio": 0.4, "masks": masks, "batch_size": 8, "select": lambda path, layer: layer.role in roles}
    scores = convert.score(network, variables, net, images, labels, KEY, **settings)
    apply = jax.jit(network.apply)

    def accuracy(variables):
        return float(np.mean(np.argmax(np.asarray(apply(variables, images)), -1) == labels))

    layers = [path for path, layer in spec.walk(net) if isinstance(layer, spec.Conv) and layer.role in roles]
    keys = jax.random.split(KEY, (len(layers), masks))
    # By hand: three kernels and biases and the norm of a quadratic layer, one kernel and the norm of a first-order one.
    params, macs = {}, {}
    for path, layer in spec.walk(net):
        shape = spec.shapes(net)[path]
        if isinstance(layer, spec.Conv | spec.Dense):
            kernel = math.prod(getattr(layer, "kernel", ())) * shape.input[-1]
            kernel = kernel * layer.features // (getattr(layer, "groups", 1) or shape.input[-1])
            times = 1 if layer.kind == "first_order" else 3
            biases = 0 if layer.kind == "first_order" and layer.norm else times * layer.features
            params[path] = times * kernel + biases + (2 * layer.features if layer.norm else 0)
            macs[path] = times * kernel * math.prod(shape.output[:-1])
    assert sum(params.values()) == sum(np.size(leaf) for leaf in jax.tree.leaves(variables["params"]))
    clean = accuracy(variables)
    assert scores.accuracy == pytest.approx(clean)
    assert [row.layer for row in scores.rows] == layers
    drops = []
    for row, path, ks in zip(scores.rows, layers, keys, strict=True):
        drop = clean - np.mean([accuracy(convert.mask(variables, path, 0.4, k)) for k in ks])
        assert row.drop == pytest.approx(drop, abs=1e-6)
        assert row.params_share == pytest.approx(params[path] / sum(params.values()))
        assert row.macs_share == pytest.approx(macs[path] / sum(macs.values()))
        assert row.ri == (pytest.approx(row.params_share * row.macs_share / row.drop) if row.drop > 0 else math.inf)
        drops.append(round(drop, 6))
    assert len(set(drops)) > 1
    assert str(scores).splitlines()[0].split() == ["layer", "params", "MACs", "drop", "RI"]
    assert len(str(scores).splitlines()) == len(layers) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ratio=1.5), "ratio must be in 0..1, got 1.5"),
        (dict(masks=0), "masks and batch_size must be at least 1, got 0"),
        (dict(select="conv9"), "select='conv9' matches no layer"),
        (
            dict(labels=np.zeros(3, int)),
            r"must be \[N, \*\(6, 6, 2\)\] and integers \[N\], .*, 6, 6, 2\) and int32\[3\]",
        ),
        (dict(labels=np.zeros(4)), r"integers \[N\], .* got \(4, 6, 6, 2\) and float32\[4\]"),
        (dict(images=normal(0, 0, 6, 6, 2), labels=np.zeros(0, int)), r"N at least 1, got \(0, 6, 6, 2\)"),
    ],
)
def test_scores_say_what_is_wrong_with_their_arguments(change, message):
    settings = {"images": normal(0, 4, *SHAPE), "labels": np.zeros(4, int), **change}
    with pytest.raises(ValueError, match=message):
        convert.score(of_ours(NETS["vgg"]), {"params": {}}, NETS["vgg"], key=KEY, **settings)
    with pytest.raises(ValueError, match="variables hold no kernels of layer 'conv9'"):
        convert.mask(random_variables(of_ours(NETS["vgg"])), "conv9", 0.5, KEY)


# --- reducing ---------------------------------------------------------------------------------------------------------


def scores_of(**drops):
    return convert.Scores(tuple(convert.LayerScore(name, 0, 0, drop, 0) for name, drop in drops.items()), 0.9)


def costs_of(architecture):
    """Parameters and MACs of the convolutions and dense layers, counted by hand; a map of every layer is kept."""
    rows = []
    for path, layer in spec.walk(architecture):
        if isinstance(layer, spec.Conv | spec.Dense):
            shape = spec.shapes(architecture)[path]
            kernel = math.prod(getattr(layer, "kernel", ())) * layer.features
            kernel *= shape.input[-1] // (getattr(layer, "groups", 1) or shape.input[-1])
            kernel *= 1 if layer.kind == "first_order" else 3
            positions = math.prod(shape.output[:-1])
            rows.append(costs.LayerCost(f"Network/{path}/layer", positions * kernel, kernel, 0, math.prod(shape.input)))
    totals = {name: sum(getattr(row, name) for row in rows) for name in convert.BUDGETS}
    return costs.CostReport(tuple(rows), costs.LayerCost("total", **totals), "paper")


def names(architecture):
    return [layer.name for layer in architecture.layers]


def reduced(architecture, drops, budget, **settings):
    scores = scores_of(**drops) if isinstance(drops, dict) else drops
    return convert.reduce(architecture, scores, budget, costs_of, **settings)


def all_drops(architecture, **special):
    paths = [path for path, layer in spec.walk(architecture) if getattr(layer, "role", "") == "body"]
    values = {path: special.get(path.replace("/", "_"), 0.2) for path in paths}
    return convert.Scores(tuple(convert.LayerScore(path, 0, 0, drop, 0) for path, drop in values.items()), 0.9)


VGG = convert.quadratize(models.vgg((4, 4, 4, "M", 8, 8, "M", 8), num_classes=3, input_shape=(8, 8, 1)))


def test_the_layer_of_the_highest_ri_goes_first_and_the_result_is_within_budget():
    # conv2 and conv3 cost the same; the one that costs no accuracy goes.
    drops = {f"conv{i}": 0.3 for i in range(1, 7)} | {"conv3": -0.01}
    result = reduced(VGG, drops, {"macs": 0.9}, reference=costs_of(VGG).total)
    assert [step[:2] for step in result.steps] == [("remove", "conv3")]
    assert names(result.architecture) == [n for n in names(VGG) if n != "conv3"]
    assert result.cost.macs <= 0.9 * costs_of(VGG).total.macs
    assert result.cost == costs_of(result.architecture).total


def test_a_layer_that_changes_the_width_is_merged_with_the_next():
    drops = {f"conv{i}": 0.3 for i in range(1, 7)} | {"conv4": 0.0}
    result = reduced(VGG, drops, {"params": 0.95}, reference=costs_of(VGG).total)
    assert result.steps[0][:2] == ("remove", "conv4")
    assert spec.shapes(result.architecture)["conv5"] == ((4, 4, 4), (4, 4, 8))


def test_all_budgets_hold_at_once_and_integers_are_absolute():
    start = costs_of(VGG).total
    budget = {"params": start.params // 2, "macs": 0.6, "residual_bytes": 0.8}
    result = reduced(VGG, {f"conv{i}": 0.1 * i for i in range(1, 7)}, budget, reference=start)
    assert result.cost.params <= start.params // 2
    assert result.cost.macs <= 0.6 * start.macs
    assert result.cost.residual_bytes <= 0.8 * start.residual_bytes
    before_last = result.steps[-2][2]
    assert before_last.params > start.params // 2 or before_last.macs > 0.6 * start.macs


def test_a_network_within_its_budget_stays_as_it_is():
    assert reduced(VGG, {"conv1": 0.1}, {"params": 10**9}).architecture is VGG


def test_layers_can_become_first_order_or_narrower_in_place():
    drops = {f"conv{i}": 0.3 for i in range(1, 7)} | {"conv5": 0.0}
    result = reduced(VGG, drops, {"params": 0.8}, reference=costs_of(VGG).total, actions=("revert", "remove"))
    assert result.steps[0][:2] == ("revert", "conv5")
    assert dict(spec.walk(result.architecture))["conv5"].kind == "first_order"
    result = reduced(VGG, drops, {"params": 0.9}, reference=costs_of(VGG).total, actions=("shrink",))
    assert dict(spec.walk(result.architecture))["conv5"].features == 4
    moved = convert.quadratize(NETS["vgg"], branch_norm="batch")
    moved = spec.edit(moved, lambda layer: dataclasses.replace(layer, norm=None))
    result = reduced(moved, all_drops(moved), {"params": 0.9}, reference=costs_of(moved).total, actions=("revert",))
    changed = next(x for _, x in spec.walk(result.architecture) if getattr(x, "kind", "") == "first_order")
    assert (changed.norm, changed.branch_norm) == ("batch", None)


RESNET = convert.quadratize(models.resnet(20, num_classes=3, input_shape=(8, 8, 1), shortcut="projection", width=0.25))
PADDED = convert.quadratize(models.resnet(20, num_classes=3, input_shape=(8, 8, 1), width=0.25))


@pytest.mark.parametrize("net", [RESNET, PADDED], ids=["projection", "pad"])
def test_residual_networks_lose_whole_blocks(net):
    drops = all_drops(net, stage3_block2_conv1=0.0, stage3_block2_conv2=0.0)
    result = reduced(net, drops, {"params": 0.8}, reference=costs_of(net).total)
    assert result.steps[0][:2] == ("remove", "stage3_block2")
    assert set(names(result.architecture)) <= set(names(net))


@pytest.mark.parametrize("net", [RESNET, PADDED], ids=["projection", "pad"])
def test_the_block_behind_a_strided_one_takes_over_its_stride_and_shortcut(net):
    drops = all_drops(net, stage2_block1_conv1=0.0, stage2_block1_conv2=0.0)
    result = reduced(net, drops, {"params": 0.99}, reference=costs_of(net).total)
    assert [step[:2] for step in result.steps] == [("remove", "stage2_block1")]
    before, after = spec.shapes(net), spec.shapes(result.architecture)
    assert after["stage2_block2"] == (before["stage2_block1"].input, before["stage2_block2"].output)
    assert after["stage2_block3"] == before["stage2_block3"]
    fresh = convert.fresh_layers(net, result.architecture)
    assert fresh[0] == "stage2_block2/conv1" and "stage2_block2/conv2" not in fresh


def test_mobilenets_lose_depthwise_and_pointwise_layers_together():
    net = convert.quadratize(
        models.mobilenet(((8, 1), (16, 2), (16, 1), (32, 2)), num_classes=3, input_shape=(8, 8, 1), width=0.5)
    )
    drops = all_drops(net, block2_depthwise=0.0, block2_pointwise=0.0)
    result = reduced(net, drops, {"params": 0.95}, reference=costs_of(net).total)
    assert [step[:2] for step in result.steps] == [("remove", "block2_pointwise")]
    layers = dict(spec.walk(result.architecture))
    assert "block2_depthwise" not in layers and "block2_pointwise" not in layers
    # Its stride and width are now those of the next pair.
    assert spec.shapes(result.architecture)["block3_depthwise"] == ((8, 8, 4), (4, 4, 4))
    assert spec.shapes(result.architecture)["block3_pointwise"].output == (4, 4, 8)


@pytest.mark.parametrize("name", ["vgg", slow("resnet"), slow("mobilenet")])
def test_a_reduced_network_runs_with_the_weights_of_what_is_left(name):
    net = convert.quadratize(NETS[name])
    result = reduced(net, all_drops(net), {"macs": 0.7}, reference=costs_of(net).total)
    small = of_ours(result.architecture)
    start = jax.tree.map(lambda leaf: 0.1 * leaf, random_variables(small, seed=70))
    moved = convert.transplant(random_variables(of_ours(NETS[name])), NETS[name], start, result.architecture)
    assert np.all(np.isfinite(outputs(small, moved, False)))


def test_a_budget_that_cannot_be_met_names_the_smallest_reachable():
    scores = all_drops(VGG)
    with pytest.raises(ValueError, match=r"cannot be met: .* has params ([\d,]+) \(budget 10\)") as error:
        reduced(VGG, scores, {"params": 10})
    # One convolution is left: 3x3, 1 -> 4 in three kernels, and the head 4 -> 3.
    assert f"params {3 * 9 * 4 + 12} " in str(error.value)
    with pytest.raises(ValueError, match=rf"budget .*1e-09.* cannot be met: .* {3 * 9 * 4 + 12} \(budget 0\)"):
        reduced(VGG, scores, {"params": np.float64(1e-9)}, reference=costs_of(VGG).total, actions="remove")


def test_a_budget_that_the_highest_ri_leads_away_from_is_met_all_the_same():
    # Taking conv1 first would leave a layer of 64 channels, which nothing makes smaller.
    net = convert.quadratize(models.vgg((4, 64), num_classes=3, input_shape=(8, 8, 1), norm=None))
    result = reduced(net, {"conv1": 0.0, "conv2": 0.9}, {"params": 500})
    assert [step[:2] for step in result.steps] == [("remove", "conv2")]
    assert result.cost.params == 3 * 9 * 4 + 4 * 3
    assert convert.smallest(net, {"params": 500}, costs_of) == result


def test_a_budget_that_only_a_later_saving_meets_is_met():
    # Without conv2 its stride and its inputs pass to conv3, which saves nothing until conv3 is gone.
    convs = (
        spec.Conv("conv1", 8, (1, 1), norm="batch", act="relu"),
        spec.Conv("conv2", 16, strides=(2, 2), norm="batch", act="relu"),
        spec.Conv("conv3", 8, norm="batch", act="relu"),
    )
    layers = (*convs, spec.GlobalPool("mean"), spec.Dense("head", 3))
    net = convert.quadratize(spec.Architecture("row", (8, 8, 3), layers))
    least = min(
        costs_of(spec.remove(net, *names)).total.params
        for names in (("conv3",), ("conv2", "conv3"), ("conv1", "conv3"))
    )
    assert convert.smallest(net, {"params": least}, costs_of).cost.params <= least


@pytest.mark.parametrize(
    ("kind", "norm", "branch_norm"),
    [("quadralib", "group", None), ("ccp(order=2)", None, None), ("t4", "batch", None), ("t4", None, "batch")],
)
def test_what_becomes_first_order_is_what_is_left_without_products(kind, norm, branch_norm):
    net = convert.quadratize(
        models.vgg((4,), num_classes=3, input_shape=SHAPE, norm=norm), kind, branch_norm=branch_norm
    )
    result = reduced(net, {"conv1": 0.1}, {"params": 0.95}, reference=costs_of(net).total, actions=("revert",))
    assert [step[:2] for step in result.steps] == [("revert", "conv1")]
    source, target = of_ours(net), of_ours(result.architecture)
    variables = random_variables(source)
    layer = variables["params"]["conv1"]["layer"]
    off = {"quadralib": "a", "ccp(order=2)": "u2", "t4": "a"}[kind]
    if branch_norm:
        layer[f"norm_{off}"]["scale"] *= 0
    else:
        layer[f"kernel_{off}"] *= 0
        if kind == "quadralib":
            layer["bias_a"] *= 0
    moved = convert.transplant(variables, net, random_variables(target, 9), result.architecture)
    expected = outputs(source, variables, False)
    np.testing.assert_allclose(outputs(target, moved, False), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("kind", "branch_norm"), [("t3", None), ("emitting(rank=3)", None), ("ccp(order=2)", "batch")])
def test_layers_without_a_first_order_part_are_not_reverted(kind, branch_norm):
    net = convert.quadratize(models.vgg((4,), num_classes=3, input_shape=SHAPE), kind, branch_norm=branch_norm)
    with pytest.raises(ValueError, match="cannot be met"):
        reduced(net, {"conv1": 0.1}, {"params": 0.95}, reference=costs_of(net).total, actions=("revert",))


@pytest.mark.parametrize(
    ("budget", "settings", "message"),
    [
        ({"flops": 3}, {}, "budget must have some of params, macs, residual_bytes, got .'flops'"),
        ({}, {}, "budget must have some of"),
        ({"macs": 0.5}, {}, "budget macs=0.5 is a fraction; pass reference="),
        ({"macs": 0}, {}, "budget macs must be a positive number, an integer or a fraction, got 0"),
        ({"macs": float("nan")}, {}, "budget macs must be a positive number, .*, got nan"),
        ({"macs": "0.5"}, {}, "budget macs must be a positive number, .*, got '0.5'"),
        ({"macs": 1}, {"actions": ("delete",)}, "actions must be some of 'remove', 'revert', 'shrink', got"),
    ],
)
def test_reductions_say_what_is_wrong_with_their_arguments(budget, settings, message):
    with pytest.raises(ValueError, match=message):
        reduced(VGG, all_drops(VGG), budget, **settings)


def test_scores_of_another_network_are_an_error():
    with pytest.raises(ValueError, match="does not have: conv9"):
        reduced(VGG, {"conv9": 0.1}, {"macs": 10})
