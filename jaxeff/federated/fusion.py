"""Fusion by optimal transport: one network from several, of other widths too.

Layer by layer, in the order in which values flow, the units of a network are transported to those of a reference: by
the plan T [n, m] of the lowest total cost between what makes them, kernels, biases and norms, given all layers before
(OT fusion, arXiv 1910.05653). A new unit is the mean of what comes to it, T / column sums, and what reads units hands
on its weights, T / row sums, so that a layer may split and merge units that are the same without another output. Then
the networks have one shape, and are averaged. Of equal widths an exact plan is a permutation, and this is matching.

Letters: n and m units of a layer of the network and of the reference.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import optimize, sparse

from jaxeff import trees
from jaxeff.federated.flow import Follower, Roles, atoms, follow, names_of, trace
from jaxeff.federated.matching import assign, products
from jaxeff.federated.permutation import Axis, Fixed, Free, Permutations, Product, Sum, derive, size_of
from jaxeff.federated.symmetry import check_paths, readers, rows_of

Tree = Any


class Layers(NamedTuple):
    """The layers of a network as fusion sees them; see `layers`.

    Attributes:
      found: what may be permuted, which are the units of layers.
      order: their names, in the order in which values flow.
      reads: (path, axis) of parameters that read units; all others make them.
    """

    found: Permutations
    order: tuple[str, ...]
    reads: frozenset[tuple[str, int]]


def layers(apply: Callable[..., Any], params: Tree, *inputs: Any) -> Layers:
    """Finds the layers of a network.

    Args:
      apply: (params, *inputs) -> outputs, any function that JAX traces.
      params: tree of arrays, or of `jax.ShapeDtypeStruct`.
      inputs: as it is called with.

    Returns:
      The layers; call `jaxeff.federated.verify` with what is found before you use them.
    """
    found, program = derive(apply, params, *inputs), trace(apply, params, *inputs)
    follower, roles = Follower(), Roles()
    named = names_of(found, program, follow(follower, program))
    # Products and convolutions first: zeros that a shortcut adds have the axes of units that come later.
    made = sorted(follower.made.items(), key=lambda item: item[0] not in follower.summed)
    flows = [named[node] for _, axes in made for axis in axes for node in atoms(axis) if node in named]
    own = follow(roles, program)
    reading = set().union(*map(atoms, roles.readers))
    reads = frozenset(
        (path, number)
        for path, axes in zip(program.paths, own, strict=True)
        for number, axis in enumerate(axes)
        if reading.intersection(atoms(axis))
    )
    return Layers(found, tuple(dict.fromkeys([*flows, *found.sizes])), reads)


def fuse(
    clients: Sequence[Layers],
    params: Sequence[Tree],
    *,
    weights: Sequence[float] | jax.Array | None = None,
    reference: int = 0,
    solver: str = "exact",
) -> Tree:
    """One network from several of one architecture, in the widths of one of them.

    Args:
      clients: their layers, of `layers`; widths may differ.
      params: their parameters.
      weights: how much each counts in the mean, not negative; None for all alike. What counts nothing may hold NaN.
      reference: number of the client whose widths and order are kept.
      solver: "exact", solved on the host, or "sinkhorn", in the program, which blurs.

    Returns:
      The parameters, in the shapes and dtypes of the reference; what is no float is the reference's. A pure function.

    Raises:
      ValueError: for lengths that do not fit, an unknown solver, or clients of other architectures.
    """
    if not clients or len(clients) != len(params):
        raise ValueError(f"clients and params must be as many, and at least one, got {len(clients)} and {len(params)}")
    if not 0 <= reference < len(clients):
        raise ValueError(f"reference must be in 0..{len(clients) - 1}, got {reference}")
    share = jnp.ones(len(clients)) if weights is None else jnp.asarray(weights, jnp.float32)
    if share.shape != (len(clients),):
        raise ValueError(f"weights must be of shape ({len(clients)},), got {share.shape}")
    target = params[reference]
    moved = [
        tree if number == reference else transport(own, clients[reference], tree, target, solver=solver)
        for number, (own, tree) in enumerate(zip(clients, params, strict=True))
    ]

    def mean(kept, *leaves):
        if not jnp.issubdtype(kept.dtype, jnp.inexact):
            return kept
        wide = jnp.promote_types(kept.dtype, jnp.float32)
        total = sum(
            jnp.where(weight > 0, weight.astype(wide) * leaf.astype(wide), 0)
            for weight, leaf in zip(share, leaves, strict=True)
        )
        return jnp.where(share.sum() > 0, total / jnp.where(share.sum() > 0, share.sum(), 1), kept).astype(kept.dtype)

    return jax.tree.map(mean, jax.tree.map(jnp.asarray, target), *moved)


def transport(source: Layers, target: Layers, params: Tree, reference: Tree, *, solver: str = "exact") -> Tree:
    """The parameters of a network in the widths and the order of another one.

    Args:
      source: the layers of the network.
      target: those of the reference.
      params: of the network.
      reference: parameters to whose units its own are transported.
      solver: "exact" or "sinkhorn".

    Returns:
      float32 leaves in the shapes of the reference, but for what is no float, which is the reference's.

    Raises:
      ValueError: for an unknown solver, or another architecture.
    """
    if solver not in PLANS:
        raise ValueError(f"solver must be one of {', '.join(map(repr, PLANS))}, got {solver!r}")
    check_paths(source.found, params=params)
    check_paths(target.found, reference=reference)
    _check_alike(source, target)
    flat = {path: jnp.asarray(leaf) for path, leaf in trees.flatten_names(params).items()}
    goal = {path: jnp.asarray(leaf) for path, leaf in trees.flatten_names(reference).items()}
    numeric = [path for path, leaf in goal.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    current = {path: flat[path].astype(jnp.float32) for path in numeric}
    axes = {path: list(source.found.axes[path]) for path in numeric}
    for place, name in enumerate(target.order):
        cost, parts = jnp.zeros((source.found.sizes[name], target.found.sizes[name])), 0
        for path, number in readers(source.found, name, target.order[:place]):
            if path not in current or (path, number) in source.reads:
                continue
            ours = rows_of(axes[path][number], current[path], number, name)
            theirs = rows_of(target.found.axes[path][number], goal[path].astype(jnp.float32), number, name)
            for a, b in zip(ours, theirs, strict=True):
                cost, parts = cost + _distances(a, b), parts + 1
        if not parts:
            raise ValueError(
                f"{name!r} is made by nothing that is known by then; of such networks nothing can be fused"
            )
        plan = PLANS[solver](cost)
        made, read = plan / plan.sum(0), plan / plan.sum(1, keepdims=True)
        for path, number in source.found.readers(name):
            if path in current:
                matrix = read if (path, number) in source.reads else made
                goal_axis = target.found.axes[path][number]
                current[path] = _carried(axes[path][number], goal_axis, current[path], number, name, matrix)
                axes[path][number] = _replaced(axes[path][number], goal_axis, name)
    return trees.unflatten_names({**goal, **current}, reference)


def sinkhorn(cost: jax.Array, *, regularisation: float = 0.01, iterations: int = 200) -> jax.Array:
    """The plan of lowest cost between uniform marginals, blurred by entropy.

    Args:
      cost: float [n, m].
      regularisation: of the entropy, as a share of the mean cost; smaller is sharper and slower to settle.
      iterations: over both marginals.

    Returns:
      float32 [n, m]; columns sum to 1 / m exactly, rows to 1 / n where it has settled. To be mapped and differentiated.

    Raises:
      ValueError: for settings out of range.
    """
    if not regularisation > 0 or iterations < 1:
        raise ValueError(
            f"regularisation must be above 0 and iterations at least 1, got {regularisation} and {iterations}"
        )
    n, m = cost.shape
    finite = jnp.isfinite(cost).all()
    cost = jnp.where(finite, cost, 0).astype(jnp.float32)
    scores = -cost / jnp.maximum(regularisation * cost.mean(), 1e-30)

    def once(columns, _):
        rows = -jnp.log(n) - jax.nn.logsumexp(scores + columns, 1, keepdims=True)
        columns = -jnp.log(m) - jax.nn.logsumexp(scores + rows, 0, keepdims=True)
        return columns, rows

    columns, rows = lax.scan(once, jnp.zeros((1, m)), length=iterations)
    return jnp.exp(scores + rows[-1] + columns)


def exact(cost: jax.Array) -> jax.Array:
    """The plan of lowest cost between uniform marginals: an assignment of equal widths, else a linear programme.

    Args:
      cost: float [n, m]; what is not finite gives the plan of a cost that is the same everywhere.

    Returns:
      float32 [n, m], rows that sum to 1 / n and columns that sum to 1 / m. Solved on the host.
    """
    n, m = cost.shape
    if n == m:
        return jax.nn.one_hot(assign(-cost), n) / n
    finite = jnp.where(jnp.isfinite(cost).all(), cost, 0)
    return jax.pure_callback(
        _programme, jax.ShapeDtypeStruct(cost.shape, jnp.float32), finite, vmap_method="sequential"
    )


PLANS: dict[str, Callable[[jax.Array], jax.Array]] = {"exact": exact, "sinkhorn": sinkhorn}
"""Solvers of optimal transport between uniform marginals by name."""


def _programme(cost: Any) -> np.ndarray:
    cost = np.asarray(cost, np.float64)
    n, m = cost.shape
    rows = sparse.kron(sparse.eye(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye(m))
    marginals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    # The last equation follows from the others.
    constraints = sparse.vstack([rows, columns]).tocsr()[:-1]
    found = optimize.linprog(cost.ravel(), A_eq=constraints, b_eq=marginals[:-1], method="highs")
    if found.x is None:
        raise RuntimeError(f"optimal transport between {n} and {m} units was not solved: {found.message}")
    return np.maximum(found.x.reshape(n, m), 0).astype(np.float32)


def _distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared distances between rows [n, d] and rows [m, d]: [n, m]."""
    squares = lambda rows: (rows**2).sum(1)
    return jnp.maximum(squares(a)[:, None] + squares(b)[None] - 2 * products(a, b), 0)


def _check_alike(source: Layers, target: Layers) -> None:
    if set(source.found.sizes) != set(target.found.sizes):
        other = sorted(set(source.found.sizes) ^ set(target.found.sizes))
        raise ValueError(f"clients must be of one architecture, but only one has the layers {', '.join(other)}")
    for path, axes in source.found.axes.items():
        others = target.found.axes.get(path, ())
        if len(axes) != len(others) or not all(map(_alike, axes, others)):
            raise ValueError(
                f"clients must be of one architecture and differ in the widths of layers alone: {path!r} is {axes} in "
                f"one and {others} in the other"
            )


def _alike(a: Axis, b: Axis) -> bool:
    if isinstance(a, Product | Sum):
        return type(a) is type(b) and len(a.parts) == len(b.parts) and all(map(_alike, a.parts, b.parts))
    if isinstance(a, Free):
        return isinstance(b, Free) and a.name == b.name
    return isinstance(b, Fixed) and a.size == b.size


def _replaced(axis: Axis, goal: Axis, name: str) -> Axis:
    """An axis in which the units of a name are those of the reference, in their order."""
    if isinstance(axis, Product | Sum):
        assert isinstance(goal, Product | Sum)
        return type(axis)(tuple(_replaced(a, b, name) for a, b in zip(axis.parts, goal.parts, strict=True)))
    return Fixed(size_of(goal), "transported") if isinstance(axis, Free) and axis.name == name else axis


def _carried(axis: Axis, goal: Axis, leaf: jax.Array, number: int, name: str, matrix: jax.Array) -> jax.Array:
    """A leaf in which the units of a name along an axis are transported by a matrix [n, m]."""
    moved = jnp.moveaxis(leaf, number, 0)
    carried = _carry(axis, goal, moved.reshape(moved.shape[0], -1), name, matrix)
    return jnp.moveaxis(carried.reshape(-1, *moved.shape[1:]), 0, number)


def _carry(axis: Axis, goal: Axis, rows: jax.Array, name: str, matrix: jax.Array) -> jax.Array:
    if isinstance(axis, Free):
        return products(matrix.T, rows.T) if axis.name == name else rows
    if isinstance(axis, Sum):
        assert isinstance(goal, Sum)
        ends = np.cumsum([size_of(part) for part in axis.parts])[:-1].tolist()
        pieces = zip(axis.parts, goal.parts, jnp.split(rows, ends), strict=True)
        return jnp.concatenate([_carry(part, other, piece, name, matrix) for part, other, piece in pieces])
    if isinstance(axis, Product):
        assert isinstance(goal, Product)
        apart = rows.reshape(*map(size_of, axis.parts), -1)
        for number, (part, other) in enumerate(zip(axis.parts, goal.parts, strict=True)):
            apart = _carried(part, other, apart, number, name, matrix)
        return apart.reshape(-1, rows.shape[1])
    return rows
