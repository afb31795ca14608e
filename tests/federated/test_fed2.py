"""Networks in groups: nothing crosses groups, bit for bit, and averaging is by owners."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import costs, federated, models, quadratic, spec, training
from jaxeff.federated import fed2

BASES = {
    "vgg9": (models.vgg9(width=0.1, input_shape=(8, 8, 3), num_classes=6), "conv5"),
    "dense of vgg9": (models.vgg9(width=0.1, input_shape=(8, 8, 3), num_classes=6), "dense1"),
    "resnet": (models.resnet(8, width=0.5, input_shape=(8, 8, 3), num_classes=6), "stage3_block1"),
    "mobilenet": (
        models.mobilenet(((8, 1), (12, 2)), width=0.5, input_shape=(8, 8, 3), num_classes=6),
        "block2_depthwise",
    ),
    "mlp": (models.mlp((9, 9), input_shape=(5,), num_classes=6), "dense2"),
}
MAP = (0, 2, 1, 0, 2, 2)  # neither in order nor of one size


def made(name, **options):
    base, first = BASES[name]
    grouped = fed2.adapt(base, first, class_to_group=MAP, **options)
    network = fed2.GroupedNetwork(grouped)
    x = jax.random.normal(jax.random.key(0), (4, *base.input_shape))
    return network, jax.jit(network.init)(jax.random.key(1), x), x


@pytest.mark.parametrize(
    ("name", "entry"), [(name, entry) for name in BASES for entry in fed2.ENTRIES if (name, entry) != ("resnet", "all")]
)
def test_gradients_of_a_class_reach_its_group_and_the_trunk_alone(name, entry):
    network, variables, x = made(name, entry=entry)
    slopes = jax.jit(jax.jacrev(lambda params: network.apply({"params": params}, x).sum(0)))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(slopes["groups"]):
        for c, group in enumerate(MAP):
            others = np.delete(np.asarray(leaf[c]), group, axis=0)
            assert not others.any(), (path, c)
    heads = slopes["groups"]["head"]["layer"]["bias"]
    assert all(np.asarray(heads[c, group]).any() for c, group in enumerate(MAP))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(slopes["trunk"]))


@pytest.mark.parametrize("name", BASES)
def test_activations_of_a_group_see_nothing_of_another(name):
    network, variables, x = made(name)
    disturbed = jax.tree.map(lambda leaf: leaf.at[1].add(7.0), variables["params"]["groups"])
    before = network.apply(variables, x)
    after = network.apply({"params": {**variables["params"], "groups": disturbed}}, x)
    own = np.array(MAP) == 1
    np.testing.assert_array_equal(before[:, ~own], after[:, ~own])
    assert (before[:, own] != after[:, own]).all()


def test_it_is_the_network_that_grouped_convolutions_make():
    """The same arithmetic by `feature_group_count`, group after group along the channels."""
    base = models.cnn((6, 6, 12), num_classes=3, input_shape=(6, 6, 2), norm=None)
    grouped = fed2.adapt(base, "conv3", groups=3)
    network = fed2.GroupedNetwork(grouped)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 2))
    variables = network.init(jax.random.key(1), x)
    params = jax.tree.map(np.asarray, variables["params"])
    by_channel = lambda leaf: np.moveaxis(leaf, 0, -2).reshape(*leaf.shape[1:-1], -1)
    kernel, bias = (by_channel(params["groups"]["conv3"]["layer"][name]) for name in ("kernel", "bias"))
    trunk = models.Network(grouped.trunk).apply({"params": params["trunk"]}, x)
    pooled = jax.lax.reduce_window(trunk, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    dims = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(pooled, kernel, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=3)
    mean = jax.nn.relu(y + bias).mean((1, 2)).reshape(2, 3, 4)
    head = params["groups"]["head"]["layer"]
    expected = np.einsum("bgi,gio->bgo", mean, head["kernel"])[..., 0] + head["bias"][:, 0]
    np.testing.assert_allclose(network.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_parameters_and_products_of_a_layer_are_divided_by_the_groups():
    base = models.cnn((8, 16, 32), num_classes=4, input_shape=(8, 8, 3), norm="group")
    x = jnp.zeros((1, 8, 8, 3))
    counted = []
    for module in (models.Network(base), fed2.GroupedNetwork(fed2.adapt(base, "conv3", groups=4))):
        variables = module.init(jax.random.key(0), x)
        total = costs.analyze(lambda v, x, module=module: module.apply(v, x), variables, x, residuals=False).total
        counted.append((total.params, total.macs))
    conv, head = 9 * 16 * 32, 32 * 4
    assert counted[0][1] - counted[1][1] == (2 * 2 * conv + head) * 3 // 4
    # The norm of 32 channels has as many parameters in groups, and the head a bias for each class.
    assert counted[0][0] - counted[1][0] == (conv + head) * 3 // 4


def test_widths_that_do_not_divide_are_rounded_up_and_said():
    grouped = fed2.adapt(models.vgg9(width=0.1, input_shape=(8, 8, 3)), "conv5", groups=5)
    wider = {"conv4": (13, 15), "conv5": (26, 30), "conv6": (26, 30), "dense1": (51, 55), "dense2": (51, 55)}
    assert grouped.rounded == wider
    assert spec.shapes(grouped.group)["conv5"].input == (2, 2, 3)
    residual = fed2.adapt(models.resnet(8, input_shape=(8, 8, 3)), "stage3_block1", groups=5)
    assert residual.rounded["stage2_block1/conv2"] == (32, 35) and residual.rounded["stage3_block1/conv1"] == (64, 65)
    assert not fed2.adapt(models.cnn((8, 16, 32), num_classes=4), "conv3").rounded


def test_batch_norms_give_way_to_norms_within_groups():
    grouped = fed2.adapt(models.resnet(8), "stage3_block1")
    layers = [layer for part in (grouped.trunk, grouped.group) for _, layer in spec.walk(part)]
    assert {layer.norm for layer in layers if hasattr(layer, "norm")} == {"group", None}
    kept = fed2.adapt(models.resnet(8), "stage3_block1", norm="batch")
    assert kept.group.layers[0].body[0].norm == "batch"


def test_quadratic_layers_have_groups_too():
    base = spec.quadratize(models.cnn((4, 6), num_classes=3, input_shape=(6, 6, 2)), "quadralib")
    network = fed2.GroupedNetwork(
        fed2.adapt(base, "conv2", groups=3), conv=quadratic.conv_layer, dense=quadratic.dense_layer
    )
    x = jnp.ones((2, 6, 6, 2))
    assert network.apply(network.init(jax.random.key(0), x), x).shape == (2, 3)


def test_psi_net_has_a_group_for_each_class_and_shares_the_first_layer():
    grouped = fed2.psi_net(models.vgg9(width=0.1, input_shape=(8, 8, 3), num_classes=4))
    assert grouped.class_to_group == (0, 1, 2, 3)
    assert [layer.name for layer in grouped.trunk.layers] == ["conv1"]
    assert grouped.group.layers[0].name == "conv2" and grouped.group.layers[-1].features == 1


COUNTS = np.array([[5, 0, 3, 0, 0, 0], [0, 4, 0, 0, 0, 0], [0, 0, 0, 2, 0, 9]])


def test_groups_are_averaged_over_their_owners():
    network, variables, _ = made("mlp")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf + i for i in range(3)]), variables)
    aggregate = fed2.aggregate(network.grouped, variables, COUNTS)
    members = federated.Member(
        jnp.arange(3), jnp.asarray(COUNTS.sum(1), jnp.float32), jnp.ones(3), jnp.zeros(3, jnp.int32)
    )
    found = aggregate.combine(stacked, members, variables)
    # Group 0 has classes 0 and 3, group 1 class 2, group 2 classes 1, 4 and 5.
    moved = [(5 * 0 + 2 * 2) / 7, 0.0, (4 * 1 + 9 * 2) / 13]
    shared = (8 * 0 + 4 * 1 + 11 * 2) / 23
    by_group = lambda leaf: np.array(moved).reshape(3, *[1] * (leaf.ndim - 1))
    for name, by in (("trunk", lambda leaf: shared), ("groups", by_group)):
        jax.tree.map(
            lambda a, b, by=by: np.testing.assert_allclose(a - b, np.broadcast_to(by(b), b.shape), atol=1e-5),
            found["params"][name], variables["params"][name],
        )  # fmt: skip


def test_subset_mode_trains_what_is_owned_and_nothing_else():
    network, variables, _ = made("mlp")
    owned = fed2.owned_groups(network.grouped, COUNTS)
    np.testing.assert_array_equal(owned, [[1, 1, 0], [0, 0, 1], [1, 0, 1]])
    own = fed2.brought(network.grouped, COUNTS, "subset")
    np.testing.assert_array_equal(own["classes"][1], np.array(MAP) == 2)
    assert fed2.brought(network.grouped, COUNTS, "full") == {}
    labels = np.concatenate([np.repeat(np.arange(6), row) for row in COUNTS])
    arrays = {"image": np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32), "label": labels}
    parts = np.split(np.arange(23), np.cumsum(COUNTS.sum(1))[:-1])
    task = federated.classification(training.from_linen(network).apply, 6)
    seen = {}
    for mode in fed2.MODES:
        brought = fed2.brought(network.grouped, COUNTS, mode)
        clients = federated.clients_of(arrays, parts, brought)
        grads = jax.grad(lambda params, batch: task.loss({"params": params}, batch, jax.random.key(0))[0])
        batch = {name: array[:8] for name, array in clients.arrays.items()}
        batch |= {"mask": jnp.ones(8), **{name: array[0] for name, array in clients.own.items()}}
        found = grads(variables["params"], batch)["groups"]
        seen[mode] = [any(np.asarray(leaf[g]).any() for leaf in jax.tree.leaves(found)) for g in range(3)]
    assert seen == {"full": [True, True, True], "subset": [True, True, False]}


def test_traffic_is_what_is_exchanged():
    network, variables, x = made("mlp")
    task = federated.classification(training.from_linen(network).apply, 6)
    batch = {"image": x, "label": jnp.zeros(4, jnp.int32), "mask": jnp.ones(4)}
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(variables))
    groups = 4 * sum(leaf.size for leaf in jax.tree.leaves(variables["params"]["groups"]))
    plain = federated.fed_avg(task, optax.sgd(0.1))
    found = federated.traffic(plain, variables, batch, 3)
    assert found.down.tolist() == found.up.tolist() == [size] * 3
    double = federated.traffic(federated.scaffold(task, 0.1), variables, batch, 3)
    assert double.down.tolist() == double.up.tolist() == [2 * size] * 3
    options = {"group_axes": fed2.group_axes(variables), "owned": fed2.owned_groups(network.grouped, COUNTS)}
    subset = federated.traffic(plain, variables, batch, 3, **options)
    np.testing.assert_allclose(subset.up, size - groups + groups * np.array([2, 1, 2]) / 3, atol=1)
    with pytest.raises(ValueError, match="group_axes and owned belong together"):
        federated.traffic(plain, variables, batch, 3, owned=options["owned"])


def test_traffic_of_fed_bn_leaves_out_norms():
    functions = training.from_linen(models.Network(models.mlp((4,), input_shape=(3,), num_classes=2, norm="batch")))
    variables = functions.init(jax.random.key(0), jnp.zeros((1, 3)))
    task = federated.classification(functions.apply, 2)
    batch = {"image": jnp.zeros((4, 3)), "label": jnp.zeros(4, jnp.int32), "mask": jnp.ones(4)}
    norm_free = 4 * (3 * 4 + 4 * 2 + 2)
    found = federated.traffic(federated.fed_bn(task, optax.sgd(0.1)), variables, batch, 2)
    assert found.down.tolist() == found.up.tolist() == [norm_free] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entry": "both"}, "entry must be one of 'split', 'all'"),
        ({"groups": 7}, r"groups must be in 1..6"),
        ({"class_to_group": (0, 0, 2, 2, 2, 2)}, "every group a class"),
        ({"class_to_group": (0, 1)}, "each of 6 classes a group"),
    ],
)
def test_maps_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fed2.adapt(BASES["mlp"][0], "dense2", **options)


def test_layers_that_cannot_begin_the_groups_are_refused():
    with pytest.raises(ValueError, match="no top-level layer 'conv9'; it has: flatten, dense1"):
        fed2.adapt(BASES["mlp"][0], "conv9")
    with pytest.raises(ValueError, match="nothing before 'dense1'"):
        fed2.adapt(BASES["mlp"][0], "dense1")
    with pytest.raises(ValueError, match="the shortcut of 'stage3_block1' hands on all channels"):
        fed2.adapt(BASES["resnet"][0], "stage3_block1", entry="all")
    with pytest.raises(ValueError, match="mode must be one of 'full', 'subset'"):
        fed2.brought(fed2.adapt(BASES["mlp"][0], "dense2"), COUNTS, "some")


def test_depthwise_layers_widen_with_those_before_them():
    grouped = fed2.adapt(models.mobilenet(num_classes=10, width=0.25), "block3_pointwise", groups=10)
    shared = spec.shapes(grouped.trunk)[grouped.trunk.layers[-1].name].output[-1]
    assert shared % 10 == 0 and any(got > wanted for wanted, got in grouped.rounded.values())
    module = fed2.GroupedNetwork(grouped)
    assert jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_a_group_that_nobody_owns_is_named():
    grouped = fed2.adapt(models.mlp((4,), input_shape=(3,), num_classes=3), "head", groups=3)
    variables = jax.eval_shape(fed2.GroupedNetwork(grouped).init, jax.random.key(0), jnp.zeros((1, 3)))
    with pytest.warns(UserWarning, match="groups 1 stay as they begin, as nobody has examples of classes 1"):
        fed2.aggregate(grouped, variables, np.array([[4, 0, 0], [0, 0, 2]]))
