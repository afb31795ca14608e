"""Gates in architectures and networks: where they stand, what they count, that nothing else changes."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import costs, dynamic, models, quadratic, spec
from jaxeff.dynamic import DynamicSpec

HALF = DynamicSpec(channels=0.5)


def gates_of(architecture):
    return {path: layer.gate for path, layer in spec.walk(architecture) if getattr(layer, "gate", None) is not None}


def counted(architecture):
    plain = spec.gate(architecture, None, "*")
    network, shape = models.Network(plain), (1, *architecture.input_shape)
    variables = jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, np.float32))
    images = jax.ShapeDtypeStruct(shape, np.float32)
    return dynamic.counted_macs(architecture, costs.analyze(network.apply, variables, images, residuals=False))


# --- where gates stand ------------------------------------------------------------------------------------------------


def test_blocks_of_vgg16_are_those_between_poolings():
    blocks = dynamic.blocks(models.vgg("D"))
    assert [len(block) for block in blocks] == [2, 2, 3, 3, 2]
    assert blocks[0] == ("conv1", "conv2") and blocks[-1] == ("conv11", "conv12")


def test_gates_of_vgg_stand_behind_the_pooling_at_the_reader():
    ratios = (0.2, 0.3, 0.4, 0.5, 0.6)
    gates = gates_of(dynamic.gate(models.vgg("D"), [DynamicSpec(channels=r) for r in ratios]))
    by_block = [ratios[0]] * 2 + [ratios[1]] * 2 + [ratios[2]] * 3 + [ratios[3]] * 3 + [ratios[4]] * 2
    assert [gate.channels for gate in gates.values()] == by_block
    assert list(gates) == [f"conv{i}" for i in range(2, 14)]


def test_gates_of_resnet_stand_before_the_second_convolution_of_each_block():
    architecture = models.resnet(56)
    assert [len(block) for block in dynamic.blocks(architecture)] == [9, 9, 9]
    gates = gates_of(dynamic.gate(architecture, HALF))
    assert list(gates) == [f"stage{s}_block{b}/conv2" for s in (1, 2, 3) for b in range(1, 10)]


def test_gates_of_mobilenet_stand_before_the_pointwise_convolutions():
    gates = gates_of(dynamic.gate(models.mobilenet(), HALF))
    assert list(gates) == [f"block{i}_pointwise" for i in range(1, 9)]


def test_gates_by_name_are_those_behind_the_named_layers():
    gates = gates_of(dynamic.gate(models.vgg("A"), {"conv[12]": HALF, "conv5": DynamicSpec(columns=0.25)}))
    assert gates == {"conv2": HALF, "conv3": HALF, "conv6": DynamicSpec(columns=0.25)}
    assert gates_of(dynamic.gate(dynamic.gate(models.vgg("A"), HALF), {"*[1-6]": None})) == {"conv8": HALF}


@pytest.mark.parametrize(
    ("architecture", "layer", "reason"),
    [
        (models.resnet(8), "stage1_block1/conv2", "its output feeds the residual sum of 'stage1_block1'"),
        (models.resnet(8), "conv1", "it is read by the residual block 'stage1_block1', whose shortcut needs all"),
        (models.resnet(8, shortcut="projection"), "stage2_block1/shortcut", "its output feeds the residual sum"),
        (models.mobilenet(), "block1_pointwise", "read by 'block2_depthwise', which has groups"),
        (models.vgg("A"), "conv8", "it is read by 'mean', which is no convolution"),
    ],
)
def test_layers_without_a_place_for_a_gate_are_refused(architecture, layer, reason):
    with pytest.raises(ValueError, match=reason):
        dynamic.gate(architecture, {layer: HALF})


def test_settings_that_do_not_fit_are_refused():
    for none in (0.5, [0.5] * 5, {"conv1": 0.5}):
        with pytest.raises(TypeError, match=r"settings: expected DynamicSpec, .* got 0.5"):
            dynamic.gate(models.vgg("A"), none)
    with pytest.raises(TypeError, match="channels is the share that is dropped, a number in .* got '0.5'"):
        DynamicSpec(channels="0.5")
    with pytest.raises(ValueError, match="settings has 2 entries, but 'vgg_A' has 5 blocks: conv1; conv2; conv3"):
        dynamic.gate(models.vgg("A"), [HALF, HALF])
    with pytest.raises(ValueError, match="'stage9' matches no convolution of 'vgg_A': conv1, "):
        dynamic.gate(models.vgg("A"), {"stage9": HALF})
    with pytest.raises(ValueError, match="gate before layer 'conv2' of 'vgg_A': group_size=48 does not divide the 64"):
        dynamic.gate(models.vgg("A"), DynamicSpec(channels=0.5, group_size=48))
    with pytest.raises(ValueError, match="gate before layer 'conv2' of 'vgg_A': tile=3 does not divide the columns"):
        dynamic.gate(models.vgg("A"), DynamicSpec(columns=0.5, tile=3))
    with pytest.raises(ValueError, match="no layer of 'mlp' can have a gate"):
        dynamic.gate(models.mlp(), HALF)


# --- what they count --------------------------------------------------------------------------------------------------


def test_dense_totals_of_the_literature():
    total = counted(models.vgg("D"))
    assert sum(cost.dense for path, cost in total.items() if path.startswith("conv")) == 313_196_544
    blocks = counted(models.resnet(56))
    assert blocks["total"].dense - blocks["head"].dense == 125_485_056
    assert blocks["total"].counted == blocks["total"].dense


@pytest.mark.parametrize(
    ("architecture", "channels", "columns", "reduction"),
    [
        (models.vgg("D"), (0.2, 0.2, 0.6, 0.9, 0.9), (0, 0, 0, 0, 0), 0.551),
        (models.resnet(56), (0.3, 0.3, 0.6), (0.6, 0.6, 0.6), 0.386),
        (models.vgg("D", input_shape=(224, 224, 3)), (0.1, 0, 0, 0, 0.2), (0.5,) * 5, 0.512),
    ],
)
def test_reductions_at_antidotes_ratios(architecture, channels, columns, reduction):
    """Our accounting at the ratios that are recalled of AntiDote's tables, up to whole numbers of channels."""
    settings = [DynamicSpec(channels=c, columns=s) for c, s in zip(channels, columns, strict=True)]
    assert counted(dynamic.gate(architecture, settings))["total"].reduction == pytest.approx(reduction, abs=2.5e-3)


def test_counts_of_one_layer():
    architecture = dynamic.gate(models.vgg("A"), {"conv1": DynamicSpec(channels=0.5, columns=0.75, outputs=0.5)})
    cost = counted(architecture)["conv2"]
    assert cost.dense == 16 * 16 * 9 * 64 * 128
    assert cost.counted == cost.dense // 16
    assert cost.attention == 2 * 16 * 16 * 64


# --- networks ---------------------------------------------------------------------------------------------------------

PLAN = models.vgg((8, "M", 8, 8), num_classes=3, input_shape=(8, 8, 3))


def initialised(network, shape):
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    return jax.jit(network.init)(jax.random.key(0), x), x


def by_hand(variables, x, settings):
    """PLAN's forward pass at inference with stock operations, masked before every convolution but the first."""
    for name, gate in zip(("conv1", "conv2", "conv3"), (None, settings, settings), strict=True):
        p, s = variables["params"][name], variables["batch_stats"][name]["norm"]
        if gate is not None:
            x = dynamic.masked(x, dynamic.select(x, gate), gate)
        x = jax.lax.conv_general_dilated(
            x, p["layer"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = (x - s["mean"]) / jnp.sqrt(s["var"] + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
        x = nn.relu(x)
        if name == "conv1":
            x = nn.max_pool(x, (2, 2), (2, 2))
    head = variables["params"]["head"]["layer"]
    return x.mean((1, 2)) @ head["kernel"] + head["bias"]


@pytest.mark.parametrize("engine", ["auto", "channels", "channels_and_columns"])
def test_a_gated_network_is_the_masked_one_with_the_same_variables(engine):
    settings = DynamicSpec(channels=0.5, columns=0.5, engine=engine)
    network = models.Network(dynamic.gate(PLAN, settings), gate=dynamic.gate_layer)
    variables, x = initialised(models.Network(PLAN), PLAN.input_shape)
    assert jax.tree.structure(initialised(network, PLAN.input_shape)[0]) == jax.tree.structure(variables)
    np.testing.assert_allclose(
        jax.jit(network.apply)(variables, x), by_hand(variables, x, settings), rtol=1e-4, atol=1e-5
    )


def test_ratios_may_be_traced_variables():
    network = models.Network(dynamic.gate(PLAN, HALF), gate=dynamic.gate_layer)
    variables, x = initialised(network, PLAN.input_shape)

    @jax.jit
    @chex.assert_max_traces(1)
    def run(channels, columns):
        ratios = {"layer": {"gate": {"channels": channels, "columns": columns}}}
        return network.apply({**variables, "ratios": {"conv2": ratios, "conv3": ratios}}, x)

    for channels, columns in ((0.0, 0.0), (0.25, 0.0), (0.5, 0.75)):
        expected = by_hand(variables, x, DynamicSpec(channels=channels, columns=columns))
        np.testing.assert_allclose(run(channels, columns), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["parallel", "channel_first"])
def test_outputs_are_dropped_under_traced_ratios_too(order):
    settings = DynamicSpec(channels=0.5, outputs=0.5, order=order)
    network = models.Network(dynamic.gate(PLAN, settings), gate=dynamic.gate_layer)
    variables, x = initialised(network, PLAN.input_shape)
    gate = {"layer": {"gate": {"channels": 0.5, "columns": 0.0}}}
    traced = jax.jit(network.apply)({**variables, "ratios": {"conv2": gate, "conv3": gate}}, x)
    np.testing.assert_allclose(traced, jax.jit(network.apply)(variables, x), rtol=1e-4, atol=1e-5)


def test_ratios_of_a_float32_table_are_what_was_meant():
    table = np.full((len(dynamic.blocks(PLAN)), 2), 0.1, np.float32)
    gated = dynamic.gate(PLAN, DynamicSpec())
    assert dynamic.with_ratios(gated, table) == dynamic.with_ratios(gated, np.full(table.shape, 0.1))


@pytest.mark.parametrize("save", ["all", "ab", "x"])
def test_quadratic_layers_are_gated_under_every_memory_policy(save):
    architecture = spec.quadratize(PLAN, "quadralib", branch_norm="batch")
    conv = partial(quadratic.conv_layer, save=save)

    def gradient(settings):
        gated = models.Network(dynamic.gate(architecture, settings), conv=conv, gate=dynamic.gate_layer)
        variables, x = initialised(gated, PLAN.input_shape)

        def loss(params):
            y, _ = gated.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return jnp.sum(y**2)

        return jax.jit(jax.value_and_grad(loss))(variables["params"])

    expected, ours = (gradient(DynamicSpec(channels=0.5, engine=engine)) for engine in ("mask", "channels"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), ours, expected)


class Own(nn.Module):
    """A network that knows nothing of gates."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="first")(x))
        for i in range(2):
            x = nn.relu(Block(name=f"block{i}")(x))
        return x.mean((1, 2))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Conv(8, (3, 3), strides=1, padding="VALID", name="conv")(
            jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        )


def test_a_network_of_ones_own_is_gated_without_being_rewritten():
    settings = DynamicSpec(channels=0.5, engine="channels")
    plain, gated = Own(), dynamic.Gated(Own(), {"block*/conv": settings})
    variables, x = initialised(plain, (6, 6, 3))
    made, _ = initialised(gated, (6, 6, 3))
    jax.tree.map(np.testing.assert_array_equal, made, variables)
    found = jax.jit(gated.apply)(variables, x)

    p = variables["params"]
    y = nn.relu(nn.Conv(8, (3, 3)).apply({"params": p["first"]}, x))
    for i in range(2):
        kept = dynamic.masked(y, dynamic.select(y, settings), settings)
        y = nn.relu(y + nn.Conv(8, (3, 3)).apply({"params": p[f"block{i}"]["conv"]}, kept))
    np.testing.assert_allclose(found, y.mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_paths_are_those_of_the_variables():
    network = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(8, (3, 3))])
    gated = dynamic.Gated(network, {"layers_2": HALF})
    x = jnp.ones((1, 6, 6, 3))
    made = jax.eval_shape(gated.init, jax.random.key(0), x)["params"]
    assert set(made) == {"layers_0", "layers_2"}
    assert [call.path for call in dynamic.gated_calls(gated, x)] == ["layers_2"]


class Taken(nn.Module):
    """A network with a gate of its own."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(8, (3, 3), conv_general_dilated_cls=dynamic.gated(HALF), name="conv")(x)


def test_bad_gates_of_networks_are_named():
    x = jnp.ones((1, 6, 6, 3))
    with pytest.raises(ValueError, match=r"gates name \['block7/\*'\], but the convolutions are: 'first'"):
        jax.eval_shape(dynamic.Gated(Own(), {"block7/*": HALF}).init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="gate before 'block0/conv': group_size=3 does not divide the 8 channels"):
        jax.eval_shape(
            dynamic.Gated(Own(), {"*/conv": DynamicSpec(channels=0.5, group_size=3)}).init, jax.random.key(0), x
        )
    with pytest.raises(ValueError, match="gate before 'conv': the layer has a conv_general_dilated_cls already"):
        jax.eval_shape(dynamic.Gated(Taken(), {"conv": HALF}).init, jax.random.key(0), x)
    grouped = nn.Conv(4, (3, 3), feature_group_count=2, conv_general_dilated_cls=dynamic.gated(HALF))
    with pytest.raises(ValueError, match=r"saves nothing before a grouped convolution \(groups=2\)"):
        jax.eval_shape(grouped.init, jax.random.key(0), jnp.ones((1, 4, 4, 4)))
    with pytest.raises(ValueError, match=r"gates are for 2D convolutions of \[N, H, W, C\]"):
        volume = nn.Conv(4, (3, 3, 3), conv_general_dilated_cls=dynamic.gated(HALF))
        jax.eval_shape(volume.init, jax.random.key(0), jnp.ones((1, 4, 4, 4, 2)))
    with pytest.raises(TypeError, match="layer 'conv2' has the gate 0.5; expected a jaxeff.dynamic.DynamicSpec"):
        network = models.Network(spec.gate(PLAN, 0.5, "conv2"), gate=dynamic.gate_layer)
        jax.eval_shape(network.init, jax.random.key(0), jnp.ones((1, *PLAN.input_shape)))


def test_of_several_patterns_the_last_counts_and_settings_are_checked():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (3, 3), name="conv2")(nn.Conv(4, (3, 3), name="conv1")(x))

    gates = {"*2": DynamicSpec(channels=0.25), "conv[12]": DynamicSpec(channels=0.5)}
    calls = dynamic.gated_calls(dynamic.Gated(Two(), gates), jnp.zeros((1, 4, 4, 4)))
    assert [call.settings.channels for call in calls] == [0.5, 0.5]
    with pytest.raises(TypeError, match="expected a jaxeff.dynamic.DynamicSpec for each name, got"):
        dynamic.Gated(Two(), {"conv1": 0.5}).init(jax.random.key(0), jnp.zeros((1, 4, 4, 4)))
    with pytest.raises(TypeError, match="engine must be the name of one"):
        DynamicSpec(channels=0.5, engine=None)
    assert DynamicSpec(channels=0.5, group_size=np.int64(2)).groups_kept(8) == 2


def test_a_boosted_layer_by_itself_takes_a_gate():
    layer = dynamic.BoostedConv(4)
    x = jnp.abs(jax.random.normal(jax.random.key(0), (1, 4, 4, 4)))
    gated = dynamic.Gated(layer, {"*": DynamicSpec(channels=0.5)})
    variables = gated.init(jax.random.key(1), x)
    assert jax.tree.structure(variables) == jax.tree.structure(layer.init(jax.random.key(1), x))
    assert np.abs(gated.apply(variables, x) - layer.apply(variables, x)).max() > 1e-3
