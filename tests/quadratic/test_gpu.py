"""The fused kernel compiled for a GPU, and that a policy holds less memory there too."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxeff.quadratic import QuadraticConv, dense

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64, 64), (300, 130, 200)])
def test_the_fused_kernel_equals_the_plain_layer(dtype, shape):
    rows, inputs, neurons = shape
    x = jax.random.normal(jax.random.key(0), (rows, inputs), dtype)
    params = {
        f"kernel_{p}": jax.random.normal(jax.random.key(i), (inputs, neurons), dtype) / np.sqrt(inputs).astype(dtype)
        for i, p in enumerate("abc", 1)
    }

    def both(impl):
        y, pullback = jax.vjp(lambda p, x: dense(p, x, impl=impl), params, x)
        return y, *pullback(y)

    fused, plain = jax.jit(lambda: both("fused"))(), jax.jit(lambda: both("separate"))()
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # Products of float32 run in TF32 here, with ten bits.
        assert np.linalg.norm(a - b) < 2e-2 * np.linalg.norm(b)


def test_the_policy_that_keeps_the_input_holds_less():
    x = jax.ShapeDtypeStruct((64, 32, 32, 64), jnp.float32)
    sizes = {}
    for save in ("all", "x"):
        stack = [QuadraticConv(64, branch_norm="batch", out_norm="batch", act="relu", save=save) for _ in range(4)]
        variables = [jax.eval_shape(layer.init, jax.random.key(0), x) for layer in stack]

        def loss(variables, x, stack=stack):
            for layer, own in zip(stack, variables, strict=True):
                x = layer.apply(own, x, True, mutable=["batch_stats"])[0]
            return x.sum()

        compiled = jax.jit(jax.grad(loss)).lower(variables, x).compile()
        sizes[save] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes["x"] < 0.6 * sizes["all"]
