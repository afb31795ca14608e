"""The row cache as a pure JAX pytree, for rows that stay in the memory of a device.

It finds, keeps and evicts the same rows as `jaxeff.sdm.row_cache` with the same `Sets`, so that the host can plan for
it. States are donated: a call reuses the memory of the state it is given, which is gone after it.

Letters: n rows asked for, S sets, W ways, slots S * W.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff.sdm.sets import Sets, fit

WAYS = 31


class DeviceCache(NamedTuple):
    """What a cache holds.

    Attributes:
      tags: uint32 [S, W].
      referenced: bool [S, W], whether a row was used since the hand passed.
      held: bool [S, W], false between calls.
      hands: int32 [S]; below W the number of ways in use, from W on W + the way that is next.
      rows: [slots, ...], by slot.
    """

    tags: jax.Array
    referenced: jax.Array
    held: jax.Array
    hands: jax.Array
    rows: jax.Array


def shape(capacity_bytes: int, row_bytes: int, bounds: tuple[int, int]) -> Sets:
    """The sets of a cache that takes so many bytes of a device.

    Args:
      capacity_bytes: for rows and all that is kept about them.
      row_bytes: of a row as it is kept.
      bounds: number of tables, and most rows of one of them.

    Raises:
      ValueError: as `jaxeff.sdm.sets.fit`; and for rows from 2**31 on, or more of them than tags of 32 bits tell apart,
        which takes a cache of a few rows.
    """
    found = fit(capacity_bytes, lambda ways, tag_bytes: ways * (row_bytes + tag_bytes + 2) + 4, WAYS, bounds)
    return _checked(found)


def init(sets: Sets, row: jax.ShapeDtypeStruct) -> DeviceCache:
    """An empty cache.

    Args:
      sets: of `shape`, or of a `RowCache` that was made with `bounds`.
      row: shape and dtype of one row.

    Raises:
      ValueError: as `shape`.
    """
    _checked(sets)
    vacant = jnp.asarray(sets.vacant(np.arange(sets.sets)))
    return DeviceCache(
        tags=jnp.tile(vacant[:, None], (1, sets.ways)),
        referenced=jnp.zeros((sets.sets, sets.ways), bool),
        held=jnp.zeros((sets.sets, sets.ways), bool),
        hands=jnp.zeros(sets.sets, jnp.int32),
        rows=jnp.zeros((sets.sets * sets.ways, *row.shape), row.dtype),
    )


@partial(jax.jit, static_argnames="sets", donate_argnames="cache")
def probe(cache: DeviceCache, sets: Sets, tables: jax.Array, rows: jax.Array) -> tuple[DeviceCache, jax.Array]:
    """Finds rows, and remembers that they were used.

    Args:
      cache: its state, which is donated.
      sets: as of `init`.
      tables: int32 [n]; within bounds, which is not checked here.
      rows: int32 [n], ids, in any number and order; negative ones are no row.

    Returns:
      The state, and int32 [n], slots, or -1 for what is not here.
    """
    index, tags = _locate(sets, tables, rows)
    slots = _find(cache, sets, index, tags, rows >= 0)
    where = jnp.where(slots >= 0, slots, sets.sets * sets.ways)
    referenced = cache.referenced.reshape(-1).at[where].set(True, mode="drop")
    return cache._replace(referenced=referenced.reshape(cache.referenced.shape)), slots


@partial(jax.jit, static_argnames="sets", donate_argnames="cache")
def fill(
    cache: DeviceCache, sets: Sets, tables: jax.Array, rows: jax.Array, values: jax.Array
) -> tuple[DeviceCache, jax.Array, jax.Array]:
    """Keeps rows; those that are here already, in their place.

    A row that comes in by this call does not go by it.

    Args:
      cache: its state, which is donated.
      sets: as of `init`.
      tables: int32 [n].
      rows: int32 [n], ids, no two of a table alike; negative ones are left out.
      values: [n, ...], what to keep, of the dtype of `cache.rows`.

    Returns:
      The state; int32 [n], slots, or -1 for what was left out; int32, how many rows went for others.

    Raises:
      TypeError: for values of another dtype.
    """
    if values.dtype != cache.rows.dtype:
        raise TypeError(f"values must be {cache.rows.dtype} as the rows of the cache, got {values.dtype}")
    n, ways = len(rows), sets.ways
    index, tags = _locate(sets, tables, rows)
    slots = _find(cache, sets, index, tags, rows >= 0)
    is_new = (rows >= 0) & (slots < 0)
    held = _at(cache.held, slots, True)
    # Which of the new rows of its set each one is, in the order in which they stand.
    order = jnp.argsort(jnp.where(is_new, index, sets.sets), stable=True)
    place, sorted_index = jnp.arange(n), jnp.where(is_new, index, sets.sets)[order]
    first = jnp.concatenate([jnp.ones(min(n, 1), bool), sorted_index[1:] != sorted_index[:-1]])
    turn_of = jnp.zeros(n, jnp.int32).at[order].set(place - lax.cummax(jnp.where(first, place, 0)))
    turns = jnp.max(jnp.where(is_new, turn_of + 1, 0), initial=0)

    def one_of_each_set(carry):
        turn, state, held, slots, evicted = carry
        mine = is_new & (turn_of == turn)
        hand = state.hands[index]
        is_open, referenced = ~held[index], state.referenced[index]
        # Where all have a reference, all lose it in a first sweep.
        exhausted = ~(is_open & ~referenced).any(1, keepdims=True)
        referenced = referenced & ~(exhausted & is_open)
        # From the hand on; what cannot be taken is beyond all others.
        distance = (jnp.arange(ways) - hand[:, None]) % ways
        passed = jnp.where(is_open & ~referenced, distance, ways).min(1)
        referenced = referenced & ~(is_open & (distance < passed[:, None]))
        filling, possible = hand < ways, passed < ways
        way = jnp.where(filling, hand, (hand + passed) % ways)
        taken = mine & (filling | possible)
        swept = mine & ~filling & possible
        hands = jnp.where(filling, hand + 1, ways + (way + 1) % ways)
        slot = jnp.where(taken, index * ways + way, -1)
        only = lambda wanted: jnp.where(wanted, index, sets.sets)
        state = state._replace(
            tags=_at(state.tags, slot, tags),
            referenced=_at(state.referenced.at[only(swept)].set(referenced, mode="drop"), slot, False),
            hands=state.hands.at[only(taken)].set(hands, mode="drop"),
        )
        return turn + 1, state, _at(held, slot, True), jnp.where(taken, slot, slots), evicted + swept.sum()

    # Rows stay out of the loop, and are written once.
    state = cache._replace(rows=jnp.zeros(0))
    start = (jnp.int32(0), state, held, slots, jnp.int32(0))
    _, state, held, slots, evicted = lax.while_loop(lambda carry: carry[0] < turns, one_of_each_set, start)
    where = jnp.where(slots >= 0, slots, sets.sets * ways + jnp.arange(n))
    filled = cache.rows.at[where].set(values, mode="drop", unique_indices=True)
    return state._replace(rows=filled, held=_at(held, slots, False)), slots, evicted


def _at(array: jax.Array, slots: jax.Array, value: Any) -> jax.Array:
    """[S, W] with a value at slots [n]; nowhere for -1."""
    where = jnp.where(slots >= 0, slots, array.size)
    return array.reshape(-1).at[where].set(value, mode="drop").reshape(array.shape)


def _find(cache: DeviceCache, sets: Sets, index: jax.Array, tags: jax.Array, valid: jax.Array) -> jax.Array:
    found = cache.tags[index] == tags[:, None]
    hit = found.any(1) & valid
    return jnp.where(hit, index * sets.ways + jnp.argmax(found, 1).astype(jnp.int32), -1)


def _locate(sets: Sets, tables: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`Sets.locate` in 32 bits: the set, int32 [n], and the tag, uint32 [n]."""
    tables, rows = tables.astype(jnp.uint32), rows.astype(jnp.uint32)
    low = tables << np.uint32(sets.row_bits) | rows
    high = tables >> np.uint32(32 - sets.row_bits) if sets.row_bits else jnp.zeros_like(tables)
    a, b = sets.mixed(high, low)
    return _high_product(sets.top(a, b), sets.sets).astype(jnp.int32), b


def _high_product(x: jax.Array, factor: int) -> jax.Array:
    """The upper 32 bits of the product of uint32 [n] and a number."""
    half, mask = np.uint32(16), np.uint32(0xFFFF)
    f_high, f_low = np.uint32(factor >> 16), np.uint32(factor & 0xFFFF)
    x_high, x_low = x >> half, x & mask
    middle = x_high * f_low + (x_low * f_low >> half)
    other = x_low * f_high + (middle & mask)
    return x_high * f_high + (middle >> half) + (other >> half)


def _checked(sets: Sets) -> Sets:
    if sets.tables is None or sets.tag_bytes != 4 or sets.row_bits > 31 or sets.sets * sets.ways >= 2**31:
        raise ValueError(
            "a cache on a device needs bounds, row ids below 2**31 and fewer slots than that, and enough sets for tags "
            f"of 4 bytes, got {sets}"
        )
    return sets
