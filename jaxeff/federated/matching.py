"""Neuron matching: the permutation of one network's units that brings its parameters closest to another's.

Networks that learned apart hold the same features in other places, and their mean is worse than both. Weight matching
(Git Re-Basin, arXiv 2209.04836) permutes one layer at a time by the best assignment, given all the others, until
nothing gains; here of any network, as `jaxeff.federated.derive` finds what may be permuted.

Assignments are solved by SciPy on the host, or by `optax.assignment` inside the program, which is slower for large
layers on CPU and needs no host. Both take the optimum; among equals they may differ.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from scipy.optimize import linear_sum_assignment

from jaxeff import trees
from jaxeff.federated.permutation import Axis, Free, Permutations, Product, Sum, permute, size_of

Tree = Any


def assign(similarity: jax.Array, solver: str = "scipy") -> jax.Array:
    """The assignment of columns to rows of the highest total similarity.

    Args:
      similarity: float [n, n].
      solver: "scipy" or "optax".

    Returns:
      int32 [n], the column of each row; where anything is not finite, row i has column i. Under `vmap` SciPy solves one
      problem after the other.

    Raises:
      ValueError: for an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")
    finite = jnp.isfinite(similarity).all()
    found = SOLVERS[solver](jnp.where(finite, similarity, 0))
    return jnp.where(finite, found, jnp.arange(len(similarity), dtype=jnp.int32))


def weight_match(
    found: Permutations,
    reference: Tree,
    params: Tree,
    *,
    solver: str = "scipy",
    sweeps: int = 100,
    tolerance: float = 1e-6,
) -> dict[str, jax.Array]:
    """Permutations that bring parameters closest to those of a reference, one layer after the other.

    Args:
      found: of `jaxeff.federated.derive`.
      reference: the parameters to come close to.
      params: of the same shapes.
      solver: as of `assign`.
      sweeps: over all that may be permuted, at most.
      tolerance: share of the similarity that a sweep must gain for another one to follow.

    Returns:
      For `jaxeff.federated.permute(found, params, ...)`. A pure function, to be mapped over clients.

    Raises:
      ValueError: for an unknown solver; if parameters have other paths than `found`.
    """
    params = jax.tree.map(jnp.asarray, params)
    flat = [trees.flatten_names(tree) for tree in (reference, params)]
    for what, tree in zip(("reference", "params"), flat, strict=True):
        if set(tree) != set(found.axes):
            raise ValueError(f"{what}: paths are not those of `found`: {sorted(set(tree) ^ set(found.axes))}")
    assign(jnp.zeros((1, 1)), solver)
    fixed = {name: _views(found, flat[0], name) for name in found.sizes}

    def sweep(state):
        perms, current, _, count = state
        gained, total = jnp.zeros(()), jnp.zeros(())
        for name, size in found.sizes.items():
            similarity = sum(
                (a @ b.T for a, b in zip(fixed[name], _views(found, trees.flatten_names(current), name), strict=True)),
                jnp.zeros((size, size)),
            )
            better = assign(similarity, solver)
            before, after = jnp.trace(similarity), similarity[jnp.arange(size), better].sum()
            # Among equals nothing moves.
            step = jnp.where(after > before, better, jnp.arange(size))
            perms = {**perms, name: perms[name][step]}
            current = permute(found, current, {name: step})
            gained, total = gained + jnp.maximum(after - before, 0), total + jnp.abs(after)
        return perms, current, gained > tolerance * total, count + 1

    start = {name: jnp.arange(size, dtype=jnp.int32) for name, size in found.sizes.items()}
    perms, *_ = lax.while_loop(
        lambda state: state[2] & (state[3] < sweeps), sweep, (start, params, jnp.array(True), jnp.zeros((), jnp.int32))
    )
    return perms


def _by_scipy(similarity: jax.Array) -> jax.Array:
    solve = lambda values: linear_sum_assignment(np.asarray(values), maximize=True)[1].astype(np.int32)
    result = jax.ShapeDtypeStruct(similarity.shape[:1], jnp.int32)
    return jax.pure_callback(solve, result, similarity, vmap_method="sequential")


def _by_optax(similarity: jax.Array) -> jax.Array:
    row, column = optax.assignment.hungarian_algorithm(-similarity)
    return jnp.zeros(similarity.shape[0], jnp.int32).at[row].set(column.astype(jnp.int32))


SOLVERS: dict[str, Callable[[jax.Array], jax.Array]] = {"scipy": _by_scipy, "optax": _by_optax}
"""Solvers of the assignment problem by name."""


def _views(found: Permutations, leaves: dict[str, jax.Array], name: str) -> list[jax.Array]:
    """Everything that something permutable indexes, as float32 [size, rest]."""
    views = []
    for path, number in found.readers(name):
        leaf = jnp.asarray(leaves[path])
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            moved = jnp.moveaxis(leaf.astype(jnp.float32), number, 0)
            views += _along(found.axes[path][number], moved.reshape(moved.shape[0], -1), name)
    return views


def _along(axis: Axis, rows: jax.Array, name: str) -> list[jax.Array]:
    """Parts of rows [axis, rest] that a name counts, with it in front."""
    if isinstance(axis, Free):
        return [rows] if axis.name == name else []
    found, start = [], 0
    if isinstance(axis, Sum):
        for part in axis.parts:
            found += _along(part, rows[start : start + size_of(part)], name)
            start += size_of(part)
    elif isinstance(axis, Product):
        apart = rows.reshape(*map(size_of, axis.parts), rows.shape[-1])
        for number, part in enumerate(axis.parts):
            moved = jnp.moveaxis(apart, number, 0)
            found += _along(part, moved.reshape(moved.shape[0], -1), name)
    return found
