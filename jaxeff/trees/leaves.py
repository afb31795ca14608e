"""Leaves of a pytree: their names, their size, and how two trees differ.

A leaf's name is the path to it, joined by slashes: ``"conv1/kernel"`` in a dictionary of parameters,
``"0/mu/conv1/kernel"`` in an optimiser state. Dictionaries, tuples, NamedTuples, dataclasses and any other registered
pytree are named alike.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any

_SHOWN = 8  # names quoted in one error message


def paths(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> tuple[str, ...]:
    """Names of the leaves, in the order of ``jax.tree.leaves``.

    Args:
      tree: any pytree; leaves may be arrays, abstract arrays or anything else.
      is_leaf: as for ``jax.tree.leaves``.

    Returns:
      One name per leaf: keys, field names and positions joined by ``/``. A tree that is a single leaf is named
      ``""``.

    Example:
      >>> paths({"conv1": {"kernel": 1.0, "bias": 2.0}, "head": (3.0,)})
      ('conv1/bias', 'conv1/kernel', 'head/0')
    """
    return tuple(_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf))


def flatten_names(tree: Tree) -> dict[str, Any]:
    """Dictionary from leaf name to leaf, in the order of ``paths``.

    Args:
      tree: any pytree.

    Returns:
      ``{name: leaf}``.

    Raises:
      ValueError: two leaves share a name, as in ``{"a/b": x, "a": {"b": y}}``.
    """
    names = paths(tree)
    _check_distinct(names)
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def unflatten_names(flat: Mapping[str, Any], like: Tree | None = None) -> Tree:
    """Inverse of ``flatten_names``.

    Args:
      flat: ``{name: leaf}``, in any order.
      like: a tree with the wanted structure; its leaves are not read. Without it the result is nested dictionaries,
        which is the original only when that was made of string-keyed dictionaries.

    Returns:
      The tree.

    Raises:
      ValueError: with ``like``: names are missing or left over (both are listed); without it: a name is a leaf and
        also the beginning of another one.
    """
    if like is not None:
        names = paths(like)
        _check_distinct(names)
        missing, extra = [n for n in names if n not in flat], sorted(set(flat) - set(names))
        if missing or extra:
            raise ValueError(
                f"unflatten_names: names do not fit `like`: missing {quoted(missing)}; unexpected {quoted(extra)}"
            )
        return _structure(like).unflatten(flat[name] for name in names)
    if set(flat) == {""}:
        return flat[""]
    tree: dict[str, Any] = {}
    branches = {name[:i] for name in flat for i, letter in enumerate(name) if letter == "/"}
    for name, leaf in flat.items():
        if name in branches:
            raise ValueError(f"unflatten_names: {name!r} is a leaf and also holds other leaves; give `like`")
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def size(tree: Tree) -> int:
    """Number of elements of all leaves; the leaves may be abstract (``optax.tree.size`` wants real arrays)."""
    return sum(math.prod(shaped(leaf).shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Number of bytes of all leaves; the leaves may be abstract. Types below a byte count as one byte."""
    leaves = [shaped(leaf) for leaf in jax.tree.leaves(tree)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf, or its shape, is of floating-point or complex numbers."""
    return jnp.issubdtype(shaped(leaf).dtype, jnp.inexact)


def all_finite(tree: Tree, limit: float | None = None) -> jax.Array:
    """Whether no leaf holds NaN or an infinity, nor anything larger than a limit.

    Args:
      tree: leaves of any dtype; integers, booleans and random keys are always finite.
      limit: of the size of every number; None for any that is finite.

    Returns:
      Boolean scalar array; true for a tree without leaves.
    """
    fits = jnp.isfinite if limit is None else lambda leaf: jnp.abs(leaf) <= limit
    inexact = filter(is_inexact, jax.tree.leaves(tree))
    return jnp.all(jnp.array([jnp.all(fits(leaf)) for leaf in inexact], dtype=bool))


def first_mismatch(a: Tree, b: Tree, names: tuple[str, str] = ("the first", "the second")) -> str | None:
    """Says in one sentence how two trees differ in structure, shapes or dtypes; values are not compared.

    Args:
      a: a tree of arrays or abstract arrays.
      b: another.
      names: what the sentence calls them, for instance ``("the checkpoint", "the model")``.

    Returns:
      ``None`` when they are alike, otherwise the first difference, for instance
      ``"'conv1/kernel' has shape (3, 3) in the checkpoint and (5, 5) in the model"``.
    """
    if not _same_structure(a, b):
        return _structure_mismatch(a, b, names)
    for name, left, right in zip(paths(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        left, right = shaped(left), shaped(right)
        for quality in ("shape", "dtype"):
            one, other = getattr(left, quality), getattr(right, quality)
            if one != other:
                return f"{name!r} has {quality} {one} in {names[0]} and {other} in {names[1]}"
    return None


def shaped(leaf: Any) -> Any:
    """The leaf, or an abstract scalar in place of a Python number; both have shape and dtype."""
    if not _is_array(leaf):
        raise TypeError(f"leaves must be arrays or numbers, got {leaf!r} of type {type(leaf).__name__}")
    return leaf if hasattr(leaf, "dtype") else jax.ShapeDtypeStruct((), jnp.result_type(leaf))


def quoted(names: Sequence[str]) -> str:
    """Names for an error message, the first few of many."""
    shown = ", ".join(repr(name) for name in names[:_SHOWN]) or "nothing"
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_array(leaf) -> bool:
    return (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or isinstance(leaf, (bool, int, float, complex))


def _structure(tree: Tree) -> Any:
    return jax.tree.structure(tree)


def _same_structure(a: Tree, b: Tree) -> bool:
    return bool(_structure(a) == _structure(b))


def _structure_mismatch(a: Tree, b: Tree, names: tuple[str, str]) -> str:
    in_a, in_b = paths(a), paths(b)
    only = [(names[0], [n for n in in_a if n not in set(in_b)]), (names[1], [n for n in in_b if n not in set(in_a)])]
    found = [f"{quoted(missing)} only in {owner}" for owner, missing in only if missing]
    return "; ".join(found) if found else _container_mismatch(a, b, names, ())


def _container_mismatch(a: Tree, b: Tree, names: tuple[str, str], at) -> str:
    # Same leaf names, other containers: a list for a tuple, or a dataclass whose static fields differ.
    (children_a, def_a), (children_b, def_b) = _one_level(a), _one_level(b)
    where = f"the container {_name(at)!r}" if at else "the outermost container"
    if type(a) is not type(b):
        return f"{where} is a {type(a).__name__} in {names[0]} and a {type(b).__name__} in {names[1]}"
    if def_a != def_b:
        shown = f"{_shortened(str(def_a))} in {names[0]}, {_shortened(str(def_b))} in {names[1]}"
        return f"{where} has other keys or static fields: {shown}"
    for (path, child_a), (_, child_b) in zip(children_a, children_b, strict=True):
        if not _same_structure(child_a, child_b):
            return _container_mismatch(child_a, child_b, names, (*at, *path))
    return "their structures differ"


def _one_level(tree: Tree) -> tuple[list, Any]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)


def _check_distinct(names: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"several leaves share the names {quoted(repeated)}; keys must not contain '/'")


def _shortened(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 4] + " ..."
