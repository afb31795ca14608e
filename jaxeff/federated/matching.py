"""Neuron matching: the permutation of one network's units that brings its parameters closest to another's.

Networks that learned apart hold the same features in other places, and their mean is worse than both. Weight matching
(Git Re-Basin, arXiv 2209.04836) permutes one layer at a time by the best assignment, given all the others, until
nothing gains; here of any network, as `jaxeff.federated.derive` finds what may be permuted, and within the groups of
networks in groups.

The first sweep is ours: it begins with the layer of which most is known, as it touches inputs, outputs and what has an
order, and compares in every layer only what touches nothing but this and layers before. What is not aligned yet is
noise, which leads narrow networks astray.

Assignments are solved by SciPy on the host, or by `optax.assignment` inside the program, which is slower for large
layers on CPU and needs no host. Both take the optimum; among equals they may differ.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from scipy.optimize import linear_sum_assignment

from jaxeff import trees
from jaxeff.federated import symmetry
from jaxeff.federated.symmetry import Readers, Symmetry, WithinGroups, check_paths, chosen, permuted, readers, views

Tree = Any


def assign(similarity: jax.Array, solver: str = "scipy") -> jax.Array:
    """The assignment of columns to rows of the highest total similarity, of one problem or of many.

    Args:
      similarity: float [..., n, n].
      solver: "scipy" or "optax".

    Returns:
      int32 [..., n], the column of each row; where anything of a problem is not finite, its row i has column i. SciPy
      solves all problems in one call of the host, those under `vmap` too.

    Raises:
      ValueError: for an unknown solver, or what is not square.
    """
    check_solver(solver)
    if similarity.ndim < 2 or similarity.shape[-1] != similarity.shape[-2]:
        raise ValueError(f"similarity must be [..., n, n], got {similarity.shape}")
    finite = jnp.isfinite(similarity).all((-2, -1), keepdims=True)
    found = SOLVERS[solver](jnp.where(finite, similarity, 0))
    return jnp.where(finite[..., 0], found, jnp.arange(similarity.shape[-1], dtype=jnp.int32))


def weight_match(
    found: Symmetry,
    reference: Tree,
    params: Tree,
    *,
    names: Collection[str] | None = None,
    solver: str = "scipy",
    sweeps: int = 100,
    tolerance: float = 1e-6,
) -> dict[str, jax.Array]:
    """Permutations that bring parameters closest to those of a reference, one layer after the other.

    Args:
      found: of `jaxeff.federated.derive`, or of `within_groups`: then each group is matched within itself, by as many
        small assignments at once.
      reference: the parameters to come close to.
      params: of the same shapes.
      names: what may be permuted; None for all.
      solver: as of `assign`.
      sweeps: over all that may be permuted, at most.
      tolerance: share of the similarity that a sweep must gain for another one to follow.

    Returns:
      For `jaxeff.federated.permute(found, params, ...)`, or `found.permute(params, ...)` of groups. A pure function, to
      be mapped over clients. What holds NaN is left as it is.

    Raises:
      ValueError: for an unknown solver or name, or fewer than one sweep; if parameters have other paths than `found`.
    """
    check_paths(found, reference=reference, params=params)
    check_solver(solver)
    if sweeps < 1:
        raise ValueError(f"sweeps must be at least 1, got {sweeps}")
    shapes = chosen(found, names)
    aims, leaves = (
        {path: jnp.asarray(leaf) for path, leaf in trees.flatten_names(tree).items()} for tree in (reference, params)
    )
    plan = _best_known_first(found, shapes, {path: leaf.size for path, leaf in aims.items()})
    touched = {name: _touched(found, name, shapes) for name in shapes}
    identity = lambda shape: jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)

    def compared(name, current, places, averaged=()):
        pairs = (views(found, tree, name, places, averaged) for tree in (aims, current))
        return sum(map(products, *pairs), jnp.zeros((*shapes[name], shapes[name][-1])))

    # What nothing else permutes is compared once, and its columns are put in the order of the moment.
    alone = {name: compared(name, leaves, places.alone) for name, places in plan.items()}
    shared = {path for places in plan.values() for path, _ in (*places.known, *places.rest)}
    ordered = lambda name, perms: jnp.take_along_axis(alone[name], perms[name][..., None, :], -1)

    def improved(name, perms, current, first, open_):
        places = plan[name]
        later = lambda: compared(name, current, places.rest)
        now = lambda: compared(name, current, places.beside, places.averaged)
        similarity = ordered(name, perms) + compared(name, current, places.known)
        if places.rest:
            similarity += lax.cond(first, now, later)
        # Of an identity matrix nothing has to be solved.
        better = assign(jnp.where(open_[..., None, None], similarity, jnp.eye(similarity.shape[-1])), solver)
        before = jnp.trace(similarity, axis1=-2, axis2=-1)
        after = jnp.take_along_axis(similarity, better[..., None], -1).sum((-2, -1))
        # Among equals nothing moves.
        moves = after > before
        step = jnp.where(moves[..., None], better, identity(shapes[name]))
        finite = jnp.isfinite(after) & jnp.isfinite(before)
        gained = jnp.where(finite, jnp.maximum(after - before, 0), 0).sum()
        total = jnp.where(finite, jnp.abs(after), 0).sum()
        perm = jnp.take_along_axis(perms[name], step, -1)
        return {**perms, name: perm}, permuted(found, current, {name: step}), moves, gained, total

    def sweep(state):
        perms, current, opened, _, count = state
        gained, total = jnp.zeros(()), jnp.zeros(())
        for name in plan:
            nothing = (perms, current, jnp.zeros(shapes[name][:-1], bool), jnp.zeros(()), jnp.zeros(()))
            step = partial(improved, name, perms, current, count == 0, opened[name])
            done = lax.cond(opened[name].any(), step, lambda nothing=nothing: nothing)
            perms, current, moves, gain, similarity = done
            gained, total = gained + gain, total + similarity
            opened = {**opened, name: jnp.zeros_like(opened[name])}
            for other, apart in touched[name].items():
                opened[other] |= moves if apart else moves.any()
        # The first sweep has not seen everything.
        opened = {name: flags | (count == 0) for name, flags in opened.items()}
        return perms, current, opened, (gained > tolerance * total) | (count == 0), count + 1

    def similarity(perms, current):
        floats = [path for path in current if jnp.issubdtype(current[path].dtype, jnp.inexact)]
        wide = lambda tree: [tree[path].astype(jnp.float32).ravel() for path in floats]
        apart = sum(jnp.trace(ordered(name, perms), axis1=-2, axis2=-1).sum() for name in perms)
        return apart + sum(map(partial(jnp.vdot, precision=lax.Precision.HIGHEST), wide(aims), wide(current)))

    start = {name: identity(shape) for name, shape in shapes.items()}
    before = {path: leaves[path] for path in sorted(shared)}
    opened = {name: jnp.ones(shape[:-1], bool) for name, shape in shapes.items()}
    perms, after, *_ = lax.while_loop(
        lambda state: state[3] & (state[4] < sweeps),
        sweep,
        (start, before, opened, jnp.array(True), jnp.zeros((), jnp.int32)),
    )
    # The first sweep does not see everything, and what it does may be worse than nothing.
    worse = similarity(perms, after) < similarity(start, before)
    return {name: jnp.where(worse, start[name], perms[name]) for name in shapes}


def products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Scalar products of all rows [..., n, d] with all rows [..., n, d]: [..., n, n]."""
    return jnp.matmul(a, jnp.swapaxes(b, -1, -2), precision=lax.Precision.HIGHEST)


def check_solver(solver: str) -> None:
    """Refuses an unknown solver.

    Raises:
      ValueError: naming those there are.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")


class _Places(NamedTuple):
    """Where something permutable occurs.

    Attributes:
      alone: with nothing else that is permuted.
      known: with what comes before it.
      beside: with what comes before it, but for other parts of the axis that it is on itself.
      averaged: names of these.
      rest: everywhere else, `beside` included.
    """

    alone: Readers
    known: Readers
    beside: Readers
    averaged: Collection[str]
    rest: Readers


def _best_known_first(found: Symmetry, wanted: Collection[str], sizes: dict[str, int]) -> dict[str, _Places]:
    """Where names occur, in the order in which most is known of each; sizes are those of the parameters by path."""
    tied = found.tied if isinstance(found, WithinGroups) else found
    # What is not to be permuted has an order.
    still = set(tied.sizes) - set(wanted)
    without = lambda places, others: tuple(place for place in places if place not in others)
    plan: dict[str, _Places] = {}
    while len(plan) < len(wanted):
        known = still | set(plan)
        near = {name: readers(found, name, known, beside=False) for name in wanted if name not in plan}
        best = max(near, key=lambda name: sum(sizes[path] for path, _ in near[name]) / tied.sizes[name])
        # Of something that touches nothing known, everything is compared.
        seen = readers(found, best, known if near[best] else None)
        alone = readers(found, best, still)
        beside, rest = without(near[best], seen), without(readers(found, best), seen)
        plan[best] = _Places(alone, without(seen, alone), beside, set(tied.sizes) - known, rest)
    return plan


def _touched(found: Symmetry, name: str, wanted: Collection[str]) -> dict[str, bool]:
    """The names whose best order depends on that of one, and whether it does in each group apart."""
    tied = found.tied if isinstance(found, WithinGroups) else found
    depending: dict[str, bool] = {}
    for path, number in tied.readers(name):
        for i, axis in enumerate(tied.axes[path]):
            for other in symmetry.names(axis) & set(wanted):
                if i == number and other == name:
                    continue
                apart = isinstance(found, WithinGroups) and path in found.stacked and {name, other} <= found.own
                depending[other] = depending.get(other, True) and apart
    return depending


def _by_scipy(similarity: jax.Array) -> jax.Array:
    def solve(values):
        problems = np.asarray(values).reshape(-1, *similarity.shape[-2:])
        # Nothing is better than every row's best, and most of what has been matched before has it already.
        done = (np.diagonal(problems, axis1=1, axis2=2) >= problems.max(-1, initial=-np.inf)).all(-1)
        columns = np.tile(np.arange(problems.shape[-1], dtype=np.int32), (len(problems), 1))
        for number in np.flatnonzero(~done):
            columns[number] = linear_sum_assignment(problems[number], maximize=True)[1]
        return columns.reshape(np.shape(values)[:-1])

    result = jax.ShapeDtypeStruct(similarity.shape[:-1], jnp.int32)
    return jax.pure_callback(solve, result, similarity, vmap_method="broadcast_all")


def _by_optax(similarity: jax.Array) -> jax.Array:
    def solve(problem):
        row, column = optax.assignment.hungarian_algorithm(-problem)
        return jnp.zeros(problem.shape[0], jnp.int32).at[row].set(column.astype(jnp.int32))

    problems = similarity.reshape(-1, *similarity.shape[-2:])
    return jax.vmap(solve)(problems).reshape(similarity.shape[:-1])


SOLVERS: dict[str, Callable[[jax.Array], jax.Array]] = {"scipy": _by_scipy, "optax": _by_optax}
"""Solvers of the assignment problem by name."""
