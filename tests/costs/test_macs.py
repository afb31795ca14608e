"""Multiply-accumulates of single operations, against brute force and against XLA's own count."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax import numpy as jnp

from jaxeff import costs
from jaxeff.costs.macs import valid_taps

CASES = {
    "same": {},
    "valid": {"padding": "VALID"},
    "stride": {"window_strides": (2, 3)},
    "asymmetric_padding": {"padding": ((2, 0), (1, 3))},
    "cropping_padding": {"padding": ((-1, 0), (1, -2))},
    "input_dilation": {"lhs_dilation": (2, 3), "padding": ((2, 1), (0, 3))},
    "kernel_dilation": {"rhs_dilation": (2, 1)},
    "groups": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": 4},
    "batch_groups": {"batch_group_count": 2},
}


def conv(**options):
    arguments = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    return lambda kernel, x: lax.conv_general_dilated(x, kernel, **arguments)


def operands(groups=1, size=(7, 8), taps=(3, 2)):
    x = jax.ShapeDtypeStruct((2, *size, 4), jnp.float32)
    return jax.ShapeDtypeStruct((*taps, 4 // groups, 4), jnp.float32), x


def macs(fn, *args, convention="paper"):
    return costs.analyze(fn, *args, convention=convention, residuals=False).total.macs


@pytest.mark.parametrize("case", CASES)
def test_xla_convention_equals_the_flops_of_the_compiled_convolution(case):
    options = CASES[case]
    args = operands(options.get("feature_group_count", 1))
    assert 2 * macs(conv(**options), *args, convention="xla") == costs.compiled(conv(**options), *args).flops


@pytest.mark.parametrize("case", CASES)
def test_paper_convention_counts_every_tap_at_every_output(case):
    options = CASES[case]
    kernel, x = operands(options.get("feature_group_count", 1))
    out = jax.eval_shape(conv(**options), kernel, x)
    assert macs(conv(**options), kernel, x) == out.size * kernel.shape[0] * kernel.shape[1] * kernel.shape[2]


@settings(max_examples=25, deadline=None)
@given(
    size=st.sampled_from([1, 4, 7]),
    taps=st.sampled_from([1, 2, 3]),
    stride=st.integers(1, 3),
    pads=st.tuples(st.integers(-1, 3), st.integers(0, 3)),
    dilation=st.integers(1, 3),
    kernel_dilation=st.integers(1, 2),
)
def test_valid_taps_equal_a_brute_force_walk(size, taps, stride, pads, dilation, kernel_dilation):
    dilated = np.zeros((size - 1) * dilation + 1, bool)
    dilated[::dilation] = True
    padded = np.pad(dilated, (max(pads[0], 0), pads[1]))[max(-pads[0], 0) :]
    span = (taps - 1) * kernel_dilation + 1
    starts = range(0, len(padded) - span + 1, stride)
    expected = sum(padded[start + tap * kernel_dilation] for start, tap in itertools.product(starts, range(taps)))
    assert valid_taps(size, len(starts), taps, stride, pads[0], dilation, kernel_dilation) == expected


@settings(max_examples=10, deadline=None)
@given(
    size=st.sampled_from([4, 7]),
    taps=st.sampled_from([1, 2, 3]),
    stride=st.sampled_from([1, 2]),
    kernel_dilation=st.sampled_from([1, 2]),
    padding=st.sampled_from(["SAME", ((2, 1), (0, 3))]),
    groups=st.sampled_from([1, 2]),
)
def test_xla_convention_equals_xla_before_optimisation_on_any_shape(
    size, taps, stride, kernel_dilation, padding, groups
):
    fn = conv(
        window_strides=(stride, 1),
        rhs_dilation=(1, kernel_dilation),
        padding=padding,
        feature_group_count=groups,
    )
    args = operands(groups, (size, 7), (taps, 2))
    flops = jax.jit(fn).lower(*args).cost_analysis()["flops"]
    assert 2 * macs(fn, *args, convention="xla") == flops


def test_convolution_over_one_and_three_axes():
    for spatial in (1, 3):
        x, kernel = jnp.zeros((2, 3, *[5] * spatial)), jnp.zeros((4, 3, *[3] * spatial))
        fn = lambda k, x, n=spatial: lax.conv_general_dilated(x, k, (1,) * n, "VALID")
        assert macs(fn, kernel, x) == 2 * 4 * 3**spatial * 3 * 3**spatial


def test_gradients_of_a_convolution_cost_a_forward_pass_each():
    kernel, x = operands()
    forward = macs(conv(), kernel, x)
    loss = lambda kernel, x: jnp.sum(conv()(kernel, x) ** 2)
    assert macs(jax.grad(loss), kernel, x) == 2 * forward
    assert macs(jax.grad(loss, argnums=(0, 1)), kernel, x) == 3 * forward


def test_gradient_of_a_network_leaves_out_the_first_input_gradient():
    def loss(kernels, x):
        for kernel in kernels:
            x = jnp.tanh(conv()(kernel, x))
        return x.sum()

    kernel, x = operands()
    one = macs(conv(), kernel, x)
    assert macs(jax.grad(loss), [kernel] * 3, x) == 3 * 3 * one - one


@pytest.mark.parametrize(
    ("spec", "left", "right", "expected"),
    [
        ("ij,jk->ik", (3, 4), (4, 5), 3 * 4 * 5),
        ("bij,bjk->bik", (2, 3, 4), (2, 4, 5), 2 * 3 * 4 * 5),
        ("ijk,jkl->il", (3, 4, 5), (4, 5, 6), 3 * 4 * 5 * 6),
        ("i,j->ij", (3,), (4,), 12),
    ],
)
def test_dot_general_counts_batch_free_and_contracted_sizes(spec, left, right, expected):
    fn = lambda w, x: jnp.einsum(spec, x, w)
    assert macs(fn, jnp.zeros(right), jnp.zeros(left)) == expected


def test_ragged_dot_meets_one_group_per_row():
    fn = lambda w, x, sizes: lax.ragged_dot(x, w, sizes)
    assert macs(fn, jnp.zeros((3, 4, 5)), jnp.zeros((7, 4)), jnp.array([1, 2, 4])) == 7 * 4 * 5


def test_elementwise_work_is_not_a_mac():
    assert macs(lambda w, x: jnp.tanh(w * x + 1).sum(), jnp.zeros(8), jnp.zeros(8)) == 0


@pytest.mark.parametrize(
    ("fn", "primitive"), [(jnp.fft.rfft, "fft"), (jnp.linalg.cholesky, "cholesky"), (jnp.linalg.svd, "svd")]
)
def test_arithmetic_that_is_not_counted_is_named(fn, primitive):
    report = costs.analyze(fn, jnp.eye(4), residuals=False)
    assert report.total.macs == 0
    assert any(note.startswith(primitive) for note in report.notes)


def test_linear_solve_names_its_factorisation_and_counts_no_product():
    report = costs.analyze(jnp.linalg.solve, jnp.eye(4), jnp.ones((4, 4)))
    assert report.total.macs == 0
    assert {note.split()[0] for note in report.notes} == {"lu", "triangular_solve"}
