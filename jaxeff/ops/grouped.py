"""Grouped layers with the group as the leading axis of activations and kernels.

A grouped convolution in the usual layout interleaves its groups in the channel axis, which XLA executes slowly on CPU
and which hides the groups from `vmap`, permutations and per-group averaging. Group-major arrays keep them apart:
activations [G, N, *space, C/G], kernels [G, *kernel, I/G, O/G]. A network changes layout once on entry and once on exit
of its grouped part.

Letters: G groups, N batch, I and O input and output channels, C channels.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxeff.ops.conv import conv_general_dilated

GroupedImpl = Literal["separate", "matmul", "auto"]


def grouped_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
    *,
    dilation: Sequence[int] = (1, 1),
    precision: Any = None,
    impl: GroupedImpl = "auto",
) -> jax.Array:
    """Grouped 2D convolution on group-major arrays, equal to `feature_group_count=G` on channel-major ones.

    Args:
      x: [G, N, H, W, I/G].
      kernel: [G, kh, kw, I/G, O/G].
      strides: two strides.
      padding: "SAME", "VALID" or two (low, high) pairs.
      dilation: two kernel dilations.
      precision: as in lax.
      impl: "separate" computes one convolution per group; "matmul" gathers patches and does one batched matrix
        product; "auto" takes the first on CPU and the second elsewhere.

    Returns:
      [G, N, H', W', O/G].

    Raises:
      ValueError: for ranks, group counts or channels that do not fit, or an unknown `impl`.
    """
    if x.ndim != 5 or kernel.ndim != 5:
        raise ValueError(
            f"x must be [G, N, H, W, I/G] and kernel [G, kh, kw, I/G, O/G], got {x.shape} and {kernel.shape}; "
            "group_major and group_major_kernel make them"
        )
    _check_groups(x, kernel)
    if impl not in ("separate", "matmul", "auto"):
        raise ValueError(f"impl must be one of 'separate', 'matmul', 'auto', got {impl!r}")
    if impl == "separate" or (impl == "auto" and jax.default_backend() == "cpu"):
        one = partial(
            conv_general_dilated,
            window_strides=strides,
            padding=padding,
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision,
            impl="canonical",
        )
        return jax.vmap(one)(x, kernel)
    groups, batch, *_, channels = x.shape
    merged = x.reshape(groups * batch, *x.shape[2:])
    patches = lax.conv_general_dilated_patches(
        merged, kernel.shape[1:3], strides, padding, rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision,
    )  # fmt: skip
    # conv_general_dilated_patches puts the channel before the taps: (I/G, kh, kw).
    weights = kernel.transpose(0, 3, 1, 2, 4).reshape(groups, -1, kernel.shape[-1])
    rows = patches.reshape(groups, -1, weights.shape[1])
    return jnp.matmul(rows, weights, precision=precision).reshape(groups, batch, *patches.shape[1:3], -1)


def grouped_dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, precision: Any = None):
    """Block-diagonal dense layer: one matrix product per group.

    Args:
      x: [G, N, I/G].
      kernel: [G, I/G, O/G].
      bias: [G, O/G] or None.
      precision: as in lax.

    Returns:
      [G, N, O/G].

    Raises:
      ValueError: for ranks, group counts or channels that do not fit.
    """
    if x.ndim != 3 or kernel.ndim != 3:
        raise ValueError(f"x must be [G, N, I/G] and kernel [G, I/G, O/G], got {x.shape} and {kernel.shape}")
    _check_groups(x, kernel)
    y = jnp.matmul(x, kernel, precision=precision)
    return y if bias is None else y + bias[:, None, :]


def group_major(x: jax.Array, groups: int) -> jax.Array:
    """[N, ..., C] to [G, N, ..., C/G].

    Raises:
      ValueError: if `groups` does not divide the last axis.
    """
    _check_divides(groups, x.shape[-1], "channels")
    split = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return jnp.moveaxis(split, -2, 0)


def channel_major(x: jax.Array) -> jax.Array:
    """[G, N, ..., C/G] to [N, ..., C]; the inverse of `group_major`."""
    moved = jnp.moveaxis(x, 0, -2)
    return moved.reshape(*moved.shape[:-2], -1)


def group_major_kernel(kernel: jax.Array, groups: int) -> jax.Array:
    """A `feature_group_count=G` kernel [..., I/G, O] as [G, ..., I/G, O/G].

    Raises:
      ValueError: if `groups` does not divide the output features.
    """
    _check_divides(groups, kernel.shape[-1], "output features")
    return jnp.moveaxis(kernel.reshape(*kernel.shape[:-1], groups, -1), -2, 0)


def _check_divides(groups: int, size: int, what: str) -> None:
    if groups < 1 or size % groups:
        raise ValueError(f"groups={groups} must divide the {size} {what}")


def _check_groups(x: jax.Array, kernel: jax.Array) -> None:
    if x.shape[0] != kernel.shape[0]:
        raise ValueError(f"x has {x.shape[0]} groups and the kernel {kernel.shape[0]}: {x.shape} and {kernel.shape}")
    if x.shape[-1] != kernel.shape[-2]:
        raise ValueError(
            f"each group of x has {x.shape[-1]} channels but each group of the kernel takes {kernel.shape[-2]}: "
            f"{x.shape} and {kernel.shape}"
        )
