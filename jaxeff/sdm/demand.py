"""What tables demand of the memory that holds them: rows, bytes and blocks.

A query asks a table for `batch_items` bags of `pooling` rows each: one bag on the user side, one per item on the item
side. What fast memory does not hold is read from slow memory in whole blocks. All functions are pure; rates are per
second, sizes in bytes, and whatever is "of a query" is an average. The formulas follow "Supporting Massive DLRM
Inference Through Software Defined Memory" (arXiv 2110.11489) as recalled; the expectations over blocks are ours.

Letters: R rows, S sizes, d bytes of a row, g bytes of a block.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxeff.sdm.io.blocks import MAX_REQUEST

PACKINGS = ("dense", "block")


@dataclasses.dataclass(frozen=True)
class TableNeed:
    """A table, and what a query asks of it.

    Attributes:
      name: of the table.
      rows: how many it has.
      row_bytes: of a stored row, with its quantisation parameters.
      pooling: rows of a bag, on average.
      batch_items: bags of a query: 1 on the user side, as many as there are items on the item side.
      hit_rate: share of its distinct rows in a query that the cache has.
      distinct: share of the look-ups of a query that name a row first; 1 where none repeats.
      map_bytes: of a map from ids to rows, which stays in fast memory wherever the rows are.
    """

    name: str
    rows: int
    row_bytes: int
    pooling: float
    batch_items: float = 1.0
    hit_rate: float = 0.0
    distinct: float = 1.0
    map_bytes: int = 0

    def __post_init__(self) -> None:
        for field, least in (("rows", 1), ("row_bytes", 1), ("pooling", 0), ("batch_items", 0), ("map_bytes", 0)):
            value = getattr(self, field)
            if not least <= value < math.inf:
                raise ValueError(f"{field} of table {self.name!r} must be a finite number from {least}, got {value}")
        for field in ("hit_rate", "distinct"):
            check_share(f"{field} of table {self.name!r}", getattr(self, field))

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes

    @property
    def lookups(self) -> float:
        """Rows that a query names, each as often as it is named."""
        return self.batch_items * self.pooling

    @property
    def unique(self) -> float:
        """Distinct rows that a query reads."""
        return self.lookups * self.distinct

    @property
    def misses(self) -> float:
        """Of these, those that the cache does not have."""
        return self.unique * (1 - self.hit_rate)


@dataclasses.dataclass(frozen=True, eq=False)
class HitCurve:
    """Hit rate of a cache against its size, straight between measured sizes and 0 at no bytes.

    Attributes:
      sizes: float64 [S], bytes, ascending.
      hit_rates: float64 [S], of distinct rows per query, 0 to 1.
    """

    sizes: np.ndarray
    hit_rates: np.ndarray

    def __post_init__(self) -> None:
        sizes, rates = np.asarray(self.sizes, np.float64), np.asarray(self.hit_rates, np.float64)
        if sizes.ndim != 1 or sizes.shape != rates.shape or not len(sizes):
            raise ValueError(f"sizes and hit_rates must be vectors of one length, got {sizes.shape} and {rates.shape}")
        if sizes[0] < 0 or not (np.diff(sizes) > 0).all():
            raise ValueError(f"sizes must ascend from 0 or more, got {sizes.tolist()}")
        if not ((rates >= 0) & (rates <= 1)).all():
            raise ValueError(f"hit_rates must be from 0 to 1, got {rates.tolist()}")
        if sizes[0] > 0:
            sizes, rates = np.append(0.0, sizes), np.append(0.0, rates)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "hit_rates", rates)

    def at(self, size: float) -> float:
        """Hit rate of a cache of so many bytes; that of the largest measured one beyond it."""
        check_least("size", size)
        return float(np.interp(size, self.sizes, self.hit_rates))


class Reads(NamedTuple):
    """What the device does for some rows.

    Attributes:
      requests: reads; neighbouring blocks share one.
      blocks: distinct blocks.
      bytes: that cross the bus.
    """

    requests: float
    blocks: float
    bytes: float


def bandwidth(table: TableNeed, qps: float) -> float:
    """Bytes per second that a table must supply: QPS * B * p * d."""
    return row_rate(table, qps) * table.row_bytes


def row_rate(table: TableNeed, qps: float) -> float:
    """Rows per second that are looked up in a table: QPS * B * p."""
    return check_least("qps", qps) * table.lookups


def slow_rate(tables: Sequence[TableNeed], qps: float) -> float:
    """Rows per second that the tables of slow memory read there: QPS * sum of B * p * (1 - hit rate)."""
    return check_least("qps", qps) * sum(table.misses for table in tables)


def bus_rate(tables: Sequence[TableNeed], qps: float, block: int, packing: str = "dense") -> float:
    """Bytes per second from slow memory: rows that are read, times the blocks that each touches.

    Args:
      tables: of slow memory.
      qps: queries per second.
      block: g, bytes of the smallest read.
      packing: of `blocks_of_a_row`.
    """
    check_least("qps", qps)
    return qps * block * sum(table.misses * blocks_of_a_row(table.row_bytes, block, packing) for table in tables)


def blocks_of_a_row(row_bytes: int, block: int, packing: str = "dense") -> float:
    """Blocks that a row touches, on average over the rows of a table that starts with a block.

    Args:
      row_bytes: d.
      block: g.
      packing: "dense", rows end to end, so that some straddle a border; or "block", rows that fit in a block never do,
        and longer ones start with one.

    Raises:
      ValueError: for sizes below 1 or another packing.

    >>> blocks_of_a_row(128, 512), blocks_of_a_row(192, 512), blocks_of_a_row(192, 512, "block")
    (1.0, 1.25, 1.0)
    """
    _check_blocks(row_bytes, block, packing)
    if packing == "block":
        return float(-(-row_bytes // block))
    # Starts are at all multiples of gcd(d, g) within a block, equally often (Hermite's identity sums their floors).
    return 1 + (row_bytes - math.gcd(row_bytes, block)) / block


def read_amplification(row_bytes: int, block: int, packing: str = "dense") -> float:
    """Bytes read for each byte of a lone row: g / d where rows do not straddle.

    >>> read_amplification(128, 4096), read_amplification(128, 512)
    (32.0, 4.0)
    """
    return blocks_of_a_row(row_bytes, block, packing) * block / row_bytes


def expected_reads(
    read: float, rows: int, row_bytes: int, block: int, packing: str = "dense", longest: int = MAX_REQUEST
) -> Reads:
    """What the device does for distinct rows that lie anywhere in a table and are asked for in one call.

    Each block is read once, however many of the rows it holds, and neighbouring blocks are one request.

    Args:
      read: distinct rows that are read.
      rows: R, of the table.
      row_bytes: d.
      block: g.
      packing: of `blocks_of_a_row`.
      longest: bytes of the longest request; as the reader has it.

    Raises:
      ValueError: for more distinct rows than there are, or what `blocks_of_a_row` refuses.
    """
    touched = blocks_of_a_row(row_bytes, block, packing)
    if not 0 <= read <= rows or rows < 1 or longest < block:
        raise ValueError(
            f"read must be from 0 to rows and longest at least a block, got read={read}, rows={rows}, longest={longest}"
        )
    if packing == "block":
        blocks = math.ceil(rows / (block // row_bytes)) if row_bytes <= block else rows * touched
    else:
        blocks = math.ceil(rows * row_bytes / block)
    # Mean field: each row is read with probability f by itself. A block is touched unless none of the k rows in it is
    # read, a border is crossed by s of the rows, and a run of blocks begins where one is touched and the last is not.
    spared = 1 - read / rows
    in_block = rows * touched / blocks
    starting = rows / blocks
    distinct = blocks * (1 - spared**in_block)
    runs = blocks * spared**in_block * (1 - spared**starting)
    # A table that is read whole has no untouched block before its one run.
    requests = max(runs, distinct * block / longest, min(1.0, read))
    return Reads(requests, distinct, distinct * block)


def updated_bytes(table: TableNeed, share: float, block: int, packing: str = "dense") -> float:
    """Bytes that an incremental update writes, which changes rows anywhere in a table and rewrites their blocks.

    Args:
      table: of slow memory.
      share: of its rows that change; 1 for the whole table.
      block: bytes of the smallest write.
      packing: of `blocks_of_a_row`.
    """
    check_share("share", share)
    return expected_reads(share * table.rows, table.rows, table.row_bytes, block, packing).bytes


def _check_blocks(row_bytes: int, block: int, packing: str) -> None:
    if row_bytes < 1 or block < 1:
        raise ValueError(f"row_bytes and block must be at least 1, got {row_bytes} and {block}")
    if packing not in PACKINGS:
        raise ValueError(f"packing must be one of {PACKINGS}, got {packing!r}")


def check_share(name: str, value: float) -> None:
    """Refuses what is no share."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")


def check_least(name: str, value: float, least: float = 0.0) -> float:
    """The value, unless it is below the least one or no number."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")
    return value


def check_positive(name: str, value: float) -> float:
    """The value, unless it is 0 or below, infinite or no number."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}")
    return value
