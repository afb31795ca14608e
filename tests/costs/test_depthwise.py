"""Depthwise convolutions that `jaxeff.ops` writes tap by tap count as the convolution they stand for."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax import numpy as jnp

from jaxeff import costs
from jaxeff.costs.macs import CONVENTIONS
from jaxeff.models import Network, mobilenet
from jaxeff.ops import conv_general_dilated, conv_impl

CHANNELS = 4
NUMBERS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
WINDOWS = {
    "same": {},
    "valid": {"padding": "VALID"},
    "stride": {"window_strides": (2, 3)},
    "asymmetric_padding": {"padding": ((2, 0), (1, 3))},
    "cropping_padding": {"padding": ((-1, 0), (1, -2))},
    "cropped_input_dilation": {"lhs_dilation": (2, 3), "padding": ((-1, 1), (0, -2))},
    "input_dilation": {"lhs_dilation": (2, 3), "padding": ((2, 1), (0, 3))},
    "kernel_dilation": {"rhs_dilation": (2, 1)},
    "everything": {
        "window_strides": (2, 1),
        "padding": ((1, -1), (3, 2)),
        "lhs_dilation": (1, 2),
        "rhs_dilation": (2, 3),
    },
    "no_output": {"padding": ((0, -6), (0, 0))},
    "only_padding": {"padding": ((9, -7), (0, 0))},
}


def depthwise(impl="canonical", rank=2, **window):
    arguments = {"window_strides": (1,) * rank, "padding": "SAME", **window}

    def conv(kernel, x):
        return conv_general_dilated(
            x, kernel, dimension_numbers=NUMBERS[rank], feature_group_count=CHANNELS, impl=impl, **arguments
        )

    return conv


def operands(multiplier=1, size=(7, 8), taps=(3, 2), dtype=jnp.float32):
    kernel = jax.ShapeDtypeStruct((*taps, 1, CHANNELS * multiplier), dtype)
    return kernel, jax.ShapeDtypeStruct((2, *size, CHANNELS), dtype)


def macs(fn, *args, convention="xla"):
    return costs.analyze(fn, *args, convention=convention, residuals=False).total.macs


def gradient(conv, argument):
    """The gradient of the kernel (0) or of the input (1) alone; the convolution itself is not part of it."""
    return lambda kernel, x, g: jax.vjp(conv, kernel, x)[1](g)[argument]


def real_taps(size, taps, window_strides=None, padding=None, lhs_dilation=None, rhs_dilation=None):
    """Walks over every output position and every tap, and looks whether an element of the input lies there."""
    ones = (1,) * len(size)
    strides, dilation, spread = window_strides or ones, lhs_dilation or ones, rhs_dilation or ones
    elements = np.zeros([(n - 1) * d + 1 for n, d in zip(size, dilation, strict=True)], bool)
    elements[tuple(slice(None, None, d) for d in dilation)] = True
    elements = np.pad(elements, [(max(low, 0), max(high, 0)) for low, high in padding])
    elements = elements[tuple(slice(max(-low, 0), min(high, 0) or None) for low, high in padding)]
    reach = [(t - 1) * d + 1 for t, d in zip(taps, spread, strict=True)]
    starts = [range(0, n - r + 1, s) for n, r, s in zip(elements.shape, reach, strides, strict=True)]
    return sum(
        bool(elements[tuple(a + t * d for a, t, d in zip(start, tap, spread, strict=True))])
        for start, tap in itertools.product(itertools.product(*starts), np.ndindex(*taps))
    )


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("window", WINDOWS)
def test_forward_and_gradients_count_as_the_stock_convolution(window, convention):
    args = operands()
    stock, ours = (depthwise(impl, **WINDOWS[window]) for impl in ("lax", "canonical"))
    assert macs(ours, *args, convention=convention) == macs(stock, *args, convention=convention)
    g = jax.eval_shape(stock, *args)
    for argument in (0, 1):
        expected = macs(gradient(stock, argument), *args, g, convention=convention)
        assert macs(gradient(ours, argument), *args, g, convention=convention) == expected


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("window", ["same", "stride"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_several_features_for_each_channel(window, dtype, convention):
    args = operands(multiplier=3, dtype=dtype)
    stock, ours = (depthwise(impl, **WINDOWS[window]) for impl in ("lax", "canonical"))
    step = lambda conv: lambda kernel, x: jax.vjp(conv, kernel, x)[1](conv(kernel, x))
    for fn in (lambda conv: conv, step):
        assert macs(fn(ours), *args, convention=convention) == macs(fn(stock), *args, convention=convention)


@settings(max_examples=15, deadline=None)
@given(
    size=st.lists(st.sampled_from([1, 4, 5]), min_size=1, max_size=3),
    data=st.data(),
)
def test_xla_convention_equals_a_walk_over_every_tap(size, data):
    def each(elements):
        return tuple(data.draw(elements) for _ in size)

    taps = each(st.integers(1, 3))
    window = {
        "window_strides": each(st.integers(1, 3)),
        "padding": each(st.tuples(st.integers(-1, 3), st.integers(0, 3))),
        "lhs_dilation": each(st.integers(1, 3)),
        "rhs_dilation": each(st.integers(1, 2)),
    }
    conv = depthwise(rank=len(size), **window)
    kernel, x = operands(size=size, taps=taps)
    expected = 2 * CHANNELS * real_taps(size, taps, **window)
    assert macs(conv, kernel, x) == expected
    g = jax.eval_shape(conv, kernel, x)
    # Each pair of an output and a tap that meet at an element takes part once in both gradients, too.
    assert macs(gradient(conv, 0), kernel, x, g) == macs(gradient(conv, 1), kernel, x, g) == expected


def mapped(arg, axis, size):
    """The shape of an argument that has a mapped axis of this size, or none."""
    if axis is None:
        return arg
    return jax.ShapeDtypeStruct(np.insert(arg.shape, axis % (arg.ndim + 1), size), arg.dtype)


@pytest.mark.parametrize("axes", [(0, None, 0), (None, 0, 0), (0, 0, None), (2, 1, 3), (-1, -1, -1)])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_mapped_axes_multiply(axes, multiplier):
    conv, args = depthwise(**WINDOWS["everything"]), operands(multiplier)
    args = (*args, jax.eval_shape(conv, *args))
    five = [mapped(arg, axis, 5) for arg, axis in zip(args, axes, strict=True)]
    six = [mapped(arg, 1, 6) for arg in five]
    for fn in (lambda kernel, x, g: conv(kernel, x), gradient(conv, 0), gradient(conv, 1)):
        one = macs(fn, *args)
        over_five = lambda *args, fn=fn: jax.vmap(fn, axes)(*args)
        assert macs(over_five, *five) == 5 * one
        assert macs(jax.vmap(over_five, 1), *six) == 5 * 6 * one


def named(function):
    function.__name__ = "depthwise_convolution_2d"
    return jax.jit(function)


def shifted(x):
    return lax.pad(x, 0.0, [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 0)])[:, :-1, 1:]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: shifted(x) * 2,
        lambda x, k: x * k[0, 0, 0],
        lambda x, k: shifted(x) * x,
        lambda x, k: shifted(x) * k[0, 0, 0] * x,
        lambda x, k: jnp.tanh(shifted(x)) * k[0, 0, 0],
        lambda x, k: shifted(x) + k[0, 0, 0],
    ],
    ids=["scaled", "not_a_view", "with_itself", "another_product_too", "after_tanh", "no_product"],
)
def test_a_function_of_the_same_name_that_is_no_convolution_counts_nothing(function, convention):
    kernel, x = operands()
    args = (x, kernel)[: function.__code__.co_argcount]
    assert macs(named(function), *args, convention=convention) == 0


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_function_of_the_same_name_that_holds_a_convolution_counts_it_once(convention):
    kernel, x = operands()
    for impl in ("lax", "canonical"):
        conv = depthwise(impl, **WINDOWS["stride"])
        expected = macs(conv, kernel, x, convention=convention)
        assert macs(named(lambda x, k, conv=conv: conv(k, x)), x, kernel, convention=convention) == expected


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_mobilenet_and_its_gradient_count_the_same_in_both_implementations(convention):
    model = Network(mobilenet(((8, 1), (12, 2), (12, 1)), input_shape=(9, 9, 3), width=0.25))
    images = jnp.zeros((2, 9, 9, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    rest = {name: part for name, part in variables.items() if name != "params"}

    def counts(impl, transform):
        def forward(params, rest):
            return model.apply({"params": params, **rest}, images).sum()

        with conv_impl(impl):
            report = costs.analyze(
                transform(forward), variables["params"], rest, convention=convention, residuals=False
            )
        return {row.name.split("/")[1]: row.macs for row in report.rows if row.macs}

    assert counts("canonical", lambda forward: forward) == counts("lax", lambda forward: forward)
    assert counts("canonical", jax.grad) == counts("lax", jax.grad)
