"""What can be done to tables before they are served: a new version is streamed from an open one, table by table.

Slow memory is cheap and fast memory is dear, so a table may be stored otherwise than it was trained: pruned rows
filled in again (`deprune`), which drops a remap; integers spelled out (`dequantise`), which saves time and costs cache;
another format (`reencode`); rows that lie apart (`pad_rows`) or in another order (`reorder`). A step is a function
`Rows -> Rows`; steps compose, and nothing is read before `rewrite` writes.

After A. Ardestani et al., "Supporting Massive DLRM Inference Through Software Defined Memory", arXiv 2110.11489; how it
is done is ours.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, NamedTuple

import numpy as np

from jaxeff.sdm import encoding
from jaxeff.sdm.disk import Disk
from jaxeff.sdm.encoding import RowFormat
from jaxeff.sdm.layout import Layout
from jaxeff.sdm.stored_file import DATA_OFFSET
from jaxeff.sdm.table import RowPlacement, Store, Table, TableSpec, remap_dtype
from jaxeff.sdm.writer import Writer

_PIECE = 1 << 20


@dataclass(frozen=True)
class Rows:
    """A table on its way from one version to the next.

    Attributes:
      spec: what it is, as of this step.
      chunks: gives its stored rows in order, uint8 [n, row_bytes].
      remap: int [ids], the row of every id, -1 for a pruned one; None where ids are rows.
      stride: bytes from one row to the next; None for `row_bytes`.
      memory: bytes that a step may hold of its rows.
      scratch: where a step may put a file without a name.
    """

    spec: TableSpec
    chunks: Callable[[], Iterator[np.ndarray]]
    remap: np.ndarray | None
    stride: int | None
    memory: int
    scratch: pathlib.Path


Step = Callable[[Rows], Rows]


class Cost(NamedTuple):
    """What a table costs.

    Attributes:
      file_bytes: capacity of slow memory, header and padding included, and the file of a remap.
      fast_bytes: fast memory that it takes whatever is cached: its remap.
      row_bytes: bytes of a row as a cache holds it.
    """

    file_bytes: int
    fast_bytes: int
    row_bytes: int


class Change(NamedTuple):
    """A table before and after.

    Attributes:
      name: its name.
      before: its cost in the version that was read.
      after: its cost in the one that was, or would be, written.
    """

    name: str
    before: Cost
    after: Cost


class Rewritten(NamedTuple):
    """What `rewrite` did.

    Attributes:
      version: name of the version that it published.
      changes: cost of every table before and after.
    """

    version: str
    changes: tuple[Change, ...]


def rewrite(
    store: Store,
    folder: str | os.PathLike[str],
    steps: Step | Sequence[Step] | Mapping[str, Step | Sequence[Step]],
    *,
    block: int | None = None,
    packing: str | None = None,
    memory: int = 1 << 28,
    keep: int = 2,
    disk: Disk | None = None,
) -> Rewritten:
    """Publishes a version whose tables are those of an open one after some steps.

    Every byte that is read is verified, so that damage is not given a new checksum.

    Args:
      store: the open version.
      folder: where to publish; that of `store` for a new version of the same store.
      steps: one step or several, for every table; or for tables by name, and the others stay as they are.
      block, packing: of the new version, see `Writer`; None for those of `store`.
      memory: bytes of rows that `reorder` and `deprune` may hold, besides some 40 bytes for every row that they move.
      keep, disk: as of `Writer`.

    Raises:
      KeyError: steps for a table that there is not.
      ValueError: a step that a table does not admit, before anything is written.
      TruncatedTable, CorruptTable: what was read is damaged.
      StoreBusy, DiskFull, WriteError: as `Writer`.
    """
    folder = pathlib.Path(folder).absolute()
    changed = _after(store, steps, memory, folder)
    block, packing = block or store.block, packing or store.packing
    changes = []
    with Writer(folder, block, packing, keep=keep, disk=disk) as writer:
        for table, rows in zip(store.tables, changed, strict=True):
            written = writer.add(rows.spec, rows.chunks(), rows.remap, stride=rows.stride)
            changes.append(Change(table.spec.name, _cost(table), _cost(written)))
        return Rewritten(writer.publish(), tuple(changes))


def preview(
    store: Store,
    steps: Step | Sequence[Step] | Mapping[str, Step | Sequence[Step]],
    *,
    block: int | None = None,
    packing: str | None = None,
) -> tuple[Change, ...]:
    """What `rewrite` would change, without reading or writing a row.

    Args:
      store, steps, block, packing: as of `rewrite`.

    Raises:
      KeyError, ValueError: as `rewrite`.
    """
    block, packing = block or store.block, packing or store.packing
    changes = []
    for table, rows in zip(store.tables, _after(store, steps, 0, store.folder), strict=True):
        placement = RowPlacement.of(rows.spec.format.row_bytes, block, packing, rows.stride)
        size, remap = placement.size(rows.spec.rows), 0
        if rows.remap is not None:
            remap = len(rows.remap) * remap_dtype(rows.spec.rows).itemsize
            size += DATA_OFFSET + -(-remap // DATA_OFFSET) * DATA_OFFSET
        changes.append(Change(table.spec.name, _cost(table), Cost(size, remap, rows.spec.format.row_bytes)))
    return tuple(changes)


def deprune(rows: Rows) -> Rows:
    """Stores every id as a row, pruned ones as zeros, and drops the remap; pooled results keep their bits.

    Trades capacity of slow memory for fast memory, and spares one random read of it per look-up.
    """
    if rows.remap is None:
        return rows
    spec = TableSpec(rows.spec.name, len(rows.remap), rows.spec.format)
    positions = rows.remap
    return replace(rows, spec=spec, chunks=lambda: _gathered(rows, positions), remap=None)


def dequantise(rows: Rows) -> Rows:
    """Stores float32 values of quantised rows: no arithmetic per look-up, for 3 to 8 times the bytes of a row."""
    return reencode("float32")(rows) if rows.spec.format.quantised else rows


def reencode(kind: str) -> Step:
    """A step that stores the values of rows in another format.

    Args:
      kind: one of `encoding.KINDS`.

    Raises:
      ValueError: for another kind; while rows are written, for one that cannot hold them.
    """
    RowFormat(kind, 1)

    def step(rows: Rows) -> Rows:
        old, new = rows.spec.format, RowFormat(kind, rows.spec.format.dim)
        if new == old:
            return rows

        def chunks() -> Iterator[np.ndarray]:
            first, piece = 0, max(1, _PIECE // (4 * old.dim))
            for chunk in rows.chunks():
                for begin in range(0, len(chunk), piece):
                    values = encoding.decode(chunk[begin : begin + piece], old)
                    yield encoding.encode(values, new, first_row=first)
                    first += len(values)

        return replace(rows, spec=TableSpec(rows.spec.name, rows.spec.rows, new), chunks=chunks, stride=None)

    return step


def pad_rows(stride: int | None = None) -> Step:
    """A step that puts rows further apart, so that fewer straddle two blocks.

    Args:
      stride: bytes from one row to the next; None for the next power of two, which none up to a block straddles.

    Raises:
      ValueError: when it is applied, for a stride below the bytes of a row.
    """

    def step(rows: Rows) -> Rows:
        row_bytes = rows.spec.format.row_bytes
        chosen = 1 << (row_bytes - 1).bit_length() if stride is None else stride
        if chosen < row_bytes:
            raise ValueError(f"stride: {chosen}, but rows of table {rows.spec.name!r} have {row_bytes} bytes")
        return replace(rows, stride=chosen)

    return step


def reorder(order: Layout | Any, *, remap: bool = True) -> Step:
    """A step that puts rows in another order, say with those together that are read together.

    Args:
      order: what `optimise` found for the rows of the table (those of `Table.positions`, where ids have a remap); it
        does nothing where that leaves the order as it is. Or int [n], the rows of now in their new order, each once:
        row order[i] comes to place i, as of `Layout.order` and np.argsort, which is the inverse of `Layout.position`.
        Rows that are left out are pruned.
      remap: store where every id went, so that ids stay what they are, for 4 bytes of fast memory each, or 8 from 2**31
        rows on (`Table.fast_bytes`); False to have new ids, `order[i]` becoming i, which whoever makes the queries must
        use.

    Raises:
      TypeError: for an order of anything but integers.
      ValueError: when it is applied, for an order with a row twice or out of range, or that leaves rows out without a
        remap, or for a layout of a table with another number of rows.
    """
    if isinstance(order, Layout):
        return _laid_out(order, remap)
    order = np.asarray(order)
    if order.ndim != 1 or (order.size and not np.issubdtype(order.dtype, np.integer)):
        raise TypeError(f"order: expected integers [n], got {order.dtype} of shape {list(order.shape)}")
    order = order if order.size else order.astype(np.int64)

    def step(rows: Rows) -> Rows:
        count, name = rows.spec.rows, rows.spec.name
        if len(order) and not (order.min() >= 0 and order.max() < count):
            raise ValueError(f"order: {order.min()} .. {order.max()}, but table {name!r} has rows 0 .. {count - 1}")
        went = np.full(count, -1, remap_dtype(len(order)))
        went[order] = np.arange(len(order))
        if (missing := int((went < 0).sum())) != count - len(order):
            raise ValueError(f"order: {missing - count + len(order)} rows of table {name!r} are in it twice")
        if missing and not remap:
            raise ValueError(f"order: {missing} rows of table {name!r} are not in it, which needs remap=True")
        if rows.remap is None:
            new = went if remap else None
        elif remap:
            new = np.full(len(rows.remap), -1, went.dtype)
            new[rows.remap >= 0] = went[rows.remap[rows.remap >= 0]]
        else:
            raise ValueError(f"remap: table {name!r} has one, so ids stay what they are; deprune it first, or keep it")
        spec = TableSpec(name, len(order), rows.spec.format)
        return replace(rows, spec=spec, chunks=lambda: _gathered(rows, order), remap=new)

    return step


def _laid_out(layout: Layout, remap: bool) -> Step:
    order = layout.order
    if order is None:
        return lambda rows: rows
    step = reorder(order, remap=remap)

    def checked(rows: Rows) -> Rows:
        if len(order) != rows.spec.rows:
            raise ValueError(
                f"order: the layout is one of {len(order)} rows, but table {rows.spec.name!r} has {rows.spec.rows}; "
                "optimise it with the rows of this table"
            )
        return step(rows)

    return checked


def _after(store: Store, steps: Any, memory: int, scratch: pathlib.Path) -> list[Rows]:
    if isinstance(steps, Mapping):
        for name in steps:
            store.index(name)
    changed = []
    for table in store.tables:
        stride = None if table.placement.stride == table.spec.format.row_bytes else table.placement.stride
        rows = Rows(table.spec, table.stream, table.remap, stride, memory, scratch)
        own = steps.get(table.spec.name, ()) if isinstance(steps, Mapping) else steps
        for step in (own,) if callable(own) else own:
            rows = step(rows)
        changed.append(rows)
    return changed


def _cost(table: Table) -> Cost:
    extra = 0 if table.remap_file is None else table.remap_file.size
    return Cost(table.size + extra, table.fast_bytes, table.spec.format.row_bytes)


def _gathered(rows: Rows, positions: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the rows at positions, int [n], zeros at -1; memory stays bounded, and reads and writes are in order."""
    there = positions[positions >= 0]
    if (there[1:] >= there[:-1]).all():
        return _in_order(rows, positions)
    if 2 * len(positions) * rows.spec.format.row_bytes <= rows.memory:
        return _in_memory(rows, positions)
    return _by_buckets(rows, positions)


def _in_order(rows: Rows, positions: np.ndarray) -> Iterator[np.ndarray]:
    # A pruned id comes with the one before it.
    reached = np.maximum.accumulate(positions)
    row_bytes = rows.spec.format.row_bytes
    piece = max(1, _PIECE // row_bytes)
    begin = done = 0
    for chunk in rows.chunks():
        until = int(np.searchsorted(reached, begin + len(chunk)))
        for low in range(done, until, piece):
            wanted = positions[low : min(low + piece, until)]
            taken = np.zeros((len(wanted), row_bytes), np.uint8)
            taken[wanted >= 0] = chunk[wanted[wanted >= 0] - begin]
            yield taken
        begin, done = begin + len(chunk), until
    for low in range(done, len(positions), piece):
        yield np.zeros((min(piece, len(positions) - low), row_bytes), np.uint8)


def _in_memory(rows: Rows, positions: np.ndarray) -> Iterator[np.ndarray]:
    taken = np.zeros((len(positions), rows.spec.format.row_bytes), np.uint8)
    stored = np.concatenate([taken[:0], *rows.chunks()])
    taken[positions >= 0] = stored[positions[positions >= 0]]
    yield taken


def _by_buckets(rows: Rows, positions: np.ndarray) -> Iterator[np.ndarray]:
    """Deals rows, as they are read, to buckets of those that will be neighbours, then puts each bucket in order."""
    row_bytes = rows.spec.format.row_bytes
    # A bucket is held as it was dealt and in order; a hand that is dealt likewise, and as the chunks it came in.
    size, hand = max(1, rows.memory // (2 * row_bytes)), rows.memory // 3
    targets = np.flatnonzero(positions >= 0)
    targets = targets[np.argsort(positions[targets], kind="stable")]
    sources, bucket = positions[targets], targets // size
    by_bucket = np.argsort(bucket, kind="stable")
    bounds = np.searchsorted(bucket[by_bucket], np.arange(-(-len(positions) // size) + 1))
    places = np.empty_like(by_bucket)
    places[by_bucket] = np.arange(len(by_bucket))
    targets = targets[by_bucket]
    del bucket, by_bucket
    # Without a name, so that it goes with the process.
    with tempfile.TemporaryFile(dir=rows.scratch, buffering=0) as file:
        begin = low = 0
        for chunk in _joined(rows.chunks(), hand):
            high = int(np.searchsorted(sources, begin + len(chunk)))
            order = np.argsort(places[low:high])
            going = places[low:high][order]
            dealt = chunk[sources[low:high][order] - begin]
            breaks = np.flatnonzero(np.diff(going) != 1) + 1
            for first, last in zip([0, *breaks], [*breaks, len(going)], strict=True):
                if first < last:
                    file.seek(int(going[first]) * row_bytes)
                    _write(file, dealt[first:last])
            begin, low = begin + len(chunk), high
        file.seek(0)
        for index, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            first = index * size
            taken = np.zeros((min(size, len(positions) - first), row_bytes), np.uint8)
            taken[targets[low:high] - first] = np.fromfile(file, np.uint8, (high - low) * row_bytes).reshape(
                -1, row_bytes
            )
            yield taken


def _joined(chunks: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The chunks, several at a time up to that many bytes."""
    waiting: list[np.ndarray] = []
    held = 0
    for chunk in chunks:
        if waiting and held + chunk.nbytes > size:
            yield np.concatenate(waiting)
            waiting, held = [], 0
        waiting.append(chunk)
        held += chunk.nbytes
    if waiting:
        yield np.concatenate(waiting)


def _write(file: IO[bytes], rows: np.ndarray) -> None:
    left = memoryview(rows.reshape(-1).data)
    while len(left):
        left = left[file.write(left) :]
