"""The convolution against loops over kernel taps in float64, against lax, and under every transformation."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jaxeff import compat
from jaxeff.ops import conv_general_dilated, conv_impl, gathered_conv

CHANNELS_LAST = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
canonical = partial(conv_general_dilated, impl="canonical", dimension_numbers=CHANNELS_LAST[2])
stock = partial(lax.conv_general_dilated, dimension_numbers=CHANNELS_LAST[2])


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_near(actual, expected, tolerance=2e-5):
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    atol = tolerance * np.abs(expected).max(initial=0)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=atol)


# --- against loops ----------------------------------------------------------------------------------------------------


def pairs_of(padding, space, kernel, strides, dilation):
    """(low, high) of the padding names, from their definition."""
    if not isinstance(padding, str):
        return padding
    pairs = []
    for size, taps, stride, d in zip(space, kernel, strides, dilation, strict=True):
        total = max((-(-size // stride) - 1) * stride + (taps - 1) * d + 1 - size, 0) if padding != "VALID" else 0
        low = total // 2 if padding == "SAME" else total - total // 2
        pairs.append((low, total - low))
    return pairs


def by_loops(x, k, strides, padding, lhs_dilation, rhs_dilation, groups, cotangent=None):
    """Channels-last convolution, one kernel tap at a time; with a cotangent also the gradients of both operands."""
    x, k = np.asarray(x, np.float64), np.asarray(k, np.float64)
    n, *space, _ = x.shape
    *kernel, per_group, features = k.shape
    dilated = [(size - 1) * d + 1 for size, d in zip(space, lhs_dilation, strict=True)]
    # A frame that holds the dilated input and every tap; cropping is reading from inside it.
    frame = max(max(map(abs, pair)) for pair in padding)
    inner = (slice(None), *(slice(frame, frame + s, d) for s, d in zip(dilated, lhs_dilation, strict=True)))
    full = np.zeros((n, *(s + 2 * frame for s in dilated), x.shape[-1]))
    full[inner] = x
    reach = [(taps - 1) * d + 1 for taps, d in zip(kernel, rhs_dilation, strict=True)]
    fit = [s + low + high - r for s, (low, high), r in zip(dilated, padding, reach, strict=True)]
    out = [max(f // s + 1, 0) for f, s in zip(fit, strides, strict=True)]
    y, dfull, dk = np.zeros((n, *out, features)), np.zeros_like(full), np.zeros_like(k)
    i, o = per_group, features // groups
    for tap in np.ndindex(*kernel) if 0 not in out else ():
        start = [frame - low + t * d for (low, _), t, d in zip(padding, tap, rhs_dilation, strict=True)]
        at = (slice(None), *(slice(a, a + (m - 1) * s + 1, s) for a, m, s in zip(start, out, strides, strict=True)))
        for g in range(groups):
            ins, outs = (..., slice(g * i, (g + 1) * i)), (..., slice(g * o, (g + 1) * o))
            y[outs] += full[at][ins] @ k[tap][outs]
            if cotangent is not None:
                dfull[at][ins] += cotangent[outs] @ k[tap][outs].T
                dk[tap][outs] += full[at][ins].reshape(-1, i).T @ cotangent[outs].reshape(-1, o)
    return y, dfull[inner], dk


def case(
    space=(7, 8), kernel=(3, 3), channels=3, features=4, strides=None, padding="SAME", lhs=None, rhs=None, groups=1,
    batch=2,
):  # fmt: skip
    ones = (1,) * len(space)
    return dict(batch=batch, space=space, kernel=kernel, channels=channels, features=features, strides=strides or ones,
                padding=padding, lhs=lhs or ones, rhs=rhs or ones, groups=groups)  # fmt: skip


ASYMMETRIC, NEGATIVE = ((0, 2), (3, 1)), ((-1, 1), (2, -2))
PADDINGS = {"same": "SAME", "valid": "VALID", "lower": "SAME_LOWER", "asymmetric": ASYMMETRIC, "negative": NEGATIVE}
TWO = dict(channels=4, features=6, groups=2)
DEPTHWISE = dict(channels=3, features=3, groups=3)
TWICE = dict(channels=3, features=6, groups=3)
MANY = dict(space=(4, 5), channels=80, features=40, groups=40)
BIG = dict(kernel=(8, 8))
SMALL = dict(space=(4, 4), channels=32, features=5)
WIDE = dict(batch=8, space=(7, 8), channels=8, features=20)
CASES = {
    **{
        f"stride{s}-{name}": case(strides=(s, s), padding=PADDINGS[name])
        for s, name in itertools.product((1, 2, 3), PADDINGS)
    },
    "strides-differ": case(strides=(1, 3), kernel=(2, 4)),
    "even-kernel": case(kernel=(2, 2)),
    "even-kernel-lower-stride2": case(kernel=(4, 2), padding="SAME_LOWER", strides=(2, 2)),
    "even-kernel-negative": case(kernel=(4, 2), padding=NEGATIVE, strides=(2, 1)),
    "negative-low-equals-high": case(padding=((-1, 1), (0, 0))),
    "pointwise-stride2": case(kernel=(1, 1), strides=(2, 2)),
    "kernel-dilated": case(rhs=(2, 3)),
    "kernel-dilated-stride2-valid": case(rhs=(2, 2), strides=(2, 2), padding="VALID"),
    "kernel-dilated-negative": case(rhs=(2, 1), padding=((-1, 2), (-2, 0)), strides=(1, 2)),
    "input-dilated": case(lhs=(2, 3), padding=((1, 1), (1, 1))),
    "input-dilated-stride2-negative": case(lhs=(2, 2), strides=(2, 3), padding=((-2, 1), (0, -3))),
    "both-dilated": case(lhs=(3, 2), rhs=(2, 2), strides=(2, 1), padding=((2, 0), (1, 3)), kernel=(2, 3)),
    "padding-beyond-kernel": case(kernel=(2, 1), padding=((3, 4), (2, 0)), strides=(2, 2)),
    "kernel-beyond-input": case(kernel=(9, 2), padding="VALID", strides=(2, 1)),
    "groups2": case(**TWO),
    "groups2-stride2-asymmetric": case(**TWO, strides=(2, 2), padding=ASYMMETRIC),
    "groups2-negative-dilated": case(**TWO, padding=((-1, 1), (2, -1)), rhs=(2, 1), lhs=(1, 2)),
    "depthwise": case(**DEPTHWISE),
    "depthwise-stride2-negative": case(**DEPTHWISE, strides=(2, 2), padding=NEGATIVE),
    "depthwise-both-dilated": case(**DEPTHWISE, lhs=(2, 1), rhs=(1, 2), padding=((1, 0), (2, 2)), strides=(3, 1)),
    "depthwise-kernel-beyond-input": case(**DEPTHWISE, kernel=(9, 2), padding="VALID", strides=(2, 1)),
    "depthwise-twice": case(**TWICE, strides=(2, 1)),
    "depthwise-twice-dilated": case(**TWICE, lhs=(1, 2), rhs=(2, 2), padding=((1, 1), (0, -1))),
    "depthwise-big-kernel": case(space=(9, 9), **BIG, **DEPTHWISE, strides=(2, 2)),
    "many-groups": case(**MANY, kernel=(2, 3), strides=(2, 1)),
    "many-groups-negative": case(**MANY, kernel=(2, 2), padding=NEGATIVE),
    "many-depthwise": case(space=(4, 5), channels=40, features=80, groups=40, kernel=(2, 3), rhs=(1, 2)),
    "big-kernel": case(space=(9, 9), **BIG),
    "big-kernel-crops": case(space=(11, 12), **BIG, strides=(2, 3), padding="VALID"),
    "big-kernel-negative": case(space=(12, 12), **BIG, padding=((-1, 1), (0, 0))),
    "big-kernel-dilated": case(space=(5, 5), **BIG, lhs=(3, 2), rhs=(1, 2), padding=((1, 2), (5, 4))),
    "big-kernel-groups": case(space=(9, 8), **BIG, **TWO),
    "wide": case(**WIDE),
    "wide-kernel-dilated": case(**WIDE, rhs=(1, 2), padding=((1, 1), (0, 3))),
    "wide-asymmetric": case(**WIDE, padding=((2, 0), (1, 0))),
    "wide-groups": case(**{**WIDE, "channels": 16, "features": 40}, groups=2),
    "wide-valid": case(**WIDE, padding="VALID"),
    "wide-stride2": case(**WIDE, strides=(2, 2)),
    "wide-strides-differ-dilated": case(**WIDE, strides=(3, 2), rhs=(1, 2), padding=((1, 0), (2, 1))),
    "wide-negative": case(**WIDE, padding=NEGATIVE),
    "wide-full-padding": case(**WIDE, padding=((2, 2), (2, 2))),
    "wide-kernel-beyond-input": case(**{**WIDE, "space": (2, 2)}),
    "wide-kernel-beyond-input-dilated": case(**{**WIDE, "space": (2, 2)}, lhs=(2, 1), padding=((1, 1), (-1, 3))),
    "wide-no-output": case(**{**WIDE, "space": (2, 7)}, padding="VALID"),
    "big-kernel-no-output": case(batch=8, space=(7, 8), kernel=(9, 9), padding="VALID"),
    "wide-row-kernel": case(**WIDE, kernel=(1, 3)),
    "wide-column-kernel": case(**WIDE, kernel=(3, 1)),
    "small": case(**SMALL),
    "small-stride2-lower": case(**{**SMALL, "space": (5, 7)}, strides=(2, 2), padding="SAME_LOWER", kernel=(2, 3)),
    "small-negative": case(**{**SMALL, "space": (6, 5)}, padding=NEGATIVE, strides=(2, 1)),
    "small-both-dilated": case(**SMALL, lhs=(2, 1), rhs=(1, 2), padding=((0, 1), (2, 1)), strides=(2, 1)),
    "small-kernel-beyond-input": case(**{**SMALL, "space": (1, 2)}, kernel=(5, 3)),
    "small-3d": case(**{**SMALL, "space": (2, 3, 2)}, kernel=(2, 3, 2)),
    "1d": case(space=(9,), kernel=(4,), strides=(2,), padding=((-1, 3),)),
    "1d-dilated-groups": case(space=(9,), kernel=(3,), rhs=(2,), lhs=(2,), padding=((0, 1),), **TWO),
    "3d": case(space=(4, 5, 3), kernel=(2, 3, 2), strides=(1, 2, 1)),
    "3d-dilated": case((4, 5, 3), (2, 1, 3), lhs=(1, 2, 1), rhs=(2, 1, 1), padding=((1, 0), (-1, 2), (2, 1))),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_both_gradients_equal_loops(name):
    c = CASES[name]
    x = normal(0, c["batch"], *c["space"], c["channels"])
    k = normal(1, *c["kernel"], c["channels"] // c["groups"], c["features"])
    pairs = pairs_of(c["padding"], c["space"], c["kernel"], c["strides"], c["rhs"])
    geometry = (c["strides"], pairs, c["lhs"], c["rhs"], c["groups"])
    g = normal(2, *by_loops(x, k, *geometry)[0].shape)

    def ours(x, k, g):
        numbers = CHANNELS_LAST[len(c["space"])]
        settings = (c["strides"], c["padding"], c["lhs"], c["rhs"], numbers, c["groups"])
        y, vjp = jax.vjp(lambda x, k: conv_general_dilated(x, k, *settings, impl="canonical"), x, k)
        return y, *vjp(g)

    for actual, expected in zip(jax.jit(ours)(x, k, g), by_loops(x, k, *geometry, g), strict=True):
        assert_near(actual, expected)


# --- against lax ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "x_shape", "k_shape"),
    [
        (None, (2, 3, 7, 8), (4, 3, 3, 2)),
        (("NCHW", "OIHW", "NCHW"), (2, 3, 7, 8), (4, 3, 3, 2)),
        (("NHWC", "OIHW", "NCHW"), (2, 7, 8, 3), (4, 3, 3, 2)),
        (("CWNH", "WOHI", "HNCW"), (3, 8, 2, 7), (2, 4, 3, 3)),
    ],
)
def test_dimension_numbers_are_those_of_lax(numbers, x_shape, k_shape):
    x, k = normal(0, *x_shape), normal(1, *k_shape)
    settings = ((2, 1), "SAME", None, (1, 2), numbers)

    def both(conv, x, k):
        y, vjp = jax.vjp(lambda x, k: conv(x, k, *settings), x, k)
        return y, *vjp(jnp.cos(y))

    ours = jax.jit(partial(both, partial(conv_general_dilated, impl="canonical")))
    theirs = jax.jit(partial(both, lax.conv_general_dilated))
    for actual, expected in zip(ours(x, k), theirs(x, k), strict=True):
        assert_near(actual, expected)


def test_outside_loops_the_forward_pass_is_bit_equal_to_lax():
    x, k = normal(0, 2, 9, 9, 3), normal(1, 3, 3, 3, 4)
    np.testing.assert_array_equal(canonical(x, k, (2, 2), "SAME"), stock(x, k, (2, 2), "SAME"))


@pytest.mark.parametrize(("groups", "channels", "strides"), [(1, 4, (2, 1)), (2, 4, (2, 1)), (1, 32, (1, 1))])
def test_gradient_of_gradient_equals_that_of_lax(groups, channels, strides):
    x, k = normal(0, 2, 4, 3, channels), normal(1, 3, 2, channels // groups, 2)
    dx, dk = normal(2, *x.shape), normal(3, *k.shape)

    def curvature(conv):
        def loss(x, k):
            return jnp.sum(jnp.sin(conv(x, k, strides, "SAME", feature_group_count=groups)))

        def slope(x, k):
            gx, gk = jax.grad(loss, (0, 1))(x, k)
            return jnp.vdot(gx, dx) + jnp.vdot(gk, dk)

        return jax.jit(jax.grad(slope, (0, 1)))(x, k)

    for actual, expected in zip(curvature(canonical), curvature(stock), strict=True):
        assert_near(actual, expected)


def test_forward_mode_needs_lax():
    x, k = normal(0, 1, 5, 5, 2), normal(1, 3, 3, 2, 2)
    _, tangent = jax.jvp(lambda x: canonical(x, k, (1, 1), "SAME", impl="lax"), (x,), (x,))
    assert_near(tangent, stock(x, k, (1, 1), "SAME"))
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(lambda x: canonical(x, k, (1, 1), "SAME"), (x,), (x,))


@pytest.mark.parametrize(("groups", "side", "channels"), [(1, 6, 4), (4, 6, 4), (1, 3, 32)])
def test_bfloat16_in_float32_out(groups, side, channels):
    shapes = [(2, side, side, channels), (3, 3, channels // groups, 4)]
    x, k = (normal(i, *s).astype(jnp.bfloat16) for i, s in enumerate(shapes))
    exact = by_loops(x, k, (1, 1), [(1, 1), (1, 1)], (1, 1), (1, 1), groups, cotangent=np.ones((2, side, side, 4)))
    conv = partial(canonical, window_strides=(1, 1), padding="SAME", feature_group_count=groups)

    def both(x, k):
        wide, vjp = jax.vjp(lambda x, k: conv(x, k, preferred_element_type=jnp.float32), x, k)
        return wide, conv(x, k), vjp(jnp.ones_like(wide))

    wide, narrow, grads = jax.jit(both)(x, k)
    assert wide.dtype == np.float32 and narrow.dtype == jnp.bfloat16
    assert_near(wide, exact[0])
    for actual, expected in zip(grads, exact[1:], strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_near(actual, expected, 1e-2)


# --- choosing the implementation --------------------------------------------------------------------------------------


def is_ours(**options):
    """Ours is a custom derivative; the stock primitive stands alone."""
    x, k = np.ones((1, 2, 4, 4), np.float32), np.ones((2, 2, 3, 3), np.float32)
    jaxpr = jax.make_jaxpr(lambda x, k: conv_general_dilated(x, k, (1, 1), "SAME", **options))(x, k)
    return "custom_vjp" in str(jaxpr)


def test_auto_is_canonical_on_cpu():
    assert is_ours() and is_ours(impl="auto") and is_ours(impl="canonical") and not is_ours(impl="lax")


def test_a_context_chooses_for_calls_that_do_not_choose():
    with conv_impl("lax"):
        assert not is_ours() and is_ours(impl="canonical")
        with conv_impl("canonical"):
            assert is_ours() and not is_ours(impl="lax")
        assert not is_ours()
    assert is_ours()


def is_native(dtype=jnp.float32, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": CHANNELS_LAST[2], **options}
    x, k = jnp.ones((1, 4, 4, 4), dtype), jnp.ones((3, 3, 4 // options.get("feature_group_count", 1), 4), dtype)
    return "GatheredConv" in str(jax.make_jaxpr(lambda x, k: conv_general_dilated(x, k, **options))(x, k))


@pytest.mark.skipif(bool(missing := gathered_conv.unavailable(np.float32)), reason=str(missing))
def test_native_is_compiled_code_where_that_covers_the_convolution():
    assert not is_native() and is_native(impl="native") and is_native(impl="native", window_strides=(2, 1))
    with conv_impl("native"):
        assert is_native() and is_native(rhs_dilation=(2, 2)) and not is_native(impl="canonical")
        assert not is_native(feature_group_count=2) and not is_native(jnp.bfloat16)
        assert not is_native(padding=((1, 1), (1, 1)), lhs_dilation=(2, 1))
    x, k, g = normal(0, 2, 3, 7, 6), normal(1, 5, 3, 3, 2), normal(2, 2, 5, 4, 3)
    found, expected = (
        jax.vjp(lambda x, k, impl=impl: conv_general_dilated(x, k, (2, 2), "SAME", impl=impl), x, k)[1](g)
        for impl in ("native", "lax")
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs)


def test_native_code_that_cannot_be_had_is_an_error(monkeypatch):
    monkeypatch.setattr(gathered_conv, "unavailable", lambda dtype: "there is no C++ compiler")
    with pytest.raises(ValueError, match="impl='native' cannot be had: there is no C.. compiler; take 'auto'"):
        is_native(impl="native")
    assert not is_native(jnp.bfloat16, impl="native") and not is_native()


def test_a_jitted_function_is_traced_anew_under_another_context():
    step = jax.jit(lambda x, k: conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=CHANNELS_LAST[2]))
    x, k = normal(0, 2, 5, 5, 3), normal(1, 3, 3, 3, 4)
    for impl, ours in (("lax", False), ("canonical", True), ("lax", False)):
        with conv_impl(impl):
            assert ("custom_vjp_call" in str(jax.make_jaxpr(step)(x, k))) is ours


def test_a_context_is_left_behind_by_an_exception():
    with pytest.raises(RuntimeError, match="stop"), conv_impl("lax", unroll=1):
        raise RuntimeError("stop")
    assert is_ours()


def test_unknown_impl_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="'lax', 'canonical', 'native', 'auto', got 'fast'"):
        is_ours(impl="fast")
    with pytest.raises(ValueError, match="got 'fast'"), conv_impl("fast"):
        pass
    with pytest.raises(ValueError, match="unroll must be >= 0 .*, got -1"), conv_impl("auto", unroll=-1):
        pass
    assert is_ours()


def test_auto_hands_to_lax_what_only_lax_does():
    auto = partial(conv_general_dilated, dimension_numbers=CHANNELS_LAST[2])
    x, k = np.arange(64).reshape(2, 4, 4, 2), np.arange(36).reshape(3, 3, 2, 2)
    np.testing.assert_array_equal(auto(x, k, (1, 1), "SAME"), stock(x, k, (1, 1), "SAME"))
    x, k = x.astype(np.float32), k.astype(np.float32)
    np.testing.assert_array_equal(
        auto(x, k, (1, 1), "SAME", batch_group_count=2), stock(x, k, (1, 1), "SAME", batch_group_count=2)
    )


# --- vmap and loops ---------------------------------------------------------------------------------------------------

CLIENTS = 3


def clients(in_axes, groups=1, channels=4):
    """Operands with their mapped axes where `in_axes` says, and the pairs of operands that each client has."""
    both = normal(0, CLIENTS, 2, 3, 5, channels), normal(1, CLIENTS, 3, 3, channels // groups, 4)
    at = [a[0] if axis is None else np.moveaxis(a, 0, axis) for a, axis in zip(both, in_axes, strict=True)]
    each = [[a[0 if axis is None else i] for a, axis in zip(both, in_axes, strict=True)] for i in range(CLIENTS)]
    return at, each


@pytest.mark.parametrize(
    ("in_axes", "groups", "unroll", "channels"),
    [
        ((0, None), 1, 32, 4),
        ((0, None), 1, 0, 4),
        ((None, 0), 1, 32, 4),
        ((None, 0), 1, 0, 4),
        ((0, 0), 2, 32, 4),
        ((1, -1), 1, 0, 4),
        ((0, None), 1, 32, 32),
        ((1, -1), 1, 32, 32),
    ],
)
def test_vmap_equals_a_loop(in_axes, groups, unroll, channels):
    at, each = clients(in_axes, groups, channels)
    strides = (2, 1) if channels == 4 else (1, 1)

    def both(conv, x, k):
        y, vjp = jax.vjp(lambda x, k: conv(x, k, strides, "SAME", feature_group_count=groups), x, k)
        return y, *vjp(jnp.cos(y))

    with conv_impl("auto", unroll=unroll):
        actual = jax.jit(jax.vmap(partial(both, canonical), in_axes))(*at)
    one = jax.jit(partial(both, stock))
    for ours, theirs in zip(actual, map(np.stack, zip(*[one(*pair) for pair in each], strict=True)), strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("unroll", [32, 2])
def test_gradient_of_vmap_equals_a_loop(unroll):
    at, each = clients((0, 0))

    def loss(conv, x, k):
        return jnp.sum(jnp.sin(conv(x, k, (1, 1), "SAME")))

    with conv_impl("auto", unroll=unroll):
        mapped = jax.vmap(partial(loss, canonical))
        actual = jax.jit(jax.grad(lambda x, k: mapped(x, k).sum(), (0, 1)))(*at)
    one = jax.jit(jax.grad(partial(loss, stock), (0, 1)))
    for ours, theirs in zip(actual, map(np.stack, zip(*[one(*pair) for pair in each], strict=True)), strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("unroll", [32, 2])
def test_nested_vmap_equals_loops(unroll):
    x, k = normal(0, 3, 2, 5, 5, 2), normal(1, 2, 3, 3, 2, 2)
    conv = partial(canonical, window_strides=(1, 1), padding="VALID")
    with conv_impl("auto", unroll=unroll):
        actual = jax.jit(jax.vmap(jax.vmap(conv, (None, 0)), (0, None)))(x, k)
    rows = [[stock(x[i], k[j], (1, 1), "VALID") for j in range(2)] for i in range(3)]
    assert_near(actual, np.stack([np.stack(row) for row in rows]))


def test_vmap_over_no_clients_is_empty():
    x, k = np.ones((0, 2, 5, 5, 3), np.float32), np.ones((0, 3, 3, 3, 4), np.float32)
    assert jax.vmap(lambda x, k: canonical(x, k, (1, 1), "SAME"))(x, k).shape == (0, 2, 5, 5, 4)


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=compat.is_jaxpr):
            if compat.is_jaxpr(value):
                yield from equations(value)


def convolutions(fn, *args):
    found = equations(jax.make_jaxpr(fn)(*args))
    return [eqn.params for eqn in found if eqn.primitive.name == "conv_general_dilated"]


def is_fast(params):
    """Channels-last and without groups: what XLA's CPU convolution is written for, wherever it stands."""
    numbers = params["dimension_numbers"]
    channels_last = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    return channels_last and params["feature_group_count"] == params["batch_group_count"] == 1


@pytest.mark.parametrize(("unroll", "expected"), [(CLIENTS, CLIENTS), (CLIENTS - 1, 1)])
def test_an_axis_is_unrolled_up_to_the_limit_and_mapped_beyond(unroll, expected):
    (x, k), _ = clients((0, 0))
    with conv_impl("auto", unroll=unroll):
        found = convolutions(jax.vmap(lambda x, k: canonical(x, k, (1, 1), "SAME")), x, k)
    assert len(found) == expected and all(map(is_fast, found))


@pytest.mark.parametrize(("side", "expected"), [(64, CLIENTS), (16, 1)])
def test_by_itself_an_axis_is_unrolled_where_results_are_large(side, expected):
    x, k = np.ones((CLIENTS, 2, side, side, 3), np.float32), np.ones((CLIENTS, 3, 3, 3, 16), np.float32)
    assert len(convolutions(jax.vmap(lambda x, k: canonical(x, k, (1, 1), "SAME")), x, k)) == expected


@pytest.mark.parametrize("looped", [False, True])
def test_xla_leaves_a_layer_and_its_gradients_to_the_kernels_that_use_all_threads(looped):
    x, k = jnp.ones((8, 8, 8, 16)), jnp.ones((3, 3, 16, 32))

    def gradients(x, k):
        y, vjp = jax.vjp(lambda x, k: canonical(x, k, (1, 1), "SAME"), x, k)
        return y, *vjp(y)

    def program(x, k):
        return lax.map(lambda x: gradients(x, k), x[None]) if looped else gradients(x, k)

    text = jax.jit(program).lower(x, k).compile().as_text()
    # Eigen's convolutions stand in the program as they are, channels last; what is inside a fusion is YNNPACK's.
    assert text.count("convolution(") == text.count("dim_labels=b01f_01io->b01f") == 3
    assert "ynn_fusion" not in text


def step(conv, k, x):
    """One step of gradient descent on a strided network of two layers."""

    def loss(k):
        hidden = jax.nn.relu(conv(x, k["first"], (2, 2), "SAME"))
        return jnp.mean(conv(hidden, k["second"], (1, 1), "SAME") ** 2)

    value, grads = jax.value_and_grad(loss)(k)
    return jax.tree.map(lambda k, g: k - 0.1 * g, k, grads), value


def kernels(*axes):
    return {"first": normal(0, *axes, 3, 3, 3, 4), "second": normal(1, *axes, 2, 2, 4, 2)}


def test_scan_and_map_over_training_steps_equal_lax():
    k, batches = kernels(), normal(2, 3, 2, 6, 6, 3)
    expected, losses = k, []
    stock_step = jax.jit(partial(step, stock))
    for x in batches:
        expected, value = stock_step(expected, x)
        losses.append(value)
    actual, ours = jax.jit(partial(lax.scan, partial(step, canonical)))(k, batches)
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    jax.tree.map(assert_near, actual, expected)
    mapped = jax.jit(lambda k, batches: lax.map(lambda x: step(canonical, k, x)[1], batches))(k, batches)
    np.testing.assert_allclose(mapped, [stock_step(k, x)[1] for x in batches], rtol=1e-5)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_training_loop_has_only_channels_last_convolutions_without_groups(mapped):
    def loop(conv):
        def train(k, batches):
            return lax.scan(partial(step, conv), k, batches)

        return jax.vmap(train) if mapped else train

    axes = (CLIENTS,) if mapped else ()
    args = kernels(*axes), normal(2, *axes, 3, 2, 6, 6, 3)
    ours, theirs = convolutions(loop(canonical), *args), convolutions(loop(stock), *args)
    assert ours and all(map(is_fast, ours))
    assert not all(map(is_fast, theirs))


# --- stock layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [False, True])
def test_inside_shard_map_a_shared_kernel_gets_its_gradient(outside):
    mesh, spec = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,)), PartitionSpec
    x, k = normal(0, 8, 5, 5, 8), normal(1, 3, 3, 8, 20)

    def gradient(conv):
        def loss(k, x):
            return lax.psum(jnp.sin(conv(x, k, (1, 1), "SAME")).sum(), "d")

        def mapped(function):
            return jax.shard_map(function, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec())

        return jax.jit(jax.grad(mapped(loss)) if outside else mapped(jax.grad(loss)))(k, x)

    assert_near(gradient(canonical), gradient(stock))


def test_plugs_into_linen():
    x = normal(0, 2, 7, 7, 4)
    ours, theirs = (
        nn.Conv(6, (3, 3), strides=2, conv_general_dilated=conv)
        for conv in (conv_general_dilated, lax.conv_general_dilated)
    )
    params = jax.jit(theirs.init)(jax.random.key(0), x)
    np.testing.assert_array_equal(ours.apply(params, x), theirs.apply(params, x))
    gradients = [jax.jit(jax.grad(lambda p, m=m: jnp.sum(m.apply(p, x) ** 2)))(params) for m in (ours, theirs)]
    jax.tree.map(assert_near, *gradients)


def test_plugs_into_nnx():
    x = normal(0, 2, 7, 7, 3)
    ours, theirs = (
        nnx.Conv(3, 4, (3, 3), padding="VALID", conv_general_dilated=conv, rngs=nnx.Rngs(0))
        for conv in (conv_general_dilated, lax.conv_general_dilated)
    )
    np.testing.assert_array_equal(ours(x), theirs(x))
    gradients = [nnx.to_pure_dict(nnx.jit(nnx.grad(lambda m: jnp.sum(m(x) ** 2)))(m)) for m in (ours, theirs)]
    jax.tree.map(assert_near, *gradients)


# --- errors -----------------------------------------------------------------------------------------------------------

X, K = np.ones((2, 7, 8, 4), np.float32), np.ones((3, 3, 4, 4), np.float32)


@pytest.mark.parametrize("impl", ["lax", "canonical"])
@pytest.mark.parametrize(
    ("x", "k", "options", "message"),
    [
        (X[0], K, {}, r"equal rank >= 3 .*got input \(7, 8, 4\) and kernel \(3, 3, 4, 4\)"),
        (X, K[:, :, :3], {}, r"takes 3 input channels per group, but the input \(2, 7, 8, 4\) has 4"),
        (X, K, {"feature_group_count": 3}, "feature_group_count=3 must divide the 4 input channels and the 4 output"),
        (X, K, {"feature_group_count": 0}, "feature_group_count=0 must divide"),
        (X, K, {"batch_group_count": 3}, "batch_group_count=3 must divide the batch"),
        (X, K, {"padding": "FULL"}, "padding must be .*SAME, SAME_LOWER, VALID, got 'FULL'"),
        (X, K, {"padding": ((0, 0),)}, "padding must have 2 .low, high. pairs"),
        (X, K, {"padding": (1, 1)}, "padding must have 2 .low, high. pairs"),
        (X, K, {"padding": 1}, "padding must have 2 .low, high. pairs .*got 1"),
        (X, K, {"window_strides": 1}, "window_strides must have 2 entries >= 1 .*got 1"),
        (X, K, {"padding": "SAME", "lhs_dilation": (2, 1)}, "padding='SAME' .* lhs_dilation.*low, high"),
        (X, K, {"window_strides": (1,)}, r"window_strides must have 2 entries >= 1 .*got \(1,\)"),
        (X, K, {"window_strides": (0, 1)}, "window_strides must have 2 entries >= 1"),
        (X, K, {"rhs_dilation": (0, 1)}, "rhs_dilation must have 2 entries >= 1"),
        (X, K, {"lhs_dilation": (1, 1, 1)}, "lhs_dilation must have 2 entries >= 1"),
    ],
)
def test_what_does_not_fit_is_an_error_before_tracing(x, k, options, message, impl):
    with pytest.raises(ValueError, match=message):
        canonical(x, k, **{"window_strides": (1, 1), "padding": "SAME", **options}, impl=impl)


def test_cropping_more_than_there_is_is_an_error():
    with pytest.raises(ValueError, match=r"padding=.*-5.* crops more than there is .*\(7, 8\)"):
        canonical(X, K, (1, 1), ((-5, -5), (0, 0)))


def test_a_result_narrower_than_the_input_is_an_error():
    with pytest.raises(TypeError, match="no narrower than the input's float32, got bfloat16; cast"):
        canonical(X, K, (1, 1), "SAME", preferred_element_type=jnp.bfloat16)


def test_dtypes_that_differ_are_an_error():
    with pytest.raises(TypeError, match="one dtype, got bfloat16 and float32"):
        canonical(X.astype(jnp.bfloat16), K, (1, 1), "SAME")


def test_canonical_refuses_what_only_lax_does():
    with pytest.raises(ValueError, match="floating-point.*got dtype int32"):
        canonical(X.astype(np.int32), K.astype(np.int32), (1, 1), "SAME")
    with pytest.raises(ValueError, match="batch_group_count=2.*Use impl='lax'"):
        canonical(X, K, (1, 1), "SAME", batch_group_count=2)


def test_a_depthwise_convolution_is_mapped_without_loops_or_copies_of_the_program():
    x = jax.random.normal(jax.random.key(0), (40, 2, 5, 5, 3))
    kernel = jax.random.normal(jax.random.key(1), (40, 3, 3, 1, 3))

    def loss(x, kernel):
        return jnp.sum(jnp.sin(canonical(x, kernel, (1, 1), "SAME", feature_group_count=3)))

    mapped = jax.vmap(jax.grad(loss, (0, 1)))
    program = str(jax.make_jaxpr(mapped)(x, kernel))
    assert "scan[" not in program and "conv_general_dilated" not in program and program.count("reduce_sum") < 40
    found = mapped(x, kernel)
    for index in (0, 39):
        for got, expected in zip(found, jax.grad(loss, (0, 1))(x[index], kernel[index]), strict=True):
            np.testing.assert_allclose(got[index], expected, rtol=1e-5, atol=1e-5)
