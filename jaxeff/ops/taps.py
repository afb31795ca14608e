"""Where each tap of a convolution looks: static, so it becomes constants of a program.

Positions are numbered in row-major order.
"""

from collections.abc import Sequence

import numpy as np


def read_positions(
    size: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> np.ndarray:
    """Which input position each tap reads for each output position.

    Args:
      size: of the input along every spatial axis.
      kernel: taps along every axis.
      strides: one for every axis.
      padding: (low, high) of every axis.
      dilation: of the kernel, one for every axis.

    Returns:
      int32 [taps, outputs]; the number of input positions where a tap reads padding.
    """
    flat = np.zeros((1, 1), np.int64)
    inside = np.ones((1, 1), bool)
    for n, taps, stride, (low, high), step in zip(size, kernel, strides, padding, dilation, strict=True):
        outputs = max(0, (n + low + high - (taps - 1) * step - 1) // stride + 1)
        at = np.arange(taps)[:, None] * step + np.arange(outputs)[None] * stride - low
        shape = len(flat) * taps, flat.shape[1] * outputs
        flat = (flat[:, None, :, None] * n + at[None, :, None, :]).reshape(shape)
        inside = (inside[:, None, :, None] & ((at >= 0) & (at < n))[None, :, None, :]).reshape(shape)
    return np.where(inside, flat, int(np.prod(size))).astype(np.int32)


def inverse(table: np.ndarray, size: int) -> np.ndarray:
    """Who finds each of `size` things, by a table [taps, finders] of what every finder finds through each tap.

    Of `read_positions` it says which output position an input position contributes to.

    Returns:
      int32 [taps, size]; the number of finders where there is none.
    """
    taps, finders = table.shape
    found = np.full((taps, size + 1), finders, np.int32)
    for tap in range(taps):
        found[tap, table[tap]] = np.arange(finders)
    return found[:, :-1]
