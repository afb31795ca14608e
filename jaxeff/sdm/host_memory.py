"""Tables in the host's memory that a program of an accelerator reads: pinned, so that no copy of the table is made.

Rows are gathered where they lie, by the host, and only they cross the bus. Where a backend cannot do that inside a
program, the rows are gathered by NumPy before it.

Letters: D dimension, N look-ups, R rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compute_on import compute_on

PINNED = "pinned_host"


def pinned(table: Any) -> jax.Array:
    """Puts a table [R, D] of any dtype into pinned memory of the host of the default device.

    Raises:
      ValueError: if the backend has no such memory.
    """
    if reason := unavailable():
        raise ValueError(f"the table cannot be pinned: {reason}; keep it as a NumPy array, which take_rows accepts")
    return jax.device_put(table, _sharding(PINNED))


def unavailable() -> str | None:
    """Why the default device has no pinned memory of its host, or None."""
    device = jax.local_devices()[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    return None if PINNED in kinds else f"{device.platform} has {', '.join(kinds)}, not {PINNED}"


def take_rows(table: Any, indices: jax.Array) -> jax.Array:
    """Rows of a table in the host's memory, on the default device.

    Args:
      table: [R, D], from `pinned` or a NumPy array; always an argument of the program that calls this, never a constant
        of it, or XLA would copy it.
      indices: integers [N], in range.

    Returns:
      [N, D] in the memory of the device.
    """
    if isinstance(table, np.ndarray):
        return jnp.asarray(table[np.asarray(indices)])
    return _take(table, indices)


@functools.partial(jax.jit, inline=True)
def _take(table: jax.Array, indices: jax.Array) -> jax.Array:
    # The indices must be in the memory of the table, and the gather is the host's.
    on_host = jax.device_put(indices, jax.memory.Space.Host)
    with compute_on("device_host"):
        rows = table.at[on_host].get(mode="promise_in_bounds")
    return jax.device_put(rows, jax.memory.Space.Device)


def _sharding(kind: str) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind=kind)
