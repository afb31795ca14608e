"""Meshes of devices, and where batches and states lie on them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

Tree = Any


def mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with named axes over devices.

    Args:
      shape: axis name to number of devices along it, in order; one of them may be -1, which takes the devices that
        the others leave. ``None`` is ``{"data": -1}``: every device on one axis.
      devices: the devices to use, ``jax.devices()`` by default, which on several hosts are those of all hosts.

    Returns:
      A ``jax.sharding.Mesh`` whose axes are left to the compiler (``AxisType.Auto``).

    Raises:
      ValueError: a size is neither positive nor -1, there are two -1, or the sizes do not multiply to the devices.
      TypeError: a size is not an integer.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = {"data": -1} if shape is None else dict(shape)
    if not shape:
        raise ValueError("mesh: shape names no axis; give for example {'data': -1}")
    for axis, size in shape.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"mesh: the size of axis {axis!r} must be an integer, got {size!r}")
        if size < 1 and size != -1:
            raise ValueError(f"mesh: the size of axis {axis!r} must be positive, or -1 for the rest, got {size}")
    open_axes = [axis for axis, size in shape.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh: only one axis may be -1, got {open_axes}")
    fixed = math.prod(size for size in shape.values() if size != -1)
    fits = len(devices) > 0 and (len(devices) % fixed == 0 if open_axes else len(devices) == fixed)
    if not fits:
        wanted = f"a multiple of {fixed}" if open_axes else f"{fixed}"
        raise ValueError(
            f"mesh: shape {shape} needs {wanted} devices, but there are {len(devices)}; "
            "change the sizes, make one of them -1, or pass the devices to use"
        )
    sizes = tuple(len(devices) // fixed if size == -1 else size for size in shape.values())
    # make_mesh, not Mesh(reshape(devices)): it orders the devices of a TPU slice by their wiring.
    return jax.make_mesh(sizes, tuple(shape), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def batch_sharding(mesh: Mesh, axis: str = "data") -> NamedSharding:
    """Sharding of arrays whose leading axis is the batch: split along one mesh axis, copied along the others.

    Args:
      mesh: the mesh.
      axis: the mesh axis that splits the batch.

    Returns:
      The sharding, also for the loaders that place batches while the last one is computed on.

    Raises:
      ValueError: the mesh has no such axis.
    """
    check_axis(mesh, axis)
    return NamedSharding(mesh, PartitionSpec(axis))


def shard_batch(batch: Tree, mesh: Mesh, axis: str = "data") -> Tree:
    """Puts a batch on the mesh, rows split along one axis.

    Args:
      batch: leaves ``[B, ...]``. On several hosts every host must hold the same, whole batch; when each loads its own
        rows use ``global_batch``.
      mesh: the mesh.
      axis: the mesh axis that splits the rows.

    Returns:
      The batch as global arrays ``[B, ...]``.

    Raises:
      ValueError: B does not divide by the devices along the axis, or the leaves disagree about B.
    """
    sharding = batch_sharding(mesh, axis)
    check_divides(batch, mesh.shape[axis], f"devices on axis {axis!r}")
    return jax.device_put(batch, sharding)


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Puts a copy of every leaf on every device of the mesh.

    Args:
      tree: the state; when there are several hosts, that of the first one is taken.
      mesh: the mesh.

    Returns:
      The same tree of global, replicated arrays. A copy already on a device is reused, so a later step that donates
      its state takes the original with it.
    """
    return put(tree, replicated(mesh))


def put(tree: Tree, sharding: Sharding) -> Tree:
    """Puts every leaf where a sharding wants it, also where it spans several hosts.

    Args:
      tree: arrays, typed PRNG keys among them. When the devices are of several hosts, every host must hold a tree of
        the same shapes and dtypes, and the values of the first host are taken: hosts that are not alike may round
        differently what they computed from the same seed, and copies that differ would stay different.
      sharding: that of every leaf.

    Returns:
      The same tree of global arrays.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    leaves, structure = jax.tree.flatten(tree)
    # jax.device_put takes no keys here, and compares host by host and leaf by leaf.
    plain = [jax.random.key_data(leaf) if _is_key(leaf) else np.asarray(leaf) for leaf in leaves]
    placed = []
    for leaf, value in zip(leaves, multihost_utils.broadcast_one_to_all(plain), strict=True):
        array = jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
        placed.append(jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array)
    return jax.tree.unflatten(structure, placed)


def divide_batch(batch: Tree, parts: int, what: str = "parts") -> Tree:
    """Splits the rows of a batch into equal, contiguous parts along a new leading axis.

    Args:
      batch: leaves ``[B, ...]``.
      parts: how many.
      what: what the parts are, for the error message.

    Returns:
      Leaves ``[parts, B / parts, ...]``.

    Raises:
      ValueError: B does not divide by the parts, or the leaves disagree about B.
    """
    rows = check_divides(batch, parts, what) // parts
    # The array's own reshape: rows that are still on the host stay there.
    return jax.tree.map(lambda leaf: leaf.reshape(parts, rows, *leaf.shape[1:]), batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def check_axis(mesh: Mesh, axis: str) -> None:
    """Raises ``ValueError`` when the mesh has no such axis."""
    if axis not in mesh.shape:
        raise ValueError(f"axis {axis!r} is not an axis of the mesh; its axes are {list(mesh.shape)}")


def check_divides(batch: Tree, parts: int, what: str) -> int:
    """Number of rows of a batch, once it is sure that they divide by ``parts``; ``ValueError`` otherwise."""
    sizes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = np.shape(leaf)
        if not shape:
            raise ValueError(f"batch leaf {name!r} is a scalar; every leaf needs a leading batch axis")
        sizes[name] = shape[0]
    if not sizes:
        raise ValueError("the batch has no leaves")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"batch leaves disagree about the number of rows: {sizes}")
    rows = next(iter(sizes.values()))
    check_rows(rows, parts, what)
    return rows


def check_rows(rows: int, parts: int, what: str) -> None:
    """Raises ``ValueError`` when a number of rows does not divide by ``parts``."""
    if parts < 1:
        raise ValueError(f"the number of {what} must be positive, got {parts}")
    if rows < 1 or rows % parts:
        lower, upper = rows // parts * parts, (rows // parts + 1) * parts
        nearest = f"{lower} or {upper}" if lower else f"{upper}"
        raise ValueError(
            f"batch of {rows} does not divide by {parts} {what}: use a batch size that is a multiple of {parts}, "
            f"for example {nearest}"
        )
