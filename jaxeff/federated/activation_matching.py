"""Activation matching: units are the same where they answer alike, whatever their parameters are.

For everything that may be permuted, the activations Z [rows, n] of two networks on one batch are compared, and the
units are assigned by Z_a^T Z_b or by their correlation, each layer by itself and in one shot (Git Re-Basin,
arXiv 2209.04836). It works for any function: the activations are values of its traced program.

Which values: "made", the results of products and convolutions that have the axis, before any nonlinearity, so that
units which a ReLU silences on the whole batch are told apart; or "read", what the next layers sum over, after
nonlinearity, norm and pooling. All of them where there are several, as in residual networks; where there is none, the
last value that has the axis. Rows are all other axes; those that may be permuted themselves are averaged over, as their
order says nothing. What no value has is left as it is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.federated.axes import Node
from jaxeff.federated.flow import Follower, Place, atoms, axis_of, evaluate, follow, names_of, trace
from jaxeff.federated.matching import assign, check_solver, products
from jaxeff.federated.permutation import Axis, Fixed, Free, Permutations, Product, Sum, size_of
from jaxeff.federated.symmetry import check_paths

Tree = Any
MEASURES: tuple[str, ...] = ("products", "correlation")
VALUES: tuple[str, ...] = ("made", "read")


def activations(
    found: Permutations, apply: Callable[..., Any], params: Tree, *inputs: Any, values: str = "made"
) -> dict[str, list[jax.Array]]:
    """The activations of all units that may be permuted.

    Args:
      found: of `jaxeff.federated.derive`, of this function.
      apply: (params, *inputs) -> outputs.
      params: its parameters.
      inputs: the batch.
      values: "made" or "read", see above.

    Returns:
      float32 [rows, size] by name, of each value that has these units. A pure function; all values are in memory at
      once.

    Raises:
      ValueError: for unknown values; if `found` is of another function or other parameters.
    """
    if values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(map(repr, VALUES))}, got {values!r}")
    check_paths(found, params=params)
    program, tracer = trace(apply, params, *inputs), Follower()
    named = names_of(found, program, follow(tracer, program))
    wanted: dict[str, dict[Place, list[Node]]] = {name: {} for name in found.sizes}
    last: dict[str, dict[Place, list[Node]]] = {name: {} for name in found.sizes}
    for place, axes in tracer.made.items():
        for node in set().union(*map(atoms, axes)).intersection(named):
            last[named[node]] = {place: axes}
            if values == "made" and place in tracer.summed:
                wanted[named[node]][place] = axes
    for place, (axes, dims) in tracer.read.items() if values == "read" else ():
        for node in set().union(*(atoms(axes[i]) for i in dims)).intersection(named):
            wanted[named[node]][place] = axes
    places = {name: of_name or last[name] for name, of_name in wanted.items()}
    kept = evaluate(program, jax.tree.leaves((params, inputs)), {place for at in places.values() for place in at})
    return {
        name: [
            unit
            for place, axes in at.items()
            for unit in _units([axis_of(node, named) for node in axes], kept[place].astype(jnp.float32), name)
        ]
        for name, at in places.items()
    }


def activation_match(
    found: Permutations,
    apply: Callable[..., Any],
    reference: Tree,
    params: Tree,
    *inputs: Any,
    measure: str = "products",
    values: str = "made",
    solver: str = "scipy",
) -> dict[str, jax.Array]:
    """Permutations that bring the activations of a network closest to those of a reference.

    Args:
      found: of `jaxeff.federated.derive`, of this function.
      apply: (params, *inputs) -> outputs.
      reference: the parameters to come close to.
      params: of the same shapes.
      inputs: one batch for both.
      measure: "products", Z_a^T Z_b; "correlation", of which units that never change have none.
      values: "made" or "read", see above.
      solver: as of `jaxeff.federated.assign`.

    Returns:
      For `jaxeff.federated.permute(found, params, ...)`. A pure function, to be mapped over clients. Units whose
      activations are not finite are left as they are, with their layer.

    Raises:
      ValueError: for an unknown measure, values or solver; if `found` is of another function or other parameters.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(map(repr, MEASURES))}, got {measure!r}")
    check_solver(solver)
    check_paths(found, reference=reference, params=params)
    ours, theirs = (activations(found, apply, tree, *inputs, values=values) for tree in (reference, params))
    prepared = _standardised if measure == "correlation" else lambda units: units
    perms = {}
    for name, size in found.sizes.items():
        similarity = sum(
            (products(prepared(a).T, prepared(b).T) for a, b in zip(ours[name], theirs[name], strict=True)),
            jnp.zeros((size, size)),
        )
        better, stay = assign(similarity, solver), jnp.arange(size, dtype=jnp.int32)
        # Among equals nothing moves.
        gains = similarity[stay, better].sum() > jnp.trace(similarity)
        perms[name] = jnp.where(gains, better, stay)
    return perms


def _standardised(units: jax.Array) -> jax.Array:
    """Columns of mean 0 and length 1, or of zeros where nothing changes."""
    centred = units - units.mean(0)
    length = jnp.linalg.norm(centred, axis=0)
    changes = length > 1e-6 * jnp.linalg.norm(units, axis=0)
    # NaN is no zero: what is not finite must be seen.
    return jnp.where(changes | ~jnp.isfinite(length), centred / jnp.where(changes, length, 1), 0)


def _units(axes: list[Axis], value: jax.Array, name: str) -> list[jax.Array]:
    """The units of a name in a value, each part that has them as [rows, size]."""
    for number, axis in enumerate(axes):
        before, after = axes[:number], axes[number + 1 :]
        if isinstance(axis, Product):
            shape = (*value.shape[:number], *map(size_of, axis.parts), *value.shape[number + 1 :])
            return _units([*before, *axis.parts, *after], value.reshape(shape), name)
        if isinstance(axis, Sum):
            found, start = [], 0
            for part in axis.parts:
                piece = jax.lax.slice_in_dim(value, start, start + size_of(part), axis=number)
                found += _units([*before, part, *after], piece, name)
                start += size_of(part)
            return found
    numbers = [number for number, axis in enumerate(axes) if isinstance(axis, Free) and axis.name == name]
    if not numbers:
        return []
    moved = jnp.moveaxis(value, numbers[0], -1)
    others = [axis for number, axis in enumerate(axes) if number != numbers[0]]
    averaged = tuple(number for number, axis in enumerate(others) if not isinstance(axis, Fixed))
    return [moved.mean(averaged).reshape(-1, moved.shape[-1])]
