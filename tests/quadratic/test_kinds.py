"""Every kind of neuron against its formula in float64: values, gradients and identities between kinds."""

import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxeff import quadratic
from jaxeff.models import Network, cnn
from jaxeff.ops import Moments
from jaxeff.quadratic import KINDS, Kind, Projection, conv, cost, dense, get, kinds, register
from jaxeff.quadratic.kinds import Extra
from jaxeff.spec import quadratize

WINDOWS = {
    "plain": dict(padding=((1, 1), (1, 1))),
    "valid-stride-groups": dict(strides=(2, 3), groups=2),
    "asymmetric-dilated": dict(padding=((0, 2), (1, 0)), dilation=(2, 1), strides=(1, 2)),
    "groups": dict(groups=2, padding=((1, 1), (1, 0)), strides=(2, 1), dilation=(1, 2)),
}


class Reference:
    """The numbers that a formula is written in: projections of one patch, in float64."""

    def __init__(self, params, patches, groups):
        self.params = {name: np.asarray(value, np.float64) for name, value in params.items()}
        self.patches = patches.reshape(*patches.shape[:3], groups, -1)  # [N, H', W', G, n]
        self.groups = groups

    def __call__(self, name, power=1, kernel=None):
        """[..., M * r], output channels of group g from the channels of group g."""
        weights = self.params[f"kernel_{kernel or name}"]
        weights = weights.reshape(-1, self.groups, weights.shape[-1] // self.groups)
        z = np.einsum("nhwgi,igo->nhwgo", self.patches**power, weights)
        return z.reshape(*z.shape[:3], -1) + self.params.get(f"bias_{name}", 0)

    def ranked(self, name, rank):
        z = self(name)
        return z.reshape(*z.shape[:3], -1, rank)

    def form(self, name, symmetric=False):
        """x^T A x with A [n, n] of each neuron, or its upper triangle."""
        n = self.patches.shape[-1]
        weights = self.params[f"kernel_{name}"]
        matrix = np.zeros((n, n, weights.shape[-1]))
        matrix[np.triu_indices(n) if symmetric else tuple(np.indices((n, n)).reshape(2, -1))] = weights
        matrix = matrix.reshape(n, n, self.groups, -1)
        z = np.einsum("nhwgi,ijgo,nhwgj->nhwgo", self.patches, matrix, self.patches)
        return z.reshape(*z.shape[:3], -1) + self.params.get(f"bias_{name}", 0)

    def mixed(self, name, hidden, offset):
        weights = self.params[name].reshape(-1, self.groups, self.params[name].shape[-1] // self.groups)
        split = hidden.reshape(*hidden.shape[:3], self.groups, -1)
        return np.einsum("nhwgi,igo->nhwgo", split, weights).reshape(hidden.shape) + self.params.get(offset, 0)


def nested(q):
    hidden = q("u1") * q.params["v1"]
    hidden = q("u2") * q.mixed("s2", hidden, "v2")
    return q.mixed("mix", q("u3") * q.mixed("s3", hidden, "v3"), "offset")


def coupled(q):
    hidden = q("u1")
    hidden = q("u2") * hidden + hidden
    return q.mixed("mix", q("u3") * hidden + hidden, "offset")


def emitting(q):
    projections = q.ranked("q", 2)
    first = q("c") + (q.params["scale"] * projections**2).sum(-1)
    return np.concatenate([first[..., None], projections], -1).reshape(*first.shape[:3], -1)


FORMULAS = {
    "first_order": lambda q: q("c"),
    "t1": lambda q: q.form("a"),
    "t1_symmetric": lambda q: q.form("a", symmetric=True),
    "t1_linear": lambda q: q.form("a") + q("c"),
    "t1_t2": lambda q: q.form("a") + q("b", power=2),
    "t1_low_rank(rank=3)": lambda q: (q.ranked("a", 3) * q.ranked("b", 3)).sum(-1),
    "t2": lambda q: q("a", power=2),
    "t3": lambda q: q("a") ** 2,
    "t4": lambda q: q("a") * q("b"),
    "t2_t4": lambda q: q("a") * q("b") + q("s", power=2, kernel="b"),
    "fan": lambda q: q("a") * q("b") + q("s", power=2),
    "quadralib": lambda q: q("a") * q("b") + q("c"),
    "qres": lambda q: q("a") * q("b") + q("a"),
    "reduced": lambda q: q("c") + q("s", power=2),
    "bergstra(rank=2)": lambda q: (q.ranked("a", 2) ** 2).sum(-1) + q("c"),
    "bergstra(rank=2, root=True)": lambda q: np.sqrt((q.ranked("a", 2) ** 2).sum(-1) + 1e-6) + q("c"),
    "emitting(rank=2)": emitting,
    "ccp(order=3)": coupled,
    "ncp(order=3)": nested,
}
NEURONS = {"emitting(rank=2)": 2}  # times three channels; the others have six neurons


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights(kind, *receptive, features=6, bias=True, groups=1):
    """Random parameters with the shapes that the layers declare."""
    if len(receptive) == 1:
        layer, x = quadratic.QuadraticDense(features, kind=kind, use_bias=bias), np.ones((1, *receptive), np.float32)
    else:
        x = np.ones((1, *receptive[:2], receptive[2] * groups), np.float32)
        layer = quadratic.QuadraticConv(features, receptive[:2], kind=kind, use_bias=bias, feature_group_count=groups)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    return {name: normal(i, *leaf.shape) for i, (name, leaf) in enumerate(sorted(shapes.items()))}


def assert_near(actual, expected, tolerance=2e-5):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def patches_of(x, kernel, strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1):
    """im2col: [N, H', W', groups, kh, kw, C / groups]."""
    padded = np.pad(x.astype(np.float64), ((0, 0), *padding, (0, 0)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    rows, cols = (
        np.arange(0, size - r + 1, s)[:, None] + np.arange(k) * d
        for size, r, s, k, d in zip(padded.shape[1:3], reach, strides, kernel, dilation, strict=True)
    )
    patches = padded[:, rows[:, None, :, None], cols[None, :, None, :]]
    return np.moveaxis(patches.reshape(*patches.shape[:-1], groups, -1), -2, 3)


def oracle(kind, params, x, kernel=(3, 3), groups=1, **window):
    return FORMULAS[kind](Reference(params, patches_of(x, kernel, groups=groups, **window), groups))


def directional(function, values, direction):
    """Central difference of a function of a dictionary of arrays in float64; of a cubic it is exact to rounding."""
    step = 1e-5
    moved = [{name: value + sign * step * direction[name] for name, value in values.items()} for sign in (1, -1)]
    return (function(moved[0]) - function(moved[1])) / (2 * step)


def compare_with_oracle(kind, options):
    options = {"padding": ((0, 0), (0, 0)), **options}
    groups = options.get("groups", 1)
    x, params = normal(20, 2, 6, 7, 4), weights(kind, 3, 3, 4 // groups, groups=groups)
    expected = oracle(kind, params, x, **options)
    g = normal(21, *expected.shape)

    def ours(params, x):
        y, vjp = jax.vjp(lambda p, x: conv(p, x, kind=kind, kernel_size=(3, 3), **options), params, x)
        return y, *vjp(g)

    y, by_params, by_x = jax.jit(ours)(params, x)
    assert_near(y, expected)
    values = {name: value.astype(np.float64) for name, value in {**params, "x": x}.items()}
    for name, gradient in {**by_params, "x": by_x}.items():
        direction = {other: 0.0 for other in values} | {name: normal(30, *values[name].shape).astype(np.float64)}

        def product(values):
            rest = {other: value for other, value in values.items() if other != "x"}
            return np.vdot(oracle(kind, rest, values["x"], **options), g)

        slope = directional(product, values, direction)
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction[name])
        assert abs(np.vdot(gradient, direction[name]) - slope) < 2e-5 * scale, name


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("window", [w if w == "groups" else pytest.param(w, marks=pytest.mark.slow) for w in WINDOWS])
def test_convolution_and_its_gradients_equal_im2col(kind, window):
    compare_with_oracle(kind, WINDOWS[window])


@pytest.mark.parametrize("kind", FORMULAS)
def test_dense_layers_and_their_gradients_are_those_of_1x1_convolutions(kind):
    x, params = normal(20, 5, 4), weights(kind, 4)
    kernels = {name: value.reshape(1, 1, *value.shape) for name, value in params.items() if name.startswith("kernel_")}
    pairs = {f"kernel_{p.name}" for p in get(kind).projections if p.of in ("pairs", "symmetric_pairs")}
    windowed = {**params, **{name: value for name, value in kernels.items() if name not in pairs}}

    def flat(params, x):
        return jnp.sum(jnp.sin(dense(params, x, kind=kind)))

    def of_images(params, x):
        return jnp.sum(jnp.sin(conv(params, x[:, None, None], kind=kind, kernel_size=(1, 1))))

    ours, theirs = jax.grad(flat, (0, 1))(params, x), jax.grad(of_images, (0, 1))(windowed, x)
    assert_near(ours[1], theirs[1])
    for name, value in ours[0].items():
        assert_near(value, np.asarray(theirs[0][name]).reshape(value.shape))


@pytest.mark.slow
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0, 2), (1, 0))])
@pytest.mark.parametrize("dilation", [(1, 1), (1, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_combination_of_window_settings(strides, padding, dilation, groups):
    compare_with_oracle("quadralib", dict(strides=strides, padding=padding, dilation=dilation, groups=groups))


@pytest.mark.parametrize("groups", [1, 2])
def test_stacked_and_separate_convolutions_are_equal(groups):
    x, params = normal(20, 2, 5, 5, 4), weights("quadralib", 3, 3, 4 // groups, groups=groups)
    separate, stacked = (conv(params, x, groups=groups, impl=impl) for impl in ("separate", "stacked"))
    assert_near(stacked, np.asarray(separate))
    with pytest.raises(ValueError, match="impl must be one of 'separate', .*'auto', got 'split'"):
        conv(params, x, groups=groups, impl="split")


def test_padding_names_of_convolutions():
    for kind in ("quadralib", "t1"):
        x, params = normal(20, 2, 6, 7, 2), weights(kind, 3, 2, 2)
        same = oracle(kind, params, x, (3, 2), padding=((1, 1), (0, 1)))
        assert_near(conv(params, x, kind=kind, kernel_size=(3, 2)), same)
        valid = conv(params, x, kind=kind, kernel_size=(3, 2), padding="VALID")
        assert_near(valid, oracle(kind, params, x, (3, 2)))
    with pytest.raises(ValueError, match="kind 't1' has kernels of pairs only, .*: give kernel_size"):
        conv(params, x, kind="t1")


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("bias", [False, True])
def test_dense_layers_equal_their_formula(kind, bias):
    x, params = normal(20, 4, 5), weights(kind, 5, bias=bias)
    as_conv = {name: v[None, None] if name[0] == "k" and "t1" not in kind else v for name, v in params.items()}
    expected = oracle(kind, as_conv, x[:, None, None], (1, 1))
    assert_near(dense(params, x, kind=kind), expected[:, 0, 0])


def test_closed_form_slopes_equal_automatic_differentiation():
    for name in (*KINDS, "t1_low_rank(rank=3)"):
        kind = kinds.get(name)
        if kind.slopes is None:
            continue
        values = [jnp.asarray(normal(i, 4, *([p.rank] if p.rank > 1 else []))) for i, p in enumerate(kind.projections)]
        tangents = [normal(9 + i, *value.shape) for i, value in enumerate(values)]
        plain, ours = (jax.jvp(f, values, tangents)[1] for f in (kind.combine, kind.apply))
        assert_near(ours, np.asarray(plain))
        first, *others = values
        second = [
            jax.hessian(lambda v, f=f, others=others: f(v, *others).sum())(first) for f in (kind.combine, kind.apply)
        ]
        np.testing.assert_allclose(second[1], second[0], atol=1e-6)


# Weights and multiply-accumulates per neuron of n inputs, as the taxonomy's table has them.
TABLE = {
    "first_order": (lambda n: n, lambda n: n),
    "t1": (lambda n: n * n, lambda n: n * n + n),
    "t1_linear": (lambda n: n * n + n, lambda n: n * n + 2 * n),
    "t1_t2": (lambda n: n * n + n, lambda n: n * n + 2 * n),
    "t2": (lambda n: n, lambda n: n),
    "t3": (lambda n: n, lambda n: n + 1),
    "t4": (lambda n: 2 * n, lambda n: 2 * n + 1),
    "t2_t4": (lambda n: 2 * n, lambda n: 3 * n + 1),
    "quadralib": (lambda n: 3 * n, lambda n: 3 * n + 2),
    "fan": (lambda n: 3 * n, lambda n: 3 * n + 1),
    "reduced": (lambda n: 2 * n, lambda n: 2 * n),
}


@pytest.mark.parametrize("kind", TABLE)
def test_costs_are_those_of_the_taxonomy(kind):
    for n in (5, 576):
        params, macs = TABLE[kind]
        assert cost(kind, n, 7) == (7 * params(n), 7 * macs(n))


def test_low_rank_neurons_cost_about_a_first_order_one_per_channel():
    k, n = 3, 100
    assert cost("emitting(rank=3)", n, k + 1, bias=True).params == (k + 1) * n + k + 1


@pytest.mark.parametrize("kind", FORMULAS)
def test_costs_count_the_parameters_that_layers_have(kind):
    for bias in (False, True):
        params = weights(kind, 3, 3, 2, groups=2, bias=bias)
        assert sum(value.size for value in params.values()) == cost(kind, 18, 6, groups=2, bias=bias).params


def test_dense_layers_take_any_leading_axes():
    x, params = normal(20, 2, 3, 5), weights("quadralib", 5, features=4)
    assert_near(dense(params, x), np.asarray(dense(params, x.reshape(6, 5))).reshape(2, 3, 4))
    assert dense(params, x[0, 0]).shape == (4,)


# --- identities between kinds -----------------------------------------------------------------------------------------


def t(kind, x, *kernels):
    return np.asarray(
        dense(
            {f"kernel_{p}": k for p, k in zip("c" if kind == "first_order" else "abc", kernels, strict=False)},
            x,
            kind=kind,
        )
    )


def test_t3_is_t4_with_equal_weights():
    x, a = normal(0, 4, 5), normal(1, 5, 3)
    np.testing.assert_array_equal(t("t3", x, a), t("t4", x, a, a))


def test_t2_is_a_diagonal_quadratic_form_and_t4_one_of_rank_two():
    x, a, b = normal(0, 4, 5), normal(1, 5, 3), normal(2, 5, 3)
    for o in range(3):
        assert_near(t("t2", x, a)[:, o], np.einsum("ni,ij,nj->n", x, np.diag(a[:, o]), x))
        assert_near(t("t4", x, a, b)[:, o], np.einsum("ni,ij,nj->n", x, np.outer(a[:, o], b[:, o]), x))


def test_a_product_is_a_difference_of_squares():
    x, a, b = normal(0, 4, 5), normal(1, 5, 3), normal(2, 5, 3)
    assert_near(t("t4", x, a, b), (t("t3", x, a + b) - t("t3", x, a - b)) / 4)


def test_a_full_form_of_rank_two_is_a_sum_of_two_products():
    x, u, v = normal(0, 4, 5), normal(1, 5, 3, 2), normal(2, 5, 3, 2)
    full = np.einsum("iok,jok->ijo", u, v).reshape(25, 3)
    low = dense({"kernel_a": u.reshape(5, 6), "kernel_b": v.reshape(5, 6)}, x, kind="t1_low_rank(rank=2)")
    assert_near(t("t1", x, full), np.asarray(low))
    products = [t("t4", x, u[..., k], v[..., k]) for k in range(2)]
    assert_near(np.asarray(low), products[0] + products[1])


def test_translating_the_input_translates_the_output():
    x, params = normal(0, 1, 12, 12, 2), weights("quadralib", 3, 3, 2)
    y, moved = (np.asarray(conv(params, z, padding="VALID")) for z in (x, np.roll(x, (2, 3), (1, 2))))
    np.testing.assert_allclose(moved[:, 2:, 3:], y[:, :-2, :-3], atol=1e-5)


def test_quadralib_is_t4_plus_first_order():
    x, a, b, c = (normal(i, 4, 5) if i == 0 else normal(i, 5, 3) for i in range(4))
    assert_near(t("quadralib", x, a, b, c), t("t4", x, a, b) + t("first_order", x, c))


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))


def test_every_registered_kind_is_compared_with_its_formula():
    assert {name.split("(")[0] for name in FORMULAS} >= {*KINDS, *kinds.FAMILIES}


def test_families_take_options():
    assert kinds.get("bergstra(rank=4)").projections[0].rank == 4
    assert kinds.get("ncp").name == "ncp" and len(kinds.get("ncp(order=2)").projections) == 2
    for name, message in {
        "bergstra(width=4)": "kind 'bergstra.width=4.': .*unexpected keyword argument 'width'",
        "bergstra(rank=0)": "rank must be an integer of at least 1, got 0",
        "bergstra(4)": "expected name.option=value",
        "t9(rank=2)": "unknown kind 't9.rank=2.'",
    }.items():
        with pytest.raises(ValueError, match=message):
            kinds.get(name)
    with pytest.raises(
        ValueError, match=r"kind 'emitting\(rank=2\)' gives 3 channels per neuron, which do not divide 8 features"
    ):
        quadratic.QuadraticDense(8, kind="emitting(rank=2)").init(jax.random.key(0), normal(0, 2, 5))


def test_full_forms_over_too_many_pairs_are_refused_with_the_alternative():
    layer = quadratic.QuadraticConv(64, (3, 3), kind="t1")
    with pytest.raises(
        ValueError, match=r"331,776 weights in each of 64 neurons, 21,233,664 .*'t1_low_rank\(rank=2\)' has 147,456"
    ):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 8, 8, 64)))


def test_a_kind_of_the_users_own_runs_in_a_network(own_registry):
    register(
        Kind(
            "mine",
            "(a.x) * (b.x) + c.(x^2)",
            (Projection("a"), Projection("b"), Projection("c", "square")),
            lambda a, b, c: a * b + c,
            "mine",
        )
    )
    x, params = normal(0, 2, 4, 4, 1), {f"kernel_{p}": normal(i, 3, 3, 1, 2) for i, p in enumerate("abc")}
    assert_near(
        conv(params, x, kind="mine"),
        np.asarray(conv({k: params[k] for k in ("kernel_a", "kernel_b")}, x, kind="t4"))
        + np.asarray(conv({"kernel_a": params["kernel_c"]}, x, kind="t2")),
    )
    network = Network(quadratize(cnn((2,), input_shape=(4, 4, 1), norm=None), "mine"), conv=quadratic.conv_layer)
    y, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), x)
    assert y.shape == (2, 10)
    assert set(variables["params"]["conv1"]["layer"]) == {f"{w}_{p}" for w in ("kernel", "bias") for p in "abc"}


def test_kinds_that_cannot_be_registered(own_registry):
    mine = Kind("t4", "a.x", (Projection("a"),), lambda a: a, "mine")
    with pytest.raises(ValueError, match=r"kind 't4' exists already: \(a.x\) \* \(b.x\); choose another name"):
        register(mine)
    register(kinds.get("t4"))
    for names in ((), ("a", "a")):
        with pytest.raises(ValueError, match="kind 'bad' needs projections with different names"):
            register(Kind("bad", "", tuple(map(Projection, names)), lambda a: a, ""))


def linear(*projections, **options):
    return Kind("bad", "", projections, lambda *values, **extras: sum(values), "", **options)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (linear(Projection("a", "cube")), "'a' must be of one of 'x', 'square', .* got of='cube', rank=1"),
        (linear(Projection("a", rank=0)), "have a rank that is an integer from 1, got of='x', rank=0"),
        (linear(Projection("a"), Projection("b", rank=2, kernel="a")), "'b' cannot share the kernel of 'a', .* rank 2"),
        (linear(Projection("a"), Projection("b", "pairs", kernel="a")), "'b' cannot share the kernel of 'a'"),
        (linear(Projection("a", relinear="two")), r"relinear of \['a'\] must be None or one of twin, free"),
        (linear(Projection("a/b")), r"names must be identifiers, got \['a/b'\]"),
        (linear(Projection("out")), r"\['out'\] would be taken for other parameters .*norm_out"),
        (
            linear(
                Projection("a"), extras=(Extra("norm_b", lambda neurons, groups: (neurons,), jax.nn.initializers.ones),)
            ),
            r"\['norm_b'\] would be taken for other parameters",
        ),
        (
            linear(
                Projection("a"),
                extras=(Extra("scale", lambda neurons, groups: (neurons,), jax.nn.initializers.ones),),
                slopes=lambda a: (1.0,),
            ),
            "slopes are for kinds without extras",
        ),
    ],
    ids=["of", "rank", "shared rank", "shared pairs", "relinear", "name", "out", "extra", "slopes"],
)
def test_kinds_that_cannot_work_are_refused_when_registered(own_registry, kind, message):
    with pytest.raises(ValueError, match=f"kind 'bad': .*{message}"):
        register(kind)


def test_too_few_slopes_are_an_error(own_registry):
    register(linear(Projection("a"), Projection("b"), slopes=lambda a, b: (1.0,)))
    params = {f"kernel_{p}": np.ones((3, 2), np.float32) for p in "ab"}
    with pytest.raises(ValueError, match="kind 'bad': slopes must be a tuple of 2"):
        jax.grad(lambda x: dense(params, x, kind="bad").sum())(np.ones((1, 3), np.float32))


def test_unknown_kinds_are_an_error_that_lists_the_known():
    for call in (lambda: dense({}, np.ones((1, 2)), kind="t9"), lambda: kinds.get("t9")):
        with pytest.raises(ValueError, match="unknown kind 't9'; known: first_order, .*quadralib, .*ncp.*register"):
            call()
    for kind in (None, kinds.get("t4")):
        with pytest.raises(ValueError, match="kind must be the name of one, such as 'quadralib', got"):
            dense({}, np.ones((1, 2)), kind=kind)


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("kernel_b", None, r"takes \['kernel_a', 'kernel_b', 'kernel_c'\].*missing \['kernel_b'\], unexpected \[\]"),
        (None, "kernel_d", r"missing \[\], unexpected \['kernel_d'\]"),
        ("kernel_a", "bias_d", r"missing \['kernel_a'\], unexpected \['bias_d'\]"),
    ],
)
def test_missing_and_unknown_parameters_are_an_error_that_names_them(drop, add, message):
    params = weights("quadralib", 3, features=2) | ({add: np.ones(2, np.float32)} if add else {})
    params.pop(drop, None)
    with pytest.raises(ValueError, match=message):
        dense(params, normal(0, 4, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kernel_b": (3, 3, 2, 2)},
            r"expected shapes \{'kernel_b': \(3, 3, 2, 4\)\}, got \{'kernel_b': \(3, 3, 2, 2\)\}",
        ),
        ({"kernel_c": (1, 1, 2, 4)}, r"'kernel_c': \(3, 3, 2, 4\)"),
        ({"bias_a": (1,)}, r"\{'bias_a': \(4,\)\}"),
        ({"kernel_a": (3, 3, 5, 4)}, r"4 input channels in 2 groups: expected shapes \{'kernel_a': \(3, 3, 2, 4\)"),
    ],
)
def test_parameters_that_do_not_fit_each_other_are_an_error_with_their_shapes(change, message):
    params = weights("quadralib", 3, 3, 2, features=4, groups=2)
    params |= {name: np.ones(shape, np.float32) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        conv(params, normal(0, 1, 5, 5, 4), groups=2)


@pytest.mark.parametrize(
    ("kind", "shapes", "options", "message"),
    [
        ("t1", {"kernel_a": (8, 4)}, {}, r"expected shapes \{'kernel_a': \(9, 4\)\}"),
        (
            "t1_linear",
            {"kernel_a": (81, 4), "kernel_c": (3, 3, 1, 4)},
            {"kernel_size": (1, 9)},
            r"'kernel_c': \(1, 9, 1, 4",
        ),
        ("quadralib", {f"kernel_{p}": (3, 3, 1, 4) for p in "abc"}, {"kernel_size": 5}, r"'kernel_a': \(5, 5, 1, 4\)"),
        (
            "quadralib",
            {"kernel_a": (3, 5), "kernel_b": (3, 4), "kernel_c": (3, 4)},
            {},
            r"got \{'kernel_a': \(3, 5\)\}",
        ),
        ("t2", {"kernel_a": ()}, {}, r"got \{'kernel_a': \(\)\}"),
    ],
)
def test_kernels_must_fit_the_window_and_the_input(kind, shapes, options, message):
    params = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        if options:
            conv(params, normal(0, 1, 9, 9, 1), kind=kind, **options)
        else:
            dense(params, normal(0, 2, 3), kind=kind)


def test_norms_of_another_width_or_name_are_an_error():
    params, x = weights("t4", 3, features=2), normal(0, 4, 3)
    norm = {"scale": np.ones(2), "bias": np.ones(2)}
    for wrong, message in (
        ({}, r"norm_out: parameters of a 'layer' norm have shapes .*, got \{\}"),
        ({"scale": np.ones(1), "bias": np.ones(2)}, r"got \{'scale': \(1,\), 'bias': \(2,\)\}"),
    ):
        with pytest.raises(ValueError, match=message):
            quadratic.dense_block(params | {"norm_out": wrong}, x, kind="t4", out_norm="layer")
    with pytest.raises(ValueError, match="norm must be None or one of .*, got 'bach'"):
        quadratic.dense_block(params | {"norm_out": norm}, x, kind="t4", out_norm="bach")


def test_norms_need_their_parameters_and_statistics():
    params, x, norm = weights("t4", 3, features=2), normal(0, 4, 3), {"scale": np.ones(2), "bias": np.ones(2)}
    given = params | {"norm_a": norm, "norm_c": norm}
    with pytest.raises(ValueError, match=r"missing \['norm_b', 'norm_out'\], unexpected \['norm_c'\]"):
        quadratic.dense_block(given, x, kind="t4", branch_norm="batch", out_norm="layer")
    given, statistics = params | {"norm_a": norm, "norm_b": norm}, {"a": Moments(np.zeros(2), np.ones(2))}
    with pytest.raises(ValueError, match=r"statistics\['b'\] must be jaxeff.ops.Moments of 2 channels, got None"):
        quadratic.dense_block(given, x, statistics, kind="t4", branch_norm="batch")


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (dict(strides=2, padding=1), dict(strides=(2, 2), padding=((1, 1), (1, 1)))),
        (dict(dilation=2, padding=(2, 1)), dict(dilation=(2, 2), padding=((2, 2), (1, 1)))),
    ],
)
def test_one_number_stands_for_both_axes(given, same):
    params, x = weights("t4", 3, 3, 1), normal(0, 2, 6, 7, 1)
    np.testing.assert_array_equal(conv(params, x, kind="t4", **given), conv(params, x, kind="t4", **same))
    layer, full = ({"kernel_dilation" if k == "dilation" else k: v for k, v in s.items()} for s in (given, same))
    y = quadratic.QuadraticConv(6, 3, kind="t4", **layer).apply({"params": params}, x)
    np.testing.assert_array_equal(y, quadratic.QuadraticConv(6, (3, 3), kind="t4", **full).apply({"params": params}, x))


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (dict(strides=(1, 1, 1)), r"strides must be a positive integer or two, got \(1, 1, 1\)"),
        (dict(dilation=0), "dilation must be a positive integer or two, got 0"),
        (dict(padding="some"), "padding must be .* one of SAME, SAME_LOWER, VALID, got 'some'"),
        (dict(padding=((1, 2, 3), 1)), r"padding must be an integer, two, two \(low, high\) pairs or a name"),
    ],
)
def test_windows_that_are_none_are_an_error(window, message):
    with pytest.raises(ValueError, match=message):
        conv(weights("t4", 3, 3, 1), normal(0, 2, 6, 6, 1), kind="t4", **window)


def test_a_window_of_pairs_must_fit_into_the_input():
    layer = quadratic.QuadraticConv(2, 3, kind="t1", padding="VALID")
    with pytest.raises(ValueError, match=r"a window of \(3, 3\) .* does not fit into an input that is \(2, 4\)"):
        layer.init(jax.random.key(0), np.ones((1, 2, 4, 1), np.float32))


def test_layers_without_features_are_an_error_that_names_the_layer_of_a_network():
    with pytest.raises(ValueError, match="features must be at least 1, got 0"):
        quadratic.QuadraticDense(0).init(jax.random.key(0), np.ones((1, 2), np.float32))
    net = Network(quadratize(cnn((2,), input_shape=(4, 4, 1)), "emitting(rank=2)"), conv=quadratic.conv_layer)
    with pytest.raises(ValueError, match="layer 'conv1': kind 'emitting.rank=2.' gives 3 channels per neuron"):
        net.init(jax.random.key(0), np.ones((1, 4, 4, 1), np.float32))


def test_inputs_of_another_rank_are_an_error():
    with pytest.raises(ValueError, match=r"x must be \[N, H, W, C\], got shape \(4, 4, 2\)"):
        conv(weights("t4", 3, 3, 2, 2), normal(0, 4, 4, 2), kind="t4")


def test_relinear_starts_exist_where_a_first_order_twin_does():
    assert kinds.relinear_starts(kinds.get("quadralib")) == {"a": "zero", "b": "free", "c": "twin"}
    for kind in ("t2", "t3"):
        with pytest.raises(
            ValueError, match=f"kind '{kind}' .*that have one: first_order, t1_linear, t4, fan, quadralib, .*ncp"
        ):
            kinds.relinear_starts(kinds.get(kind))


# --- what quadratic neurons are for -----------------------------------------------------------------------------------


def test_a_single_neuron_learns_exclusive_or():
    x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    wanted = np.array([0, 1, 1, 0], np.float32)
    layer = quadratic.QuadraticDense(1)
    params = jax.jit(layer.init)(jax.random.key(0), x)

    def loss(params):
        return jnp.mean((layer.apply(params, x)[:, 0] - wanted) ** 2)

    def step(params, _):
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, jax.grad(loss)(params)), None

    trained, _ = jax.jit(lambda params: jax.lax.scan(step, params, None, length=400))(params)
    np.testing.assert_allclose(layer.apply(trained, x)[:, 0], wanted, atol=0.05)
    # A first-order neuron can do no better than one half everywhere.
    design = np.c_[x, np.ones(4)]
    best = design @ np.linalg.lstsq(design, wanted, rcond=None)[0]
    assert math.isclose(np.mean((best - wanted) ** 2), 0.25)


@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("kind", ["quadralib", "t1"])
def test_groups_that_do_not_divide_are_named_by_the_function_too(kind, groups):
    with pytest.raises(ValueError, match=f"groups={groups} must be at least 1 and divide the 4 input channels"):
        conv(weights(kind, 3, 3, 4), normal(0, 2, 5, 5, 4), kind=kind, groups=groups, kernel_size=(3, 3))


def test_a_kind_does_not_hide_a_family():
    with pytest.raises(ValueError, match="kind 'bergstra' would hide the family of that name"):
        register(Kind("bergstra", "a.x", (Projection("a"),), lambda a: a, "mine"))
