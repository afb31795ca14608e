"""What reverse mode keeps, against sizes worked out by hand and against the arrays a pullback really holds."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from jaxeff import costs

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 4))
W = jax.random.normal(KEY, (4, 4))
ACTIVATION = 8 * 4 * 4  # bytes of one float32 activation


def kept(fn, *args, **options):
    report = costs.analyze(fn, *args, **options)
    return {row.name: row.residual_bytes for row in report.rows if row.residual_bytes}


def test_dense_keeps_its_input_and_tanh_its_output():
    def net(w, x):
        with jax.named_scope("first"):
            x = jnp.sin(x @ w)
        with jax.named_scope("second"):
            return x @ w

    # sin keeps its derivative, the second product the output of the first layer, the first product the network's input
    assert kept(net, W, X) == {"first": 2 * ACTIVATION, "(inputs)": ACTIVATION}


def test_residuals_match_the_arrays_that_a_pullback_holds():
    def net(w, x):
        return jnp.exp(jnp.tanh(x @ w) @ w).sum()

    _, pullback = jax.vjp(net, W, X)
    held = {id(leaf): leaf for leaf in jax.tree.leaves(pullback) if leaf is not W}
    assert costs.analyze(net, W, X).total.residual_bytes == sum(leaf.nbytes for leaf in held.values())


@pytest.mark.parametrize(("keeps_branches", "expected"), [(False, ACTIVATION), (True, 3 * ACTIVATION)])
def test_custom_rules_keep_only_what_they_declare(keeps_branches, expected):
    @jax.custom_vjp
    def quadratic(w, x):
        return (x @ w[0]) * (x @ w[1])

    def forward(w, x):
        a, b = x @ w[0], x @ w[1]
        return a * b, (w, x, a, b) if keeps_branches else (w, x)

    def backward(kept, g):
        w, x = kept[:2]
        a, b = kept[2:] if keeps_branches else (x @ w[0], x @ w[1])
        return (x.T @ (g * b), x.T @ (g * a)), (g * b) @ w[0].T + (g * a) @ w[1].T

    quadratic.defvjp(forward, backward)

    def net(w, x):
        with jax.named_scope("embed"):
            x = x * 2
        with jax.named_scope("quadratic"):
            return quadratic(w, x)

    report = costs.analyze(net, (W, W + 1), X)
    assert report.total.residual_bytes == expected
    assert report.layer("embed").residual_bytes == ACTIVATION
    assert report.layer("quadratic").residual_bytes == expected - ACTIVATION


def test_remat_keeps_only_its_input():
    block = lambda w, x: jnp.sin(jnp.sin(x @ w) @ w)
    assert kept(block, W, X)["(outside)"] == 3 * ACTIVATION
    assert kept(jax.checkpoint(block), W, X) == {"(inputs)": ACTIVATION}


def test_scan_keeps_one_copy_for_each_trip():
    def net(w, x):
        return lax.scan(jax.named_scope("block")(lambda c, _: (jnp.sin(c @ w), None)), x, length=5)[0]

    assert kept(net, W, X) == {"block": 2 * 5 * ACTIVATION}


def test_stacked_parameters_of_a_scan_are_not_residuals():
    net = lambda w, x: lax.scan(lambda c, w: (c @ w, None), x, w)[0]
    assert sum(kept(net, jnp.ones((5, 4, 4)), X).values()) == 5 * ACTIVATION


def test_relu_keeps_a_mask_of_one_byte_per_element():
    assert kept(lambda w, x: jax.nn.relu(x @ w), W, X) == {"(outside)": ACTIVATION // 4, "(inputs)": ACTIVATION}


def test_reshaped_residuals_are_counted_once():
    def net(w, x):
        y = jnp.sin(x)
        return y @ w, y.reshape(4, 8) @ jnp.ones((8, 8)) * y.reshape(4, 8), y.T @ y

    assert kept(net, W, X, params_argnum=None)["(outside)"] <= 3 * ACTIVATION


def test_parameters_are_inputs_when_no_argument_holds_parameters():
    assert kept(lambda w, x: x @ w, W, X, params_argnum=None) == {"(inputs)": ACTIVATION + W.nbytes}


def test_integer_arguments_are_kept_but_not_differentiated():
    tokens = np.arange(3, dtype=np.int32)
    report = costs.analyze(lambda table, tokens: table[tokens] * 2, jnp.ones((10, 4)), tokens)
    assert 0 < report.total.residual_bytes <= 2 * 4 * tokens.size


def test_residuals_are_left_out_on_request():
    report = costs.analyze(lambda w, x: x @ w, W, X, residuals=False)
    assert report.total.residual_bytes is None
    assert report.rows[0].residual_bytes is None


def test_function_without_reverse_mode_says_how_to_go_on():
    loop = lambda w, x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x)
    with pytest.raises(ValueError, match="reverse mode.*while_loop.*residuals=False"):
        costs.analyze(loop, W, X)
