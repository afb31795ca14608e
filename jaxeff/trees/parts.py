"""Parts of a pytree picked by the names of its leaves.

Patterns are shell globs over the whole name, in which ``*`` also matches slashes: ``"*/bias"`` is every bias, however
deep. One pattern so picks the same weights from parameters and gradients, and with a ``*`` in front from the moments of
an optimiser state.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxeff.trees.leaves import Tree, first_mismatch, paths, quoted

Pattern = str | Sequence[str] | Callable[[str, Any], bool]


def map_named(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Maps ``fn(name, *leaves)`` over trees of one structure.

    Args:
      fn: called once per leaf with its name and the leaf of every tree.
      tree: gives the names and the structure of the result.
      *rest: trees with the structure of ``tree``.

    Returns:
      The tree of results, structured as ``tree``.

    Raises:
      ValueError: a tree of ``rest`` has another structure; the message names the first difference.
    """
    leaves, treedef = _flatten(tree)
    columns = [leaves]
    for position, other in enumerate(rest, start=1):
        column, other_treedef = _flatten(other)
        if other_treedef != treedef:
            difference = first_mismatch(tree, other, ("the first tree", f"tree {position} of rest"))
            raise ValueError(f"map_named: the trees differ in structure: {difference}")
        columns.append(column)
    return treedef.unflatten(fn(*row) for row in zip(paths(tree), *columns, strict=True))


def select(tree: Tree, pattern: Pattern) -> Tree:
    """The part of a tree that a pattern names: ``partition(tree, pattern)[0]``.

    Args:
      tree: any pytree.
      pattern: a glob, several globs, or ``predicate(name, leaf) -> bool``.

    Returns:
      ``tree`` with ``None``, which holds no leaves, in place of everything else.

    Raises:
      ValueError: a glob matches no leaf.
    """
    return partition(tree, pattern)[0]


def partition(tree: Tree, pattern: Pattern) -> tuple[Tree, Tree]:
    """Splits a tree in two, so that one half can be trained, sent or decayed and the other kept.

    ``None`` stands where a leaf went to the other half. It holds no leaves, so ``jax.grad``, ``optax`` and
    ``jax.tree.map`` see each half as an ordinary, smaller tree.

    Args:
      tree: any pytree.
      pattern: a glob, several globs (any may match), or ``predicate(name, leaf) -> bool``, which is called while
        tracing and so may look at shapes and dtypes but not at values.

    Returns:
      ``(selected, rest)``; ``merge`` puts them together again.

    Raises:
      ValueError: a glob matches no leaf. A predicate may select nothing.
    """
    leaves, treedef = _flatten(tree)
    names = paths(tree)
    chosen = _predicate(pattern, names)
    flags = [bool(chosen(name, leaf)) for name, leaf in zip(names, leaves, strict=True)]
    selected = treedef.unflatten(leaf if flag else None for flag, leaf in zip(flags, leaves, strict=True))
    rest = treedef.unflatten(None if flag else leaf for flag, leaf in zip(flags, leaves, strict=True))
    return selected, rest


def merge(*parts: Tree) -> Tree:
    """Puts the parts of a ``partition`` together again.

    Args:
      *parts: trees of one structure in which ``None`` marks a leaf that another part holds. Parts may themselves have
        been partitioned further.

    Returns:
      The whole tree; ``None`` stays where no part holds a leaf.

    Raises:
      ValueError: two parts hold the same leaf, or the structures differ.
    """
    if not parts:
        raise ValueError("merge: give at least one part")
    columns, treedefs = zip(*(_flatten(part, is_leaf=_is_none) for part in parts), strict=True)
    for position, treedef in enumerate(treedefs[1:], start=1):
        if treedef != treedefs[0]:
            raise ValueError(
                f"merge: part {position} is structured unlike part 0, so they do not come from one partition: "
                f"leaves {quoted(paths(parts[position], _is_none))} and {quoted(paths(parts[0], _is_none))}"
            )
    whole = []
    for name, row in zip(paths(parts[0], _is_none), zip(*columns, strict=True), strict=True):
        held = [leaf for leaf in row if leaf is not None]
        if len(held) > 1:
            raise ValueError(f"merge: {len(held)} parts hold the leaf {name!r}; parts must not overlap")
        whole.append(held[0] if held else None)
    return treedefs[0].unflatten(whole)


def labels(tree: Tree, rules: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> Tree:
    """A label per leaf, from the first glob that matches its name; made for ``optax.multi_transform``.

    Args:
      tree: any pytree.
      rules: ``{glob: label}`` or ``[(glob, label), ...]``, tried in order. End with ``"*"`` for a default.

    Returns:
      A tree structured as ``tree`` whose leaves are labels.

    Raises:
      ValueError: leaves that no rule matches, listed by name.

    Example:
      >>> labels({"conv": {"bias": 0.0, "kernel": 0.0}}, {"*/bias": "no_decay", "*": "decay"})
      {'conv': {'bias': 'no_decay', 'kernel': 'decay'}}
    """
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    unmatched = []

    def label(name, _):
        for glob, value in pairs:
            if fnmatch.fnmatchcase(name, glob):
                return value
        unmatched.append(name)
        return None

    result = map_named(label, tree)
    if unmatched:
        raise ValueError(
            f"labels: no rule matches {quoted(unmatched)}; the rules are {[glob for glob, _ in pairs]}: "
            "add one, or end with ('*', default)"
        )
    return result


def _predicate(pattern: Pattern, names: Sequence[str]) -> Callable[[str, Any], bool]:
    if callable(pattern):
        return pattern
    globs = [pattern] if isinstance(pattern, str) else list(pattern)
    for glob in globs:
        # A misspelt glob would otherwise train, freeze or send nothing, without a word.
        if not any(fnmatch.fnmatchcase(name, glob) for name in names):
            raise ValueError(f"partition: the glob {glob!r} matches no leaf; the leaves are {quoted(names)}")
    return lambda name, _: any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _flatten(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list, Any]:
    return jax.tree.flatten(tree, is_leaf=is_leaf)


def _is_none(node) -> bool:
    return node is None
