"""The window of a convolution, and where each of its taps looks: static, so it becomes constants of the program."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxeff.ops import conv_general_dilated, taps

LAYOUT = ("NHWC", "HWIO", "NHWC")


class Geometry(NamedTuple):
    """A 2D convolution without groups.

    Attributes:
      strides: (vertical, horizontal).
      padding: (low, high) of each axis.
      dilation: of the kernel, (vertical, horizontal).
      precision: as in lax.
    """

    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    precision: Any = None


def geometry(
    x_shape: Sequence[int],
    kernel_shape: Sequence[int],
    strides: Sequence[int] = (1, 1),
    padding: Any = "SAME",
    dilation: Sequence[int] = (1, 1),
    precision: Any = None,
) -> Geometry:
    """The geometry of a convolution of x [N, H, W, I] with a kernel [kh, kw, I, O], its padding made explicit."""
    if isinstance(padding, str):
        reach = [(size - 1) * d + 1 for size, d in zip(kernel_shape[:2], dilation, strict=True)]
        padding = lax.padtype_to_pads(x_shape[1:3], reach, strides, padding)
    (top, bottom), (left, right) = ((int(low), int(high)) for low, high in padding)
    vertical, horizontal = (int(s) for s in strides)
    return Geometry(
        (vertical, horizontal),
        ((top, bottom), (left, right)),
        (int(dilation[0]), int(dilation[1])),
        lax.Precision(precision) if isinstance(precision, str) else precision,
    )


def convolve(window: Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution itself, in the form that is fast on this device."""
    return conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=LAYOUT,
        precision=window.precision,
    )


def out_size(window: Geometry, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
    """Height and width of the output, of an input and a kernel of these."""
    height, width = (
        (n + low + high - (taps - 1) * d - 1) // s + 1
        for n, taps, s, (low, high), d in zip(
            size, kernel, window.strides, window.padding, window.dilation, strict=True
        )
    )
    return height, width


def read_positions(window: Geometry, size: tuple[int, int], kernel: tuple[int, int]) -> np.ndarray:
    """Which input position each tap reads for each output position, see `jaxeff.ops.taps`: int32 [taps, outputs]."""
    return taps.read_positions(size, kernel, window.strides, window.padding, window.dilation)


def written_positions(window: Geometry, size: tuple[int, int], kernel: tuple[int, int]) -> np.ndarray:
    """Which output position each input position contributes to through each tap: int32 [taps, inputs]."""
    return taps.inverse(read_positions(window, size, kernel), size[0] * size[1])
