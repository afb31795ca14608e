"""Which rows share a block on disk: an order of the rows in which a query reads fewer blocks.

A query that needs n different rows reads as many blocks as they lie in. Rows that are read together are brought
together by recursive bisection: all rows are split in two halves so that few queries need both, then each half, down to
blocks. A split is improved by swaps of rows between its halves, in the order of what a query is expected to save when
its rows go on being split (the smoothed fanout of the Social Hash Partitioner, Kabiljo et al. 2017; Bandana, Eisenman
et al. 2018, places rows of embedding tables with it). Where it starts matters, so there are several candidates: rows by
popularity, rows by the query with which they are read for the first time in a random order of the queries (a minhash),
and the bisections from both.

The candidates are fitted to the first part of a trace. The next part chooses among them, and the last part decides
whether the best one is used at all: where it does not gain, as with hashed ids of rows that are read independently, the
order stays as it is. `jaxeff.sdm.reorder` stores a table in the order that was found.

Letters: Q queries, n entries of all queries, R rows of the table, S rows that the first part reads, k rows of a block.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

METHODS: tuple[str, ...] = ("popularity", "minhash", "bisection", "minhash+bisection")
# Expected fanout of a query that keeps each row of it with this probability, as in the Social Hash Partitioner.
_KEEP = 0.5
_LONGEST = 64  # powers beyond are zero in float32 sums
_ROUNDS = 12
_SETTLED = 2e-3  # of the rows; fewer swaps than that end a level


class Layout(NamedTuple):
    """An order of the rows of a table.

    Attributes:
      position: [R] int32 (int64 for more rows), the place of each row, so row i goes to position[i]; the inverse of
        `order`. None where the order stays as it is.
      method: one of METHODS, or "none".
      before: blocks per unique row of a query in the held-out part, as the rows are.
      after: the same in the best order found, used or not.
      rows_moved: rows that the fitted part read and that were put in front; 0 where the order stays.
      remap_bytes: fast memory of a remap of the ids, 4 or 8 bytes for each row of the table whether it moved or not
        (`Table.fast_bytes`): a table whose ids have a remap pays it already, and ids that are renumbered at their
        source need none. 0 where the order stays.
    """

    position: np.ndarray | None
    method: str
    before: float
    after: float
    rows_moved: int
    remap_bytes: int

    @property
    def order(self) -> np.ndarray | None:
        """The rows in their new order, int64 [R]: row order[i] comes to place i. None where it stays as it is."""
        return None if self.position is None else np.argsort(self.position)


def blocks_per_row(
    indices: np.ndarray, offsets: np.ndarray, rows_per_block: int, position: np.ndarray | None = None
) -> float:
    """Blocks that queries read, for each row that they need.

    Both are counted within a query: a row that occurs twice is one row, a block with several of its rows is one block.

    Args:
      indices: integers [n], rows of all queries.
      offsets: integers [Q + 1], where each query begins.
      rows_per_block: k.
      position: [R], the place of each row; None for rows in their order.

    Returns:
      In 1/k..1; 0 for queries without rows.

    >>> blocks_per_row(np.array([0, 1, 1, 9]), np.array([0, 3, 4]), rows_per_block=4)
    0.6666666666666666
    """
    query = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    row = np.asarray(indices, np.int64)
    span = int(row.max(initial=0)) + 1
    pairs = np.unique(query * span + row)
    query, row = pairs // span, pairs % span
    place = row if position is None else np.asarray(position)[row].astype(np.int64)
    block = place // rows_per_block
    width = int(block.max(initial=0)) + 1
    return len(np.unique(query * width + block)) / max(len(pairs), 1)


def optimise(
    indices: np.ndarray,
    offsets: np.ndarray,
    rows: int,
    rows_per_block: int,
    *,
    methods: tuple[str, ...] = METHODS,
    held_out: float = 0.2,
    margin: float = 0.05,
    hottest: int | None = None,
    seed: int = 0,
) -> Layout:
    """Finds an order of rows in which queries read fewer blocks, if there is one.

    Args:
      indices: integers [n], rows of all queries, in order of time; rows that fast memory serves are better left out.
      offsets: integers [Q + 1], where each query begins.
      rows: R.
      rows_per_block: k, at least 1.
      methods: candidates, of METHODS.
      held_out: share of the queries, the last ones, that choose and decide, one half each; in 0..1.
      margin: what the order must gain on the deciding part, as a share of the blocks.
      hottest: how many rows are put in front at most, the most popular; None for all that are read.
      seed: of the minhash and of the order of swaps.

    Returns:
      The layout; the rows that the fitted part did not read keep their order behind the others.

    Raises:
      ValueError: for ids out of range, offsets that do not describe the indices, or a setting out of range.
    """
    indices, offsets = _checked(indices, offsets, rows, rows_per_block, methods, held_out, margin, hottest)
    queries = len(offsets) - 1
    fit, choose = queries - int(round(queries * held_out)), queries - int(round(queries * held_out / 2))
    choosing, deciding = _part(indices, offsets, fit, choose), _part(indices, offsets, choose, queries)
    before = blocks_per_row(*deciding, rows_per_block)
    stays = Layout(None, "none", before, before, 0, 0)
    graph = _graph(*_part(indices, offsets, 0, fit), hottest)
    if rows_per_block == 1 or len(graph.rows) < 2 or not len(deciding[0]):
        return stays
    best: tuple[float, str, np.ndarray] | None = None
    for method, order in _candidates(graph, methods, rows_per_block, seed).items():
        position = _positions(graph.rows[order], rows)
        found = blocks_per_row(*choosing, rows_per_block, position)
        if best is None or found < best[0]:
            best = found, method, position
    assert best is not None
    _, method, position = best
    after = blocks_per_row(*deciding, rows_per_block, position)
    if after > (1 - margin) * before:
        return stays._replace(after=after)
    return Layout(position, method, before, after, len(graph.rows), position.nbytes)


class _Graph(NamedTuple):
    """Which rows occur in which queries, each pair once.

    Attributes:
      rows: int64 [S], ids of the rows that occur, ascending.
      row: int32 [n], number of the row in `rows`, the entries ordered by query.
      query: int32 [n].
    """

    rows: np.ndarray
    row: np.ndarray
    query: np.ndarray


def _graph(indices: np.ndarray, offsets: np.ndarray, hottest: int | None) -> _Graph:
    query = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    rows, row = np.unique(indices, return_inverse=True)
    if hottest is not None and len(rows) > hottest:
        popular = np.argsort(-np.bincount(row), kind="stable")[:hottest]
        rank = np.full(len(rows), -1)
        rank[np.sort(popular)] = np.arange(hottest)
        kept = rank[row] >= 0
        rows, row, query = rows[np.sort(popular)], rank[row][kept], query[kept]
    pairs = np.unique(query * len(rows) + row)
    return _Graph(rows, (pairs % max(len(rows), 1)).astype(np.int32), (pairs // max(len(rows), 1)).astype(np.int32))


def _candidates(graph: _Graph, methods: tuple[str, ...], k: int, seed: int) -> dict[str, np.ndarray]:
    """Orders of the rows that occur, int [S], by method."""
    starts: dict[str, Callable[[], np.ndarray]] = {
        "popularity": lambda: np.argsort(-np.bincount(graph.row, minlength=len(graph.rows)), kind="stable"),
        "minhash": lambda: _minhash(graph, np.random.default_rng(seed)),
    }
    bases: Mapping[str, str] = {"bisection": "popularity", "minhash+bisection": "minhash"}
    found: dict[str, np.ndarray] = {}
    for method in methods:
        order = starts[bases.get(method, method)]()
        found[method] = _bisected(graph, order, k, np.random.default_rng(seed)) if method in bases else order
    return found


def _minhash(graph: _Graph, rng: np.random.Generator) -> np.ndarray:
    """Rows by the first of their queries in a random order, then by the first in another."""
    queries = int(graph.query.max()) + 1
    keys = []
    for _ in range(2):
        rank = rng.permutation(queries)
        first = np.full(len(graph.rows), queries)
        np.minimum.at(first, graph.row, rank[graph.query])
        keys.append(first)
    return np.lexsort(keys[::-1])


def _bisected(graph: _Graph, order: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Improves an order by recursive bisection down to blocks of k rows."""
    count = len(order)
    place = np.empty(count, np.int32)
    place[order] = np.arange(count, dtype=np.int32)
    starts, blocks = np.array([0]), np.array([-(-count // k)])
    # Entries of one query in one node are a pair, and stand together.
    row, size = graph.row, np.bincount(graph.query)
    while True:
        # Entries that are alone can save nothing any more.
        row, size = row[np.repeat(size > 1, size)], size[size > 1]
        if not len(row) or not (blocks > 1).any():
            return np.argsort(place, kind="stable")
        half = -(-blocks // 2)
        middle = starts + k * half
        node = (np.searchsorted(starts, place, side="right") - 1).astype(np.int32)  # of each row
        place = _swapped(place, node, middle.astype(np.int32)[node], row, size, rng)
        row, size = _split(row, size, place >= middle[node])
        divided = np.stack([blocks > 0, blocks > 1], 1)
        starts, blocks = np.stack([starts, middle], 1)[divided], np.stack([half, blocks - half], 1)[divided]


def _split(row: np.ndarray, size: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The entries of each pair, those of the left half first, as two pairs."""
    ends = np.cumsum(size)
    on_right = right[row]
    rights = np.cumsum(on_right)  # up to and with each entry
    before = np.append(0, rights[ends - 1])
    first, lefts = ends - size, size - np.diff(before)
    at_right = rights - 1 + np.repeat(first + lefts - before[:-1], size)
    at_left = np.arange(len(row)) - rights + np.repeat(before[:-1], size)
    found = np.empty_like(row)
    found[np.where(on_right, at_right, at_left)] = row
    return found, np.stack([lefts, size - lefts], 1).ravel()


def _swapped(
    place: np.ndarray, node: np.ndarray, middle: np.ndarray, row: np.ndarray, size: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Swaps rows between the halves of every node, while that saves something."""
    place = place.copy()
    first = np.cumsum(size) - size
    longest = min(int(size.max()), _LONGEST)
    powers = ((1 - _KEEP) ** np.arange(longest + 1)).astype(np.float32)
    halves = 2 * (int(node.max()) + 1)
    for _ in range(_ROUNDS):
        right = place >= middle
        on_right = right[row]
        rights = np.add.reduceat(on_right, first, dtype=np.int32)
        lefts = size - rights
        # What a move to the other half saves is the same for all entries of a pair that lie in one half.
        power = [powers[np.minimum(some, longest)] for some in (lefts - 1, lefts, rights - 1, rights)]
        saved = np.where(on_right, np.repeat(power[2] - power[1], size), np.repeat(power[0] - power[3], size))
        gain = np.bincount(row, weights=saved, minlength=len(place)).astype(np.float32)
        # The rows of each half by falling gain, and the n-th of the left against the n-th of the right.
        half = node * 2 + right
        order = _by_falling_gain(half, gain)
        starts = np.append(0, np.cumsum(np.bincount(half, minlength=halves)))
        able = np.minimum(np.diff(starts)[::2], np.diff(starts)[1::2])
        rank = np.arange(able.sum()) - np.repeat(np.cumsum(able) - able, able)
        one = order[np.repeat(starts[:-1:2], able) + rank]
        other = order[np.repeat(starts[1:-1:2], able) + rank]
        # Two rows that want each other's half would both move and be apart again, so each swap waits for a coin.
        better = (gain[one] + gain[other] > 1e-6) & (rng.random(len(one)) < 0.5)
        one, other = one[better], other[better]
        place[one], place[other] = place[other], place[one]
        if len(one) < _SETTLED * len(place):
            break
    return place


def _by_falling_gain(half: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Orders by half and then by gain, both in one key: the bits of a float rise with it once negatives are turned."""
    bits = (-gain).view(np.uint32)
    bits = bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000)).astype(np.uint32)
    return np.argsort(half.astype(np.uint64) << np.uint64(32) | bits)


def _positions(in_front: np.ndarray, rows: int) -> np.ndarray:
    """The place of each row when some are put in front."""
    position = np.empty(rows, np.int32 if rows <= np.iinfo(np.int32).max else np.int64)
    behind = np.ones(rows, bool)
    behind[in_front] = False
    position[in_front] = np.arange(len(in_front))
    position[behind] = np.arange(len(in_front), rows)
    return position


def _part(indices: np.ndarray, offsets: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """The queries from start to stop."""
    some = offsets[start : stop + 1]
    return indices[some[0] : some[-1]], some - some[0]


def _checked(indices, offsets, rows, rows_per_block, methods, held_out, margin, hottest):
    indices, offsets = np.asarray(indices), np.asarray(offsets)
    for name, array in (("indices", indices), ("offsets", offsets)):
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise ValueError(f"{name} must be integers [n], got {array.dtype} {array.shape}")
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(indices) or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets must rise from 0 to the number of indices, {len(indices)}, got {offsets}")
    if len(indices) and not (0 <= indices.min() and indices.max() < rows):
        raise ValueError(
            f"indices must be in 0..{rows - 1}, the rows of the table, got {indices.min()}..{indices.max()}"
        )
    if rows_per_block < 1:
        raise ValueError(f"rows_per_block must be at least 1, got {rows_per_block}")
    if not methods or (unknown := sorted(set(methods) - set(METHODS))):
        raise ValueError(f"methods must be some of {', '.join(METHODS)}, got {unknown if methods else 'none'}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be in 0..1, got {margin}")
    if hottest is not None and hottest < 1:
        raise ValueError(f"hottest must be at least 1, got {hottest}")
    return indices.astype(np.int64, copy=False), offsets.astype(np.int64, copy=False)
