"""Engines in compiled code: what is kept is read where it lies, so leaving out the rest costs nothing but the choice.

CPU only, float32, and only where a C++ compiler is found; `jaxeff.ops.gathered_conv` says how.
"""

from typing import Any

import jax

from jaxeff.dynamic.engines.geometry import Geometry
from jaxeff.ops import choice
from jaxeff.ops.gathered_conv import gathered_conv, unavailable


def native_conv(
    window: Geometry,
    x: jax.Array,
    kernel: jax.Array,
    channels: jax.Array | None = None,
    columns: jax.Array | None = None,
    features: jax.Array | None = None,
) -> jax.Array:
    """Convolution over the kept channels and columns of each sample; exact.

    Args:
      window: geometry of the convolution.
      x: float32 [N, H, W, C].
      kernel: float32 [kh, kw, C, O].
      channels: int32 [N, K], ascending; None for all.
      columns: int32 [N, S], numbers of positions, no two of a sample alike; None for all.
      features: int32 [N, L], ascending, output channels that are computed, the others being zero; None for all.

    Returns:
      [N, H', W', O]. Its backward pass costs the kept share of channels and columns, too.
    """
    return gathered_conv(x, kernel, window.strides, window.padding, window.dilation, channels, columns, features)


def native_misfit(dtype: Any) -> str | None:
    """Why `native_conv` cannot be had for this dtype, or None; compiles it, and what chooses for it, where need be."""
    return unavailable(dtype) or choice.unavailable()
