"""Algebra on pytrees whose leaves have names.

``leaves`` names, counts and compares; ``parts`` selects and labels by name; ``stacked`` holds many trees as one and
sums them. Everything that computes on leaves may be called under ``jit``, ``vmap``, ``grad`` and ``shard_map``.

What optax has is not repeated here. From ``optax.tree`` take ``add``, ``sub``, ``mul``, ``div``, ``scale``,
``add_scale``, ``vdot``, ``norm``, ``sum``, ``max``, ``min``, ``clip``, ``cast``, ``where``, ``zeros_like``,
``ones_like``, ``random_like`` and ``allclose``; from ``jax.tree`` take ``map``, ``leaves``, ``reduce`` and
``structure``.
"""

from jaxeff.trees.leaves import (
    all_finite,
    first_mismatch,
    flatten_names,
    is_inexact,
    nbytes,
    paths,
    size,
    unflatten_names,
)
from jaxeff.trees.parts import labels, map_named, merge, partition, select
from jaxeff.trees.stacked import stack, take, unstack, weighted_mean, weighted_sum

__all__ = [
    "all_finite",
    "first_mismatch",
    "flatten_names",
    "is_inexact",
    "labels",
    "map_named",
    "merge",
    "nbytes",
    "partition",
    "paths",
    "select",
    "size",
    "stack",
    "take",
    "unflatten_names",
    "unstack",
    "weighted_mean",
    "weighted_sum",
]
