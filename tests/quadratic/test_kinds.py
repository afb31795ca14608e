"""Every kind of neuron against its formula in float64: values, gradients and identities between kinds."""

import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxeff import quadratic
from jaxeff.models import Network, cnn
from jaxeff.quadratic import KINDS, Kind, Projection, conv, dense, kinds, register
from jaxeff.spec import quadratize

BUILT_IN = ("first_order", "t2", "t3", "t4", "quadralib")
# The formulas and the derivative of each by its projections, written by hand.
VALUE = {
    "first_order": lambda c: c,
    "t2": lambda a: a,
    "t3": lambda a: a**2,
    "t4": lambda a, b: a * b,
    "quadralib": lambda a, b, c: a * b + c,
}
SLOPES = {
    "first_order": lambda c: (1,),
    "t2": lambda a: (1,),
    "t3": lambda a: (2 * a,),
    "t4": lambda a, b: (b, a),
    "quadralib": lambda a, b, c: (b, a, 1),
}
LETTERS = {"first_order": "c", "t2": "a", "t3": "a", "t4": "ab", "quadralib": "abc"}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights(kind, *shape, bias=True):
    params = {f"kernel_{p}": normal(i, *shape) for i, p in enumerate(LETTERS[kind])}
    return params | ({f"bias_{p}": normal(9 + i, shape[-1]) for i, p in enumerate(LETTERS[kind])} if bias else {})


def assert_near(actual, expected, tolerance=2e-5):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def patches_of(x, kernel, strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1)):
    """im2col with positions: [N, H', W', kh, kw, C], and for each (row, column) where it was read in the padded x."""
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    rows, cols = (
        np.arange(0, size - r + 1, s)[:, None] + np.arange(k) * d
        for size, r, s, k, d in zip(padded.shape[1:3], reach, strides, kernel, dilation, strict=True)
    )
    index = rows[:, None, :, None], cols[None, :, None, :]
    return padded[:, *index], index, padded.shape


def oracle(kind, params, x, g, groups=1, padding=((0, 0), (0, 0)), **window):
    """Value of a convolution of neurons, and the gradients of vdot(value, g) by x and by the parameters."""
    x, g = x.astype(np.float64), None if g is None else g.astype(np.float64)
    raised = x**2 if kind == "t2" else x
    kernel = params[f"kernel_{LETTERS[kind][0]}"].shape
    patches, index, shape = patches_of(raised, kernel[:2], padding=padding, **window)
    split = patches.reshape(*patches.shape[:-1], groups, -1)
    grouped = {p: params[f"kernel_{p}"].astype(np.float64).reshape(*kernel[:3], groups, -1) for p in LETTERS[kind]}
    projections = [
        np.einsum("nhwijgc,ijcgo->nhwgo", split, grouped[p]).reshape(*patches.shape[:3], -1)
        + params.get(f"bias_{p}", 0)
        for p in LETTERS[kind]
    ]
    y = VALUE[kind](*projections)
    if g is None:
        return y
    grads, dpatches = {}, 0
    for p, slope in zip(LETTERS[kind], SLOPES[kind](*projections), strict=True):
        wanted = (g * slope).reshape(*g.shape[:3], groups, -1)
        grads[f"kernel_{p}"] = np.einsum("nhwijgc,nhwgo->ijcgo", split, wanted).reshape(kernel)
        if f"bias_{p}" in params:
            grads[f"bias_{p}"] = (g * slope).sum((0, 1, 2))
        dpatches = dpatches + np.einsum("nhwgo,ijcgo->nhwijgc", wanted, grouped[p])
    dx = np.zeros(shape)
    np.add.at(dx, (slice(None), *index), dpatches.reshape(patches.shape))
    dx = dx[:, padding[0][0] : padding[0][0] + x.shape[1], padding[1][0] : padding[1][0] + x.shape[2]]
    return y, dx * (2 * x if kind == "t2" else 1), grads


WINDOWS = {
    "plain": dict(padding=((1, 1), (1, 1))),
    "valid-stride": dict(strides=(2, 3)),
    "asymmetric-dilated": dict(padding=((0, 2), (1, 0)), dilation=(2, 1), strides=(1, 2)),
    "groups": dict(groups=2, padding=((1, 1), (1, 1)), strides=(2, 1)),
}


@pytest.mark.parametrize(
    ("kind", "window"), [*((kind, "groups") for kind in BUILT_IN), *(("quadralib", name) for name in list(WINDOWS)[:3])]
)
def test_convolution_and_its_gradients_equal_im2col(kind, window):
    options = {"padding": ((0, 0), (0, 0)), **WINDOWS[window]}
    x, params = normal(20, 2, 6, 7, 4), weights(kind, 3, 3, 4 // options.get("groups", 1), 6)
    g = normal(21, *oracle(kind, params, x, None, **options).shape)
    y, dx, grads = oracle(kind, params, x, g, **options)

    def ours(params, x, g):
        y, vjp = jax.vjp(lambda params, x: conv(params, x, kind=kind, **options), params, x)
        return y, *vjp(g)

    actual = jax.jit(ours, compiler_options={"xla_backend_optimization_level": 0})(params, x, g)
    assert_near(actual[0], y)
    assert_near(actual[2], dx)
    assert set(actual[1]) == set(grads)
    for name, expected in grads.items():
        assert_near(actual[1][name], expected)


def test_padding_names_of_convolutions():
    x, params = normal(20, 2, 6, 7, 2), weights("quadralib", 3, 2, 2, 3)
    same = oracle("quadralib", params, x, None, padding=((1, 1), (0, 1)))
    assert_near(conv(params, x), same)
    assert_near(conv(params, x, padding="VALID"), oracle("quadralib", params, x, None))


@pytest.mark.parametrize("kind", BUILT_IN)
@pytest.mark.parametrize("bias", [False, True])
def test_dense_layer_and_its_gradients_equal_its_formula(kind, bias):
    x, params, g = normal(20, 4, 5), weights(kind, 5, 3, bias=bias), normal(21, 4, 3)
    as_conv = {name: value[None, None] if name[0] == "k" else value for name, value in params.items()}
    y, dx, grads = oracle(kind, as_conv, x[:, None, None], g[:, None, None])
    actual, vjp = jax.vjp(lambda params, x: dense(params, x, kind=kind), params, x)
    assert_near(actual, y[:, 0, 0])
    by_params, by_x = vjp(g)
    assert_near(by_x, dx[:, 0, 0])
    for name, value in params.items():
        assert_near(by_params[name], grads[name].reshape(value.shape))


def test_dense_layers_take_any_leading_axes():
    x, params = normal(20, 2, 3, 5), weights("quadralib", 5, 4)
    assert_near(dense(params, x), np.asarray(dense(params, x.reshape(6, 5))).reshape(2, 3, 4))
    assert dense(params, x[0, 0]).shape == (4,)


# --- identities between kinds -----------------------------------------------------------------------------------------


def t(kind, x, *kernels):
    return np.asarray(dense({f"kernel_{p}": k for p, k in zip(LETTERS[kind], kernels, strict=True)}, x, kind=kind))


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


def test_quadralib_is_t4_plus_first_order():
    x, a, b, c = (normal(i, 4, 5) if i == 0 else normal(i, 5, 3) for i in range(4))
    assert_near(t("quadralib", x, a, b, c), t("t4", x, a, b) + t("first_order", x, c))


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))


def test_built_in_kinds():
    assert set(BUILT_IN) <= set(KINDS)
    for kind in BUILT_IN:
        assert "".join(p.name for p in kinds.get(kind).projections) == LETTERS[kind]


def test_a_kind_of_the_users_own_runs_in_a_network(own_registry):
    register(
        Kind(
            "fan",
            "(a.x) * (b.x) + c.(x^2)",
            (Projection("a"), Projection("b"), Projection("c", power=2)),
            lambda a, b, c: a * b + c,
            "Fan et al. 2023",
        )
    )
    x, params = normal(0, 2, 4, 4, 1), {f"kernel_{p}": normal(i, 3, 3, 1, 2) for i, p in enumerate("abc")}
    assert_near(
        conv(params, x, kind="fan"),
        np.asarray(conv({k: params[k] for k in ("kernel_a", "kernel_b")}, x, kind="t4"))
        + np.asarray(conv({"kernel_a": params["kernel_c"]}, x, kind="t2")),
    )
    network = Network(quadratize(cnn((2,), input_shape=(4, 4, 1), norm=None), "fan"), conv=quadratic.conv_layer)
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


def test_unknown_kinds_are_an_error_that_lists_the_known():
    for call in (lambda: dense({}, np.ones((1, 2)), kind="t9"), lambda: kinds.get("t9")):
        with pytest.raises(ValueError, match="unknown kind 't9'; known: first_order, t2, t3, t4, quadralib.*register"):
            call()


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("kernel_b", None, r"takes \['kernel_a', 'kernel_b', 'kernel_c'\].*missing \['kernel_b'\], unexpected \[\]"),
        (None, "kernel_d", r"missing \[\], unexpected \['kernel_d'\]"),
        ("kernel_a", "bias_d", r"missing \['kernel_a'\], unexpected \['bias_d'\]"),
    ],
)
def test_missing_and_unknown_parameters_are_an_error_that_names_them(drop, add, message):
    params = weights("quadralib", 3, 2) | ({add: np.ones(2, np.float32)} if add else {})
    params.pop(drop, None)
    with pytest.raises(ValueError, match=message):
        dense(params, normal(0, 4, 3))


def test_inputs_of_another_rank_are_an_error():
    with pytest.raises(ValueError, match=r"x must be \[N, H, W, C\], got shape \(4, 4, 2\)"):
        conv(weights("t4", 3, 3, 2, 2), normal(0, 4, 4, 2), kind="t4")


def test_relinear_starts_exist_where_a_first_order_twin_does():
    assert kinds.relinear_starts(kinds.get("quadralib")) == {"a": "zero", "b": "kaiming", "c": "kaiming"}
    for kind in ("t2", "t3"):
        with pytest.raises(ValueError, match=f"kind '{kind}' .*that have one: first_order, t4, quadralib"):
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
