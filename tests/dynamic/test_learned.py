"""Gates that learn against NumPy in float64, as layers, in networks, and with their losses in training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.signal import correlate

from jaxeff import costs, dynamic, models, training
from jaxeff.dynamic import DynamicSpec
from jaxeff.ops import autotune, gathered_conv

NATIVE = pytest.mark.skipif(bool(missing := gathered_conv.unavailable(np.float32)), reason=str(missing))


def relu_map(seed, *shape):
    return np.maximum(np.random.default_rng(seed).normal(size=shape), 0).astype(np.float32)


def convolved(x, kernel):
    """3x3 SAME convolution in float64."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    planes = [
        [sum(correlate(image[..., i], kernel[..., i, o], "valid") for i in range(x.shape[-1])) for image in padded]
        for o in range(kernel.shape[-1])
    ]
    return np.moveaxis(np.array(planes), 0, -1)


def started(layer, x):
    """Variables with statistics, offsets and biases that are not those of the start."""
    variables = layer.init(jax.random.key(0), x)
    keys = iter(jax.random.split(jax.random.key(1), 50))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jnp.abs(jax.random.normal(next(keys), leaf.shape)), variables)


def boosted(variables, x, kept, group_size):
    p, stats = variables["params"], variables["batch_stats"]["norm"]
    y = convolved(x, np.asarray(p["conv"]["kernel"]))
    y = (y - np.asarray(stats["mean"])) / np.sqrt(np.asarray(stats["var"], np.float64) + 1e-5) + p["norm"]["bias"]
    s = np.abs(x).mean((1, 2)).astype(np.float64)
    g = np.maximum(s @ np.asarray(p["saliency"]["kernel"], np.float64) + np.asarray(p["saliency"]["bias"]), 0)
    boost = np.zeros_like(g)
    for n, row in enumerate(g):
        top = np.argsort(-row, kind="stable")[:kept]
        boost[n, top] = row[top]
    return np.maximum(boost.repeat(group_size, 1)[:, None, None] * y, 0), g


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize(("share", "group_size", "kept"), [(0.5, 1, 4), (0.75, 2, 1), (0.0, 1, 8)])
def test_a_boosted_layer_is_its_formula(gathered, share, group_size, kept):
    layer = dynamic.BoostedConv(8, share, group_size, gathered=gathered)
    x = relu_map(0, 3, 5, 6, 4)
    variables = started(layer, x)
    expected, _ = boosted(variables, x, kept, group_size)
    y = layer.apply(variables, x)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)
    open_channels = (np.asarray(y) > 0).any((1, 2)).sum(-1)
    assert (open_channels <= kept * group_size).all()


@NATIVE
def test_measured_boosted_layers_run_in_compiled_code(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEFF_CACHE_DIR", str(tmp_path))
    layer, x = dynamic.BoostedConv(8, 0.5), relu_map(0, 3, 5, 6, 4)
    variables = started(layer, x)
    (call,) = dynamic.gated_calls(layer, x)
    assert set(dynamic.tune(layer, x)) == {call.signature}
    autotune.remember({call.signature: "native_features"})
    np.testing.assert_allclose(layer.apply(variables, x), boosted(variables, x, 4, 1)[0], rtol=2e-5, atol=2e-5)
    (row,) = dynamic.speed_report(layer, x, rounds=1).rows
    assert row.engine == "native_features" and row.counted == 2


def test_its_gradient_and_loss_are_those_of_the_formula():
    x = relu_map(0, 2, 4, 4, 3)
    layers = [dynamic.BoostedConv(6, 0.5, gathered=gathered, penalty=0.1) for gathered in (True, False)]
    variables = started(layers[0], x)

    def loss(layer, params, x):
        return (layer.apply({**variables, "params": params}, x) ** 2).sum()

    first, second = (jax.grad(loss, (1, 2))(layer, variables["params"], x) for layer in layers)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # Along one direction, against the difference of the float64 formula.
    step = np.random.default_rng(5).normal(size=(3, 6)) * 1e-5
    moved = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    values = []
    for sign in (1, -1):
        there = {**moved, "params": {**moved["params"], "saliency": dict(moved["params"]["saliency"])}}
        there["params"]["saliency"]["kernel"] = moved["params"]["saliency"]["kernel"] + sign * step
        values.append((boosted(there, x, 3, 1)[0] ** 2).sum())
    expected = (values[0] - values[1]) / 2
    assert float((first[0]["saliency"]["kernel"] * step).sum()) == pytest.approx(expected, rel=1e-2)
    _, state = layers[0].apply(variables, x, True, mutable=["batch_stats", "gate_losses"])
    _, g = boosted(variables, x, 3, 1)
    assert float(dynamic.gate_losses(state)) == pytest.approx(0.1 * g.sum(-1).mean(), rel=1e-5)


def test_the_gate_before_the_next_layer_drops_what_the_boosted_layer_closed():
    first, second = dynamic.BoostedConv(8, 0.5), np.random.default_rng(1).normal(size=(3, 3, 8, 5)).astype(np.float32)
    x = relu_map(0, 3, 6, 6, 4)
    y = first.apply(started(first, x), x)
    whole = dynamic.conv(y, jnp.asarray(second), DynamicSpec())
    for engine in ("mask", "channels", "grouped"):
        gated = dynamic.conv(y, jnp.asarray(second), DynamicSpec(channels=0.5, engine=engine))
        np.testing.assert_allclose(gated, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("engine", ["channels", pytest.param("native_channels", marks=NATIVE)])
def test_a_boosted_layer_with_a_gate_on_its_input_leaves_out_both(gathered, engine):
    x, settings = relu_map(2, 3, 5, 6, 4), DynamicSpec(channels=0.5, engine=engine)
    layer = dynamic.BoostedConv(8, 0.5, gathered=gathered, conv_general_dilated_cls=dynamic.gated(settings))
    variables = started(dynamic.BoostedConv(8, 0.5), x)
    _, g = boosted(variables, x, 4, 1)
    kept = np.asarray(dynamic.masked(x, dynamic.select(x, settings), settings))
    p, stats = variables["params"], variables["batch_stats"]["norm"]
    y = (convolved(kept, np.asarray(p["conv"]["kernel"])) - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    boost = np.where(np.argsort(np.argsort(-g, kind="stable")) < 4, g, 0)[:, None, None]
    expected = np.maximum(boost * (y + p["norm"]["bias"]), 0)
    np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=2e-5, atol=2e-5)
    (call,) = dynamic.gated_calls(layer, x)
    assert call.features == (4 if gathered else None) and call.kernel.shape == (3, 3, 4, 8)


def test_a_channel_gated_layer_is_its_formula():
    layer = dynamic.ChannelGatedConv(6, base=0.5, use_bias=True, penalty=0.5, target=2.0)
    x = relu_map(0, 3, 5, 5, 4)
    variables = started(layer, x)
    p, stats = variables["params"], variables["batch_stats"]["norm"]
    base = convolved(x[..., :2], np.asarray(p["base"]["kernel"]))
    rest = convolved(x[..., 2:], np.asarray(p["rest"]["kernel"]))
    above = (base - stats["mean"]) / np.sqrt(np.asarray(stats["var"], np.float64) + 1e-5) - np.asarray(p["threshold"])
    expected = base + (above > 0) * rest + np.asarray(p["bias"])
    y, state = layer.apply(variables, x, mutable=["gate_losses", "gate_density"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert float(state["gate_density"]["value"]) == pytest.approx((above > 0).mean())
    loss = 0.5 * ((2.0 - np.asarray(p["threshold"], np.float64)) ** 2).sum()
    assert float(dynamic.gate_losses(state)) == pytest.approx(loss, rel=1e-5)

    def through(threshold):
        params = {**p, "threshold": threshold}
        return layer.apply({**variables, "params": params}, x).sum()

    # Backwards the step is a sigmoid of slope 5.
    soft = 1 / (1 + np.exp(-5 * above))
    np.testing.assert_allclose(
        jax.grad(through)(p["threshold"]), -(5 * soft * (1 - soft) * rest).sum((0, 1, 2)), rtol=1e-3, atol=1e-3
    )


def test_with_one_input_channel_it_is_an_ordinary_convolution():
    layer, x = dynamic.ChannelGatedConv(3), relu_map(0, 2, 4, 4, 1)
    variables = started(layer, x)
    assert set(variables) == {"params"} and set(variables["params"]) == {"base"}
    np.testing.assert_allclose(
        layer.apply(variables, x), convolved(x, np.asarray(variables["params"]["base"]["kernel"])), atol=1e-5
    )


@pytest.mark.parametrize(
    "conv", [dynamic.boosted_conv(channels=0.5, penalty=1e-2), dynamic.channel_gated_conv(penalty=1e-2)]
)
def test_networks_learn_with_their_losses(conv):
    architecture = models.cnn((4, 8), pools=1, input_shape=(6, 6, 2))
    network = models.Network(architecture, conv=conv)
    functions = training.from_linen(network)
    method = training.classification(
        *functions, optax.sgd(0.05), num_classes=10, penalty=lambda params, state: dynamic.gate_losses(state)
    )
    batch = {"image": relu_map(3, 8, 6, 6, 2), "label": np.arange(8) % 10}
    state = method.init(jax.random.key(0), batch)
    step = jax.jit(method.step)
    losses = []
    for _ in range(25):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    variables = {"params": state.params, **state.model_state}
    logits, found = functions.apply(variables, batch["image"], True, jax.random.key(0))
    penalty = float(dynamic.gate_losses(found))
    plain = float(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean())
    assert penalty > 0 and float(step(state, batch)[1]["loss"]) == pytest.approx(plain + penalty, rel=1e-4)


@pytest.mark.parametrize("gathered", [True, False])
def test_sweeps_and_targeted_dropout_find_the_gates_before_boosted_layers(gathered):
    architecture = dynamic.gate(models.cnn((4, 8, 8), pools=1, input_shape=(6, 6, 2)), DynamicSpec(channels=0.5))
    conv = dynamic.boosted_conv(channels=0.5, gathered=gathered)
    network = models.Network(architecture, conv=conv, gate=dynamic.gate_layer)
    images = relu_map(3, 8, 6, 6, 2)
    variables = started(network, images)
    paths = dynamic.block_paths(architecture)
    found = dynamic.sensitivity(network.apply, variables, images, np.arange(8) % 10, paths, grid=(0.0, 0.5))
    assert found.accuracy.shape == (2, 2, 2)
    # At the ratios of the settings the swept network is the one with its gates.
    swept = network.apply({**variables, "ratios": dynamic.ratio_variables(paths, [[0.5, 0.0]] * 2)}, images)
    np.testing.assert_allclose(swept, network.apply(variables, images), rtol=1e-4, atol=1e-5)
    schedule = dynamic.ratio_ascent([[0.5, 0.0]] * 2, every=1)
    functions = dynamic.targeted_dropout(training.from_linen(network), paths, schedule)
    logits, _ = functions.apply(functions.init(jax.random.key(0), images), images, True, jax.random.key(0))
    assert np.isfinite(logits).all()


def test_counted_is_what_the_gates_leave_open():
    architecture = models.cnn((4, 8), pools=1, input_shape=(6, 6, 2))
    images, macs = jnp.zeros((1, 6, 6, 2)), {"conv1": 36 * 9 * 2 * 4, "conv2": 9 * 9 * 4 * 8, "head": 80}

    def counted(conv, gates=None, opened=None):
        network = models.Network(architecture, conv=conv)
        variables = network.init(jax.random.key(0), images)
        apply = lambda variables, x: network.apply(variables, x, True, mutable=[*variables])[0]
        report = costs.analyze(apply, variables, images, residuals=False)
        chosen = architecture if gates is None else dynamic.gate(architecture, gates)
        return dynamic.counted_macs(chosen, report, conv=conv, opened=opened)

    table = counted(dynamic.boosted_conv(channels=0.75), DynamicSpec(channels=0.5))
    assert {path: cost.dense for path, cost in table.items() if path != "total"} == macs
    assert [table[path].counted for path in macs] == [macs["conv1"] // 4, macs["conv2"] // 8, macs["head"]]
    # The mean of every channel, and the products that make saliency of it; before the second layer the gate's sum, too.
    assert table["conv1"].attention == 36 * 2 + 2 * 4 and table["conv2"].attention == 2 * 9 * 4 + 4 * 8
    gating = dynamic.channel_gated_conv(base=0.25)
    table = counted(gating, opened={"conv1": 0.9, "conv2": 0.2})
    assert table["conv2"].counted == round(macs["conv2"] * (0.25 + 0.2 * 0.75))
    assert table["conv1"].counted == macs["conv1"]  # a quarter of two channels is none, so nothing is gated
    with pytest.raises(ValueError, match="layer 'conv2': channel gating opens as many outputs as its input asks for"):
        counted(gating)


@NATIVE
def test_what_compiled_code_leaves_out_is_not_counted_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEFF_CACHE_DIR", str(tmp_path))
    architecture, conv = models.cnn((8, 8), pools=1, input_shape=(6, 6, 2)), dynamic.boosted_conv(channels=0.5)
    network, images = models.Network(architecture, conv=conv), jnp.zeros((1, 6, 6, 2))
    variables = network.init(jax.random.key(0), images)
    calls = dynamic.gated_calls(network, images)
    for engine in ("mask", "native_mask", "native_features"):
        autotune.remember({call.signature: engine for call in calls})
        report = costs.analyze(lambda *args: network.apply(*args), variables, images, residuals=False)
        table = dynamic.counted_macs(architecture, report, conv=conv)
        assert table["conv1"].dense == 36 * 9 * 2 * 8 and table["conv1"].counted == 36 * 9 * 2 * 4


def test_budgets_of_boosted_networks_are_of_what_they_leave():
    plain = models.cnn((8, 8, 8), pools=1, input_shape=(6, 6, 2))
    architecture, conv = dynamic.gate(plain, DynamicSpec()), dynamic.boosted_conv(channels=0.5)
    network = models.Network(plain, conv=conv)
    images = jnp.zeros((1, 6, 6, 2))
    variables = network.init(jax.random.key(0), images)
    apply = lambda variables, x: network.apply(variables, x, True, mutable=[*variables])[0]
    report = costs.analyze(apply, variables, images, residuals=False)
    names, grid = ("conv1", "conv2"), (0.0, 0.25, 0.5, 0.75)
    accuracy = 1 - 0.1 * np.broadcast_to(np.array(grid), (2, 2, 4))
    found = dynamic.Sensitivity(grid, accuracy, names)
    for share in (0.3, 0.4, 0.51):
        ratios = dynamic.ratios_within_macs(architecture, report, found, share, conv=conv)
        left = dynamic.counted_macs(dynamic.with_ratios(architecture, ratios), report, conv=conv)["total"]
        assert left.counted <= share * left.dense
    assert not ratios.any()  # half is what the boosted layers leave anyway
    gated = models.Network(architecture, conv=conv, gate=dynamic.gate_layer)
    assert dynamic.ratios_within_seconds(gated, images, architecture, found, 50.0, rounds=1).shape == (2, 2)


def test_what_a_gated_convolution_refuses_is_computed_whole():
    x, layer = relu_map(0, 2, 5, 5, 4), dynamic.BoostedConv(8, 0.5, padding=((-1, 0), (0, 0)))
    variables = started(layer, x)
    whole = dynamic.BoostedConv(8, 0.5, padding=((-1, 0), (0, 0)), gathered=False)
    np.testing.assert_array_equal(layer.apply(variables, x), whole.apply(variables, x))
    layer = dynamic.BoostedConv(8, 0.5)
    assert layer.apply(started(layer, x), x[:0]).shape == (0, 5, 5, 8)


def test_a_glob_that_matches_what_is_inside_a_boosted_layer_gates_it_once():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dynamic.BoostedConv(8, 0.5, name="b")(nn.Conv(4, (3, 3), name="a")(x))

    x, settings = relu_map(0, 2, 5, 5, 4), DynamicSpec(channels=0.5)
    for glob in ("*b*", "b"):
        network = dynamic.Gated(Own(), {glob: settings})
        variables = network.init(jax.random.key(0), x)
        gates = [call for call in dynamic.gated_calls(network, x) if call.settings == settings]
        assert [call.path for call in gates] == ["b"]
        assert set(variables["params"]) == {"a", "b"}


def test_bad_input_is_refused():
    x = jnp.zeros((1, 4, 4, 4))
    with pytest.raises(ValueError, match="group_size=3 does not divide the 8 channels"):
        dynamic.BoostedConv(8, 0.5, 3).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="channels is the share that is dropped"):
        dynamic.BoostedConv(8, 1.0).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"base is a share of the input channels, in \(0, 1\), got 1.0"):
        dynamic.ChannelGatedConv(8, base=1.0).init(jax.random.key(0), x)
    for conv in (dynamic.boosted_conv(), dynamic.channel_gated_conv()):
        network = models.Network(models.architecture("mobilenet", num_classes=10, input_shape=(32, 32, 3)), conv=conv)
        with pytest.raises(ValueError, match="gates that learn take first-order convolutions without groups"):
            jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
