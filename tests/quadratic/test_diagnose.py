"""Diagnostics against NumPy in float64, and their figures read back from the files."""

import math

import flax.linen as nn
import jax
import matplotlib.image
import numpy as np
import pytest
from jax import numpy as jnp

from jaxeff import costs, models, quadratic, spec
from jaxeff.quadratic import diagnose, figures, memory

KEY = jax.random.key(0)


def network(kind="quadralib", *, plan=(3, "M", 4), norm="batch", branch_norm="batch", size=4, **settings):
    architecture = models.vgg(plan, num_classes=5, input_shape=(size, size, 2), norm=norm)
    architecture = spec.quadratize(architecture, kind, branch_norm=branch_norm)
    return models.Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer, **settings)


def random_variables(net, seed=0):
    """Parameters and statistics that are nowhere zero or one; variances positive."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(net.init, KEY, jnp.zeros((1, *net.architecture.input_shape)))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
            if path[-1].key in ("var", "scale")
            else 0.5 * rng.normal(size=leaf.shape).astype(np.float32)
        ),
        shapes,
    )


def images(size=4, seed=1):
    return np.random.default_rng(seed).normal(size=(3, size, size, 2)).astype(np.float32)


# --- the oracle -------------------------------------------------------------------------------------------------------


def conv(kernel, x):
    """3x3, SAME, one multiply at a time."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    taps = [
        np.einsum("nhwi,io->nhwo", padded[:, i : i + height, j : j + width], kernel[i, j].astype(np.float64))
        for i in range(3)
        for j in range(3)
    ]
    return sum(taps)


def batch_norm(params, statistics, z):
    return (z - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * params["scale"] + params["bias"]


def projections(variables, layer, x):
    params, statistics = (variables[collection][layer]["layer"] for collection in ("params", "batch_stats"))
    return {p: batch_norm(params[f"norm_{p}"], statistics[f"norm_{p}"], conv(params[f"kernel_{p}"], x)) for p in "abc"}


def finished(variables, layer, y):
    params, statistics = (variables[collection][layer]["layer"] for collection in ("params", "batch_stats"))
    return np.maximum(batch_norm(params["norm_out"], statistics["norm_out"], y), 0)


def pooled(x):
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def into_conv2(variables, x):
    z = projections(variables, "conv1", x)
    return pooled(finished(variables, "conv1", z["a"] * z["b"] + z["c"]))


@pytest.fixture(scope="module")
def net():
    module = network()
    return module, random_variables(module), images()


# --- activations ------------------------------------------------------------------------------------------------------


def test_activation_parts_are_the_product_and_the_linear_term(net):
    module, variables, x = net
    parts = diagnose.activation_parts(module, variables, x, "conv1")
    z = projections(variables, "conv1", x)
    np.testing.assert_allclose(parts.second, (z["a"] * z["b"]).mean(-1), atol=1e-4)
    np.testing.assert_allclose(parts.first, z["c"].mean(-1), atol=1e-4)
    np.testing.assert_allclose(parts.total, (z["a"] * z["b"] + z["c"]).mean(-1), atol=1e-4)


def test_smaller_maps_are_resized_to_the_images(net):
    module, variables, x = net
    parts = diagnose.activation_parts(module, variables, x, "conv2")
    z = projections(variables, "conv2", into_conv2(variables, x))
    expected = jax.image.resize(z["c"].mean(-1).astype(np.float32), x.shape[:3], "bicubic")
    np.testing.assert_allclose(parts.first, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "second", "first"),
    [
        ("t4", lambda a, b: a * b, lambda a, b: 0 * a),
        ("qres", lambda a, b: a * b, lambda a, b: a),
        pytest.param("t2", lambda a: a, lambda a: 0 * a, marks=pytest.mark.slow),
    ],
)
def test_other_kinds_are_split_by_order(kind, second, first):
    module = network(kind, plan=(3,), norm=None, branch_norm=None)
    variables, x = random_variables(module), images()
    params = variables["params"]["conv1"]["layer"]
    names = [name for name in "ab" if f"kernel_{name}" in params]
    z = [conv(params[f"kernel_{p}"], x * x if kind == "t2" else x) + params[f"bias_{p}"] for p in names]
    parts = diagnose.activation_parts(module, variables, x, "conv1")
    np.testing.assert_allclose(parts.second, second(*z).mean(-1), atol=1e-4)
    np.testing.assert_allclose(parts.first, first(*z).mean(-1), atol=1e-4)


def test_layers_that_are_not_there_are_answered_with_those_that_are(net):
    module, variables, x = net
    with pytest.raises(ValueError, match="got 'head'; there are: conv1, conv2"):
        diagnose.activation_parts(module, variables, x, "head")
    with pytest.raises(ValueError, match="got 'conv9'; conv1/layer, conv1, pool1, "):
        diagnose.attention_map(module, variables, x, "conv9")


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_of_projections_and_the_quadratic_ratio(net):
    module, variables, x = net
    statistics = diagnose.layer_statistics(module, variables, x)
    assert list(statistics) == ["conv1", "conv2", "head"]
    z = projections(variables, "conv2", into_conv2(variables, x))
    rms = {p: np.sqrt((values**2).mean()) for p, values in z.items()}
    assert statistics["conv2"].rms == pytest.approx(rms, rel=1e-4)
    kurtosis = {p: ((v - v.mean()) ** 4).mean() / v.var() ** 2 for p, v in z.items()}
    assert statistics["conv2"].kurtosis == pytest.approx(kurtosis, rel=1e-4)
    ratio = np.sqrt(((z["a"] * z["b"]) ** 2).mean()) / rms["c"]
    assert statistics["conv2"].quad_ratio == pytest.approx(ratio, rel=1e-4)
    assert statistics["head"].quad_ratio == 0


def test_a_product_alone_has_no_first_order_part_and_a_stock_network_no_statistics():
    module = network("t4", plan=(3,), norm=None, branch_norm=None)
    assert diagnose.layer_statistics(module, random_variables(module), images())["conv1"].quad_ratio == math.inf
    stock = models.Network(models.vgg((3,), num_classes=5, input_shape=(4, 4, 2)))
    with pytest.raises(ValueError, match="Network has no quadratic layer"):
        diagnose.layer_statistics(stock, random_variables(stock), images())


def test_histograms_count_every_weight_on_the_axis_of_its_layer():
    rng = np.random.default_rng(0)
    layer = {"kernel_a": rng.normal(size=(3, 3, 2, 4)), "kernel_b": 3 * rng.normal(size=(3, 3, 2, 4)), "bias_a": 9.0}
    tree = {"block": {"conv1": {"layer": layer}}, "head": {"layer": {"kernel": rng.normal(size=(4, 5))}}}
    found = diagnose.kernel_histograms(tree, bins=10)
    assert {name: list(kernels) for name, kernels in found.items()} == {"block/conv1": ["a", "b"], "head": ["kernel"]}
    a, b = found["block/conv1"]["a"], found["block/conv1"]["b"]
    assert a.counts.sum() == b.counts.sum() == 72
    limit = np.abs(layer["kernel_b"]).max()
    np.testing.assert_allclose(a.edges, np.linspace(-limit, limit, 11))
    between = (layer["kernel_a"] >= a.edges[4]) & (layer["kernel_a"] < a.edges[5])
    assert a.counts[4] == between.sum()
    assert a.rms == pytest.approx(np.sqrt((layer["kernel_a"] ** 2).mean()))
    with pytest.raises(ValueError, match="head/layer/kernel holds numbers that are not finite"):
        diagnose.kernel_histograms({"head": {"layer": {"kernel": np.array([1.0, np.nan])}}})
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        diagnose.kernel_histograms(tree, bins=0)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradient_norms_by_depth_of_a_chain_of_products():
    """y = w10 w9 ... w1 x with all weights 2: the gradient by each of them is y / 2, and 1/4 of that by one of 8."""

    class Chain(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            for index in range(10, 0, -1):  # not the order of the alphabet
                x = nn.Dense(1, use_bias=False, name=f"dense{index}")(x)
            return x

    params = {f"dense{i}": {"kernel": jnp.full((1, 1), 8.0 if i == 1 else 2.0)} for i in range(1, 11)}
    found = diagnose.gradient_norms(Chain(), {"params": params}, jnp.ones((1, 1)), jnp.sum)
    assert found.layers == tuple(f"dense{i}" for i in range(10, 0, -1))
    y = 8.0 * 2.0**9
    np.testing.assert_allclose(found.norms, [y / 2] * 9 + [y / 8])
    assert found.ratio == pytest.approx(1 / 4)


def test_gradient_norms_equal_finite_differences(net):
    module, variables, x = net
    found = diagnose.gradient_norms(module, variables, x, lambda y: jnp.sum(y * y), train=False)
    assert found.layers == ("conv1", "conv2", "head")
    z = into_conv2(variables, x)
    b = projections(variables, "conv2", z)
    hidden = finished(variables, "conv2", b["a"] * b["b"] + b["c"]).mean((1, 2))
    head = variables["params"]["head"]["layer"]
    y = hidden @ head["kernel_c"] + head["bias_c"]
    assert found.norms[2] == pytest.approx(np.linalg.norm(hidden.T @ (2 * y)), rel=1e-3)


@pytest.mark.slow
def test_gradients_of_squares_vanish_with_depth_and_those_of_linear_terms_do_not():
    """After five layers of (a.x)^2 the output is of degree 32 in the input: small inputs leave no gradient at all."""
    norms = {}
    for kind in ("t3", "quadralib"):
        module = network(kind, plan=(4,) * 5, norm=None, branch_norm=None)
        variables = module.init(KEY, images())
        norms[kind] = diagnose.gradient_norms(module, variables, 0.2 * images(), lambda y: y[:, 0].sum()).norms
    assert norms["t3"][0] < 1e-6 * norms["quadralib"][0]


# --- where a network looks --------------------------------------------------------------------------------------------


def test_attention_is_the_squared_activation_over_channels(net):
    module, variables, x = net
    z = projections(variables, "conv1", x)
    energy = (finished(variables, "conv1", z["a"] * z["b"] + z["c"]) ** 2).sum(-1)
    expected = energy / np.linalg.norm(energy, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(diagnose.attention_map(module, variables, x, "conv1"), expected, atol=1e-4)


@pytest.mark.parametrize("chosen", [None, (4, 0, 2)])
def test_grad_cam_of_the_last_convolution_weighs_channels_by_the_head(net, chosen):
    """Behind a mean over space and a dense layer the gradient of a logit is that row of the head over H W."""
    module, variables, x = net
    z = projections(variables, "conv2", into_conv2(variables, x))
    features = finished(variables, "conv2", z["a"] * z["b"] + z["c"])
    head = variables["params"]["head"]["layer"]
    logits = features.mean((1, 2)) @ head["kernel_c"] + head["bias_c"]
    classes = logits.argmax(-1) if chosen is None else np.array(chosen)
    maps = np.maximum(np.einsum("nhwc,cn->nhw", features, head["kernel_c"][:, classes]), 0)
    peak = maps.max((1, 2), keepdims=True)
    scaled = np.divide(maps, peak, out=np.zeros_like(maps), where=peak > 0).astype(np.float32)
    expected = np.clip(jax.image.resize(scaled, x.shape[:3], "bicubic"), 0, 1)
    given = None if chosen is None else np.array(chosen)
    np.testing.assert_allclose(diagnose.grad_cam(module, variables, x, "conv2", given), expected, atol=1e-3)


def test_grad_cam_is_traced_with_known_classes(net):
    module, variables, x = net
    known = jnp.array([4, 0, 2])
    inside = jax.jit(lambda x: diagnose.grad_cam(module, variables, x, "conv2", known))(x)
    np.testing.assert_allclose(inside, diagnose.grad_cam(module, variables, x, "conv2", known), atol=1e-5)


@pytest.mark.parametrize("classes", [[0, 1, 5], [-1, 0, 2], 1, [0], [0.0, 1.0, 2.0], [0, 1, 2**40]])
def test_classes_that_are_not_there_are_an_error(net, classes):
    module, variables, x = net
    with pytest.raises(ValueError, match=r"classes must be integers \[3\] of 0..4, got"):
        diagnose.grad_cam(module, variables, x, "conv2", np.array(classes))


# --- memory -----------------------------------------------------------------------------------------------------------

UNIT = 8 * 8 * 8 * 16 * 4  # bytes of the output of a layer on [8, 8, 8, 16]


@pytest.mark.parametrize(
    ("save", "branch_norm", "out_norm", "units"),
    [
        # Input; norms keep one array each, the product both factors, ReLU a byte per value.
        ("all", "batch", "batch", 1 + 3 + 2 + 1 + 0.25),
        pytest.param("ab", "batch", "batch", 1 + 3, marks=pytest.mark.slow),
        ("x", "batch", "batch", 1),
        pytest.param("all", None, "batch", 1 + 2 + 1 + 0.25, marks=pytest.mark.slow),
        pytest.param("x", None, "batch", 1, marks=pytest.mark.slow),
        pytest.param("all", "group", "group", 1 + 3 + 2 + 1 + 0.25, marks=pytest.mark.slow),
        # The normalised values as well, and some for every position of sixteen channels.
        pytest.param("all", "layer", "layer", 1 + 6 + 2 + 2 + 0.25 + 4 * 4 / 16, marks=pytest.mark.slow),
        pytest.param("all", "rms", "rms", 1 + 6 + 2 + 2 + 0.25 + 4 * 2 / 16, marks=pytest.mark.slow),
    ],
)
def test_what_a_layer_keeps_is_what_its_compiled_stack_grows_by(save, branch_norm, out_norm, units):
    layer = quadratic.QuadraticConv(16, branch_norm=branch_norm, out_norm=out_norm, act="relu", save=save)
    x = jax.ShapeDtypeStruct((8, 8, 8, 16), jnp.float32)
    kept = memory.residual_bytes(layer, x)
    assert kept == pytest.approx(units * UNIT, rel=0.02)
    assert memory.compiled_slope(layer, x, (2, 4)) == pytest.approx(kept, rel=0.1)


def traced_bytes(layer, x):
    """What plain tracing of the layer's gradient finds that it keeps."""
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def loss(params, rest, x):
        return layer.apply({"params": params, **rest}, x, True, mutable=list(rest))[0].sum()

    return costs.analyze(loss, variables["params"], rest, x).total.residual_bytes


@pytest.mark.parametrize("branch_norm", [None, "batch"])
@pytest.mark.parametrize(
    "kind",
    ["t1", "t1_symmetric", "t1_low_rank(rank=2)", "t2", "t2_t4", "fan", "qres", "emitting(rank=3)", "ncp(order=2)"],
)
def test_what_layers_of_other_kinds_keep_is_what_their_trace_keeps(kind, branch_norm):
    layer = quadratic.QuadraticConv(4, kind=kind, branch_norm=branch_norm, out_norm="batch", act="relu")
    x = jax.ShapeDtypeStruct((8, 6, 6, 4), jnp.float32)
    assert memory.residual_bytes(layer, x) == pytest.approx(traced_bytes(layer, x), rel=0.02)


@pytest.mark.parametrize(("branch_norm", "out_norm"), [("batch", "batch"), ("layer", "rms"), (None, None)])
@pytest.mark.parametrize("save", ["all", "ab", "x"])
def test_what_a_layer_keeps_in_bfloat16_is_what_its_trace_keeps(save, branch_norm, out_norm):
    settings = dict(branch_norm=branch_norm, out_norm=out_norm, act="relu", save=save)
    layer = quadratic.QuadraticConv(16, dtype=jnp.bfloat16, **settings)
    x = jax.ShapeDtypeStruct((8, 6, 6, 8), jnp.bfloat16)
    assert memory.residual_bytes(layer, x) == pytest.approx(traced_bytes(layer, x), rel=0.02)


@pytest.mark.parametrize("save", ["all", "ab", "x"])
def test_report_of_a_residual_network_adds_up_to_its_trace(save):
    architecture = models.resnet(8, input_shape=(8, 8, 3), shortcut="projection", width=0.5)
    architecture = spec.quadratize(architecture, branch_norm="batch")

    def conv_layer(layer, **settings):
        return quadratic.conv_layer(layer, save=save, **settings)

    module = models.Network(architecture, conv=conv_layer, dense=quadratic.dense_layer)
    report = memory.memory_report(module, jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.float32), compiled=False)
    assert report.analytic_bytes == pytest.approx(report.traced.total.residual_bytes, rel=0.03)
    by_name = {row.name: row for row in report.rows}
    assert by_name["stage2_block1"].residual_bytes == 16 * 4 * 4 * 16  # one byte for each value of the sum
    # The branch keeps the block's input for the shortcut too, which has a projection and a norm of its own.
    own = {"all": 1, "ab": 1, "x": 0}[save] * 16 * 4 * 4 * 16 * 4
    assert own <= by_name["stage2_block1/shortcut"].residual_bytes < own + 1000
    text = str(report)
    assert "batch 16" in text and "stage3_block1/conv2" in text and "residuals, traced" in text


def test_memory_of_other_networks_and_of_stacks_that_change_shape_is_refused():
    stock = models.Network(models.vgg((3,), num_classes=5, input_shape=(4, 4, 2)))
    with pytest.raises(ValueError, match="Network has no quadratic layer"):
        memory.memory_report(stock, jnp.zeros((2, 4, 4, 2)))
    with pytest.raises(ValueError, match=r"got \(2, 4, 4, 2\) -> \(2, 4, 4, 3\)"):
        memory.compiled_slope(quadratic.QuadraticConv(3), jnp.zeros((2, 4, 4, 2)))


# --- figures ----------------------------------------------------------------------------------------------------------


def coloured(path):
    """Whether a PNG was written that is neither empty nor grey."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return pixels.shape[0] > 200 and (np.ptp(pixels, axis=-1) > 0.2).mean() > 0.001


def test_every_finding_has_a_figure(tmp_path):
    rng = np.random.default_rng(0)
    x, maps = rng.normal(size=(2, 8, 8, 3)), rng.normal(size=(3, 2, 8, 8))
    layer = diagnose.LayerStatistics({"a": 1.0, "c": 20.0}, {"a": 3.0, "c": 4.0}, 0.5)
    alone = diagnose.LayerStatistics({"a": 1.0}, {"a": 3.0}, math.inf)
    layers = ("conv1", "stage1_block1/conv1")
    norms = diagnose.GradientNorms(layers, np.array([1.0, 1e-4]), 1e-4)
    diverged = diagnose.GradientNorms(layers, np.array([np.inf, 0.0]), math.nan)
    histograms = diagnose.kernel_histograms({"conv1": {"kernel_a": rng.normal(size=50), "kernel_b": np.zeros(50)}})
    written = [
        figures.draw_activation_parts(x, diagnose.ActivationParts(*maps), tmp_path / "new" / "parts.png"),
        figures.draw_maps(x, {"attention": np.abs(maps[0]), "nothing": 0 * maps[0]}, tmp_path / "maps.png"),
        figures.draw_layer_statistics({"conv1": layer, "conv2": alone}, str(tmp_path / "statistics.png")),
        figures.draw_histograms(histograms, tmp_path / "weights.png"),
        figures.draw_gradient_norms({"t3": norms, "t4": diverged}, tmp_path / "depth.png"),
    ]
    assert all(coloured(path) for path in written)


def test_memory_has_a_figure_with_and_without_the_compiler(tmp_path):
    module = network(plan=(3,))
    report = memory.memory_report(module, jax.ShapeDtypeStruct((2, 4, 4, 2), jnp.float32))
    assert report.compiled.temp_bytes > 0 and "temporaries, compiled" in str(report)
    without = memory.MemoryReport(report.rows, report.batch, report.analytic_bytes, report.traced, None)
    assert coloured(figures.draw_memory({"all": report, "again": without}, tmp_path / "memory.png"))
