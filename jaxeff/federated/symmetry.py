"""Symmetries of networks in groups: every group permutes its own units, and keeps its place.

What `jaxeff.federated.derive` finds of a whole network in groups moves alike in all of them. But a group of Fed2 reads
its own channels alone, so that each has a permutation of its own, (S_m)^G in all, while the groups, which belong to
classes, never change places. It is found on the tied network, all of whose groups have the same parameters: what may
be permuted there may be permuted in each group apart, and the last channels of a shared trunk that is split among
groups with it.

Letters: G groups, m units of a group, n units of a layer.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import trees
from jaxeff.federated.fed2 import GROUPS, TRUNK, GroupedNetwork, group_axes, parts
from jaxeff.federated.paired import SHARED, spread_axes
from jaxeff.federated.permutation import (
    Axis,
    Fixed,
    Free,
    Perms,
    Permutations,
    Product,
    Sum,
    derive,
    permute,
    random_perms,
    size_of,
    verify,
)
from jaxeff.ops.grouped import group_major

Tree = Any
Readers = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class WithinGroups:
    """What may be permuted in a network in groups; see `within_groups`.

    Attributes:
      tied: of the network all of whose groups have the same parameters.
      groups: G.
      stacked: paths of the parameters whose first axis is that of the groups.
      own: names of what each group permutes for itself.
    """

    tied: Permutations
    groups: int
    stacked: frozenset[str]
    own: frozenset[str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the permutations by name: (G, m) for what each group permutes for itself, (n,) for what all share."""
        lead = lambda name: (self.groups,) if name in self.own else ()
        return {name: (*lead(name), size) for name, size in self.tied.sizes.items()}

    def permute(self, params: Tree, perms: Perms) -> Tree:
        """The parameters with everything named permuted.

        Args:
          params: of the network, or a tree of the same shapes.
          perms: integers by name, of `shapes`; what is not named stays.

        Raises:
          ValueError: for an unknown name, or a permutation of another shape.
        """
        for name, perm in perms.items():
            if name not in self.shapes:
                raise ValueError(f"perms: {name!r} is none of {', '.join(self.shapes)}")
            if np.shape(perm) != self.shapes[name]:
                raise ValueError(f"perms[{name!r}] must be of shape {self.shapes[name]}, got {np.shape(perm)}")
        own = {name: jnp.asarray(perm) for name, perm in perms.items() if name in self.own}
        common = {name: perm for name, perm in perms.items() if name not in self.own}
        of_group = lambda tree, own: permute(self.tied, tree, {**common, **own})
        flat = trees.flatten_names(params)
        stacked = {path: leaf for path, leaf in flat.items() if path in self.stacked}
        moved = jax.vmap(of_group)(stacked, own) if stacked else {}
        for path, leaf in flat.items():
            if path in stacked:
                continue
            axes = self.tied.axes[path]
            ordinary = Permutations(self.tied.sizes, {"": tuple(_still(axis, own) for axis in axes)})
            leaf = permute(ordinary, leaf, common)
            for number, axis in enumerate(axes):
                if names(axis) & set(own):
                    leaf = jnp.take(leaf, self._places(axis, common, own), number, mode="clip")
            moved[path] = leaf
        return trees.unflatten_names(moved, params)

    def random(self, key: jax.Array) -> dict[str, jax.Array]:
        """Random permutations of everything, in each group others."""
        return self._assembled(random_perms(self._pieces(), key))

    def verify(
        self, apply: Callable[..., Any], params: Tree, *inputs: Any, key: jax.Array, tolerance: float = 1e-4
    ) -> None:
        """Permutes every group at random and compares the outputs.

        Args:
          apply: (params, *inputs) -> outputs, the network in groups.
          params, inputs: as it is called with.
          key: of the permutations.
          tolerance: of the outputs, relative to the largest.

        Raises:
          ValueError: if they differ; nothing may be permuted then.
        """
        pieces = self._pieces()
        places = {name: jnp.arange(size) for name, size in pieces.sizes.items()}
        moved = lambda places, *inputs: apply(self.permute(params, self._assembled(places)), *inputs)
        verify(pieces, moved, places, *inputs, key=key, tolerance=tolerance)

    def views(
        self, leaves: Mapping[str, jax.Array], name: str, places: Readers, averaged: Collection[str] = ()
    ) -> list[jax.Array]:
        """What something permutable indexes, as float32 [*shape, rest]; as the function `views`."""
        rows = partial(rows_of, name=name, averaged=averaged)
        found = []
        for path, number in places:
            leaf, axis = jnp.asarray(leaves[path]), self.tied.axes[path][number]
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                continue
            leaf = leaf.astype(jnp.float32)
            if path in self.stacked:
                parts = jax.vmap(partial(rows, axis, number=number))(leaf)
                if name not in self.own:
                    parts = [jnp.moveaxis(part, 0, 1).reshape(part.shape[1], -1) for part in parts]
            elif name in self.own:
                within = _within(axis, self.groups)
                assert within is not None
                apart = jnp.moveaxis(leaf, number, 0).reshape(self.groups, size_of(within), -1)
                parts = jax.vmap(partial(rows, within, number=0))(apart)
            else:
                parts = rows(axis, leaf, number)
            found += parts
        return found

    def _places(self, axis: Axis, common: Perms, own: Mapping[str, jax.Array]) -> jax.Array:
        """The old place of what comes to each new one of an axis that counts through the groups."""
        within = _within(axis, self.groups)
        assert within is not None
        count, alone = size_of(within), Permutations(self.tied.sizes, {"": (within,)})
        named = {name: perm for name, perm in own.items() if name in names(within)}
        places = jax.vmap(lambda perms: permute(alone, jnp.arange(count), {**common, **perms}))(named)
        # Once, and not again for every number that is moved, as XLA would when it fuses.
        return jax.lax.optimization_barrier((places + count * jnp.arange(self.groups)[:, None]).reshape(-1))

    def _pieces(self) -> Permutations:
        """Each permutation by itself, as what orders a vector."""
        sizes = {
            f"{name} of {number}": shape[-1]
            for name, shape in self.shapes.items()
            for number in range(self.groups if name in self.own else 1)
        }
        return Permutations(sizes, {name: (Free(size, name),) for name, size in sizes.items()})

    def _assembled(self, pieces: Perms) -> dict[str, jax.Array]:
        return {
            name: jnp.stack([pieces[f"{name} of {number}"] for number in range(self.groups)])
            if name in self.own
            else pieces[f"{name} of 0"]
            for name in self.shapes
        }


Symmetry = Permutations | WithinGroups


def within_groups(network: GroupedNetwork, variables: Mapping[str, Any], x: Any) -> WithinGroups:
    """Finds what may be permuted in a network in groups: within each group, and in what all share.

    Args:
      network: of `jaxeff.federated.fed2`.
      variables: its variables, or their `jax.ShapeDtypeStruct`s.
      x: [B, *input_shape], what it is called with.

    Returns:
      The symmetries; call their `verify` before you use them. Where the trunk is split, its last channels belong to
      the groups, and are permuted with them; where every group reads all of it, its channels are those of all.
    """
    grouped = network.grouped
    trunk, group = parts(network)

    def tied(variables, x):
        part = lambda name: {collection: tree[name] for collection, tree in variables.items() if name in tree}
        entering: Any = trunk.apply(part(TRUNK), x)
        if grouped.entry == "split":
            # Groups as further examples: a batch keeps its order, and so do they.
            apart = group_major(entering, grouped.groups)
            entering = apart.reshape(-1, *apart.shape[2:])
        return group.apply(part(GROUPS), entering)

    axes = spread_axes(group_axes(variables), variables)
    one = lambda axis, leaf: leaf if axis == SHARED else jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    found = derive(tied, jax.tree.map(one, axes, variables), x)
    stacked = frozenset(path for path, axis in trees.flatten_names(axes).items() if axis != SHARED)
    within, bare = set(), set()
    for path, of_leaf in found.axes.items():
        for axis in of_leaf:
            if path in stacked:
                within |= names(axis)
            elif (rest := _within(axis, grouped.groups)) is None:
                bare |= names(axis)
            else:
                # What counts through groups may occur without them elsewhere: then it is common to all.
                bare |= names(axis) - names(rest)
    return WithinGroups(found, grouped.groups, stacked, frozenset(within - bare))


def shapes(found: Symmetry) -> dict[str, tuple[int, ...]]:
    """Shapes of the permutations by name."""
    return found.shapes if isinstance(found, WithinGroups) else {name: (size,) for name, size in found.sizes.items()}


def permuted(found: Symmetry, params: Tree, perms: Perms) -> Tree:
    """`permute` of a network, in groups or not."""
    return found.permute(params, perms) if isinstance(found, WithinGroups) else permute(found, params, perms)


def readers(found: Symmetry, name: str, known: Collection[str] | None = None, *, beside: bool = True) -> Readers:
    """Where something permutable occurs together with nothing but what is known.

    Args:
      found: the symmetries.
      name: what is looked for.
      known: names of what else may be permuted in these places; None for anything.
      beside: whether that is asked of the axis on which the name occurs too, where it is one of several parts of a
        product, and not of the others alone.

    Returns:
      (path, axis) of parameters.
    """
    tied = found.tied if isinstance(found, WithinGroups) else found
    places = tied.readers(name)
    if known is None:
        return places
    there = lambda axis, own: names(axis) if not own else _beside(axis, name) if beside else set()
    return tuple(
        (path, number)
        for path, number in places
        if all(there(axis, i == number) <= set(known) for i, axis in enumerate(tied.axes[path]))
    )


def views(
    found: Symmetry, leaves: Mapping[str, jax.Array], name: str, places: Readers, averaged: Collection[str] = ()
) -> list[jax.Array]:
    """What something permutable indexes.

    Args:
      found: the symmetries.
      leaves: parameters by path.
      name: of what is permutable.
      places: of `readers`.
      averaged: names of what is averaged over where it occurs on the same axis, as its order is not known.

    Returns:
      float32 [*shape, rest], of floats alone.
    """
    if isinstance(found, WithinGroups):
        return found.views(leaves, name, places, averaged)
    parts = []
    for path, number in places:
        leaf = jnp.asarray(leaves[path])
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            parts += rows_of(found.axes[path][number], leaf.astype(jnp.float32), number, name, averaged)
    return parts


def check_paths(found: Symmetry, **named: Tree) -> None:
    """Refuses trees that have other parameters than those of which something was found.

    Raises:
      ValueError: naming the tree and the paths.
    """
    axes = found.tied.axes if isinstance(found, WithinGroups) else found.axes
    for what, tree in named.items():
        if set(trees.paths(tree)) != set(axes):
            raise ValueError(f"{what}: paths are not those of `found`: {sorted(set(trees.paths(tree)) ^ set(axes))}")


def chosen(found: Symmetry, wanted: Collection[str] | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the permutations with these names, or of all.

    Raises:
      ValueError: for an unknown name.
    """
    known = shapes(found)
    if unknown := sorted(set(wanted or ()) - set(known)):
        raise ValueError(f"names: {', '.join(unknown)}: none of {', '.join(known)}")
    return {name: shape for name, shape in known.items() if wanted is None or name in wanted}


def rows_of(axis: Axis, leaf: jax.Array, number: int, name: str, averaged: Collection[str] = ()) -> list[jax.Array]:
    """The parts of an axis of a leaf that a name counts, each as [size, rest]; see `views`."""
    moved = jnp.moveaxis(leaf, number, 0)
    return _along(axis, moved.reshape(moved.shape[0], -1), name, averaged)


def _along(axis: Axis, rows: jax.Array, name: str, averaged: Collection[str]) -> list[jax.Array]:
    if isinstance(axis, Free):
        return [rows] if axis.name == name else []
    found, start = [], 0
    if isinstance(axis, Sum):
        for part in axis.parts:
            found += _along(part, rows[start : start + size_of(part)], name, averaged)
            start += size_of(part)
    elif isinstance(axis, Product):
        apart = rows.reshape(*map(size_of, axis.parts), rows.shape[-1])
        for number, part in enumerate(axis.parts):
            others = [i for i, other in enumerate(axis.parts) if i != number and names(other) & set(averaged)]
            moved = jnp.moveaxis(apart.mean(others, keepdims=True), number, 0)
            found += _along(part, moved.reshape(moved.shape[0], -1), name, averaged)
    return found


def _within(axis: Axis, groups: int) -> Axis | None:
    """What is left of an axis that counts through the groups first; None for another one."""
    parts = axis.parts if isinstance(axis, Product) else (axis,)
    count, number = 1, 0
    while count < groups and number < len(parts) and isinstance(parts[number], Fixed):
        count, number = count * size_of(parts[number]), number + 1
    return Product(parts[number:]) if count == groups and parts[number:] else None


def names(axis: Axis) -> set[str]:
    """The names of everything that may be permuted along an axis."""
    if isinstance(axis, Free):
        return {axis.name}
    return set().union(*map(names, axis.parts)) if isinstance(axis, Product | Sum) else set()


def _beside(axis: Axis, name: str) -> set[str]:
    """What else may be permuted where a name counts through an axis."""
    if isinstance(axis, Sum):
        return set().union(*(_beside(part, name) for part in axis.parts if name in names(part)))
    if isinstance(axis, Product):
        return set().union(*(_beside(part, name) if name in names(part) else names(part) for part in axis.parts))
    return set()


def _still(axis: Axis, own: Collection[str]) -> Axis:
    """An axis that keeps its order where groups permute it."""
    return Fixed(size_of(axis), "of groups") if names(axis) & set(own) else axis
