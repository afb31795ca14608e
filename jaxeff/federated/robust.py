"""Aggregates that a few bad clients cannot move: medians, trimmed means, Krum, MultiKrum, Bulyan, clipped updates.

All are functions of stacked trees [N, ...] and of who is counted, [N], concrete or traced: clients that dropped out,
sent what is not finite, or own nothing of a group have no part. `by_group` makes any of them one of Fed2's, over the
owners of each group alone.

Krum and Bulyan are those of Blanchard et al. (NeurIPS 2017) and El Mhamdi et al. (ICML 2018), the trimmed mean and the
median those of Yin et al. (ICML 2018). They need single updates, so they rule out secure aggregation.

Letters: N clients, n of them counted, f byzantine ones, G groups.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff.federated.paired import SHARED, spread_axes

Tree = Any
Aggregate = Callable[[Tree, jax.Array], Tree]


def finite_clients(stacked: Tree) -> jax.Array:
    """Which clients sent nothing but finite numbers: bool [N]."""
    found = [
        jnp.isfinite(leaf).reshape(len(leaf), -1).all(1)
        for leaf in jax.tree.leaves(stacked)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.stack(found).all(0) if found else jnp.ones(len(jax.tree.leaves(stacked)[0]), bool)


def clipped(stacked: Tree, reference: Tree, norm: float | jax.Array) -> Tree:
    """Clients drawn towards a reference until their distance from it is no more than `norm`.

    Args:
      stacked: leaves [N, ...].
      reference: leaves [...], the parameters that the round began with.
      norm: L2, over all leaves together; traced or not.

    Returns:
      Leaves [N, ...].
    """
    updates = jax.tree.map(lambda leaf, start: leaf.astype(jnp.float32) - start, stacked, reference)
    length = jnp.sqrt(sum(jnp.square(u).reshape(len(u), -1).sum(1) for u in jax.tree.leaves(updates)))
    scale = jnp.minimum(1.0, norm / jnp.maximum(length, 1e-12))

    def one(leaf, start, update):
        return (start + scale.reshape(-1, *(1,) * (update.ndim - 1)) * update).astype(leaf.dtype)

    return jax.tree.map(one, stacked, reference, updates)


def median(stacked: Tree, counted: Any) -> Tree:
    """Median of every coordinate over those counted; of an even number the mean of the middle two.

    Args:
      stacked: floating-point leaves [N, ...].
      counted: bool [N].

    Returns:
      Leaves [...]; NaN where nobody is counted.
    """
    counted = jnp.asarray(counted, bool)
    n = counted.sum()

    def one(leaf):
        ordered = _ordered(leaf, counted)
        low, high = jnp.take(ordered, (n - 1) // 2, 0), jnp.take(ordered, n // 2, 0)
        return jnp.where(n > 0, (low + high) / 2, jnp.nan).astype(leaf.dtype)

    return jax.tree.map(one, stacked)


def trimmed_mean(stacked: Tree, counted: Any, share: float) -> Tree:
    """Mean of every coordinate over those counted, without a share of them at each end.

    Args:
      stacked, counted: as of `median`.
      share: that is left out at each end, in [0, 0.5), rounded down to whole clients.

    Returns:
      Leaves [...]; NaN where nobody is counted.

    Raises:
      ValueError: for a share out of range.
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"share is left out at each end and must be in [0, 0.5), got {share}")
    counted = jnp.asarray(counted, bool)
    n = counted.sum()
    # What is meant by 0.2 of five clients is one.
    cut = jnp.floor(share * n + 1e-6).astype(jnp.int32)

    def one(leaf):
        place = jnp.arange(len(leaf)).reshape(-1, *(1,) * (leaf.ndim - 1))
        inner = (place >= cut) & (place < n - cut)
        total = jnp.where(inner, _ordered(leaf, counted), 0).sum(0)
        return jnp.where(n > 0, total / jnp.maximum(n - 2 * cut, 1), jnp.nan).astype(leaf.dtype)

    return jax.tree.map(one, stacked)


def krum(stacked: Tree, counted: Any, byzantine: int, *, select: int = 1) -> Tree:
    """Mean of the `select` clients that are closest to their n - f - 2 nearest neighbours; Krum itself takes one.

    Args:
      stacked, counted: as of `median`.
      byzantine: f, how many clients may be bad.
      select: how many are averaged, n - f at most; more than one is MultiKrum.

    Returns:
      Leaves [...].

    Raises:
      ValueError: for fewer than 2 f + 3 clients, of those counted if that is known, or more to select than n - f.
    """
    counted = _counted(counted, byzantine, 3, 2, "krum")
    known = _known(counted)
    if not 1 <= select <= known - byzantine:
        raise ValueError(
            f"select must be in 1..{known - byzantine}, as {byzantine} of {known} may be bad, got {select}"
        )
    chosen = jnp.argsort(_krum_scores(_distances(stacked), counted, byzantine), stable=True)[:select]
    number = jnp.clip(counted.sum() - byzantine, 1, select)

    def one(leaf):
        picked = jnp.where(_of_clients(jnp.arange(select) < number, leaf), leaf[chosen].astype(jnp.float32), 0)
        return (picked.sum(0) / number).astype(leaf.dtype)

    return jax.tree.map(one, stacked)


def bulyan(stacked: Tree, counted: Any, byzantine: int) -> Tree:
    """Of n - 2 f clients that Krum chooses one after the other, the mean of the n - 4 f values around each median.

    Args:
      stacked, counted: as of `median`.
      byzantine: f.

    Returns:
      Leaves [...].

    Raises:
      ValueError: for fewer than 4 f + 3 clients, of those counted if that is known.
    """
    counted = _counted(counted, byzantine, 3, 4, "bulyan")
    known = _known(counted)
    distances, left, chosen = _distances(stacked), counted, []
    for _ in range(known - 2 * byzantine):
        chosen.append(jnp.argmin(_krum_scores(distances, left, byzantine)))
        left = left.at[chosen[-1]].set(False)
    picked, n = jnp.stack(chosen), counted.sum()
    # Where fewer are counted than could be, the last of them have chosen nobody.
    there, keep = jnp.arange(len(picked)) < n - 2 * byzantine, jnp.maximum(n - 4 * byzantine, 1)

    def one(leaf):
        values = leaf[picked].astype(jnp.float32)
        (middle,) = jax.tree.leaves(median([values], there))
        away = jnp.where(_of_clients(there, values), jnp.abs(values - middle), jnp.inf)
        ordered = jnp.take_along_axis(values, jnp.argsort(away, axis=0, stable=True), 0)
        near = jnp.where(_of_clients(jnp.arange(len(values)) < keep, values), ordered, 0)
        return (near.sum(0) / keep).astype(leaf.dtype)

    return jax.tree.map(one, stacked)


def by_group(
    aggregate: Aggregate, stacked: Tree, group_axes: Tree, owned: Any, counted: Any, previous: Tree, *, least: int = 1
) -> Tree:
    """Any of these over what Fed2 pairs: shared leaves over all counted, each group over its owners alone.

    Args:
      aggregate: (stacked, counted) -> tree, for example `median`, or `lambda s, c: trimmed_mean(s, c, 0.2)`.
      stacked, group_axes, previous: as of `jaxeff.federated.paired_average`.
      owned: bool [N, G], who owns which group; weights that are not 0 do.
      counted: bool [N].
      least: how many must be counted, of all and of the owners of each group.

    Returns:
      Leaves [...]; the previous ones where fewer are counted.
    """
    counted = jnp.asarray(counted, bool)
    owned = (jnp.asarray(owned) > 0) & counted[:, None]
    leaves, structure = jax.tree.flatten(stacked)
    axes = jax.tree.leaves(spread_axes(group_axes, previous))
    before, results = jax.tree.leaves(previous), jax.tree.leaves(previous)
    shared = [i for i, axis in enumerate(axes) if axis == SHARED]
    if shared:
        for i, value in zip(shared, aggregate([leaves[i] for i in shared], counted), strict=True):
            results[i] = jnp.where(counted.sum() >= least, value, before[i])
    paired = [i for i, axis in enumerate(axes) if axis != SHARED]
    groups: list[list[jax.Array]] = []
    for g in range(owned.shape[1]) if paired else ():
        values = aggregate([jnp.take(leaves[i], g, 1 + axes[i]) for i in paired], owned[:, g])
        old = [jnp.take(before[i], g, axes[i]) for i in paired]
        enough = owned[:, g].sum() >= least
        groups.append([jnp.where(enough, value, was) for value, was in zip(values, old, strict=True)])
    for place, i in enumerate(paired):
        results[i] = jnp.stack([group[place] for group in groups], axes[i])
    tree: Any = structure
    return tree.unflatten(results)


def _of_clients(chosen: jax.Array, leaf: jax.Array) -> jax.Array:
    """One bool for each client, beside the leaf of all of them."""
    return chosen.reshape(-1, *(1,) * (leaf.ndim - 1))


def _ordered(leaf: jax.Array, counted: jax.Array) -> jax.Array:
    """Values in ascending order, those that are not counted last."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise TypeError(f"leaves must be floating point, got {leaf.dtype}; partition others away")
    there = counted.reshape(-1, *(1,) * (leaf.ndim - 1))
    return jnp.sort(jnp.where(there, leaf.astype(jnp.float32), jnp.inf), axis=0)


def _distances(stacked: Tree) -> jax.Array:
    """Squared distances between clients, [N, N]."""
    rows = [leaf.reshape(len(leaf), -1).astype(jnp.float32) for leaf in jax.tree.leaves(stacked)]

    # From one client to all others at a time: differences of all pairs would be N times what the clients take.
    def from_one(number):
        return sum((jnp.square(row - row[number]).sum(-1) for row in rows), jnp.zeros(len(rows[0])))

    return lax.map(from_one, jnp.arange(len(rows[0])))


def _krum_scores(distances: jax.Array, counted: jax.Array, byzantine: int) -> jax.Array:
    """Sum of the squared distances to the nearest n - f - 2 others; infinite for who is not counted."""
    others = counted[:, None] & counted[None] & ~jnp.eye(len(counted), dtype=bool)
    ordered = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
    n = counted.sum()
    near = jnp.clip(n - byzantine - 2, 1, jnp.maximum(n - 1, 0))
    # What is too far away for a number is infinitely far.
    total = jnp.where(jnp.arange(len(counted)) < near, ordered, 0).sum(1)
    return jnp.where(counted, total, jnp.inf)


def _counted(counted: Any, byzantine: int, least: int, times: int, caller: str) -> jax.Array:
    counted = jnp.asarray(counted, bool)
    if byzantine < 0 or _known(counted) < times * byzantine + least:
        raise ValueError(
            f"{caller}: {byzantine} byzantine clients need at least {times} * {byzantine} + {least} counted ones, but "
            f"there are {_known(counted)}"
        )
    return counted


def _known(counted: jax.Array) -> int:
    """How many are counted, or could be where that is traced."""
    return len(counted) if isinstance(counted, jax.core.Tracer) else int(np.asarray(counted).sum())
