"""Tables in the host's memory that a program of an accelerator reads: pinned, so that no copy of the table is made.

Inside a program rows are gathered in one of two forms: by the "host", so that only they cross the bus, or by the
"device", which reads the host's memory over the bus. Not every backend can do either, so both are tried on a few rows
before the first use. Where none works, a NumPy array takes the place of the table, and rows are gathered before the
program.

Letters: D numbers of a row, N look-ups, R rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import compat

PINNED = "pinned_host"
FORMS = ("host", "device")


def pinned(table: Any) -> jax.Array:
    """Puts a table [R, D] of any dtype into pinned memory of the host of the default device.

    Raises:
      ValueError: if the backend has no such memory.
    """
    if reason := unavailable():
        raise ValueError(f"the table cannot be pinned: {reason}; keep it as a NumPy array, which take_rows accepts")
    return jax.device_put(table, _pinned_sharding())


def unavailable() -> str | None:
    """Why the default device has no pinned memory of its host, or None."""
    device = _device()
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    return None if PINNED in kinds else f"{device.platform} has {', '.join(kinds)}, not {PINNED}"


def forms() -> tuple[str, ...]:
    """The forms of `FORMS` that give right rows on the default device; may be asked while a program is traced."""
    return () if unavailable() else _working(_device())


def take_rows(table: Any, indices: Any, form: str = "auto") -> jax.Array:
    """Rows of a table in the host's memory, on the default device.

    Args:
      table: [R, D], from `pinned`, or a NumPy array where the indices are known; always an argument of the program that
        calls this, never a constant of it, or XLA would copy it.
      indices: integers [N], in 0 .. R - 1, which is not checked.
      form: for a pinned table "host", "device", or "auto" for the first of these that works here.

    Returns:
      [N, D] in the memory of the device.

    Raises:
      TypeError: for a NumPy array inside a program.
      ValueError: for a form that is unknown or does not work here.
    """
    if form not in ("auto", *FORMS):
        raise ValueError(f"form={form!r} is unknown; there are auto, {', '.join(FORMS)}")
    if isinstance(table, np.ndarray):
        if isinstance(indices, jax.core.Tracer):
            raise TypeError("rows of a NumPy array cannot be taken inside a program; pin it, or take them before")
        return jnp.asarray(np.take(table, np.asarray(indices), axis=0))
    working = forms()
    if form not in ("auto", *working) or not working:
        raise ValueError(
            f"form={form!r} does not work on {_device().platform}, where {', '.join(working) or 'none'} does; pass the "
            "table as a NumPy array"
        )
    return _take(table, jnp.asarray(indices), working[0] if form == "auto" else form)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _take(table: jax.Array, indices: jax.Array, form: str) -> jax.Array:
    gather = compat.on_host(_rows) if form == "host" else _rows
    # What is gathered from must be in one memory with the indices.
    rows = gather(table, jax.device_put(indices, jax.memory.Space.Host))
    return jax.device_put(rows, jax.memory.Space.Device)


def _rows(table: jax.Array, indices: jax.Array) -> jax.Array:
    return table.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)


@functools.cache
def _working(device: jax.Device) -> tuple[str, ...]:
    expected = np.arange(24, dtype=np.float32).reshape(6, 4)
    indices = np.array([4, 0, 4], np.int32)
    found = []
    with jax.ensure_compile_time_eval(), jax.default_device(device):
        for form in FORMS:
            try:
                rows = np.asarray(_take(pinned(expected), jnp.asarray(indices), form))
            except Exception:  # compilers refuse in ways of their own
                continue
            if np.array_equal(rows, expected[indices]):
                found.append(form)
    return tuple(found)


def _device() -> jax.Device:
    """The default device: the one that is configured, or the first."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]


def _pinned_sharding() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(_device(), memory_kind=PINNED)
