"""What a gate chooses by, and what it chooses, in compiled code on CPU.

XLA sums a map at a tenth of the rate at which it can be read, and sorts what is to be chosen, twice: before a small
convolution that takes as long as the convolution itself. `choice.cc` takes microseconds.
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
SYMBOLS: tuple[str, ...] = ("SumOverPositions", "SumOverChannels", "Highest")
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


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def map_sums(maps: jax.Array, over: str, term: str) -> jax.Array:
    """Sums of feature maps along one axis.

    Args:
      maps: float32 [..., P, C].
      over: "positions" or "channels".
      term: what is summed: of "mean" the numbers, of "abs_mean" their magnitudes, of "l2" their squares.

    Returns:
      float32 [..., C] over positions, [..., P] over channels.

    Raises:
      jaxeff.ops.native.UnavailableError: where the code cannot be compiled.
    """
    native.register(SOURCE, *SYMBOLS)
    name, kept = {"positions": ("SumOverPositions", -1), "channels": ("SumOverChannels", -2)}[over]
    result = compat.ffi_result_like(maps, (*maps.shape[:-2], maps.shape[kept]), jnp.float32)
    call = jax.ffi.ffi_call(name, result, vmap_method="broadcast_all")
    return call(maps, kind=np.int64(TERMS.index(term)), **NO_PRODUCTS)


@map_sums.defjvp
def _map_sums_jvp(over, term, primals, tangents):
    (maps,), (tangent,) = primals, tangents
    slope = {"mean": lambda: 1.0, "abs_mean": lambda: jnp.sign(maps), "l2": lambda: 2 * maps}[term]()
    return map_sums(maps, over, term), (slope * tangent).sum(-2 if over == "positions" else -1)


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
