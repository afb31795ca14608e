"""When each row is read: an order of given reads in which rows return soon after they were read, and in company.

The counts of the rows are kept exactly; only the moments are drawn. A read is a return with probability q, and then it
follows the read before it at a stack depth drawn from a truncated power law (the depth is 1 + the number of distinct
rows since); otherwise its moment is uniform, so that popular rows come more often, as in a draw by popularity. A depth
becomes a waiting time by the trace's own footprint, the mean number of distinct rows in a window, which is found by
iteration. A row that is drawn by popularity before its return would return from less deep, so such returns exchange
their depths for lesser ones, as popular rows are never deep in a stack. With q up to 0.7 on a million reads of the
published popularity, the depths of returns have the distribution of the law within 0.04; with q = 1, where popular rows
can only crowd, within 0.2.

Letters: N reads, U distinct rows.
"""

from typing import NamedTuple

import numpy as np

_ROUNDS = 3
_EXCHANGES = 12


class Recency(NamedTuple):
    """Temporal locality; the defaults are ours, as nothing is published.

    Attributes:
      share: probability q that a read of a row that was read before is a return, 0 .. 1; 0 for no temporal locality.
      exponent: of the power law of the stack depths.
      shallowest: least depth, at least 1; None for the reads of one query, so that returns are in later queries.
      deepest: greatest depth; None for a quarter of the distinct rows.
    """

    share: float = 0.3
    exponent: float = 1.0
    shallowest: int | None = None
    deepest: int | None = None


DEFAULT = Recency()


class CoAccess(NamedTuple):
    """Rows of one table that are read together, in groups of about the same popularity.

    Attributes:
      size: rows of a group, at least 2.
      share: probability that a read of a row comes with that of its group, 0 .. 1.
      page_locality: share of the groups whose rows are neighbours in the table, 0 .. 1; the others are scattered, as
        hashed ids are.
    """

    size: int = 8
    share: float = 0.9
    page_locality: float = 0.0


def check_recency(recency: Recency) -> None:
    """Raises ValueError for a recency that cannot be drawn."""
    if not 0 <= recency.share <= 1:
        raise ValueError(f"Recency(share={recency.share}) must be in 0..1")
    if not np.isfinite(recency.exponent):
        raise ValueError(f"Recency(exponent={recency.exponent}) must be finite")
    least = 1 if recency.shallowest is None else recency.shallowest
    if least < 1 or (recency.deepest is not None and recency.deepest < least):
        raise ValueError(f"depths must be 1 <= shallowest <= deepest, got {recency}")


def check_coaccess(coaccess: CoAccess) -> None:
    """Raises ValueError for a co-access that cannot be drawn."""
    if coaccess.size < 2:
        raise ValueError(f"CoAccess(size={coaccess.size}) must be at least 2; use None for rows that are read alone")
    for name in ("share", "page_locality"):
        if not 0 <= getattr(coaccess, name) <= 1:
            raise ValueError(f"CoAccess({name}={getattr(coaccess, name)}) must be in 0..1")


def groups(tables: np.ndarray, size: int) -> np.ndarray:
    """Groups of neighbours in a list of rows, none over two tables.

    Args:
      tables: int [U], the table of each row, ascending; rows of one table by falling popularity.
      size: rows of a group; the last of a table may have fewer.

    Returns:
      int64 [U], the first row of each row's group.
    """
    first = np.searchsorted(tables, tables)
    place = np.arange(len(tables))
    return place - (place - first) % size


def moments(
    counts: np.ndarray,
    recency: Recency,
    rng: np.random.Generator,
    *,
    leaders: np.ndarray | None = None,
    together: float = 0.0,
) -> np.ndarray:
    """Draws the moment of every read.

    Args:
      counts: int64 [U], reads of each row, at least 1.
      recency: temporal locality; None for `shallowest` means 1 here.
      rng: source of the draw.
      leaders: int64 [U], of each row the first one of its group, whose count must not be lower; None for no groups.
      together: probability that a read takes the moment of the same read of its leader.

    Returns:
      float64 [N] in [0, N), the reads of row 0 first, then those of row 1, and so on.
    """
    total = int(counts.sum())
    row = np.repeat(np.arange(len(counts)), counts)
    start = np.cumsum(counts) - counts
    again = np.arange(total) != start[row]
    moment = rng.random(total) * total
    returns = again & (rng.random(total) < recency.share)
    copies, source = np.zeros(total, bool), np.arange(total)
    if leaders is not None:
        copies = (leaders[row] != row) & (rng.random(total) < together)
        source = np.where(copies, start[leaders[row]] + source - start[row], source)
    if not returns.any():
        return moment[source]
    depth = np.zeros(total)
    depth[returns] = _depths(recency, rng.random(int(returns.sum())), len(counts))
    # The read that a return follows, at one or several removes.
    base = np.maximum.accumulate(np.where(returns, 0, np.arange(total)))
    places, fresh = np.flatnonzero(returns), np.flatnonzero(~returns)
    seats = np.sort(row[fresh] * float(total) + moment[fresh])
    waits, found = np.zeros(total), moment[source]
    for _ in range(_ROUNDS):
        footprint = _footprint(row, found)
        waits[places] = _waiting(footprint, depth[places] - 1)
        waits[places] = _exchanged(waits[places], _until_drawn(seats, row[places], found[places - 1], total), rng)
        depth[places] = 1 + np.interp(waits[places], np.arange(len(footprint)), footprint)
        passed = np.cumsum(waits)
        found = np.where(returns, (moment[base] + passed - passed[base]) % total, moment)[source]
    return found


def working_set(keys: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """The mean number of distinct keys in windows of a trace, over all windows of a length.

    Args:
      keys: integers [n] in order of access.
      windows: int [W], lengths in 1..n.

    Returns:
      float64 [W].

    Raises:
      ValueError: for a window that is not in 1..n.

    >>> working_set(np.array([7, 7, 8, 7]), np.array([1, 2, 4])).tolist()
    [1.0, 1.6666666666666667, 2.0]
    """
    keys, windows = np.asarray(keys), np.asarray(windows, np.int64)
    n = len(keys)
    if windows.size and not (windows.min() >= 1 and windows.max() <= n):
        raise ValueError(f"windows must be in 1..{n}, the length of the trace, got {windows}")
    ids, key = np.unique(keys, return_inverse=True)
    order = np.argsort(key, kind="stable")
    owner = key[order]
    # Runs of accesses without a key: between its accesses, before the first and after the last. A window fits w of them
    # fewer ways, and each way is a window without that key.
    first, last = np.searchsorted(owner, np.arange(len(ids))), np.searchsorted(owner, np.arange(len(ids)), "right") - 1
    between = np.diff(order)[owner[1:] == owner[:-1]] - 1
    runs = np.concatenate([between, order[first], n - 1 - order[last]])
    longer = np.bincount(runs, minlength=n + 1)[::-1].cumsum()[::-1]  # runs of at least this length
    without = np.append(longer[::-1].cumsum()[::-1], 0)  # sum over runs of max(run - w + 1, 0), at w
    return len(ids) - without[windows] / (n - windows + 1)


def _depths(recency: Recency, u: np.ndarray, distinct: int) -> np.ndarray:
    """Depths by inverse transform, the power law taken as continuous and cut to whole numbers."""
    least = 1 if recency.shallowest is None else recency.shallowest
    least = min(least, distinct)
    most = max(least, min(distinct, recency.deepest or max(distinct // 4, 1)))
    power = 1 - recency.exponent
    if power == 0:
        depth = least * ((most + 1) / least) ** u
    else:
        depth = least * (1 + u * np.expm1(power * np.log((most + 1) / least))) ** (1 / power)
    return np.clip(np.floor(depth), least, most)


def _until_drawn(seats: np.ndarray, row: np.ndarray, moment: np.ndarray, total: int) -> np.ndarray:
    """How long after some moments their rows are drawn by popularity; infinite where they are not any more.

    Args:
      seats: float64, row * N + moment of all such draws, ascending.
      row: int64 [m].
      moment: float64 [m].
      total: N.
    """
    start = row * float(total)
    after = np.append(seats, np.inf)[np.searchsorted(seats, start + moment, side="right")]
    return np.where(after < start + total, after - start - moment, np.inf)


def _exchanged(waits: np.ndarray, limits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exchanges waits that are longer than their limits for others, as far as both then keep theirs."""
    waits = waits.copy()
    for _ in range(_EXCHANGES):
        late = rng.permutation(np.flatnonzero(waits > limits))
        if not len(late):
            break
        partner = rng.permutation(len(waits))[: len(late)]
        late = late[: len(partner)]
        able = (waits[partner] <= limits[late]) & (waits[late] <= limits[partner]) & (waits[partner] <= limits[partner])
        late, partner = late[able], partner[able]
        waits[late], waits[partner] = waits[partner], waits[late]
    return waits


def _footprint(row: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """Mean distinct rows of a window of w reads, at w = 0 .. N, the trace taken as a ring."""
    total = len(row)
    place = np.empty(total, np.int64)
    place[np.argsort(moment, kind="stable")] = np.arange(total)
    place = np.sort(row * total + place)
    starts = np.flatnonzero(np.diff(place // total, prepend=-1))
    ends = np.append(starts[1:], total) - 1
    gap = np.diff(place, append=0)
    gap[ends] = place[starts] + total - place[ends]
    # A window one longer has a new row wherever the gap before that read is not shorter.
    longer = total - np.bincount(gap, minlength=total + 1).cumsum()
    return np.append(0, np.cumsum(longer[:total]) / total)


def _waiting(footprint: np.ndarray, distinct: np.ndarray) -> np.ndarray:
    """The length of a window with so many distinct rows in the mean."""
    return np.interp(distinct, footprint, np.arange(len(footprint)))
