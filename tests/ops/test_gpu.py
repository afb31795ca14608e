"""What must hold on a GPU: the stock convolution is chosen, and every other form computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import models, ops, quadratic, spec, training

pytestmark = pytest.mark.gpu
NUMBERS = ("NHWC", "HWIO", "NHWC")


def operands():
    x = jax.random.normal(jax.random.key(0), (4, 9, 9, 8))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 8, 16))
    return x, kernel


def conv(x, kernel, impl):
    return ops.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=NUMBERS, impl=impl, precision=jax.lax.Precision.HIGHEST
    )


def test_auto_is_the_stock_convolution():
    program = str(jax.make_jaxpr(lambda *args: conv(*args, "auto"))(*operands()))
    assert "conv_general_dilated" in program and "custom_vjp" not in program


def test_the_canonical_form_has_the_same_gradients():
    def loss(impl):
        return lambda *args: jnp.sum(jnp.sin(conv(*args, impl)))

    ours, stock = (jax.jit(jax.grad(loss(impl), (0, 1)))(*operands()) for impl in ("canonical", "lax"))
    for a, b in zip(ours, stock, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_grouped_forms_agree():
    x = jax.random.normal(jax.random.key(2), (4, 2, 6, 6, 3))
    kernel = jax.random.normal(jax.random.key(3), (4, 3, 3, 3, 5))
    highest = jax.lax.Precision.HIGHEST
    separate, matmul = (ops.grouped_conv(x, kernel, impl=i, precision=highest) for i in ("separate", "matmul"))
    np.testing.assert_allclose(separate, matmul, rtol=1e-4, atol=1e-4)


def test_a_quadratic_network_trains_in_bfloat16():
    architecture = spec.quadratize(models.cnn((8, 16), input_shape=(16, 16, 3)), branch_norm="batch")
    module = models.Network(architecture, conv=quadratic.conv_layer, dense=quadratic.dense_layer, dtype=jnp.bfloat16)
    method = training.classification(
        *training.from_linen(module), training.optimizer("sgd", 0.05, momentum=0.9), num_classes=10
    )
    batch = {"image": jax.random.uniform(jax.random.key(4), (32, 16, 16, 3)), "label": jnp.arange(32) % 10}
    state = method.init(jax.random.key(0), batch)
    step = jax.jit(method.step)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
