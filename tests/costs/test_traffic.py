"""Bytes that leave layers and bytes that must move, against sums worked out by hand."""

import jax
from jax import lax
from jax import numpy as jnp

from jaxeff import costs

W, X = jnp.ones((4, 4)), jnp.ones((8, 4))
WEIGHT, ACTIVATION = 64, 128


def analyze(fn, *args, **options):
    return costs.analyze(fn, *args, residuals=False, **options)


def layer(name, fn):
    return jax.named_scope(name)(fn)


def test_a_chain_of_layers_reads_and_writes_each_value_once():
    first = layer("first", lambda w, x: jnp.tanh(jnp.tanh(x @ w)))
    second = layer("second", lambda w, x: x @ w + x)
    report = analyze(lambda w, x: second(w[1], first(w[0], x)), (W, W + 1), X)
    for row in report.rows:
        assert row.activation_bytes == ACTIVATION
        assert row.moved_bytes == ACTIVATION + WEIGHT + ACTIVATION


def test_a_value_read_by_two_layers_leaves_once_and_enters_twice():
    fork = layer("fork", jnp.tanh)
    left, right = layer("left", jnp.sin), layer("right", jnp.cos)

    def net(x):
        x = fork(x)
        return left(x), right(x)

    report = analyze(net, X)
    assert report.layer("fork").activation_bytes == ACTIVATION
    assert report.layer("left").moved_bytes == report.layer("right").moved_bytes == 2 * ACTIVATION


def test_values_inside_a_layer_do_not_count():
    assert analyze(lambda x: jnp.sin(jnp.cos(jnp.tanh(x))), X).total.activation_bytes == ACTIVATION


def test_the_carry_of_a_loop_leaves_and_enters_at_every_trip():
    block = layer("block", lambda w, x: jnp.tanh(x @ w))
    report = analyze(lambda w, x: lax.scan(lambda c, _: (block(w, c), None), x, length=5)[0], W, X)
    unrolled = lambda w, x: [x := layer(f"block{i}", lambda w, x: jnp.tanh(x @ w))(w, x) for i in range(5)][-1]
    straight = analyze(unrolled, W, X)
    assert report.total.activation_bytes == straight.total.activation_bytes == 5 * ACTIVATION
    assert report.total.moved_bytes == straight.total.moved_bytes


def test_slices_and_stacks_of_a_loop_move_once_in_all():
    report = analyze(lambda x: lax.map(jnp.sin, x), X)
    assert report.total.activation_bytes == ACTIVATION
    assert report.total.moved_bytes == 2 * ACTIVATION


def test_a_lookup_reads_only_its_rows():
    table, ids = jnp.ones((1000, 4)), jnp.arange(3)
    lookup = lambda table, ids: table.at[ids].get(mode="promise_in_bounds")
    report = analyze(lookup, table, ids)
    rows = 3 * 4 * 4
    assert report.total.moved_bytes == rows + ids.nbytes + rows


def test_low_precision_halves_the_bytes():
    net = layer("net", lambda w, x: jnp.tanh(x @ w))
    half = analyze(net, W.astype(jnp.bfloat16), X.astype(jnp.bfloat16))
    assert 2 * half.total.moved_bytes == analyze(net, W, X).total.moved_bytes


def test_captured_constants_are_read_by_the_layer():
    report = analyze(layer("net", lambda x: x @ W), X, params_argnum=None)
    assert report.layer("net").moved_bytes == ACTIVATION + WEIGHT + ACTIVATION
    assert report.total.params == 0


def test_random_keys_and_dropped_outputs_are_understood():
    def dropout(x, key):
        values, _ = lax.top_k(x, 2)
        return values * jax.random.bernoulli(key, 0.5, values.shape)

    report = costs.analyze(dropout, X, jax.random.key(0))
    assert report.total.activation_bytes == 8 * 2 * 4
