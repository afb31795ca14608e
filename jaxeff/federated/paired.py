"""Feature-paired averaging: a group of features is averaged over the clients that own it, by its identity.

Fed2 (KDD 2021) binds groups of channels to groups of classes. What all clients share is averaged as FedAvg does; a
group g of a decoupled leaf is averaged over the clients with examples of its classes,

    W_g = sum_i omega_ig W_ig / sum_i omega_ig,      or what it was before where nobody owns it.

The exact form of the weights is ours: the sums of the class counts are the default, as weights by all examples would
let clients of other classes decide.

Letters: N clients, C classes, G groups.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WEIGHTS: tuple[str, ...] = ("class_counts", "uniform", "size")
LIMIT = 1e20
"""Of any number that a client sends: larger ones overflow when they are weighted and summed."""
SHARED = -1
"""Stands for the group axis of what has none."""
Tree = Any


def group_weights(
    class_counts: Any, class_to_group: Sequence[int], groups: int, by: str = "class_counts"
) -> np.ndarray:
    """How much each client counts in each group: 0 where it owns none of its classes.

    Args:
      class_counts: integers [N, C], as of `jaxeff.federated.Partition`.
      class_to_group: the group of each class, [C], in 0..G-1.
      groups: G.
      by: "class_counts", the examples of the group's classes; "uniform", every owner alike; "size", all examples of
        the owner.

    Returns:
      omega, float32 [N, G].

    Raises:
      ValueError: for an unknown `by`, shapes that do not fit, or groups without a class.
    """
    counts, owner = np.asarray(class_counts), np.asarray(class_to_group)
    if by not in WEIGHTS:
        raise ValueError(f"by must be one of {', '.join(map(repr, WEIGHTS))}, got {by!r}")
    if counts.ndim != 2 or owner.shape != counts.shape[1:]:
        raise ValueError(f"class_to_group must have one group for each of the classes of {counts.shape}: {owner.shape}")
    if sorted(set(owner.tolist())) != list(range(groups)):
        raise ValueError(
            f"every one of the {groups} groups needs a class, and every class one of them: {owner.tolist()}"
        )
    held = counts @ np.eye(groups, dtype=counts.dtype)[owner]
    if by == "uniform":
        return (held > 0).astype(np.float32)
    return np.where(held > 0, held if by == "class_counts" else counts.sum(1, keepdims=True), 0).astype(np.float32)


def paired_average(stacked: Tree, group_axes: Tree, omega: Any, weights: Any, previous: Tree) -> Tree:
    """One tree from those of the clients: shared leaves by `weights`, groups of decoupled leaves by `omega`.

    Sums are accumulated in float32 at least and cast back once. Clients of weight 0 have no influence, whatever they
    hold, NaN included. Of integers, such as counters of steps, the highest is taken; of keys, the previous one.

    Args:
      stacked: leaves [N, ...].
      group_axes: the same tree with the axis of G of each decoupled leaf, as it is without N, and None for what is
        shared; or a prefix of it.
      omega: [N, G], not negative, as of `group_weights`.
      weights: [N], not negative, for example examples of each client.
      previous: the tree before, leaves [...]: kept where the weights of a leaf, or of a group, add up to 0.

    Returns:
      Leaves [...], of the same dtypes. A pure function, differentiable in `stacked`; with None everywhere it is
      `jaxeff.trees.weighted_mean`.

    Raises:
      ValueError: for weights whose shapes do not fit, or an axis that is not of G.
    """
    omega, weights = jnp.asarray(omega, jnp.float32), jnp.asarray(weights, jnp.float32)
    clients = {leaf.shape[0] for leaf in jax.tree.leaves(stacked)}
    if clients != {len(weights)} or omega.ndim != 2 or len(omega) != len(weights):
        raise ValueError(
            f"weights [N] and omega [N, G] must be of the {sorted(clients)} clients, got {weights.shape}, {omega.shape}"
        )

    def combined(path, axis, leaf, before):
        if axis == SHARED:
            return _mean(leaf, weights, before)
        if leaf.shape[1 + axis] != omega.shape[1]:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} has {leaf.shape[1 + axis]} groups along axis {axis}, but omega has "
                f"{omega.shape[1]}"
            )
        by_group = jax.vmap(_mean, (1, 1, 0))(jnp.moveaxis(leaf, 1 + axis, 1), omega, jnp.moveaxis(before, axis, 0))
        return jnp.moveaxis(by_group, 0, axis)

    return jax.tree_util.tree_map_with_path(combined, spread_axes(group_axes, previous), stacked, previous)


def empty(previous: Tree, group_axes: Tree, groups: int) -> Tree:
    """Sums over nobody, to which `term`s are added: what `paired_average` adds up, where clients come one by one."""
    shape = jax.eval_shape(lambda: term(previous, group_axes, jnp.zeros(groups), jnp.zeros(())))

    def one(leaf):
        lowest = jnp.issubdtype(leaf.dtype, jnp.integer)
        return jnp.full(leaf.shape, jnp.iinfo(leaf.dtype).min if lowest else 0, leaf.dtype)

    return jax.tree.map(one, shape)


def term(variables: Tree, group_axes: Tree, omega: jax.Array, weight: jax.Array) -> Tree:
    """What one client adds to the sums of a feature-paired average.

    Args:
      variables: leaves [...].
      group_axes: as of `paired_average`.
      omega: [G], its weights in the groups.
      weight: its weight in what is shared.

    Returns:
      The weights, and the weighted leaves in float32 at least; integers as they are, of which the highest is taken.
    """

    def one(axis, leaf):
        if _is_key(leaf):
            return jnp.zeros((), jnp.float32)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            lowest = jnp.iinfo(leaf.dtype).min if jnp.issubdtype(leaf.dtype, jnp.integer) else False
            return jnp.where(_spread(omega > 0, axis, leaf) if axis != SHARED else weight > 0, leaf, lowest)
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        by = _spread(omega, axis, leaf) if axis != SHARED else weight
        return jnp.where(by > 0, by.astype(wide) * leaf.astype(wide), 0)

    return {"omega": omega, "weight": weight, "sums": jax.tree.map(one, spread_axes(group_axes, variables), variables)}


def add(sums: Tree, more: Tree) -> Tree:
    """Sums of some clients and those of others: added, or of integers the higher one."""
    return jax.tree.map(lambda a, b: a + b if jnp.issubdtype(a.dtype, jnp.inexact) else jnp.maximum(a, b), sums, more)


def result(sums: Tree, group_axes: Tree, previous: Tree) -> Tree:
    """The average, from the sums over all clients; what it was where the weights add up to 0."""

    def one(axis, total, before):
        if _is_key(before):
            return before
        by = _spread(sums["omega"], axis, before) if axis != SHARED else sums["weight"]
        mean = total if not jnp.issubdtype(before.dtype, jnp.inexact) else total / jnp.where(by > 0, by, 1)
        return jnp.where(by > 0, mean.astype(before.dtype), before)

    return jax.tree.map(one, spread_axes(group_axes, previous), sums["sums"], previous)


def fixed_result(sums: Tree, group_axes: Tree, previous: Tree, expected: Any, owners: Any = None) -> Tree:
    """What was before, and the sum of the clients' changes by a number that does not depend on who they are.

    Args:
      sums: of `term`s.
      group_axes, previous: as of `paired_average`.
      expected: clients of a round, by which the changes of what is shared are divided.
      owners: [G], by which those of the groups are; None for `expected`.

    Returns:
      The tree; integers, such as counters, stay what they were.
    """
    expected = jnp.asarray(expected, jnp.float32)
    owners = jnp.broadcast_to(expected if owners is None else jnp.asarray(owners, jnp.float32), sums["omega"].shape)

    def one(axis, total, before):
        if not jnp.issubdtype(before.dtype, jnp.inexact):
            return before
        weight = _spread(sums["omega"], axis, before) if axis != SHARED else sums["weight"]
        over = _spread(owners, axis, before) if axis != SHARED else expected
        return (before + (total - weight * before) / over).astype(before.dtype)

    return jax.tree.map(one, spread_axes(group_axes, previous), sums["sums"], previous)


def _spread(omega: jax.Array, axis: int, leaf: jax.Array) -> jax.Array:
    """Weights of groups along their axis of a leaf."""
    return omega.reshape([-1 if i == axis else 1 for i in range(leaf.ndim)])


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def spread_axes(group_axes: Tree, tree: Tree) -> Tree:
    """The group axis of every leaf of a tree, `SHARED` where it has none; `group_axes` as of `paired_average`."""
    return jax.tree.map(
        lambda axis, part: jax.tree.map(lambda _: SHARED if axis is None else axis, part),
        group_axes,
        tree,
        is_leaf=lambda axis: axis is None,
    )


def _mean(leaf: jax.Array, weights: jax.Array, before: jax.Array) -> jax.Array:
    if _is_key(leaf):
        return before
    counted = (weights > 0).reshape(-1, *(1,) * (leaf.ndim - 1))
    total = weights.sum()
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        lowest = jnp.iinfo(leaf.dtype).min if jnp.issubdtype(leaf.dtype, jnp.integer) else False
        return jnp.where(total > 0, jnp.where(counted, leaf, lowest).max(0), before)
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    values = jnp.where(counted, leaf, 0).astype(wide)
    added = jnp.tensordot(weights.astype(wide), values, axes=1, precision=jax.lax.Precision.HIGHEST)
    # The denominator is 1 where nobody counts, so that no gradient of the branch that is not taken is NaN.
    mean = added / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, mean.astype(leaf.dtype), before)
