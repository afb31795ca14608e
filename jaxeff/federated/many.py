"""Matching of many clients, and the aggregate that matches before it averages.

Clients are matched to one reference, such as the global model before the round, all at once; or to one another: each in
turn to the mean of the others, until nothing moves (MergeMany, Git Re-Basin, arXiv 2209.04836).

Letters: N clients, M of them in a round, G groups.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxeff.federated.aggregates import Aggregate, Member, mean
from jaxeff.federated.matching import check_solver, weight_match
from jaxeff.federated.symmetry import Symmetry, WithinGroups, check_paths, chosen, permuted

Tree = Any
ALIGNMENTS: tuple[str, ...] = ("none", "within_group", "full")
REFERENCES: tuple[str, ...] = ("previous", "others")


def match_to(
    found: Symmetry,
    reference: Tree,
    stacked: Tree,
    *,
    names: Collection[str] | None = None,
    solver: str = "scipy",
    sweeps: int = 100,
) -> Tree:
    """The parameters of many clients, each permuted to come closest to a reference.

    Args:
      found: of `jaxeff.federated.derive` or `within_groups`.
      reference: parameters, leaves [...].
      stacked: of the clients, leaves [N, ...].
      names, solver, sweeps: as of `jaxeff.federated.weight_match`.

    Returns:
      Leaves [N, ...]. A pure function.

    Raises:
      ValueError: as `weight_match`.
    """

    def one(params):
        perms = weight_match(found, reference, params, names=names, solver=solver, sweeps=sweeps)
        return permuted(found, params, perms)

    return jax.vmap(one)(stacked)


def merge_many(
    found: Symmetry,
    stacked: Tree,
    *,
    weights: Any = None,
    names: Collection[str] | None = None,
    solver: str = "scipy",
    sweeps: int = 100,
    cycles: int = 20,
) -> Tree:
    """The parameters of many clients, each permuted to come closest to the mean of the others.

    Args:
      found: of `jaxeff.federated.derive` or `within_groups`.
      stacked: of the clients, leaves [N, ...].
      weights: [N], of the means, not negative; None for all alike. Clients that count nothing or hold what is not
        finite stay as they are and have no influence.
      names, solver, sweeps: as of `jaxeff.federated.weight_match`.
      cycles: over all clients, at most; fewer where nothing moves any more.

    Returns:
      Leaves [N, ...]. A pure function. All clients together may have come to rest in another order than any had.

    Raises:
      ValueError: as `weight_match`; for weights that are not one for each client, or fewer than one cycle.
    """
    clients = {leaf.shape[0] for leaf in jax.tree.leaves(stacked)}
    if len(clients) != 1:
        raise ValueError(f"stacked must have leaves [N, ...] of one N, got {sorted(clients)}")
    (count,) = clients
    share = jnp.ones(count) if weights is None else jnp.asarray(weights, jnp.float32)
    if share.shape != (count,):
        raise ValueError(f"weights must be of shape ({count},), got {share.shape}")
    if cycles < 1:
        raise ValueError(f"cycles must be at least 1, got {cycles}")
    finite = [
        jnp.isfinite(leaf).reshape(count, -1).all(1)
        for leaf in jax.tree.leaves(stacked)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    share = jnp.where(jnp.all(jnp.stack(finite), 0), share, 0) if finite else share

    def one(number, state):
        current, moved = state
        params = jax.tree.map(lambda leaf: leaf[number], current)
        others = share.at[number].set(0)
        reference = jax.tree.map(lambda leaf: _mean(leaf, others), current)
        perms = weight_match(found, reference, params, names=names, solver=solver, sweeps=sweeps)
        counts = (share[number] > 0) & (others.sum() > 0)
        perms = {name: jnp.where(counts, perm, jnp.arange(perm.shape[-1])) for name, perm in perms.items()}
        new = permuted(found, params, perms)
        moves = [(perm != jnp.arange(perm.shape[-1])).any() for perm in perms.values()]
        current = jax.tree.map(lambda leaf, mine: leaf.at[number].set(mine), current, new)
        return current, moved | jnp.any(jnp.array(moves))

    def cycle(state):
        current, moved = lax.fori_loop(0, count, one, (state[0], jnp.array(False)))
        return current, moved, state[2] + 1

    start = (jax.tree.map(jnp.asarray, stacked), jnp.array(True), jnp.zeros((), jnp.int32))
    return lax.while_loop(lambda state: state[1] & (state[2] < cycles), cycle, start)[0]


def matched(
    found: Symmetry,
    base: Aggregate | None = None,
    *,
    align: str = "full",
    to: str = "previous",
    solver: str = "scipy",
    sweeps: int = 100,
) -> Aggregate:
    """An aggregate that matches the clients first: of any algorithm of `jaxeff.federated.algorithms`.

    Args:
      found: of `jaxeff.federated.derive`, or of `within_groups` for a network in groups, of all variables, and
        verified.
      base: what aggregates the matched clients, such as `aggregates.mean()` (None), `aggregates.paired(...)` or
        `fed2.aggregate(...)`; its weights are kept.
      align: "none", nothing is matched; "within_group", units within their groups, with the last channels of a trunk
        that is split among them, while what all share stays; "full", everything that was found. Groups never change
        places.
      to: "previous", the global model before the round; "others", each client to the mean of the others in turn, by the
        weights of `base`, and all together to the global model in the end.
      solver, sweeps: as of `jaxeff.federated.weight_match`.

    Returns:
      The aggregate; it needs all clients at once, which every backend keeps for it. Variables alone are permuted:
      what an algorithm sends or remembers beside them, such as the control variates of SCAFFOLD, is not.

    Raises:
      ValueError: for an unknown alignment, reference or solver; "within_group" of a network without groups.
    """
    if align not in ALIGNMENTS:
        raise ValueError(f"align must be one of {', '.join(map(repr, ALIGNMENTS))}, got {align!r}")
    if to not in REFERENCES:
        raise ValueError(f"to must be one of {', '.join(map(repr, REFERENCES))}, got {to!r}")
    if sweeps < 1:
        raise ValueError(f"sweeps must be at least 1, got {sweeps}")
    check_solver(solver)
    inner = mean() if base is None else base
    if align == "none":
        return inner
    names: tuple[str, ...] = tuple(chosen(found, None))
    if align == "within_group":
        if not isinstance(found, WithinGroups):
            raise ValueError("align='within_group' needs a network in groups; found must be of `within_groups`")
        names = tuple(name for name in names if name in found.own)
    options: dict[str, Any] = dict(names=names, solver=solver, sweeps=sweeps)

    def combine(stacked: Tree, members: Member, previous: Tree) -> Tree:
        check_paths(found, previous=previous)
        counted = members.counted > 0
        # What is not counted may be NaN.
        there = lambda leaf, old: jnp.where(counted.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, old)
        stacked = jax.tree.map(there, stacked, previous)
        if to == "previous":
            aligned = match_to(found, previous, stacked, **options)
        else:
            weights = jnp.where(counted, inner.weight(members), 0)
            aligned = merge_many(found, stacked, weights=weights, **options)
            middle = jax.tree.map(lambda leaf: _mean(leaf, weights), aligned)
            perms = weight_match(found, previous, middle, **options)
            aligned = jax.vmap(lambda params: permuted(found, params, perms))(aligned)
        return inner.combine(aligned, members, previous)

    return Aggregate(inner.weight, combine)


def _mean(leaf: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean over clients of what is a float, in float32; what is not is taken of the first."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf[0]
    values = jnp.where((weights > 0).reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0).astype(jnp.float32)
    total = jnp.tensordot(weights, values, 1, precision=lax.Precision.HIGHEST)
    return total / jnp.where(weights.sum() > 0, weights.sum(), 1)
