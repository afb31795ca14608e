"""What a query asks of the tables: bags of rows, laid end to end so that nothing is done table by table.

Letters: G bags of all tables, N row look-ups, T tables.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxeff.ops.bags import Bags, check_bags, well_formed


class Query(NamedTuple):
    """Bags of several tables, end to end.

    Attributes:
      indices: int64 [N], row ids, bag after bag.
      offsets: int64 [G + 1], where each bag starts, and N.
      tables: int32 [G], the table of each bag.
      weights: float32 [N], of each look-up, or None for ones.
    """

    indices: np.ndarray
    offsets: np.ndarray
    tables: np.ndarray
    weights: np.ndarray | None = None

    @property
    def bags(self) -> Bags:
        """The bags without their tables."""
        return Bags(self.indices, self.offsets, self.weights)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [G], look-ups of each bag."""
        return self.offsets[1:] - self.offsets[:-1]  # np.diff takes several times as long


def query(bags: Sequence[Bags], tables: Sequence[int] | None = None) -> Query:
    """Lays the bags of several tables end to end.

    Args:
      bags: of each table; tables may have different numbers of bags, or none.
      tables: number of the table of each entry of `bags`; None for 0, 1, ...

    Raises:
      ValueError: if some tables have weights and others none, `tables` is of another length, or offsets or weights of a
        table are wrong, as of `jaxeff.ops.bags.well_formed`.
      TypeError: for ids or offsets that are not integers.
    """
    tables = range(len(bags)) if tables is None else tables
    if len(tables) != len(bags):
        raise ValueError(f"tables must name one table for each of the {len(bags)} entries of bags, got {len(tables)}")
    checked_bags = []
    for table, one in zip(tables, bags, strict=True):
        try:
            checked_bags.append(well_formed(one))
        except (TypeError, ValueError) as error:
            raise type(error)(f"table {table}: {error}") from None
    bags = checked_bags
    weighted = {one.weights is not None for one in bags if len(one.indices)}
    if len(weighted) > 1:
        raise ValueError("some bags have weights and others none; give weights of 1 to the others")
    offsets = [np.asarray(one.offsets, np.int64) for one in bags]
    ends = np.cumsum([0, *(len(one.indices) for one in bags)])
    starts = [offset[:-1] + end for offset, end in zip(offsets, ends, strict=False)]
    return Query(
        indices=_joined([np.asarray(one.indices, np.int64) for one in bags], np.int64),
        offsets=np.concatenate([*starts, ends[-1:]]).astype(np.int64),
        tables=np.repeat(np.asarray(tables, np.int32), [len(offset) - 1 for offset in offsets]),
        weights=_joined([one.weights for one in bags if one.weights is not None], np.float32)
        if True in weighted
        else None,
    )


def checked(asked: Query, rows: np.ndarray, policy: str = "raise") -> Query:
    """A query that asks only for rows that exist.

    Args:
      asked: the query.
      rows: int64 [T], rows of each table.
      policy: of ids out of range, as in `jaxeff.ops.bags.check_bags`.

    Raises:
      TypeError: for tables that are not integers, and as `check_bags`.
      ValueError: for a table that does not exist, one table for fewer or more bags than there are, and as `check_bags`.
    """
    tables = np.asarray(asked.tables)
    if tables.ndim != 1 or (len(tables) and not np.issubdtype(tables.dtype, np.integer)):
        raise TypeError(f"tables: expected integers [G], got {tables.dtype} {tables.shape}")
    asked = asked._replace(tables=tables)
    if len(asked.tables) != len(asked.offsets) - 1:
        raise ValueError(f"tables names {len(asked.tables)} bags, but offsets has {len(asked.offsets) - 1}")
    if len(asked.tables) and not (0 <= asked.tables.min() and asked.tables.max() < len(rows)):
        found = asked.tables[(asked.tables < 0) | (asked.tables >= len(rows))][0]
        raise ValueError(f"a bag is of table {found}, but there are tables 0 .. {len(rows) - 1}")
    asked = asked._replace(tables=tables.astype(np.int32, copy=False))
    if _is_right(asked, rows):
        return asked
    bags = check_bags(asked.bags, rows[asked.tables], policy, np.int64)
    return Query(bags.indices, bags.offsets, asked.tables, bags.weights)


def _is_right(asked: Query, rows: np.ndarray) -> bool:
    """Whether `check_bags` would change nothing, in a few passes; it says what is wrong where something is."""
    indices, offsets, weights = asked.bags
    arrays = (isinstance(array, np.ndarray) and array.ndim == 1 for array in (indices, offsets))
    if not all(arrays) or indices.dtype != np.int64 or offsets.dtype != np.int64 or weights is not None:
        return False
    lengths = asked.lengths
    if not len(lengths) or offsets[0] or offsets[-1] != len(indices) or lengths.min() < 0:
        return False
    limits = np.repeat(rows[asked.tables], lengths)
    # Negative ids are large as unsigned numbers.
    return not (indices.view(np.uint64) >= limits.view(np.uint64)).any()


def sorted_bags(asked: Query) -> Query:
    """The same query with the look-ups of every bag in ascending order: equal bags are summed in equal order."""
    # Of look-ups with one id, those of the lower bits of the weight first.
    bits = np.zeros(len(asked.indices), np.uint32) if asked.weights is None else asked.weights.view(np.uint32)
    order = np.lexsort((bits, asked.indices, bag_of_lookup(asked)))
    weights = None if asked.weights is None else asked.weights[order]
    return asked._replace(indices=asked.indices[order], weights=weights)


def bag_of_lookup(asked: Query) -> np.ndarray:
    """int64 [N], the bag of each look-up."""
    return np.repeat(np.arange(len(asked.tables)), asked.lengths)


def chosen(asked: Query, bags: np.ndarray) -> Query:
    """Some bags, int [g] ascending, at least one of them."""
    first, last = int(bags[0]), int(bags[-1])
    lookups: slice | np.ndarray
    if last - first + 1 == len(bags):  # as nearly always, tables of a kind follow each other
        lookups = slice(asked.offsets[first], asked.offsets[last + 1])
        offsets = asked.offsets[first : last + 2] - asked.offsets[first]
    else:
        wanted = np.zeros(len(asked.tables), bool)
        wanted[bags] = True
        lookups = np.repeat(wanted, asked.lengths)
        offsets = np.concatenate([[0], np.cumsum(asked.lengths[bags])]).astype(np.int64)
    weights = None if asked.weights is None else asked.weights[lookups]
    return Query(asked.indices[lookups], offsets, asked.tables[bags], weights)


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)
