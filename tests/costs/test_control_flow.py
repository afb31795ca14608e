"""What is nested is counted as often as it runs, under the names of everything around it."""

import functools

import jax
import pytest
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jaxeff import costs

W = jnp.ones((4, 4))
X = jnp.ones((2, 4))
ONE = 2 * 4 * 4  # MACs of X @ W

analyze = functools.partial(costs.analyze, residuals=False)


def names(report):
    return [row.name for row in report.rows]


def test_scan_is_counted_by_its_length():
    assert analyze(lambda w, x: lax.scan(lambda c, _: (c @ w, None), x, length=5)[0], W, X).total.macs == 5 * ONE


def test_nested_scans_multiply():
    inner = lambda w, x: lax.scan(lambda c, _: (c @ w, None), x, length=3)[0]
    outer = lambda w, x: lax.scan(lambda c, _: (inner(w, c), None), x, length=5)[0]
    assert analyze(outer, W, X).total.macs == 15 * ONE


def test_scan_of_length_zero_costs_nothing():
    assert analyze(lambda w, x: lax.scan(lambda c, _: (c @ w, None), x, length=0)[0], W, X).total.macs == 0


@pytest.mark.parametrize("bounds", [(0, 6), (jnp.int32(2), jnp.int32(8))])
def test_fori_loop_with_known_bounds_is_counted_exactly(bounds):
    report = analyze(lambda w, x: lax.fori_loop(*bounds, lambda i, c: c @ w, x), W, X)
    assert report.total.macs == 6 * ONE
    assert report.notes == ()


def test_while_loop_with_literal_bound_is_counted_exactly():
    loop = lambda w, x: lax.while_loop(lambda s: s[0] < 7, lambda s: (s[0] + 2, s[1] @ w), (0, x))[1]
    assert analyze(loop, W, X).total.macs == 4 * ONE


@pytest.mark.parametrize(
    "condition", [lambda s: jnp.sum(s[1]) < 9, lambda s: s[0] < jnp.int32(s[1].sum()), lambda s: s[0] >= 7]
)
def test_while_loop_of_unknown_length_is_counted_once_and_named(condition):
    def loop(w, x):
        with jax.named_scope("search"):
            return lax.while_loop(condition, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]

    report = analyze(loop, W, X)
    assert report.total.macs == ONE
    assert len(report.notes) == 1
    assert "search" in report.notes[0] and "once" in report.notes[0]


def test_fori_loop_up_to_an_argument_is_counted_once():
    report = analyze(lambda w, x, n: lax.fori_loop(0, n, lambda i, c: c @ w, x), W, X, jnp.int32(5))
    assert report.total.macs == ONE
    assert report.notes


def test_cond_counts_its_most_expensive_branch():
    branches = lambda w, x, flag: lax.cond(flag, lambda: x @ w, lambda: x @ w @ w)
    assert analyze(branches, W, X, jnp.bool_(True)).total.macs == 2 * ONE


def test_parameters_of_branches_that_are_not_taken_are_still_parameters():
    def experts(ws, x, index):
        def expert(name, times, w):
            def apply():
                with jax.named_scope(name):
                    y = x
                    for _ in range(times):
                        y = y @ w
                    return y

            return apply

        return lax.switch(index, [expert(f"expert{i}", i + 1, w) for i, w in enumerate(ws)])

    report = analyze(experts, [W, W + 1, W + 2], X, jnp.int32(0))
    assert report.total.macs == 3 * ONE
    assert [report.layer(f"expert{i}").params for i in range(3)] == [16, 16, 16]
    assert report.layer("expert0").macs == report.layer("expert0").moved_bytes == 0


def with_jvp_rule(fn):
    wrapped = jax.custom_jvp(fn)
    wrapped.defjvps(None, None)
    return wrapped


def with_batching_rule(fn):
    wrapped = jax.custom_batching.custom_vmap(fn)
    wrapped.def_vmap(lambda size, mapped, w, x: (jax.vmap(fn, [0 if m else None for m in mapped])(w, x), True))
    return wrapped


@pytest.mark.parametrize(
    "wrap", [jax.jit, jax.checkpoint, with_jvp_rule, with_batching_rule, lambda f: jax.jit(jax.jit(f))]
)
def test_calls_are_transparent(wrap):
    inner = wrap(jax.named_scope("inner")(lambda w, x: x @ w))

    def net(w, x):
        with jax.named_scope("outer"):
            return inner(w, x)

    report = analyze(net, W, X)
    assert names(report) == ["outer/inner"]
    assert (report.total.macs, report.total.params) == (ONE, 16)


def test_names_compose_through_scan_remat_and_jit():
    block = jax.jit(jax.checkpoint(jax.named_scope("block")(lambda w, x: jnp.sin(x @ w))))

    def net(w, x):
        with jax.named_scope("net"):
            return lax.scan(jax.named_scope("body")(lambda c, _: (block(w, c), None)), x, length=3)[0].sum()

    assert names(analyze(net, W, X))[0] == "net/body/block"
    backward = analyze(jax.vmap(jax.grad(net), (None, 0)), W, X[None])
    assert backward.layer("net/body/block").macs == (1 + 1 + 2) * 3 * ONE


def test_vmap_multiplies_the_work_and_keeps_the_names():
    net = jax.named_scope("net")(lambda w, x: x @ w)
    report = analyze(jax.vmap(net, (None, 0)), W, jnp.ones((3, 2, 4)))
    assert names(report) == ["net"]
    assert report.total.macs == 3 * ONE
    assert analyze(jax.vmap(net), jnp.ones((3, 4, 4)), jnp.ones((3, 2, 4))).total.macs == 3 * ONE


def test_lax_map_and_vmap_cost_the_same():
    batch = jnp.ones((3, 2, 4))
    mapped = analyze(lambda w, x: lax.map(lambda v: v @ w, x), W, batch)
    assert mapped.total.macs == analyze(lambda w, x: jax.vmap(lambda v: v @ w)(x), W, batch).total.macs


def test_shard_map_counts_the_work_of_all_devices():
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    report = costs.analyze(split, W, jnp.ones((8, 4)))
    assert report.total.macs == 4 * ONE
    assert report.total.params == 16
    assert report.total.residual_bytes == 8 * 4 * 4


def test_collectives_are_not_kept_alive_by_their_axis():
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def net(w, x):
        lax.psum(x @ w @ w, "data")
        return x @ w

    split = jax.shard_map(net, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    assert analyze(split, W, jnp.ones((4, 4))).total.macs == 2 * ONE


def test_pallas_kernel_counts_its_grid():
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    def product(y, x):
        specs = [pl.BlockSpec((4, 8), lambda i, j: (i, 0)), pl.BlockSpec((8, 4), lambda i, j: (0, j))]
        out = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        block = pl.BlockSpec((4, 4), lambda i, j: (i, j))
        return pl.pallas_call(kernel, out, grid=(2, 2), in_specs=specs, out_specs=block, interpret=True)(x, y)

    report = analyze(product, jnp.ones((8, 8)), jnp.ones((8, 8)))
    assert report.total.macs == 8 * 8 * 8
    assert report.total.moved_bytes == 3 * 8 * 8 * 4


def test_work_that_nobody_reads_costs_nothing():
    def net(w, x):
        x @ w @ w
        return x @ w

    assert analyze(net, W, X).total.macs == ONE


def test_unread_gradient_of_a_custom_rule_costs_nothing():
    @jax.custom_vjp
    def dense(w, x):
        return x @ w

    dense.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))
    assert analyze(jax.grad(lambda w, x: dense(w, x).sum()), W, X).total.macs == ONE


def test_work_behind_a_side_effect_counts():
    def net(w, x):
        jax.debug.print("{}", x @ w)
        return x

    assert analyze(net, W, X).total.macs == ONE
