"""Many trees alike as one: stacks of clients, seeds or ensemble members, and their weighted sums.

A stacked tree has the structure of one member; every leaf carries a leading axis that counts the members.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.trees.leaves import Tree, first_mismatch, paths, shaped


def stack(trees: Sequence[Tree]) -> Tree:
    """Stacks trees along a new leading axis.

    Args:
      trees: at least one tree; all with the same structure, shapes and dtypes.

    Returns:
      One tree whose leaves are ``[len(trees), ...]``.

    Raises:
      ValueError: no trees, or two that differ; the message names the first difference.
    """
    trees = list(trees)
    _check_alike("stack", trees)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Tree, axis: int = 0) -> list[Tree]:
    """Splits a stacked tree into the list of its members.

    Args:
      tree: leaves share the length of ``axis``.
      axis: the axis that is removed.

    Returns:
      As many trees as ``axis`` is long.

    Raises:
      ValueError: a leaf has no such axis, or the lengths differ.
    """
    length = _stacked_length("unstack", tree, axis)
    leaves = jax.tree.leaves(tree)
    treedef: Any = jax.tree.structure(tree)
    columns = [jnp.moveaxis(jnp.asarray(leaf), axis, 0) for leaf in leaves]
    return [treedef.unflatten(column[i] for column in columns) for i in range(length)]


def take(stacked: Tree, i: Any) -> Tree:
    """Member ``i`` of a stacked tree, or the members ``i`` when that is an array.

    Args:
      stacked: leaves ``[K, ...]``.
      i: integer or integer array ``[M]``, concrete or traced; negative counts from the end. Concrete indices are
        checked; a traced one outside the range is clamped to it, as everywhere in JAX.

    Returns:
      Leaves ``[...]`` for an integer, ``[M, ...]`` for an array.

    Raises:
      ValueError: a concrete index is outside ``[-K, K)``, or the leaves disagree about ``K``.
      TypeError: ``i`` does not hold integers.
    """
    length = _stacked_length("take", stacked, 0)
    if not jnp.issubdtype(jnp.result_type(i), jnp.integer):
        raise TypeError(f"take: i must be an integer or an array of integers, got {i!r}")
    if _is_concrete(i):
        outside = [int(index) for index in np.ravel(np.asarray(i)) if not -length <= index < length]
        if outside:
            raise ValueError(f"take: index {outside[0]} is outside the {length} members of the stacked tree")
    index = jnp.asarray(i)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], stacked)


def weighted_sum(trees: Tree | list[Tree], weights: Any, *, stacked: bool | None = None) -> Tree:
    """Sum over members of weight times leaf.

    Sums are accumulated in float32 (float64 and complex leaves in their own dtype) and cast back to the dtype of the
    leaf once, at the end; integer leaves are rounded to the nearest integer. A leaf that is not finite spoils the sum
    even where its weight is zero: replace it first (``optax.tree.where``).

    Args:
      trees: a list of K trees alike in structure, shapes and dtypes, or one stacked tree with leaves ``[K, ...]``.
      weights: ``[K]`` real numbers, concrete or traced.
      stacked: whether ``trees`` is one stacked tree. By default a Python list is taken as separate trees and
        everything else as stacked; say so when a stacked tree is itself a list.

    Returns:
      One tree, leaves ``[...]``.

    Raises:
      ValueError: the number of weights and members differ, trees differ, or a concrete weight is not finite.
      TypeError: a leaf holds booleans or random keys, of which there is no weighted sum.
    """
    return _weighted("weighted_sum", trees, weights, stacked, mean=False)


def weighted_mean(trees: Tree | list[Tree], weights: Any, *, stacked: bool | None = None) -> Tree:
    """Weighted sum over members, divided by the total weight: federated averaging's server step.

    Precision and dtypes are those of ``weighted_sum``.

    Args:
      trees: as for ``weighted_sum``.
      weights: ``[K]`` non-negative real numbers, for instance example counts; they need not sum to one. A traced
        total of zero cannot be seen before the computation and gives NaN leaves.
      stacked: as for ``weighted_sum``.

    Returns:
      One tree, leaves ``[...]``.

    Raises:
      ValueError: as ``weighted_sum``; and concrete weights that are negative or sum to zero.
      TypeError: as ``weighted_sum``.
    """
    return _weighted("weighted_mean", trees, weights, stacked, mean=True)


def _weighted(caller: str, trees, weights, stacked: bool | None, *, mean: bool):
    separate = isinstance(trees, list) if stacked is None else not stacked
    if separate:
        trees = list(trees)
        _check_alike(caller, trees)
        members, columns = len(trees), [jax.tree.leaves(tree) for tree in trees]
        example = trees[0]
    else:
        members, columns, example = _stacked_length(caller, trees, 0), [jax.tree.leaves(trees)], trees
    if isinstance(weights, (list, tuple)) and not _is_concrete(weights):
        weights = jnp.stack([jnp.asarray(weight) for weight in weights])
    _check_weights(caller, weights, members, mean)

    def combine(*leaves):
        arrays = [jnp.asarray(leaf) for leaf in leaves]
        dtype, accumulator = arrays[0].dtype, _accumulator(arrays[0].dtype)
        w = jnp.asarray(weights, jnp.finfo(accumulator).dtype)  # real also where the leaf is complex
        if separate:
            total = sum(
                (w[k] * array.astype(accumulator) for k, array in enumerate(arrays)), jnp.zeros((), accumulator)
            )
        else:
            # HIGHEST: a matrix unit would otherwise round float32 operands to bfloat16 or tf32.
            operands = w.astype(accumulator), arrays[0].astype(accumulator)
            total = jnp.tensordot(*operands, axes=1, precision=jax.lax.Precision.HIGHEST)
        if mean:
            total = total / jnp.sum(w)
        return (jnp.round(total) if jnp.issubdtype(dtype, jnp.integer) else total).astype(dtype)

    for name, leaf in zip(paths(example), columns[0], strict=True):
        if not jnp.issubdtype(shaped(leaf).dtype, jnp.number):
            raise TypeError(f"{caller}: {name!r} is {shaped(leaf).dtype}, which has no weighted sum; partition it away")
    treedef: Any = jax.tree.structure(example)
    return treedef.unflatten(combine(*leaves) for leaves in zip(*columns, strict=True))


def _accumulator(dtype) -> Any:
    # Not promote_types: it refuses 8-bit floats.
    if jnp.issubdtype(dtype, jnp.complexfloating) or dtype == jnp.float64:
        return dtype
    return jnp.float64 if dtype in (jnp.int64, jnp.uint64) else jnp.float32


def _check_weights(caller: str, weights, members: int, mean: bool) -> None:
    if np.shape(weights) != (members,):
        raise ValueError(
            f"{caller}: weights must have shape ({members},), one per member of `trees`, got {np.shape(weights)}"
            "; a list is taken as separate trees and anything else as one stacked tree unless `stacked` says otherwise"
        )
    if not _is_concrete(weights):
        return
    values = np.asarray(weights, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{caller}: weights must be finite, got {values.tolist()}")
    if mean and ((values < 0).any() or values.sum() == 0):
        raise ValueError(f"{caller}: weights must be non-negative with a positive sum, got {values.tolist()}")


def _check_alike(caller: str, trees: list) -> None:
    if not trees:
        raise ValueError(f"{caller}: got no trees; give at least one")
    for position, tree in enumerate(trees[1:], start=1):
        difference = first_mismatch(trees[0], tree, ("tree 0", f"tree {position}"))
        if difference:
            raise ValueError(f"{caller}: trees must be alike: {difference}")


def _stacked_length(caller: str, tree: Tree, axis: int) -> int:
    lengths = {}
    for name, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True):
        shape = np.shape(leaf)
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"{caller}: {name!r} of shape {shape} has no axis {axis} that counts members")
        lengths[name] = shape[axis]
    if not lengths:
        raise ValueError(f"{caller}: the tree has no leaves, so it cannot be a stack of trees")
    if len(set(lengths.values())) > 1:
        (usual, _), *_ = Counter(lengths.values()).most_common(1)
        name, length = next((n, k) for n, k in lengths.items() if k != usual)
        raise ValueError(
            f"{caller}: leaves disagree about the length of axis {axis}: {name!r} has {length}, others {usual}"
        )
    return next(iter(lengths.values()))


def _is_concrete(x) -> bool:
    """Whether the values can be read now: not traced, and not spread over several hosts."""

    def readable(leaf):
        return not isinstance(leaf, jax.core.Tracer) and (not isinstance(leaf, jax.Array) or leaf.is_fully_addressable)

    return all(readable(leaf) for leaf in jax.tree.leaves(x))
