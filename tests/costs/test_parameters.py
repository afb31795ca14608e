"""Parameters belong to the layer that reads them first, whatever they are called."""

import jax
import pytest
from jax import lax
from jax import numpy as jnp

from jaxeff import costs


def dense(name, w, x):
    with jax.named_scope(name):
        return x @ w


def params(fn, *args, **options):
    report = costs.analyze(fn, *args, residuals=False, **options)
    return {row.name: row.params for row in report.rows if row.params} | {"total": report.total.params}


A, B, X = jnp.ones((4, 6)), jnp.ones((6, 3)), jnp.ones((2, 4))


def test_each_leaf_counts_where_it_is_read():
    net = lambda p, x: dense("second", p["a"], dense("first", p["z"], x))
    assert params(net, {"a": B, "z": A}, X) == {"first": 24, "second": 18, "total": 42}


def test_a_shared_leaf_counts_once_in_the_first_layer():
    w = jnp.ones((4, 4))
    assert params(lambda w, x: dense("b", w, dense("a", w, x)), w, X) == {"a": 16, "total": 16}


def test_unread_leaves_are_named():
    net = lambda p, x: dense("only", p[0], x)
    assert params(net, [A, B], X) == {"only": 24, "(unused)": 18, "total": 42}
    report = costs.analyze(net, [A, B], X)
    assert report.rows[-1].name == "(unused)"


def test_leaves_read_only_by_dead_code_are_unused():
    def net(p, x):
        dense("dead", p[1], dense("alive", p[0], x))
        return dense("alive", p[0], x)

    assert params(net, [A, B], X) == {"alive": 24, "(unused)": 18, "total": 42}


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.astype(jnp.bfloat16),
        lambda w: w.T.astype(jnp.float32).T,
        lambda w: w.reshape(2, 2, 6).reshape(4, 6),
        lambda w: jax.jit(lambda w: w.astype(jnp.bfloat16))(w),
    ],
)
def test_layout_changes_outside_any_scope_belong_to_the_reader(change):
    net = lambda w, x: dense("layer", change(w), x)
    assert params(net, A, X) == {"layer": 24, "total": 24}


def test_arithmetic_on_a_leaf_outside_any_scope_reads_it_there():
    assert params(lambda w, x: dense("layer", w * 2, x), A, X) == {"(outside)": 24, "total": 24}


def test_leaves_are_followed_through_jit_and_remat():
    net = jax.jit(lambda w, x: jax.checkpoint(lambda w, x: dense("deep", w, x))(w, x))
    assert params(net, A, X) == {"deep": 24, "total": 24}


def test_stacked_leaves_of_a_scan_count_with_their_whole_size():
    stack = jnp.ones((5, 4, 4))
    net = lambda w, x: lax.scan(lambda c, w: (dense("block", w, c), None), x, w)[0]
    report = costs.analyze(net, stack, X)
    assert report.layer("block").params == 80
    assert report.layer("block").macs == 5 * 2 * 4 * 4


def test_leaves_are_followed_through_the_carry_of_a_training_loop():
    def train(w, x):
        step = lambda w, _: (w - jax.grad(lambda w: dense("layer", w, x).sum())(w), None)
        return lax.scan(step, w, length=3)[0]

    assert params(train, A, X)["total"] == 24


def test_any_argument_can_hold_the_parameters():
    net = lambda x, w: dense("layer", w, x)
    assert params(net, X, A, params_argnum=1) == {"layer": 24, "total": 24}
    assert params(net, X, A, params_argnum=None) == {"total": 0}
