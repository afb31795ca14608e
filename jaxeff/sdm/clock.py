"""CLOCK on the sets of a row cache, in NumPy: what `row_cache.cc` does key by key, here for a key of each set at once.

Letters: n keys, S sets, W ways, slots S * W.
"""

import dataclasses

import numpy as np

from jaxeff.sdm.sets import Sets

# Of a row whose next use is not known.
NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass
class State:
    """What a cache keeps about its rows.

    Attributes:
      sets: the shape.
      lines: uint32 or uint64 [S, W + 1], the tags of a set, and behind them its reference bits.
      hand: uint8 [S]; below W the number of ways in use, from W on W + the way that is next.
      held: uint32 [S], ways that must not go, as bits.
      next_use: int32 [slots], the batch in which a row is used next, or None where that is not kept.
      now: the batch that has begun.
      choosy: whether rows that may never be used stay out of full sets.
    """

    sets: Sets
    lines: np.ndarray
    hand: np.ndarray
    held: np.ndarray
    next_use: np.ndarray | None
    now: int = 0
    choosy: bool = False


def clear(state: State) -> None:
    """Forgets all rows."""
    state.lines[:, :-1] = state.sets.vacant(np.arange(state.sets.sets))[:, None]
    state.lines[:, -1] = state.hand[:] = state.held[:] = 0
    if state.next_use is not None:
        state.next_use[:] = NEVER


def release(state: State, slots: np.ndarray) -> None:
    """Holds nothing any more of the sets of slots, int64 [n]; negative ones are none."""
    state.held[slots[slots >= 0] // state.sets.ways] = 0


def find(
    state: State, keys: np.ndarray, *, mark: bool, hold: bool = False, next_use: np.ndarray | None = None
) -> np.ndarray:
    """Slots of keys uint64 [n], int64 [n], or -1.

    Args:
      state: is changed in place.
      keys: to find.
      mark: whether what is found gets its reference bit.
      hold: whether it is held.
      next_use: int32 [n], is kept of what is found.
    """
    index, tags = state.sets.locate(keys)
    ways = state.sets.ways
    lines = state.lines[index]
    found, way = np.nonzero(lines[:, :ways] == tags[:, None])
    index = index[found]
    slots = np.full(len(keys), -1, np.int64)
    slots[found] = index * ways + way
    bit = np.left_shift(1, way).astype(lines.dtype)
    if mark:
        # Most of what is hit has its bit already.
        new = np.flatnonzero(lines[found, ways] & bit == 0)
        _set_bits(state.lines[:, ways], index[new], bit[new])
    if hold:
        _set_bits(state.held, index, bit.astype(np.uint32))
    if next_use is not None and state.next_use is not None:
        state.next_use[slots[found]] = next_use[found]
    return slots


def insert(state: State, keys: np.ndarray, next_use: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Makes room for keys, and holds what they get.

    Args:
      state: is changed in place.
      keys: uint64 [n]; one that is here already stays where it is.
      next_use: int32 [n], where `state` keeps it.

    Returns:
      int64 [n], slots, or -1 for what is left out; and how many rows went.
    """
    ways, evicted = state.sets.ways, 0
    slots = find(state, keys, mark=False, hold=True, next_use=next_use)
    new = np.flatnonzero(slots < 0)
    index, tags = state.sets.locate(keys[new])
    order = np.argsort(index, kind="stable")
    starts = np.flatnonzero(np.diff(index[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    for turn in range(sizes.max(initial=0)):
        chosen = order[starts[sizes > turn] + turn]
        at, tag, use = index[chosen], tags[chosen], None if next_use is None else next_use[new[chosen]]
        way = np.full(len(chosen), -1)
        if turn:  # of a key that stands twice, the first is here by now
            again, its_way = np.nonzero(state.lines[at, :ways] == tag[:, None])
            way[again] = its_way
        fresh = np.flatnonzero(way < 0)
        way[fresh], swept = _victims(state, at[fresh], None if use is None else use[fresh])
        evicted += swept
        put = fresh[way[fresh] >= 0]
        bit = np.left_shift(1, way[put]).astype(tags.dtype)
        state.lines[at[put], way[put]] = tag[put]
        state.lines[at[put], ways] &= ~bit
        state.held[at[put]] |= bit.astype(np.uint32)
        place = np.where(way < 0, -1, at * ways + way)
        slots[new[chosen]] = place
        if use is not None and state.next_use is not None:
            state.next_use[place[way >= 0]] = use[way >= 0]
    return slots, evicted


def _victims(state: State, index: np.ndarray, next_use: np.ndarray | None) -> tuple[np.ndarray, int]:
    """The ways, int64 [n], that new rows take in different sets [n], or -1, and how many rows go; hands move on."""
    ways = state.sets.ways
    # 64 bits hold a set's bits twice, for sweeps that begin anywhere.
    everyone, one, zero = np.uint64((1 << ways) - 1), np.uint64(1), np.uint64(0)
    hand = state.hand[index].astype(np.int64)
    filling = hand < ways
    is_open = ~state.held[index].astype(np.uint64) & everyone
    if next_use is not None and state.next_use is not None:
        uses = state.next_use.reshape(-1, ways)[index]
        uses[uses < state.now] = NEVER
        bits = one << np.arange(ways, dtype=np.uint64)
        farthest = np.where(is_open[:, None] & bits > 0, uses, -1).max(1)
        is_open &= np.where(uses == farthest[:, None], bits, zero).sum(1)
        is_open[(next_use >= farthest) & (state.choosy | (farthest != NEVER))] = zero
    possible = is_open != zero
    referenced = state.lines[index, ways].astype(np.uint64)
    # Where all have a reference, all lose it in a first sweep.
    referenced &= ~np.where(is_open & ~referenced == zero, is_open, zero)
    start = np.where(filling, 0, hand - ways).astype(np.uint64)
    twice = (is_open & ~referenced) * np.uint64((1 << ways) + 1) >> start
    passed = np.bitwise_count(~twice & (twice - one)).astype(np.uint64)
    sweep = ((one << np.minimum(passed, np.uint64(ways))) - one) << start
    referenced &= ~(is_open & (sweep | sweep >> np.uint64(ways)))
    way = ((start + passed) % np.uint64(ways)).astype(np.int64)
    full = ~filling & possible
    state.lines[index[full], ways] = referenced[full]
    state.hand[index] = np.where(filling, hand + 1, np.where(full, ways + (way + 1) % ways, hand))
    return np.where(filling, hand, np.where(possible, way, -1)), int(np.count_nonzero(full))


def _set_bits(words: np.ndarray, index: np.ndarray, bits: np.ndarray) -> None:
    """words[index] |= bits, where an index may stand more than once."""
    while len(index):
        words[index] |= bits
        lost = words[index] & bits == 0
        index, bits = index[lost], bits[lost]
