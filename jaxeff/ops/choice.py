"""What a gate chooses by, what it chooses, and what is left then, in compiled code on CPU.

XLA sums a map at a tenth of the rate at which it can be read, and sorts what is to be chosen, twice; and to divide, or
to put zeros into a small map, it wakes its threads, which takes ten times as long as the work. Before a small
convolution all that takes as long as the convolution itself. `choice.cc` takes microseconds.
"""

import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import compat
from jaxeff.ops import native

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
SYMBOLS: tuple[str, ...] = (
    "MeanOverPositions", "MeanOverChannels", "Highest", "HighestMask", "KeepHighest", "KeepChannels", "MeanOverKept",
)  # fmt: skip
TERMS: tuple[str, ...] = ("mean", "abs_mean", "l2")
# For jaxeff.costs: what is done here are no multiply-accumulates.
NO_PRODUCTS: dict[str, Any] = {"paper_macs": np.int64(0), "xla_macs": np.int64(0)}


def unavailable() -> str | None:
    """Why the functions here cannot be had, or None; the first call on a machine compiles."""
    return native.reason(SOURCE, *SYMBOLS)


def available(array: jax.Array) -> bool:
    """Whether the functions here can be had for this array at once, without compiling first."""
    on_cpu = jax.default_backend() == "cpu" and array.dtype == jnp.float32
    return on_cpu and native.compiled(SOURCE) and unavailable() is None


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def map_means(maps: jax.Array, over: str, term: str, group: int = 1) -> jax.Array:
    """Means of feature maps along one axis.

    Args:
      maps: float32 [..., P, C].
      over: "positions" or "channels".
      term: "mean" of the numbers, "abs_mean" of their magnitudes, or "l2", the root of the mean of their squares.
      group: over positions, the mean of the results of so many neighbouring channels; divides C.

    Returns:
      float32 [..., C / group] over positions, [..., P] over channels.

    Raises:
      jaxeff.ops.native.UnavailableError: where the code cannot be compiled.
    """
    native.register(SOURCE, *SYMBOLS)
    name, size = ("MeanOverPositions", maps.shape[-1] // group)
    if over == "channels":
        name, size = "MeanOverChannels", maps.shape[-2]
    result = compat.ffi_result_like(maps, (*maps.shape[:-2], size), jnp.float32)
    call = jax.ffi.ffi_call(name, result, vmap_method="broadcast_all")
    return call(maps, kind=np.int64(TERMS.index(term)), group=np.int64(group), **NO_PRODUCTS)


@map_means.defjvp
def _map_means_jvp(over, term, group, primals, tangents):
    (maps,), (tangent,) = primals, tangents
    axis = -2 if over == "positions" else -1
    slope = {"mean": lambda: 1.0, "abs_mean": lambda: jnp.sign(maps), "l2": lambda: maps}[term]()
    change = (slope * tangent).mean(axis)
    if term == "l2":
        change = change / map_means(maps, over, term)
    if over == "positions":
        change = change.reshape(*change.shape[:-1], -1, group).mean(-1)
    return map_means(maps, over, term, group), change


def means_of_kept(maps: jax.Array, by_group: jax.Array, kept: int, term: str, *, only_nan: bool) -> jax.Array:
    """Means over channels without those that are dropped: without all of them, or those alone whose score is NaN.

    Args:
      maps: float32 [..., P, C].
      by_group: float32 [..., G], scores of groups of C / G neighbouring channels.
      kept: how many groups, in the order of `highest`.
      term: as of `map_means`; what is left out counts as zero.
      only_nan: whether other dropped channels count.

    Returns:
      float32 [..., P], without gradient.

    Raises:
      jaxeff.ops.native.UnavailableError: where the code cannot be compiled.
    """
    native.register(SOURCE, *SYMBOLS)
    axes = compat.varying_axes(maps) | compat.varying_axes(by_group)
    operands = compat.vary((jax.lax.stop_gradient(maps), jax.lax.stop_gradient(by_group)), axes)
    result = compat.ffi_result_like(operands[0], maps.shape[:-1], jnp.float32)
    call = jax.ffi.ffi_call("MeanOverKept", result, vmap_method="broadcast_all")
    numbers = {"kind": TERMS.index(term), "groups_kept": kept, "only_nan": int(only_nan)}
    return call(*operands, **{name: np.int64(number) for name, number in numbers.items()}, **NO_PRODUCTS)


def highest(scores: jax.Array, k: int) -> jax.Array:
    """Indices of the k highest, ascending; among equal ones the lower indices, NaN as minus infinity, -0 as 0.

    Args:
      scores: float32 [..., S].
      k: how many, 1..S.

    Returns:
      int32 [..., k].

    Raises:
      jaxeff.ops.native.UnavailableError: where the code cannot be compiled.
    """
    native.register(SOURCE, *SYMBOLS)
    result = compat.ffi_result_like(scores, (*scores.shape[:-1], k), jnp.int32)
    return jax.ffi.ffi_call("Highest", result, vmap_method="broadcast_all")(scores, **NO_PRODUCTS)


def highest_mask(scores: jax.Array, k: int | jax.Array) -> jax.Array:
    """Which scores are the k highest, in the order of `highest`.

    Args:
      scores: float32 [..., S].
      k: how many; traced too, and an array that broadcasts to [..., 1]. Below 1 is none, above S all.

    Returns:
      bool [..., S].

    Raises:
      jaxeff.ops.native.UnavailableError: where the code cannot be compiled.
    """
    native.register(SOURCE, *SYMBOLS)
    counts = jnp.broadcast_to(jnp.asarray(k, jnp.int32), (*scores.shape[:-1], 1))
    axes = compat.varying_axes(scores) | compat.varying_axes(counts)
    scores, counts = compat.vary((scores, counts), axes)
    result = compat.ffi_result_like(scores, scores.shape, jnp.bool_)
    return jax.ffi.ffi_call("HighestMask", result, vmap_method="broadcast_all")(scores, counts, **NO_PRODUCTS)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def keep_highest(maps: jax.Array, by_group: jax.Array, by_column: jax.Array, kept: tuple[int, int]) -> jax.Array:
    """Maps with zeros in the place of all but the highest channel groups and positions, in the order of `highest`.

    Args:
      maps: float32 [..., P, C].
      by_group: float32 [..., G], scores of groups of C / G neighbouring channels; G of 0 keeps all.
      by_column: float32 [..., P], scores of positions, or [..., 0], which keeps all.
      kept: how many groups and how many positions.

    Returns:
      float32 [..., P, C]. Gradients of any order pass what is kept; none reach the scores.

    Raises:
      jaxeff.ops.native.UnavailableError: where the code cannot be compiled.
    """
    native.register(SOURCE, *SYMBOLS)
    axes = compat.varying_axes(maps) | compat.varying_axes(by_group) | compat.varying_axes(by_column)
    operands = compat.vary((maps, by_group, by_column), axes)
    result = compat.ffi_result_like(operands[0], maps.shape, jnp.float32)
    call = jax.ffi.ffi_call("KeepHighest", result, vmap_method="broadcast_all")
    return call(*operands, groups_kept=np.int64(kept[0]), columns_kept=np.int64(kept[1]), **NO_PRODUCTS)


keep_highest.defvjp(
    lambda maps, by_group, by_column, kept: (keep_highest(maps, by_group, by_column, kept), (by_group, by_column)),
    lambda kept, scores, g: (keep_highest(g, *scores, kept), *map(jnp.zeros_like, scores)),
)


@jax.custom_vjp
def keep_channels(maps: jax.Array, channels: jax.Array) -> jax.Array:
    """Maps with zeros in the place of all but the listed channels.

    Args:
      maps: float32 [..., P, C].
      channels: int32 [..., K].

    Returns:
      float32 [..., P, C], with gradients of any order.

    Raises:
      jaxeff.ops.native.UnavailableError: where the code cannot be compiled.
      jax.errors.JaxRuntimeError: while it runs, for channels out of range.
    """
    native.register(SOURCE, *SYMBOLS)
    axes = compat.varying_axes(maps) | compat.varying_axes(channels)
    operands = compat.vary((maps, channels), axes)
    result = compat.ffi_result_like(operands[0], maps.shape, jnp.float32)
    return jax.ffi.ffi_call("KeepChannels", result, vmap_method="broadcast_all")(*operands, **NO_PRODUCTS)


keep_channels.defvjp(
    lambda maps, channels: (keep_channels(maps, channels), channels),
    lambda channels, g: (keep_channels(g, channels), np.zeros(channels.shape, jax.dtypes.float0)),
)
