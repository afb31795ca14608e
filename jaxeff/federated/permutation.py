"""Which axes of a network's parameters may be permuted together: found in its jaxpr, and checked before use.

The units of a hidden layer have no order: permute its outputs, what is added to and scales them, and what reads them,
and the network computes what it did. `derive` finds all such axes of any function of a parameter tree by following
every axis through the traced program. Axes that must move together are one; a reshape makes an axis the product of
others, a concatenation their sum. Axes that have an order, of inputs, outputs, space, or of anything that is not
understood, are left alone, with the reason: a wrong permutation is never made of ignorance, and `verify` makes sure.

Under grouped convolutions and group norms, the axis of channels is a product, of groups and of channels within them:
whole groups may change places, and channels within all groups alike.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import compat, trees
from jaxeff.federated.axes import Node, Tracer, find, fixed, pin
from jaxeff.ops import conv_impl

Tree = Any
Perms = Mapping[str, Any]


# --- what is found ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A part of an axis that keeps its order, and why."""

    size: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Free:
    """A part of an axis that may be permuted; all parts of one name together."""

    size: int
    name: str


@dataclasses.dataclass(frozen=True)
class Product:
    """An axis that counts through several, the last one fastest."""

    parts: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Sum:
    """An axis that has several, one after the other."""

    parts: tuple[Any, ...]


Axis = Fixed | Free | Product | Sum


@dataclasses.dataclass(frozen=True)
class Permutations:
    """What `derive` found.

    Attributes:
      sizes: of everything that may be permuted, by name: path and axis of the first parameter that has it.
      axes: of every parameter, by path.
    """

    sizes: dict[str, int]
    axes: dict[str, tuple[Axis, ...]]

    @property
    def fixed(self) -> dict[str, str]:
        """The axes that are left alone, or parts of them, as "path[axis]", and why; not those of size 1."""
        return {
            f"{path}[{number}]": "; ".join(dict.fromkeys(part.reason for part in parts))
            for path, axes in self.axes.items()
            for number, axis in enumerate(axes)
            if (parts := [part for part in _leaves(axis) if isinstance(part, Fixed) and part.size > 1])
        }

    def readers(self, name: str) -> tuple[tuple[str, int], ...]:
        """Where something that may be permuted occurs: (path, axis)."""
        return tuple(
            (path, number)
            for path, axes in self.axes.items()
            for number, axis in enumerate(axes)
            if any(isinstance(part, Free) and part.name == name for part in _leaves(axis))
        )


def permute(found: Permutations, params: Tree, perms: Perms) -> Tree:
    """The parameters with everything named permuted, wherever it occurs.

    Args:
      found: of `derive`.
      params: the parameters, or a tree of the same shapes such as gradients.
      perms: integers [size] by name: the old place of what comes to each new place; concrete or traced. What is not
        named stays.

    Returns:
      The tree. A pure function, to be mapped over clients.

    Raises:
      ValueError: for an unknown name, or a permutation of another length.
    """
    for name, perm in perms.items():
        if name not in found.sizes:
            raise ValueError(f"perms: {name!r} is none of {', '.join(found.sizes)}")
        if np.shape(perm) != (found.sizes[name],):
            raise ValueError(f"perms[{name!r}] must be of shape ({found.sizes[name]},), got {np.shape(perm)}")

    def one(path, leaf):
        for number, axis in enumerate(found.axes[path]):
            if any(isinstance(part, Free) and part.name in perms for part in _leaves(axis)):
                leaf = jnp.take(leaf, _places(axis, perms), axis=number, mode="clip")
        return leaf

    moved = {path: one(path, leaf) for path, leaf in trees.flatten_names(params).items()}
    return trees.unflatten_names(moved, params)


def random_perms(found: Permutations, key: jax.Array) -> dict[str, jax.Array]:
    """A random permutation of everything that may be permuted."""
    keys = jax.random.split(key, max(1, len(found.sizes)))
    return {name: jax.random.permutation(k, size) for (name, size), k in zip(found.sizes.items(), keys, strict=False)}


def verify(
    found: Permutations,
    apply: Callable[..., Any],
    params: Tree,
    *inputs: Any,
    key: jax.Array,
    tolerance: float = 1e-4,
) -> None:
    """Permutes at random and compares the outputs.

    Args:
      found: of `derive`.
      apply, params, inputs: as for `derive`.
      key: of the permutations.
      tolerance: of the outputs, relative to the largest; sums in another order differ by rounding.

    Raises:
      ValueError: if they differ; nothing may be permuted then.
    """
    run = jax.jit(apply)
    expected = jax.tree.leaves(run(params, *inputs))
    moved = jax.tree.leaves(run(permute(found, params, random_perms(found, key)), *inputs))
    for before, after in zip(expected, moved, strict=True):
        scale = max(1e-12, float(jnp.abs(before).max())) if before.size else 1.0
        gap = float(jnp.abs(before - after).max()) / scale if before.size else 0.0
        if not gap <= tolerance:
            raise ValueError(
                f"permuted parameters give another output, by {gap:.2g} of the largest: they are no symmetry"
            )


def derive(apply: Callable[..., Any], params: Tree, *inputs: Any) -> Permutations:
    """Finds what may be permuted in the parameters of a function.

    Args:
      apply: (params, *inputs) -> outputs, any function that JAX traces; a network as it is evaluated.
      params: tree of arrays, or of `jax.ShapeDtypeStruct`.
      inputs: as it is called with.

    Returns:
      The permutations; call `verify` before you use them.
    """
    flat = trees.flatten_names(params)
    structure: Any = jax.tree.structure(params)
    with conv_impl("lax"):
        program = jax.make_jaxpr(lambda leaves, *rest: apply(structure.unflatten(leaves), *rest))(
            list(flat.values()), *inputs
        )
    own = [[Node(size) for size in leaf.shape] for leaf in flat.values()]
    rest = [[fixed(size, "of the input") for size in var.aval.shape] for var in program.jaxpr.invars[len(own) :]]
    for nodes in Tracer().run(program.jaxpr, compat.jaxpr_constants(program), [*own, *rest]):
        for node in nodes:
            pin(node, "of the output")
    names: dict[Node, Free] = {}
    axes = {
        path: tuple(_read(node, f"{path}[{i}]", names) for i, node in enumerate(nodes))
        for path, nodes in zip(flat, own, strict=True)
    }
    return Permutations({free.name: free.size for free in names.values()}, axes)


# --- from nodes to what is found --------------------------------------------------------------------------------------


def _read(node: Node, place: str, names: dict[Node, Free]) -> Axis:
    node = find(node)
    if node.kind == "atom":
        if node.reason or node.size == 1:
            return Fixed(node.size, node.reason or "of one")
        if node not in names:
            taken = {free.name for free in names.values()}
            name = place if place not in taken else f"{place}.{sum(other.startswith(place) for other in taken)}"
            names[node] = Free(node.size, name)
        return names[node]
    parts = tuple(_read(part, place, names) for part in node.parts)
    return Product(parts) if node.kind == "product" else Sum(parts)


def _leaves(axis: Axis) -> list[Fixed | Free]:
    return [leaf for part in axis.parts for leaf in _leaves(part)] if isinstance(axis, Product | Sum) else [axis]


def size_of(axis: Axis) -> int:
    """Length of an axis."""
    if isinstance(axis, Product):
        return int(np.prod([size_of(part) for part in axis.parts]))
    return sum(map(size_of, axis.parts)) if isinstance(axis, Sum) else axis.size


def _places(axis: Axis, perms: Perms) -> jax.Array:
    """The old place of what comes to each new one."""
    if isinstance(axis, Product):
        places = jnp.zeros(1, jnp.int32)
        for part in axis.parts:
            places = (places[:, None] * size_of(part) + _places(part, perms)).reshape(-1)
        return places
    if isinstance(axis, Sum):
        starts = np.cumsum([0, *map(size_of, axis.parts)])
        return jnp.concatenate([int(s) + _places(part, perms) for s, part in zip(starts, axis.parts, strict=False)])
    if isinstance(axis, Free) and axis.name in perms:
        return jnp.asarray(perms[axis.name], jnp.int32)
    return jnp.arange(axis.size, dtype=jnp.int32)
