"""The fused kernel, interpreted, against NumPy in float64 and against the plain layer."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxeff import costs, quadratic
from jaxeff.quadratic import conv, conv_block, dense, kernels


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rows", [5, 40])
def test_values_and_gradients_equal_numpy(count, rows):
    x, g = normal(0, rows, 20), normal(1, rows, 24)
    weights = tuple(normal(2 + i, 20, 24) for i in range(count))
    biases = tuple(normal(8 + i, 24) for i in range(count))
    tile = kernels.Tile(16, 16, 16)
    y, pullback = jax.vjp(lambda x, w, b: kernels.fused_dense(x, w, b, tile, True), x, weights, biases)
    by_x, by_weights, by_biases = pullback(g)
    projections = [x.astype(np.float64) @ w + b for w, b in zip(weights, biases, strict=True)]
    a, b = projections[:2]
    np.testing.assert_allclose(y, a * b + sum(projections[2:]), atol=1e-3)
    slopes = [g * b, g * a, g][:count]
    np.testing.assert_allclose(by_x, sum(s @ w.T for s, w in zip(slopes, weights, strict=True)), atol=5e-3)
    for slope, weight, bias in zip(slopes, by_weights, by_biases, strict=True):
        np.testing.assert_allclose(weight, x.astype(np.float64).T @ slope, atol=5e-3)
        np.testing.assert_allclose(bias, slope.sum(0), atol=1e-3)


def test_bfloat16_is_accumulated_in_float32():
    x = jnp.asarray(normal(0, 16, 64), jnp.bfloat16)
    weights = tuple(jnp.asarray(normal(i, 64, 16), jnp.bfloat16) for i in range(3))
    y = kernels.fused_dense(x, weights, (jnp.zeros(16),) * 3, kernels.Tile(16, 16, 16), True)
    a, b, c = (np.asarray(x, np.float64) @ np.asarray(w, np.float64) for w in weights)
    assert y.dtype == jnp.bfloat16
    # One rounding of the result to eight bits, not one of each factor.
    np.testing.assert_allclose(np.asarray(y, np.float64), a * b + c, rtol=2**-8, atol=1e-2)


def test_layers_take_the_fused_form():
    params = {f"kernel_{p}": normal(i, 6, 4) for i, p in enumerate("abc")} | {"bias_b": normal(9, 4)}
    x = normal(5, 2, 3, 6)
    np.testing.assert_allclose(dense(params, x, impl="fused"), dense(params, x), atol=1e-4)
    pointwise = {name: v[None, None] if name[0] == "k" else v for name, v in params.items()}
    image = normal(6, 2, 3, 3, 6)
    settings = dict(out_norm="batch", act="relu")
    pointwise["norm_out"] = {"scale": normal(1, 4), "bias": normal(2, 4)}
    fused, plain = (conv_block(pointwise, image, impl=impl, **settings) for impl in ("fused", "separate"))
    np.testing.assert_allclose(fused[0], plain[0], atol=1e-4)
    np.testing.assert_allclose(fused[1]["out"].mean, plain[1]["out"].mean, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda k: dense({"kernel_c": k[0, 0]}, np.ones((1, 2)), kind="first_order", impl="fused"),
            "got 'first_order'",
        ),
        (
            lambda k: conv({f"kernel_{p}": k for p in "ab"}, np.ones((1, 4, 4, 2)), kind="t4", impl="fused"),
            "for 1x1 conv",
        ),
        (
            lambda k: conv_block(
                {f"kernel_{p}": k[:1, :1] for p in "ab"},
                np.ones((1, 4, 4, 2)),
                kind="t4",
                impl="fused",
                branch_act="relu",
            ),
            "nothing between projections and product, got branch_act",
        ),
    ],
)
def test_what_cannot_be_fused_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((3, 3, 2, 2), np.float32))


@pytest.mark.parametrize("save", ["ab", "x"])
def test_fused_layers_follow_the_policy_with_what_stands_behind_them(save):
    layer = quadratic.QuadraticDense(8, out_norm="batch", act="gelu", impl="fused", use_bias=True)
    x = normal(0, 8, 8)
    variables = layer.init(jax.random.key(0), x)
    rest = {"batch_stats": variables["batch_stats"]}

    def loss(params, x, layer):
        return jnp.sum(jnp.sin(layer.apply({"params": params, **rest}, x, True, mutable=["batch_stats"])[0]))

    plain = jax.grad(loss, (0, 1))(variables["params"], x, layer.clone(impl="separate"))
    ours = jax.grad(loss, (0, 1))(variables["params"], x, layer.clone(save=save))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours, plain)
    kept = [
        costs.analyze(lambda p, x, s=s: loss(p, x, layer.clone(save=s)), variables["params"], x).total.residual_bytes
        for s in (save, "all")
    ]
    assert kept[0] < kept[1]
