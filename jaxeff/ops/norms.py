"""Normalisation by name: pure functions, and the Linen module that keeps their parameters and running statistics.

Every part of the library that takes a norm takes it by one of these names, so "batch", "group", "layer", "rms" and None
mean the same thing everywhere.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

NORMS: tuple[str, ...] = ("batch", "group", "layer", "rms")
EPSILON = 1e-5
GROUPS = 8
MOMENTUM = 0.9


class Moments(NamedTuple):
    """Mean and (biased) variance of each channel; float32 [C]."""

    mean: jax.Array
    var: jax.Array


def moments(x: jax.Array, axis_name: str | None = None) -> Moments:
    """Mean and variance of every channel of x [..., C], over a mapped axis as well where one is named.

    In one pass, as the mean of the squares less the square of the mean, like Flax's: where a mean is a thousand times
    its deviation, float32 has no digits left for the variance.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    space = tuple(range(x.ndim - 1))
    raw = (x.mean(space), (x * x).mean(space))
    mean, square = raw if axis_name is None else lax.pmean(raw, axis_name)
    # Rounding may leave less than nothing where the mean is large.
    return Moments(mean, jnp.maximum(square - mean * mean, 0.0))


def normalise(
    kind: str | None,
    x: jax.Array,
    params: Mapping[str, jax.Array],
    statistics: Moments | None = None,
    *,
    groups: int = GROUPS,
    epsilon: float = EPSILON,
) -> jax.Array:
    """Normalises channels-last activations.

    Args:
      kind: "batch", "group" (over space and the channels of a group), "layer" (over channels), "rms" (over channels,
        without mean) or None, which returns x.
      x: [N, ..., C].
      params: "scale" [C] and, but for "rms", "bias" [C].
      statistics: the moments that "batch" uses: those of this batch, or running ones.
      groups: number of groups of "group"; lowered to the largest divisor of the channels that is not above it.
      epsilon: added to the variance.

    Returns:
      Array of the shape of x, in the wider of its dtype and that of the parameters.

    Raises:
      ValueError: for an unknown kind, or "batch" without statistics.
    """
    if checked_norm(kind) is None:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = params["scale"].astype(wide.dtype)
    if kind == "rms":
        return wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon) * scale
    bias = params["bias"].astype(wide.dtype)
    if kind == "batch":
        if statistics is None:
            raise ValueError("norm 'batch' needs statistics: jaxeff.ops.moments(x), or running ones")
        return _scaled(wide, statistics, scale, bias, epsilon)
    if kind == "group":
        parts = largest_divisor(x.shape[-1], groups)
        split = wide.reshape(*x.shape[:-1], parts, x.shape[-1] // parts)
        of_group = _moments_over(split, (*range(1, x.ndim - 1), x.ndim))
        shape = (parts, x.shape[-1] // parts)
        return _scaled(split, of_group, scale.reshape(shape), bias.reshape(shape), epsilon).reshape(x.shape)
    return _scaled(wide, _moments_over(wide, (-1,)), 1.0, 0.0, epsilon) * scale + bias


class Running(NamedTuple):
    """The running statistics of a batch norm, as the Linen variables that hold them."""

    mean: Any
    var: Any

    def moments(self) -> Moments:
        """Their values."""
        return Moments(self.mean.value, self.var.value)

    def update(self, batch: Moments) -> None:
        """Moves them towards the statistics of a batch."""
        self.mean.value = MOMENTUM * self.mean.value + (1 - MOMENTUM) * batch.mean
        self.var.value = MOMENTUM * self.var.value + (1 - MOMENTUM) * batch.var


class NormVariables(nn.Module):
    """The variables of a norm, for layers that normalise inside a function of their own.

    Attributes: those of `Norm` of these names.
    """

    kind: str
    param_dtype: Any = jnp.float32
    scale_init: Any = nn.initializers.ones
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, features: int) -> tuple[dict[str, jax.Array], Running | None]:
        """Returns {"scale", "bias"} of that many channels ("rms" has no bias) and the running statistics of "batch"."""
        kind = checked_norm(self.kind)
        params = {"scale": self.param("scale", self.scale_init, (features,), self.param_dtype)}
        if kind != "rms":
            params["bias"] = self.param("bias", self.bias_init, (features,), self.param_dtype)
        if kind != "batch":
            return params, None
        mean = self.variable("batch_stats", "mean", jnp.zeros, (features,), jnp.float32)
        return params, Running(mean, self.variable("batch_stats", "var", jnp.ones, (features,), jnp.float32))


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
    groups: int = GROUPS
    epsilon: float = EPSILON
    axis_name: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scale_init: Any = nn.initializers.ones
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalises x [N, ..., C]; with `train`, "batch" uses and updates the statistics of this batch."""
        kind = checked_norm(self.kind)
        if kind is None:
            return x
        variables = NormVariables(kind, self.param_dtype, self.scale_init, self.bias_init)
        # The inner module shares this module's scope, so that the parameters are simply {scale, bias}.
        nn.share_scope(self, variables)
        params, running = variables(x.shape[-1])
        statistics = None
        if running is not None and train:
            statistics = moments(x, None if self.is_initializing() else self.axis_name)
            if not self.is_initializing():
                running.update(statistics)
        elif running is not None:
            statistics = running.moments()
        y = normalise(kind, x, params, statistics, groups=self.groups, epsilon=self.epsilon)
        return y.astype(self.dtype or jnp.result_type(x, *params.values()))


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


def _moments_over(x: jax.Array, axes: tuple[int, ...]) -> Moments:
    mean = x.mean(axes, keepdims=True)
    return Moments(mean, jnp.maximum((x * x).mean(axes, keepdims=True) - mean * mean, 0.0))


def _scaled(x, statistics: Moments, scale, bias, epsilon: float) -> jax.Array:
    """One multiply-add with the small factors worked out first, so that differentiation keeps x and nothing beside."""
    factor = lax.rsqrt(statistics.var + epsilon) * scale
    return x * factor + (bias - statistics.mean * factor)
