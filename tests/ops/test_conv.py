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
from jax.extend import core

from jaxeff.ops import conv_general_dilated, conv_impl

CHANNELS_LAST = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
canonical = partial(conv_general_dilated, impl="canonical", dimension_numbers=CHANNELS_LAST[2])
stock = partial(lax.conv_general_dilated, dimension_numbers=CHANNELS_LAST[2])


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_near(actual, expected, tolerance=2e-5):
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance * np.abs(expected).max())


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
    out = [
        (s + low + high - r) // t + 1 for s, (low, high), r, t in zip(dilated, padding, reach, strides, strict=True)
    ]
    y, dfull, dk = np.zeros((n, *out, features)), np.zeros_like(full), np.zeros_like(k)
    i, o = per_group, features // groups
    for tap in np.ndindex(*kernel):
        start = [frame - low + t * d for (low, _), t, d in zip(padding, tap, rhs_dilation, strict=True)]
        at = (slice(None), *(slice(a, a + (m - 1) * s + 1, s) for a, m, s in zip(start, out, strides, strict=True)))
        for g in range(groups):
            ins, outs = (..., slice(g * i, (g + 1) * i)), (..., slice(g * o, (g + 1) * o))
            y[outs] += full[at][ins] @ k[tap][outs]
            if cotangent is not None:
                dfull[at][ins] += cotangent[outs] @ k[tap][outs].T
                dk[tap][outs] += full[at][ins].reshape(-1, i).T @ cotangent[outs].reshape(-1, o)
    return y, dfull[inner], dk




def case(space=(7, 8), kernel=(3, 3), channels=3, features=4, strides=None, padding="SAME", lhs=None, rhs=None, groups=1):
    n = len(space)
    strides, lhs, rhs = strides or (1,) * n, lhs or (1,) * n, rhs or (1,) * n
    return dict(
        space=space, kernel=kernel, channels=channels, features=features, strides=strides, padding=padding, lhs=lhs,
        rhs=rhs, groups=groups,
    )  # fmt: skip


ASYMMETRIC, NEGATIVE = ((0, 2), (3, 1)), ((-1, 1), (2, -2))
DEPTHWISE = dict(channels=3, features=3, groups=3)
WIDE = dict(channels=34, features=68, groups=34)  # more groups than are computed separately, and not by taps below
CASES = {
    **{
        f"stride{s}-{padding if isinstance(padding, str) else name}": case(strides=(s, s), padding=padding)
        for s, (name, padding) in itertools.product(
            (1, 2, 3),
            {"same": "SAME", "valid": "VALID", "lower": "SAME_LOWER", "asymmetric": ASYMMETRIC, "negative": NEGATIVE}.items(),
        )
    },
    "strides-differ": case(strides=(1, 3), kernel=(2, 4)),
    "even-kernel": case(kernel=(2, 2)),
    "even-kernel-lower-stride2": case(kernel=(4, 2), padding="SAME_LOWER", strides=(2, 2)),
    "even-kernel-negative": case(kernel=(4, 2), padding=NEGATIVE, strides=(2, 1)),
    "pointwise": case(kernel=(1, 1)),
    "pointwise-stride2": case(kernel=(1, 1), strides=(2, 2)),
    "kernel-dilated": case(rhs=(2, 3)),
    "kernel-dilated-stride2-valid": case(rhs=(2, 2), strides=(2, 2), padding="VALID"),
    "kernel-dilated-negative": case(rhs=(2, 1), padding=((-1, 2), (-2, 0)), strides=(1, 2)),
    "input-dilated": case(lhs=(2, 3), padding=((1, 1), (1, 1))),
    "input-dilated-stride2-negative": case(lhs=(2, 2), strides=(2, 3), padding=((-2, 1), (0, -3))),
    "both-dilated": case(lhs=(3, 2), rhs=(2, 2), strides=(2, 1), padding=((2, 0), (1, 3)), kernel=(2, 3)),
    "padding-beyond-kernel": case(kernel=(2, 1), padding=((3, 4), (2, 0)), strides=(2, 2)),
    "groups2": case(channels=4, features=6, groups=2),
    "groups2-stride2-asymmetric": case(channels=4, features=6, groups=2, strides=(2, 2), padding=ASYMMETRIC),
    "groups2-negative-dilated": case(channels=4, features=2, groups=2, padding=NEGATIVE, rhs=(2, 1), lhs=(1, 2)),
    "depthwise": case(**DEPTHWISE),
    "depthwise-stride2-negative": case(**DEPTHWISE, strides=(2, 2), padding=NEGATIVE),
    "depthwise-both-dilated": case(**DEPTHWISE, lhs=(2, 1), rhs=(1, 2), padding=((1, 0), (2, 2)), strides=(3, 1)),
    "depthwise-twice": case(channels=3, features=6, groups=3, strides=(2, 1)),
    "depthwise-twice-dilated": case(channels=3, features=6, groups=3, lhs=(1, 2), rhs=(2, 2), padding=((1, 1), (0, -1))),
    "depthwise-large-kernel": case(space=(9, 9), kernel=(8, 8), **DEPTHWISE, padding="SAME", strides=(2, 2)),
    "many-groups": case(space=(4, 5), channels=80, features=40, groups=40, kernel=(2, 3), strides=(2, 1)),
    "many-groups-negative": case(space=(4, 5), channels=80, features=40, groups=40, padding=NEGATIVE, kernel=(2, 2)),
    "many-depthwise": case(space=(4, 5), channels=40, features=80, groups=40, kernel=(2, 3), rhs=(1, 2)),
    "large-kernel": case(space=(9, 9), kernel=(8, 8)),
    "large-kernel-crops": case(space=(11, 12), kernel=(8, 8), strides=(2, 3), padding="VALID"),
    "large-kernel-negative": case(space=(13, 12), kernel=(8, 7), padding=((-2, 0), (1, -2)), strides=(2, 1)),
    "large-kernel-dilated": case(space=(5, 5), kernel=(8, 8), lhs=(3, 2), rhs=(1, 2), padding=((1, 2), (5, 4))),
    "large-kernel-groups": case(space=(9, 8), kernel=(8, 8), channels=4, features=2, groups=2, padding="SAME"),
    "1d": case(space=(9,), kernel=(4,), strides=(2,), padding=((-1, 3),)),
    "1d-dilated-groups": case(space=(9,), kernel=(3,), rhs=(2,), lhs=(2,), padding=((0, 1),), channels=4, groups=2),
    "3d": case(space=(4, 5, 3), kernel=(2, 3, 2), strides=(1, 2, 1)),
    "3d-dilated": case(space=(4, 5, 3), kernel=(2, 1, 3), lhs=(1, 2, 1), rhs=(2, 1, 1), padding=((1, 0), (-1, 2), (2, 1))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forward_and_both_gradients_equal_loops(name):
    c = CASES[name]
    x = normal(0, 2, *c["space"], c["channels"])
    k = normal(1, *c["kernel"], c["channels"] // c["groups"], c["features"])
    pairs = pairs_of(c["padding"], c["space"], c["kernel"], c["strides"], c["rhs"])
    geometry = (c["strides"], pairs, c["lhs"], c["rhs"], c["groups"])
    g = normal(2, *by_loops(x, k, *geometry)[0].shape)

    @jax.jit
    def ours(x, k, g):
        def conv(x, k):
            numbers = CHANNELS_LAST[len(c["space"])]
            return conv_general_dilated(
                x, k, c["strides"], c["padding"], c["lhs"], c["rhs"], numbers, c["groups"], impl="canonical"
            )

        y, vjp = jax.vjp(conv, x, k)
        return y, *vjp(g)

    # With lhs_dilation a name has no meaning, and the cases above give pairs.
    for actual, expected in zip(ours(x, k, g), by_loops(x, k, *geometry, g), strict=True):
        assert_near(actual, expected)
