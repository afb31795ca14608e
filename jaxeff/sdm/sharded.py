"""Pooled look-ups of tables whose rows are spread over the devices of a mesh.

Each device holds an equal range of the rows of a table, and its share of the bags. Either ids travel to the owners of
their rows and rows travel back (`all_to_all`), or every device hears all ids, sums what it owns of every bag and sends
each device the sums for its bags (`reduce_scatter`). The first moves D numbers for a look-up, the second for a bag and
device: it wins where bags are longer than there are devices.

Letters: B bags, D dimension, L look-ups of the longest bag, P devices, R rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxeff.ops.embedding_bag import mean_of, pooled_lookup

METHODS = ("all_to_all", "reduce_scatter")


def padded_table(table: jax.Array, parts: int) -> jax.Array:
    """A table [R, D] with rows of zeros behind it, so that it splits into so many equal ranges."""
    return jnp.pad(table, ((0, -len(table) % parts), (0, 0)))


def moved_numbers(method: str, bags: int, length: int, dim: int, parts: int) -> int:
    """How many numbers (ids or floats) each device sends for `bags` bags of all devices, by the counts of the method.

    Raises:
      ValueError: for an unknown method.
    """
    _known(method)
    here = bags // parts
    if method == "all_to_all":
        return here * length * (parts - 1) // parts * (1 + dim)
    return here * length * (parts - 1) + (bags - here) * dim


def cheaper(bags: int, length: int, dim: int, parts: int) -> str:
    """The method that moves fewer numbers."""
    return min(METHODS, key=lambda method: moved_numbers(method, bags, length, dim, parts))


def sharded_lookup(
    mesh: jax.sharding.Mesh,
    axis: str,
    *,
    mode: str = "sum",
    method: str = "reduce_scatter",
    capacity: int | None = None,
    rows: int | None = None,
) -> Callable[..., Any]:
    """A pooled look-up of a table that is split by rows along an axis of a mesh.

    Args:
      mesh: the devices, as `jaxeff.parallel.mesh` makes one.
      axis: name of the axis along which rows and bags are split.
      mode: "sum" or "mean".
      method: "all_to_all" adds the rows of a bag in their order, so its results are bit-equal to those of one device;
        "reduce_scatter" adds one partial sum for each device.
      capacity: of "all_to_all", how many ids a device may send to each other one; None for all that it has, which
        always suffices. With less, fewer bytes are moved, and look-ups beyond it are counted as lost.
      rows: of the table before `padded_table`; ids from there on are out of range. None for all that it has.

    Returns:
      A function (table [R, D], indices int32 [B, L], lengths int32 [B] or None, weights float32 [B, L] or None) ->
      (float32 [B, D], int32 [] look-ups that were lost); R and B are multiples of the number of devices. An id that is
      out of range makes its bag NaN. It may be called inside jit.

    Raises:
      ValueError: for an unknown method or axis, a capacity of less than 1 or for the other method; and by the function
        for shapes that do not split.
    """
    _known(method)
    if any(kind is jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        raise ValueError("mesh: its axes must be left to the compiler; make it by jaxeff.parallel.mesh")
    if axis not in mesh.shape:
        raise ValueError(f"axis={axis!r} is not an axis of the mesh, which has {', '.join(mesh.shape)}")
    if capacity is not None and (method != "all_to_all" or capacity < 1):
        raise ValueError(f"capacity is of all_to_all and at least 1, got {capacity} for {method}")
    parts = mesh.shape[axis]
    local = partial(_routed, capacity=capacity) if method == "all_to_all" else _partial_sums

    def look_up(table, indices, lengths=None, weights=None):
        for name, size in (("rows of the table", len(table)), ("bags", len(indices))):
            if size % parts:
                raise ValueError(f"the {size} {name} do not split over {parts} devices; pad them to a multiple")
        if jnp.iinfo(indices.dtype).bits < 32:
            indices = indices.astype(jnp.int32)
        length = jnp.full(len(indices), indices.shape[1], jnp.int32) if lengths is None else lengths
        weight = jnp.ones(indices.shape, table.dtype) if weights is None else weights
        inside = jnp.arange(indices.shape[1]) < length[:, None]
        spec = jax.P(axis)

        @partial(jax.shard_map, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec, jax.P()))
        def on_device(table, indices, inside, weight):
            return local(table, indices, inside, weight, axis=axis, parts=parts)

        # As in a look-up on one device: an id out of range makes its bag NaN, and nothing else.
        outside = inside & ((indices < 0) | (indices >= (len(table) if rows is None else rows)))
        pooled, lost = on_device(table, indices, inside & ~outside, weight)
        pooled = jnp.where(outside.any(1)[:, None], jnp.nan, pooled)
        if mode == "mean":
            pooled = mean_of(pooled, length)
        return pooled, lost

    if mode not in ("sum", "mean"):
        raise ValueError(f"mode={mode!r} is unknown; there are sum and mean")
    return look_up


def _partial_sums(table, indices, inside, weight, *, axis, parts):
    first = lax.axis_index(axis) * len(table)
    indices, inside, weight = (lax.all_gather(x, axis, tiled=True) for x in (indices, inside, weight))
    mine = inside & (indices >= first) & (indices < first + len(table))
    sums = pooled_lookup(table, jnp.where(mine, indices - first, 0), None, jnp.where(mine, weight, 0))
    return lax.psum_scatter(sums, axis, tiled=True), jnp.int32(0)


def _routed(table, indices, inside, weight, *, axis, parts, capacity):
    count = indices.size
    room = min(capacity or count, count)
    flat, valid = indices.reshape(-1), inside.reshape(-1)
    # Padding goes nowhere: behind the last owner.
    owner = jnp.where(valid, flat // len(table), parts)
    order = jnp.argsort(owner, stable=True)
    sorted_owner = owner[order]
    rank = jnp.arange(count) - jnp.searchsorted(sorted_owner, sorted_owner, side="left")
    sent = (rank < room) & (sorted_owner < parts)
    place = jnp.where(sent, sorted_owner * room + rank, parts * room)
    outgoing = jnp.zeros(parts * room, flat.dtype).at[place].set(flat[order] % len(table), mode="drop")
    incoming = lax.all_to_all(outgoing.reshape(parts, room), axis, 0, 0)
    rows = lax.all_to_all(table[incoming], axis, 0, 0).reshape(parts * room, -1)
    # One more row, of zeros, for look-ups that are padding or found no room.
    rows = jnp.pad(rows, ((0, 1), (0, 0)))
    found = jnp.zeros(count, jnp.int32).at[order].set(place.astype(jnp.int32))
    pooled = pooled_lookup(rows, found.reshape(indices.shape), None, jnp.where(inside, weight, 0))
    lost = jnp.sum(valid) - jnp.sum(sent)
    return pooled, lax.psum(lost.astype(jnp.int32), axis)


def _known(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; there are {', '.join(METHODS)}")
