"""Whatever form `jaxeff.ops` gives a convolution to be fast, it counts as the convolution of lax that it stands for."""

from functools import partial

import jax
import pytest
from jax import numpy as jnp

from jaxeff import costs
from jaxeff.costs.macs import CONVENTIONS
from jaxeff.ops import conv_general_dilated

NUMBERS = ("NHWC", "HWIO", "NHWC")
WIDE = dict(x=(8, 7, 8, 8), k=(3, 3, 8, 20))
CASES = {
    "wide": WIDE,
    "wide_valid": {**WIDE, "padding": "VALID"},
    "wide_groups": dict(x=(8, 7, 8, 16), k=(3, 3, 8, 40), groups=2),
    "wide_stride": {**WIDE, "strides": (2, 3)},
    "wide_crops": {**WIDE, "padding": ((-1, 0), (2, -2))},
    "kernel_dilated": {**WIDE, "rhs": (1, 2), "padding": ((1, 1), (0, 3))},
    "kernel_larger": dict(x=(4, 2, 2, 8), k=(3, 3, 8, 20)),
    "kernel_larger_crops": dict(x=(4, 2, 2, 8), k=(3, 3, 8, 20), lhs=(2, 1), padding=((1, 1), (-1, 3))),
    "shifts": dict(x=(2, 7, 8, 3), k=(3, 3, 3, 4)),
    "shifts_stride": dict(x=(2, 7, 8, 3), k=(3, 2, 3, 4), strides=(2, 3), padding=((2, 0), (1, 3))),
    "shifts_input_dilated": dict(x=(2, 7, 8, 3), k=(3, 3, 3, 4), lhs=(2, 3), padding=((2, 1), (0, 3))),
    "shifts_groups": dict(x=(2, 7, 8, 4), k=(3, 3, 2, 6), groups=2),
    "shifts_many_groups": dict(x=(2, 4, 5, 80), k=(2, 3, 2, 40), groups=40),
    "crops": dict(x=(2, 7, 8, 3), k=(3, 3, 3, 4), padding=((-1, 0), (2, -2))),
    "small": dict(x=(2, 4, 4, 32), k=(3, 3, 32, 5)),
    "small_stride": dict(x=(2, 5, 7, 32), k=(2, 3, 32, 5), strides=(2, 2)),
    "small_crops": dict(x=(2, 6, 5, 32), k=(3, 3, 32, 5), strides=(2, 1), padding=((-1, 1), (2, -2))),
    "small_valid": dict(x=(2, 5, 5, 32), k=(3, 3, 32, 5), padding="VALID"),
    "small_dilated": dict(x=(2, 4, 4, 32), k=(3, 3, 32, 5), lhs=(2, 1), rhs=(1, 2), padding=((1, 1), (2, 2))),
    "pointwise": dict(x=(2, 7, 8, 3), k=(1, 1, 3, 4), strides=(2, 2)),
    "taps_beyond_counting": dict(x=(2, 9, 9, 3), k=(8, 8, 3, 4)),
}


def convolution(case, impl):
    options = {"padding": "SAME", "strides": (1, 1), "lhs": None, "rhs": None, "groups": 1, **case}
    arguments = [options[name] for name in ("strides", "padding", "lhs", "rhs")]
    return partial(lambda x, k: conv_general_dilated(x, k, *arguments, NUMBERS, options["groups"], impl=impl))


def forward(case, impl):
    return convolution(case, impl), jnp.ones(case["x"]), jnp.ones(case["k"])


def gradient(argument, case, impl):
    conv = convolution(case, impl)
    x, k = jnp.ones(case["x"]), jnp.ones(case["k"])
    g = jnp.ones(jax.eval_shape(conv, x, k).shape)
    if argument == "x":
        return lambda g, k: jax.vjp(lambda x: conv(x, k), x)[1](g), g, k
    return lambda g, x: jax.vjp(lambda k: conv(x, k), k)[1](g), g, x


PROGRAMS = {"forward": forward, "dx": partial(gradient, "x"), "dk": partial(gradient, "k")}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("case", CASES)
def test_every_form_counts_as_the_convolution_of_lax(case, program, convention):
    totals = []
    for impl in ("lax", "canonical"):
        function, *args = PROGRAMS[program](CASES[case], impl)
        totals.append(costs.analyze(function, *args, convention=convention, residuals=False).total.macs)
    assert totals[0] == totals[1] > 0


def test_a_form_is_no_layer():
    def block(x, k):
        with jax.named_scope("block"):
            return conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NUMBERS, impl="canonical")

    report = costs.analyze(jax.grad(lambda k, x: block(x, k).sum()), jnp.ones(WIDE["k"]), jnp.ones(WIDE["x"]))
    assert {row.name for row in report.rows if row.macs} == {"block"}
