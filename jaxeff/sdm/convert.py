"""Tables of a store from arrays: those of a pytree of parameters by their paths, or of an iterator one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxeff.sdm.disk import Disk
from jaxeff.sdm.encoding import RowFormat
from jaxeff.sdm.table import TableSpec
from jaxeff.sdm.writer import Writer

# What comes from a device at a time.
_PIECE = 1 << 26


def tables_of(tree: Any, select: Callable[[str, Any], bool] | None = None) -> dict[str, Any]:
    """Finds the tables of a pytree.

    Args:
      tree: parameters, as of a checkpoint.
      select: gets the path of a leaf, "params/user/embedding", and the leaf; True for a table. None for every leaf of
        two axes, which takes kernels of dense layers along.

    Returns:
      The tables by path, in the order of the tree.

    Raises:
      ValueError: nothing is selected, or a leaf that has not two axes.

    >>> list(tables_of({"user": {"embedding": np.zeros((3, 2))}, "bias": np.zeros(2)}))
    ['user/embedding']
    """
    paths = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    chosen = {path: leaf for path, leaf in paths if (select(path, leaf) if select else np.ndim(leaf) == 2)}
    for path, leaf in chosen.items():
        if np.ndim(leaf) != 2:
            raise ValueError(f"select: {path!r} has shape {list(np.shape(leaf))}, and a table has two axes")
    if not chosen:
        raise ValueError(f"tree: no leaf is a table; there are {', '.join(path for path, _ in paths) or 'none'}")
    return chosen


def write_tables(
    folder: str | os.PathLike[str],
    tables: Mapping[str, Any] | Iterable[tuple[str, Any]],
    kind: str | Mapping[str, str] = "float32",
    *,
    remaps: Mapping[str, Any] | None = None,
    block: int = 4096,
    packing: str = "dense",
    keep: int = 2,
    disk: Disk | None = None,
) -> str:
    """Publishes arrays as a version of a store.

    Args:
      folder: the folder of the store.
      tables: float [R, D] arrays of NumPy or JAX, by name; or pairs of name and array, each made when it is its turn
        and let go after. An array of a device comes to the host in pieces of 64 MiB.
      kind: one of `encoding.KINDS` for all, or by name.
      remaps: for tables that were pruned, the row of every id, -1 for pruned ones, by name.
      block, packing, keep, disk: as of `Writer`.

    Returns:
      The name of the version.

    Raises:
      ValueError, TypeError: an array that is no table, a kind that is not known or does not hold it, or a remap or kind
        of a table that does not come.
      StoreBusy, DiskFull, WriteError: as `Writer`.
    """
    left = dict(remaps or {})
    kinds = dict(kind) if isinstance(kind, Mapping) else None
    with Writer(folder, block, packing, keep=keep, disk=disk) as writer:
        for name, array in tables.items() if isinstance(tables, Mapping) else tables:
            if getattr(array, "ndim", None) != 2 or not array.shape[1]:
                raise ValueError(f"tables: {name!r}: expected an array [R, D], got {list(np.shape(array))}")
            if kinds is not None and name not in kinds:
                raise ValueError(f"kind: none for table {name!r}; give one for every table, or one for all")
            chosen = kinds.pop(name) if kinds is not None else str(kind)
            spec = TableSpec(name, array.shape[0], RowFormat(chosen, array.shape[1]))
            writer.add(spec, _pieces(array), left.pop(name, None))
        if left or kinds:
            raise ValueError(f"{'remaps' if left else 'kind'}: no table {', '.join(left or kinds or ())} came")
        return writer.publish()


def _pieces(array: Any) -> Iterator[np.ndarray]:
    on_host = not isinstance(array, jax.Array) or all(device.platform == "cpu" for device in array.devices())
    if on_host:
        yield np.asarray(array)
        return
    rows = max(1, _PIECE // (array.shape[1] * array.dtype.itemsize))
    for begin in range(0, array.shape[0], rows):
        yield np.asarray(lax.dynamic_slice_in_dim(array, begin, min(rows, array.shape[0] - begin)))
