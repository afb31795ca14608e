"""Normalisation layers by name, as Linen modules with one calling convention.

Every part of the library that takes a norm takes it by one of these names, so "batch", "group", "layer", "rms" and None
mean the same thing everywhere.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

NORMS: tuple[str, ...] = ("batch", "group", "layer", "rms")


class Norm(nn.Module):
    """Normalisation of channels-last activations.

    Attributes:
      kind: "batch" (running statistics in the "batch_stats" collection, momentum 0.9), "group", "layer", "rms", or None
        for no norm.
      groups: number of groups of "group"; lowered to the largest divisor of the channels that is not above it.
      epsilon: added to the variance.
      axis_name: mapped axis over which "batch" shares its statistics, or None.
      dtype: dtype of the result; statistics are computed in float32.
      param_dtype: dtype of scale and offset.
      scale_init: initialiser of the scale [C].
      bias_init: initialiser of the offset [C].
    """

    kind: str | None
    groups: int = 8
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scale_init: Any = nn.initializers.ones
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalises x [N, ..., C]; with `train`, "batch" uses and updates the statistics of this batch."""
        if checked_norm(self.kind) is None:
            return x
        shared: dict[str, Any] = dict(
            epsilon=self.epsilon, dtype=self.dtype, param_dtype=self.param_dtype, scale_init=self.scale_init
        )
        # The inner module shares this module's scope, so that the parameters are simply {scale, bias}.
        if self.kind == "batch":
            norm: Any = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                axis_name=self.axis_name if train and not self.is_initializing() else None,
                bias_init=self.bias_init,
                **shared,
            )
        elif self.kind == "group":
            norm = nn.GroupNorm(largest_divisor(x.shape[-1], self.groups), bias_init=self.bias_init, **shared)
        elif self.kind == "layer":
            norm = nn.LayerNorm(bias_init=self.bias_init, **shared)
        else:
            norm = nn.RMSNorm(**shared)
        nn.share_scope(self, norm)
        return norm(x)


def checked_norm(kind: str | None) -> str | None:
    """Returns `kind` if it names a norm or is None.

    Raises:
      ValueError: listing the valid names.
    """
    if kind is not None and kind not in NORMS:
        raise ValueError(f"norm must be None or one of {', '.join(map(repr, NORMS))}, got {kind!r}")
    return kind


def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of `size` that is not above `limit` (both positive integers)."""
    return next(d for d in range(min(size, limit), 0, -1) if size % d == 0)
