"""The compiled convolution against loops in NumPy in float64: what is kept, its gradients, and what it refuses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import costs
from jaxeff.ops import gathered_conv as module
from jaxeff.ops import native
from jaxeff.ops.gathered_conv import gathered_conv

missing = module.unavailable(np.float32)
compiled = pytest.mark.skipif(bool(missing), reason=str(missing))


def by_loops(x, k, strides, padding, dilation, cotangent):
    """Output and gradients of a convolution, one product of an output position and a tap at a time."""
    x, k, cotangent = (np.asarray(a, np.float64) for a in (x, k, cotangent))
    out, taps = cotangent.shape[1:-1], k.shape[:-2]
    y, dx, dk = np.zeros(cotangent.shape), np.zeros(x.shape), np.zeros(k.shape)
    for o in itertools.product(*map(range, out)):
        for t in itertools.product(*map(range, taps)):
            at = tuple(
                a * s + b * d - low for a, s, b, d, (low, _) in zip(o, strides, t, dilation, padding, strict=True)
            )
            if not all(0 <= a < n for a, n in zip(at, x.shape[1:-1], strict=True)):
                continue
            there, here = (slice(None), *at), (slice(None), *o)
            y[here] += x[there] @ k[t]
            dx[there] += cotangent[here] @ k[t].T
            dk[t] += x[there].T @ cotangent[here]
    return y, dx, dk


def check(seed, batch, size, channels, features, taps, strides, padding, dilation, kept=None, columns=None, made=None):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, *size, channels)).astype(np.float32)
    k = rng.normal(size=(*taps, channels, features)).astype(np.float32)
    mask, chosen = np.ones((batch, int(np.prod(size)), channels)), {}
    for name, count, axis in (("channels", kept, 2), ("columns", columns, 1)):
        if count is None:
            continue
        indices = np.sort([rng.permutation(mask.shape[axis])[:count] for _ in range(batch)]).astype(np.int32)
        chosen[name] = jnp.asarray(indices)
        flags = np.zeros((batch, mask.shape[axis]))
        np.put_along_axis(flags, indices, 1, 1)
        mask *= np.expand_dims(flags, 3 - axis)
    mask, there = mask.reshape(x.shape), np.ones((batch, features))
    if made is not None:
        chosen["features"] = jnp.asarray(np.sort([rng.permutation(features)[:made] for _ in range(batch)]), jnp.int32)
        there = np.zeros((batch, features))
        np.put_along_axis(there, np.asarray(chosen["features"]), 1, 1)
    there = there.reshape(batch, *(1,) * len(size), features)

    @jax.jit
    def run(x, k, chosen):
        y, pullback = jax.vjp(lambda x, k: gathered_conv(x, k, strides, padding, dilation, **chosen), x, k)
        return y, *pullback(jnp.cos(y))

    y, dx, dk = run(np.where(mask, x, np.nan), k, chosen)  # what is dropped is never read
    expected = by_loops(x * mask, k, strides, padding, dilation, there * np.cos(np.asarray(y, np.float64)))
    for ours, theirs in ((y, there * expected[0]), (dx, expected[1] * mask), (dk, expected[2])):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, np.abs(theirs).max()))


@compiled
@pytest.mark.parametrize(
    ("batch", "size", "channels", "features", "kept", "columns", "made"),
    [
        # The sizes at which it takes another way: blocks of 64 outputs, vectors of 16, pieces of 128 and 256 positions,
        # products by tap and by patches, kernels that are copied or mirrored first and such that are not.
        (1, (24, 24), 3, 70, None, None, None),
        (2, (18, 16), 20, 17, None, None, None),
        (2, (18, 16), 20, 17, 7, None, None),
        (2, (18, 16), 20, 17, None, 100, None),
        (3, (5, 5), 20, 130, 18, 13, None),
        (3, (5, 5), 70, 33, 66, None, None),
        (9, (2, 2), 40, 40, 3, None, None),
        (9, (2, 2), 40, 40, 30, 3, None),
        (5, (4, 4), 17, 65, None, None, None),
        (2, (4, 4), 600, 20, 550, None, None),
        (2, (6, 6), 1100, 20, 200, None, None),
        (1, (3, 3), 20, 6, 9, None, None),
        (2, (18, 16), 20, 150, None, None, 90),
        (3, (5, 5), 20, 40, 9, 13, 17),
        (2, (6, 6), 3, 20, None, None, 1),
    ],
)
def test_every_way_equals_loops(batch, size, channels, features, kept, columns, made):
    check(0, batch, size, channels, features, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), kept, columns, made)


@compiled
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_window_equals_loops(data):
    rank = data.draw(st.integers(1, 3))
    axes = [
        data.draw(
            st.tuples(st.integers(4, 7), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(0, 2),
                      st.integers(1, 2))
        )
        for _ in range(rank)
    ]  # fmt: skip
    size, taps, strides, low, high, dilation = zip(*axes, strict=True)
    padding = tuple(zip(low, high, strict=True))
    size = tuple(max(n, (t - 1) * d + 1) for n, t, d in zip(size, taps, dilation, strict=True))
    channels, positions = data.draw(st.integers(1, 5)), int(np.prod(size))
    kept = data.draw(st.sampled_from([None, 1, channels]))
    columns = data.draw(st.sampled_from([None, 1, positions - 1]))
    batch, features = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    made = data.draw(st.sampled_from([None, 1, features]))
    check(0, batch, size, channels, features, taps, strides, padding, dilation, kept, columns, made)


@compiled
def test_nothing_is_computed_of_nothing():
    for shape, kernel in (
        ((0, 4, 4, 3), (3, 3, 3, 2)),
        ((2, 4, 4, 3), (3, 3, 3, 0)),
        ((2, 2, 2, 3), (3, 3, 3, 2)),
        ((2, 1, 1, 3), (3, 3, 3, 2)),
    ):
        x, k = jnp.ones(shape), jnp.ones(kernel)
        y, pullback = jax.vjp(lambda x, k: gathered_conv(x, k, (1, 1), ((0, 0), (0, 0)), (1, 1)), x, k)
        assert y.shape == (shape[0], max(0, shape[1] - 2), max(0, shape[2] - 2), kernel[3]) and y.size == 0
        assert [g.shape for g in pullback(y)] == [shape, kernel] and not any(map(np.any, pullback(y)))


@compiled
@pytest.mark.parametrize("index", [-1, 4])
@pytest.mark.parametrize("what", ["channels", "columns"])
def test_indices_out_of_range_stop_the_program(what, index):
    x, k, chosen = jnp.ones((2, 2, 2, 4)), jnp.ones((1, 1, 4, 3)), {what: jnp.array([[0, 1], [2, index]])}
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"an index of {what} is {index}, of 4"):
        jax.block_until_ready(gathered_conv(x, k, (1, 1), ((0, 0), (0, 0)), (1, 1), **chosen))


@compiled
@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"channels": [[2, 1], [0, 1]]}, "indices of channels must ascend; sort them, and take none twice"),
        ({"channels": [[0, 1], [3, 3]]}, "indices of channels must ascend"),
        ({"columns": [[0, 1], [2, 2]]}, "index 2 of columns is there twice"),
    ],
)
def test_indices_in_another_order_stop_the_program(chosen, message):
    x, k, chosen = jnp.ones((2, 2, 2, 4)), jnp.ones((1, 1, 4, 3)), jax.tree.map(jnp.asarray, chosen)
    chosen = {name: jnp.asarray(rows) for name, rows in chosen.items()}
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(gathered_conv(x, k, (1, 1), ((0, 0), (0, 0)), (1, 1), **chosen))


@compiled
def test_columns_may_come_in_any_order_and_indices_in_any_integers():
    rng = np.random.default_rng(3)
    x, k = rng.normal(size=(2, 4, 4, 5)).astype(np.float32), rng.normal(size=(3, 3, 5, 6)).astype(np.float32)
    columns = jnp.asarray([rng.permutation(16)[:7] for _ in range(2)])
    conv = lambda columns, dtype: gathered_conv(
        x, k, (1, 1), ((1, 1), (1, 1)), (1, 1), jnp.array([[0, 3], [1, 4]], dtype), columns.astype(dtype)
    )
    ordered = conv(jnp.sort(columns), jnp.int32)
    for dtype in (jnp.uint8, jnp.int16, jnp.uint32):
        np.testing.assert_allclose(conv(columns, dtype), ordered, rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.parametrize(
    ("x", "k", "chosen", "message"),
    [
        ((2, 4, 4, 8), (3, 3, 4, 5), {}, r"kernel \[\*taps, C, O\], got \(2, 4, 4, 8\) and \(3, 3, 4, 5\)"),
        ((2, 4, 4, 8), (3, 8, 5), {}, r"x must be \[N, \*space, C\]"),
        ((2, 4, 4, 8), (3, 3, 8, 5), {"channels": (1, 2)}, r"channels must be of shape \[2, 1..8\], got \(1, 2\)"),
        ((2, 4, 4, 8), (3, 3, 8, 5), {"channels": (2, 0)}, r"channels must be of shape \[2, 1..8\], got \(2, 0\)"),
        ((2, 4, 4, 8), (3, 3, 8, 5), {"columns": (2, 17)}, r"columns must be of shape \[2, 1..16\], got \(2, 17\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, k, chosen, message):
    chosen = {name: jnp.zeros(shape, jnp.int32) for name, shape in chosen.items()}
    with pytest.raises(ValueError, match=message):
        gathered_conv(jnp.ones(x), jnp.ones(k), (1, 1), ((1, 1), (1, 1)), (1, 1), **chosen)


@compiled
def test_gradients_of_gradients():
    rng = np.random.default_rng(4)
    x, k = rng.normal(size=(2, 5, 5, 6)).astype(np.float32), rng.normal(size=(3, 3, 6, 4)).astype(np.float32)
    channels = jnp.array([[0, 2, 5], [1, 2, 3]])
    mask = np.zeros((2, 6), np.float32)
    np.put_along_axis(mask, np.asarray(channels), 1, 1)

    def penalty(conv):
        slope = jax.grad(lambda x, k: jnp.sin(conv(x, k)).sum(), (0, 1))
        return lambda x, k: sum((g**2).sum() for g in slope(x, k))

    window = (2, 1), ((1, 1), (0, 1))
    ours = jax.grad(penalty(lambda x, k: gathered_conv(x, k, *window, (1, 1), channels)), (0, 1))(x, k)
    stock = lambda x, k: jax.lax.conv_general_dilated(
        x * mask[:, None, None], k, *window, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    for found, expected in zip(ours, jax.grad(penalty(stock), (0, 1))(x, k), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@compiled
def test_shared_kernels_inside_shard_map():
    rng = np.random.default_rng(5)
    x, k = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 4, 4, 3), (3, 3, 3, 2)))
    conv = lambda x, k: gathered_conv(x, k, (1, 1), ((1, 1), (1, 1)), (1, 1))
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("batch",))
    sharded = jax.shard_map(conv, mesh=mesh, in_specs=(jax.P("batch"), jax.P()), out_specs=jax.P("batch"))
    found, expected = (jax.grad(lambda x, k, f=f: (f(x, k) ** 2).sum(), (0, 1))(x, k) for f in (sharded, conv))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@compiled
def test_the_same_bits_every_time():
    rng = np.random.default_rng(0)
    x, k = jnp.asarray(rng.normal(size=(4, 12, 12, 24)), jnp.float32), jnp.asarray(rng.normal(size=(3, 3, 24, 80)))
    run = jax.jit(jax.value_and_grad(lambda k: (gathered_conv(x, k, (1, 1), ((1, 1), (1, 1)), (1, 1)) ** 2).sum()))
    first, *others = (run(k.astype(jnp.float32)) for _ in range(5))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@compiled
def test_mapped_kernels_and_mapped_inputs():
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=(3, 2, 5, 5, 4)).astype(np.float32), rng.normal(size=(3, 3, 3, 4, 6)).astype(np.float32)
    conv = lambda x, k: gathered_conv(x, k, (1, 1), ((1, 1), (1, 1)), (1, 1))
    both = jax.vmap(jax.grad(lambda k, x: conv(x, k).sum()))(k, x)
    shared = jax.vmap(conv, (0, None))(x, k[0])
    for i in range(3):
        np.testing.assert_allclose(both[i], jax.grad(lambda k, x: conv(x, k).sum())(k[i], x[i]), rtol=1e-5)
        np.testing.assert_allclose(shared[i], conv(x[i], k[0]), rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.parametrize("convention", ["paper", "xla"])
def test_its_work_is_counted(convention):
    x, k = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 6))
    window = (1, 1), ((1, 1), (1, 1)), (1, 1)

    def macs(function, *args):
        report = costs.analyze(function, *args, convention=convention)
        assert not any("ffi_call" in note for note in report.notes)
        return report.total.macs

    stock = macs(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, *window[:2], rhs_dilation=window[2], dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        x, k,
    )  # fmt: skip
    assert macs(lambda x, k: gathered_conv(x, k, *window), x, k) == stock
    half = {"channels": jnp.zeros((2, 2), jnp.int32), "columns": jnp.zeros((2, 16), jnp.int32)}
    assert macs(lambda x, k: gathered_conv(x, k, *window, **half), x, k) == stock // 8


def test_it_says_why_it_cannot_be_had(monkeypatch):
    assert "it computes in float32, not in bfloat16" in module.unavailable(jnp.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert "it is made for CPU, and the backend is gpu" in module.unavailable(jnp.float32)
    monkeypatch.setattr(native, "reason", lambda *_: "there is no C++ compiler")
    assert module.unavailable(jnp.float32) == "there is no C++ compiler"


@compiled
@pytest.mark.parametrize("name", ["channels", "columns", "features"])
def test_indices_that_are_no_integers_are_refused(name):
    x, k = jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 3, 3, 2))
    with pytest.raises(TypeError, match=f"{name} must be integers, got float32"):
        gathered_conv(x, k, (1, 1), ((1, 1), (1, 1)), (1, 1), **{name: jnp.zeros((1, 1))})
