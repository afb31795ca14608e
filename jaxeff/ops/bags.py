"""Bags of ids of an embedding table on the host: what they are, what may be wrong with them, and as a rectangle.

Letters: B bags, L entries of the longest, nnz entries of all.
"""

from typing import Any, NamedTuple

import numpy as np

POLICIES: tuple[str, ...] = ("raise", "drop", "hash")


class Bags(NamedTuple):
    """Bags of ids on the host.

    Attributes:
      indices: integers [nnz], the ids of all bags, one bag after the other.
      offsets: int64 [B + 1]; bag b has the entries from offsets[b] to offsets[b + 1]; the last is nnz.
      weights: float32 [nnz], or None where every entry counts as it is.
    """

    indices: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Number of entries of each bag, int64 [B]."""
        return np.diff(self.offsets)


def check_bags(bags: Bags, rows: int | np.ndarray, policy: str = "raise", dtype: Any = np.int32) -> Bags:
    """Finds what is wrong with bags before a look-up, where out of range would be silent.

    Args:
      bags: of any integer dtypes.
      rows: of the table; or integers [B], of the table of each bag, where bags of several lie end to end.
      policy: for ids outside 0 .. rows - 1: "raise" an error, "drop" the entry (its bag has one less, also for a
        mean), or "hash", the id modulo the number of rows.
      dtype: of the ids that are handed back; np.int64 for tables of more rows than JAX can index.

    Returns:
      Bags with ids of that dtype, int64 offsets and float32 weights; arrays that have these already are not copied.

    Raises:
      TypeError: for ids or offsets that are not integers, or weights that are not numbers.
      ValueError: for an unknown policy; a table without rows or of more rows than the dtype holds; offsets that are not
        one-dimensional, do not begin with 0, are negative, decrease, or do not end at nnz; weights of another shape or
        not finite; ids out of range under "raise".
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    most = np.iinfo(dtype).max
    limits = np.asarray(rows)
    # Of several tables one may be empty, if its bags are.
    least = 0 if limits.ndim else 1
    if limits.size and not least <= limits.min() <= limits.max() <= most:
        wrong = limits.min() if limits.min() < least else limits.max()
        raise ValueError(
            f"rows: expected 1 to {most} to be indexed by {np.dtype(dtype)}, got {wrong}; a table of more rows cannot "
            "be one JAX array: split it, or keep it on disk and pass dtype=np.int64"
        )
    bags = well_formed(bags)
    indices, offsets, weights = bags
    if limits.ndim:
        if limits.shape != (len(offsets) - 1,):
            raise ValueError(
                f"rows: expected one number, or one for each of {len(offsets) - 1} bags, got {limits.shape}"
            )
        limits = np.repeat(limits, np.diff(offsets))
    outside = (indices < 0) | (indices >= limits)
    if outside.any():
        if policy == "raise":
            at = int(outside.argmax())
            bag = int(np.searchsorted(offsets, at, side="right")) - 1
            limit = np.broadcast_to(limits, indices.shape)[at]
            raise ValueError(
                f"indices: {int(outside.sum())} of {len(indices)} are outside 0..{limit - 1}, the first is "
                f'{indices[at]} in bag {bag}; correct them, or pass policy="drop" or "hash"'
            )
        if policy == "hash":
            indices = indices % limits
        else:
            kept = ~outside
            offsets = np.concatenate([[0], np.cumsum(kept)])[offsets]
            indices, weights = indices[kept], None if weights is None else weights[kept]
    return Bags(indices.astype(dtype, copy=False), offsets, weights)


def well_formed(bags: Bags) -> Bags:
    """Bags whose offsets and weights belong to their ids, whatever table these are of.

    Args:
      bags: of any integer dtypes, arrays or lists.

    Returns:
      The same with int64 offsets and float32 weights, and ids as they are.

    Raises:
      TypeError, ValueError: as `check_bags`, but for ids out of range.
    """
    indices, offsets = np.asarray(bags.indices), np.asarray(bags.offsets)
    for name, array in (("indices", indices), ("offsets", offsets)):
        if not np.issubdtype(array.dtype, np.integer) and array.size:
            raise TypeError(f"{name}: expected integers, got {array.dtype}")
        if array.ndim != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {array.shape}")
    if indices.dtype == np.uint64 and indices.size and indices.max() > np.iinfo(np.int64).max:
        raise ValueError(f"indices: {indices.max()} is more than int64 holds; hash ids to fewer numbers")
    offsets = offsets.astype(np.int64, copy=False)
    _check_offsets(offsets, len(indices))
    weights = None if bags.weights is None else _checked_weights(np.asarray(bags.weights), len(indices))
    return Bags(indices, offsets, weights)


def padded(bags: Bags, length: int | None = None, fill: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Bags as a rectangle, for `pooled_lookup`.

    Args:
      bags: with valid offsets, as from `check_bags`.
      length: L; None for that of the longest bag.
      fill: the id behind the end of a bag, where nothing is added.

    Returns:
      `(indices int32 [B, L], lengths int32 [B], weights float32 [B, L] or None)`; weights are zero behind the end.

    Raises:
      ValueError: for a bag that is longer than `length`, or ids beyond int32.
    """
    lengths = bags.lengths
    longest = int(lengths.max(initial=0))
    if length is None:
        length = longest
    elif longest > length:
        raise ValueError(
            f"length: bag {int(lengths.argmax())} has {longest} entries, more than length={length}; raise it, or cut "
            "the bag"
        )
    limits = np.iinfo(np.int32)
    if bags.indices.dtype != np.int32 and bags.indices.size:
        low, high = int(bags.indices.min()), int(bags.indices.max())
        if low < limits.min or high > limits.max:
            raise ValueError(f"indices: {low if low < limits.min else high} does not fit int32; number the rows anew")
    inside = np.arange(length) < lengths[:, None]  # row-major, as the entries are
    indices = np.full((len(lengths), length), fill, np.int32)
    indices[inside] = bags.indices
    weights = None
    if bags.weights is not None:
        weights = np.zeros(indices.shape, np.float32)
        weights[inside] = bags.weights
    return indices, lengths.astype(np.int32), weights


def _check_offsets(offsets: np.ndarray, entries: int) -> None:
    if not len(offsets):
        raise ValueError("offsets: expected B + 1 of them for B bags, got none")
    if (offsets < 0).any():
        at = int((offsets < 0).argmax())
        raise ValueError(f"offsets: expected no negative ones, got {offsets[at]} at {at}")
    if offsets[0]:
        raise ValueError(f"offsets: must begin with 0, got {offsets[0]}")
    falls = np.diff(offsets) < 0
    if falls.any():
        at = int(falls.argmax())
        raise ValueError(f"offsets: must not decrease, got {offsets[at]} and then {offsets[at + 1]} at {at + 1}")
    if offsets[-1] != entries:
        raise ValueError(f"offsets: must end at the number of indices, {entries}, got {offsets[-1]}")


def _checked_weights(weights: np.ndarray, entries: int) -> np.ndarray:
    if weights.shape != (entries,):
        raise ValueError(f"weights: expected shape ({entries},), one for each index, got {weights.shape}")
    if not np.issubdtype(weights.dtype, np.number) or np.issubdtype(weights.dtype, np.complexfloating):
        raise TypeError(f"weights: expected real numbers, got {weights.dtype}")
    finite = np.isfinite(weights)
    if not finite.all():
        at = int((~finite).argmax())
        raise ValueError(f"weights: expected finite numbers, got {weights[at]} at {at}")
    return weights.astype(np.float32, copy=False)
