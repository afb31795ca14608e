"""Memory policies: gradients equal plain differentiation, and the compiled program really holds less."""

import functools

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from jaxeff import costs
from jaxeff.quadratic import QuadraticConv, QuadraticDense, conv_block, dense_block


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def variables_of(layer, x):
    """Random variables: norms that do something, biases that are not zero."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: 0.5 + 0.3 * normal(leaf.size, *leaf.shape), shapes)


def gradients(layer, variables, x, g, piece_bytes=None):
    """Output, changed statistics and gradients by parameters and input of a layer in training."""

    @jax.jit
    def run(variables, x):
        rest = {name: value for name, value in variables.items() if name != "params"}

        def forward(params, x):
            return layer.apply({"params": params, **rest}, x, train=True, mutable=["batch_stats"])

        y, pullback, changed = jax.vjp(forward, variables["params"], x, has_aux=True)
        return y, changed, pullback(g)

    return run(variables, x)


def assert_equal_to_plain(layer, x, features=6, tolerance=1e-4):
    variables = variables_of(layer, x)
    shape = jax.eval_shape(lambda: layer.apply(variables, x)).shape
    g = normal(7, *shape).astype(x.dtype)
    y, changed, (by_params, by_x) = gradients(layer.clone(save="all"), variables, x, g)
    for save in ("ab", "x"):
        ours = gradients(layer.clone(save=save), variables, x, g)
        for name, a, b in (("y", y, ours[0]), ("x", by_x, ours[2][1])):
            assert_close(name, a, b, tolerance)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(by_params))
        paths = jax.tree_util.tree_flatten_with_path(by_params)[0]
        for (path, a), b in zip(paths, jax.tree.leaves(ours[2][0]), strict=True):
            name = jax.tree_util.keystr(path)
            # Before a batch norm the gradient of an offset, or of a scale, is nothing but rounding.
            before = "bias" in name or "norm_" in name
            nothing = before and "norm_out" not in name and "batch" in (layer.branch_norm, layer.out_norm)
            assert_close(name, a, b, tolerance, max(float(jnp.abs(a).max()), (0.1 if nothing else 1e-3) * largest))
        jax.tree.map(functools.partial(assert_close, "statistics", tolerance=tolerance), changed, ours[1])


def assert_close(name, expected, actual, tolerance, scale=None):
    assert expected.shape == actual.shape and expected.dtype == actual.dtype, name
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    scale = np.abs(expected).max() if scale is None else scale
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(scale, 1e-6), err_msg=name)


NORMS = [
    dict(),
    dict(branch_norm="batch", out_norm="batch", act="relu"),
    dict(branch_norm="batch", use_bias=True, branch_act="relu"),
    dict(out_norm="batch", act="relu"),
    dict(branch_norm="group", out_norm="layer", act="gelu"),
    dict(branch_norm="rms", out_norm="batch"),
]


@pytest.fixture(params=[1, 5])
def pieces(request, monkeypatch):
    """The number of examples in a piece; batches of 11 leave one over."""
    from jaxeff.quadratic import backward

    monkeypatch.setattr(backward, "PIECE_BYTES", 0)
    monkeypatch.setattr(backward, "_piece_size", lambda *_: request.param)


@pytest.mark.parametrize("settings", NORMS, ids=lambda s: "-".join(map(str, s.values())) or "plain")
def test_gradients_equal_plain_differentiation(settings, pieces):
    layer = QuadraticConv(6, (3, 3), (2, 1), feature_group_count=2, **settings)
    assert_equal_to_plain(layer, normal(0, 11, 5, 4, 4))


def numpy_block(params, x):
    """A dense layer of QuadraLib's neurons with batch norms on projections and output, and tanh; float64."""

    def norm(z, name):
        own = params[f"norm_{name}"]
        return (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) * own["scale"] + own["bias"]

    a, b, c = (norm(x @ params[f"kernel_{p}"] + params[f"bias_{p}"], p) for p in "abc")
    return np.tanh(norm(a * b + c, "out"))


@pytest.mark.parametrize("save", ["all", "ab", "x"])
def test_gradients_through_both_norms_equal_differences_of_numpy(save):
    norms = {
        name: {"scale": 1 + 0.3 * normal(i, 4), "bias": normal(9 + i, 4)} for i, name in enumerate([*"abc", "out"])
    }
    params = {f"norm_{name}": norm for name, norm in norms.items()}
    params |= {f"kernel_{p}": normal(20 + i, 3, 4) for i, p in enumerate("abc")}
    params |= {f"bias_{p}": normal(30 + i, 4) for i, p in enumerate("abc")}
    x, g = normal(40, 7, 3), normal(41, 7, 4)

    def ours(params, x):
        y, _ = dense_block(params, x, branch_norm="batch", out_norm="batch", act="tanh", save=save, piece_bytes=50)
        return jnp.sum(g * y)

    found = jax.tree.leaves(jax.jit(jax.grad(ours, (0, 1)))(params, x))
    leaves, tree = jax.tree.flatten(jax.tree.map(np.float64, (params, x)))
    rng = np.random.default_rng(0)
    for i, leaf in enumerate(leaves):
        way = rng.normal(size=leaf.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [*leaves[:i], leaf + step * way, *leaves[i + 1 :]]
            ends.append(np.sum(g * numpy_block(*jax.tree.unflatten(tree, moved))))
        assert np.sum(found[i] * way) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=2e-4)


KINDS = (
    *("first_order", "t1", "t1_symmetric", "t1_low_rank(rank=2)", "t1_linear", "t1_t2", "t2", "t3", "t4", "t2_t4"),
    *("fan", "qres", "reduced", "bergstra(rank=2)", "emitting(rank=2)", "ccp(order=2)", "ncp(order=2)"),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_every_policy(kind):
    assert_equal_to_plain(QuadraticDense(6, kind=kind), normal(0, 7, 5))
    block = QuadraticConv(6, (2, 2), kind=kind, branch_norm="batch", out_norm="batch", act="relu")
    assert_equal_to_plain(block, normal(0, 7, 4, 4, 2))


def test_dense_layers_take_any_leading_axes():
    layer = QuadraticDense(6, branch_norm="batch", out_norm="batch")
    assert_equal_to_plain(layer, normal(0, 4, 3, 5))
    assert_equal_to_plain(QuadraticDense(6), normal(0, 5))
    assert_equal_to_plain(QuadraticDense(6), normal(0, 8))


def test_evaluation_uses_the_running_statistics_whatever_the_policy():
    x = normal(0, 3, 4, 4, 2)
    layer = QuadraticConv(6, branch_norm="batch", out_norm="batch", act="relu")
    variables = variables_of(layer, x)
    y = [layer.clone(save=save).apply(variables, x) for save in ("all", "ab", "x")]
    np.testing.assert_array_equal(y[0], y[1])
    np.testing.assert_array_equal(y[0], y[2])
    alone = layer.apply(variables, x[:1])
    np.testing.assert_allclose(alone, y[0][:1], atol=1e-5)


@pytest.mark.parametrize("save", ["ab", "x"])
def test_gradients_with_running_statistics_equal_plain_ones_and_keep_as_little(save):
    x = normal(0, 6, 4, 4, 8)
    layer = QuadraticConv(8, branch_norm="batch", out_norm="batch", act="relu", use_bias=True)
    variables = variables_of(layer, x)
    rest = {"batch_stats": jax.tree.map(np.abs, variables["batch_stats"])}

    def loss(params, x, save):
        return jnp.sum(jnp.sin(layer.clone(save=save).apply({"params": params, **rest}, x)))

    plain, ours = (
        jax.jit(jax.grad(functools.partial(loss, save=s), (0, 1)))(variables["params"], x) for s in ("all", save)
    )
    jax.tree.map(functools.partial(assert_close, save, tolerance=1e-4), plain, ours)
    kept = costs.analyze(functools.partial(loss, save=save), variables["params"], x).total.residual_bytes
    units = {"ab": 1 + 3, "x": 1}[save]
    # The sine of the loss keeps its input too.
    assert kept == pytest.approx((units + 1) * x.nbytes, rel=0.05)


def test_an_axis_that_is_bound_in_the_forward_pass_only_is_named():
    params = {f"kernel_{p}": normal(i, 3, 2) for i, p in enumerate("abc")}
    params |= {f"norm_{p}": {"scale": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)} for p in "abc"}

    def run(x, save):
        return dense_block(params, x, branch_norm="batch", axis_name="members", save=save)[0]

    def outside(x, save="x"):
        return jnp.sum(jnp.sin(jax.vmap(functools.partial(run, save=save), axis_name="members")(x)))

    def inside(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(run(x, "x"))))(x)

    x = normal(5, 2, 4, 3)
    with pytest.raises(ValueError, match="axis_name='members' is not bound in the backward pass"):
        jax.grad(outside)(x)
    expected = jax.grad(functools.partial(outside, save="all"))(x)
    np.testing.assert_allclose(jax.vmap(inside, axis_name="members")(x), expected, atol=1e-5)


@pytest.mark.parametrize("save", ["ab", "x"])
def test_bfloat16_parameters_have_the_gradients_of_plain_differentiation(save):
    types = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    layer = QuadraticDense(4, branch_norm="batch", use_bias=True, **types)
    x, g = (normal(seed, 32, width).astype(jnp.bfloat16) for seed, width in ((0, 5), (1, 4)))
    variables = layer.init(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: leaf + jnp.bfloat16(0.3), variables["params"])
    rest = {"batch_stats": variables["batch_stats"]}

    def gradient(save):
        def loss(params):
            y, _ = layer.clone(save=save).apply({"params": params, **rest}, x, True, mutable=["batch_stats"])
            return jnp.sum((y * g).astype(jnp.float32))

        return jax.grad(loss)(params)

    for ours, plain in zip(jax.tree.leaves(gradient(save)), jax.tree.leaves(gradient("all")), strict=True):
        # What rounding to bfloat16 leaves; the gradient of a bias before a batch norm is zero.
        ours, plain = ours.astype(np.float32), plain.astype(np.float32)
        np.testing.assert_allclose(ours, plain, atol=0.01 * max(1, np.abs(plain).max()))


def test_bfloat16_stays_finite_and_close_on_large_inputs():
    layer = QuadraticConv(8, dtype=jnp.bfloat16, branch_norm="batch", out_norm="batch", act="relu", save="x")
    x = 30 * normal(0, 8, 6, 6, 4)
    variables = variables_of(layer, x)
    g = normal(1, 8, 6, 6, 8).astype(jnp.bfloat16)
    y, _, (by_params, by_x) = gradients(layer, variables, x, g)
    assert y.dtype == jnp.bfloat16 and by_x.dtype == jnp.float32
    wide, _, (expected, _) = gradients(layer.clone(dtype=None, save="all"), variables, x, g.astype(np.float32))
    assert np.isfinite(np.asarray(y, np.float32)).all()
    np.testing.assert_allclose(np.asarray(y, np.float32), wide, atol=0.15)
    for a, b in zip(jax.tree.leaves(by_params), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32 and np.isfinite(a).all()
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b) + 1e-2


def test_policies_under_vmap_equal_the_layers_one_by_one():
    x = normal(0, 2, 5, 4)
    layer = QuadraticDense(6, branch_norm="batch", out_norm="batch", save="x")
    variables = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), variables_of(layer, x[0]))

    def loss(params, rest, x):
        return jnp.sin(layer.apply({"params": params, **rest}, x, True, mutable=["batch_stats"])[0]).sum()

    rest = {"batch_stats": variables["batch_stats"]}
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(variables["params"], rest, x)
    for i in range(2):
        alone = jax.grad(loss)(*jax.tree.map(lambda leaf, i=i: leaf[i], (variables["params"], rest, x)))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=2e-5), mapped, alone)


def test_plain_differentiation_is_of_any_mode_and_order():
    params = {f"kernel_{p}": normal(i, 3, 2) for i, p in enumerate("abc")}

    def energy(x):
        return dense_block(params, x)[0].sum()

    a, b = (params[f"kernel_{p}"].astype(np.float64) for p in "ab")
    expected = np.einsum("io,jo->ij", a, b)
    np.testing.assert_allclose(jax.hessian(energy)(normal(5, 3)), expected + expected.T, atol=1e-5)
    assert jax.jvp(energy, (normal(5, 3),), (normal(6, 3),))[1].shape == ()


def test_a_policy_that_does_not_exist_lists_those_that_do():
    params = {f"kernel_{p}": normal(i, 3, 2) for i, p in enumerate("abc")}
    with pytest.raises(ValueError, match="save must be one of 'all', 'ab', 'x', got 'none'"):
        dense_block(params, normal(0, 2, 3), save="none")


# --- the compiled program ---------------------------------------------------------------------------------------------


def temporaries(save, depth, scanned, norms, batch=64, size=32, channels=16):
    """Bytes that the compiled gradient of a stack of equal blocks holds besides arguments and results."""
    settings = dict(branch_norm="batch", out_norm="batch", act="relu") if norms else {}
    shape = (3, 3, channels, channels)
    params = {f"kernel_{p}": jax.ShapeDtypeStruct((depth, *shape), jnp.float32) for p in "abc"}
    for name in ("a", "b", "c", "out") if norms else ():
        leaf = jax.ShapeDtypeStruct((depth, channels), jnp.float32)
        params[f"norm_{name}"] = {"scale": leaf, "bias": leaf}

    def block(x, params):
        return conv_block(params, x, save=save, **settings)[0]

    def loss(params, x):
        if scanned:
            return lax.scan(lambda x, params: (block(x, params), None), x, params)[0].sum()
        for i in range(depth):
            x = block(x, jax.tree.map(lambda leaf, i=i: leaf[i], params))
        return x.sum()

    x = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
    unit = batch * size * size * channels * 4
    return compiled.memory_analysis().temp_size_in_bytes / unit


@pytest.mark.slow
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("scanned", "limit"), [(False, 2.0), (True, 1.1)])
def test_a_block_keeps_little_more_than_its_input(norms, scanned, limit):
    slope = (temporaries("x", 8, scanned, norms) - temporaries("x", 4, scanned, norms)) / 4
    plain = (temporaries("all", 8, scanned, norms) - temporaries("all", 4, scanned, norms)) / 4
    assert slope <= limit < plain
