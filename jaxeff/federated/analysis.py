"""Which classes a feature is for: class-preference vectors, how much they differ in a layer, where to divide a network.

What unit j of a layer does for class c is, to first order, what its removal would take from the logit of c,

    p_jc = mean over images of c of sum over positions of A_j * dZ_c / dA_j.

Units of shallow layers are for all classes alike, those of deep layers for some; Fed2 (KDD 2021) divides a network
where they begin to differ. The formulas are our reading of it.

Letters: B images, C classes, J units of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.federated import fed2
from jaxeff.ops.grouped import channel_major, group_major

Variables = Mapping[str, Any]
NORMS: tuple[str | None, ...] = ("l2", "l1", None)
NOTHING = -1
"""Stands for the class of a unit that is for none."""


def class_preference(
    module: nn.Module,
    variables: Variables,
    images: jax.Array,
    labels: jax.Array,
    num_classes: int,
    *,
    normalise: str | None = "l2",
) -> dict[str, jax.Array]:
    """Class-preference vectors of the units of every layer, from one backward pass for all classes and layers.

    Args:
      module: a classifier (images) -> logits [B, C], as it is evaluated: its images must not depend on each other. Of
        any Flax module the layers are its direct parts that have parameters, of `jaxeff.models.Network` with all that
        follows them; of a `GroupedNetwork` those of its groups follow those of the trunk, group after group.
      variables: of the module.
      images: [B, ...], as the module takes them.
      labels: integers [B].
      num_classes: C.
      normalise: length 1 of each vector: "l2", "l1", or None, for sums that add up to logits.

    Returns:
      {layer: float32 [J, C]} in the order of the layers; 0 for classes without an image.

    Raises:
      ValueError: for an unknown `normalise`, or images and labels that do not fit.
    """
    if normalise not in NORMS:
        raise ValueError(f"normalise must be one of {', '.join(map(repr, NORMS))}, got {normalise!r}")
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    if not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be one for each image, at least one, got {labels.shape} for {images.shape}")
    call = _tapped(module)
    names: list[str] = []  # in the order in which they run; pytrees sort theirs

    def shapes(variables, images):
        activations = call(variables, images)[1]
        names.extend(activations)
        return activations

    shaped = jax.eval_shape(shapes, variables, images)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shaped)

    def chosen(added):
        logits, activations = call(variables, images, added)
        # Images do not depend on each other, so the sum of their own logits has every gradient that is asked for.
        return jnp.take_along_axis(logits, labels[:, None], 1).sum(), activations

    slopes, activations = jax.grad(chosen, has_aux=True)(nothing)
    members = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    share = members / jnp.maximum(members.sum(0), 1)

    def one(activation, slope):
        effect = (activation * slope).astype(jnp.float32)
        effect = effect.reshape(len(images), -1, effect.shape[-1]).sum(1)
        return _of_length_one(jnp.matmul(effect.T, share, precision=jax.lax.Precision.HIGHEST), normalise)

    return {name: one(activations[name], slopes[name]) for name in names}


def total_variance(preferences: Mapping[str, jax.Array]) -> dict[str, float]:
    """Mean distance of the class-preference vectors of each layer from their mean: {layer: distance}."""
    return {
        name: float(jnp.linalg.norm(vectors - vectors.mean(0), axis=-1).mean()) for name, vectors in preferences.items()
    }


def choose_depth(variances: Mapping[str, float], share: float = 0.5) -> str:
    """The layer to divide a network at: the first from which on all vary by at least this share of the most.

    Args:
      variances: of `total_variance`, of the layers in order.
      share: in (0, 1]. The rule is ours.

    Returns:
      Its name, for `jaxeff.federated.fed2.adapt`; the last one where no other is.

    Raises:
      ValueError: without layers, or for a share out of range.
    """
    if not variances or not 0 < share <= 1:
        raise ValueError(f"there must be layers, and share in (0, 1], got {len(variances)} layers and {share}")
    names, limit = list(variances), share * max(variances.values())
    first = len(names) - 1
    while first and variances[names[first]] >= limit and variances[names[first - 1]] >= limit:
        first -= 1
    return names[first]


def _tapped(module: nn.Module) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """(variables, images, added to activations) -> (logits, activations), for what is called with images alone."""
    if isinstance(module, fed2.GroupedNetwork):
        return _grouped_tapped(module)

    def call(variables, images, added: Mapping[str, jax.Array] | None = None):
        parts = list(variables["params"])
        seen: dict[str, jax.Array] = {}

        def intercept(run, args, kwargs, context):
            result = run(*args, **kwargs)
            path = context.module.path
            if context.method_name != "__call__" or len(path) != 1 or path[0] not in parts or path[0] in seen:
                return result
            name = path[0]
            seen[name] = result if added is None else result + added[name]
            return seen[name]

        with nn.intercept_methods(intercept):
            logits = module.apply(variables, images)
        return logits, seen

    return call


def _grouped_tapped(module: fed2.GroupedNetwork):
    grouped = module.grouped
    trunk, group = map(_tapped, fed2.parts(module))

    def call(variables, images, added=None):
        of = lambda name: {collection: parts[name] for collection, parts in variables.items() if name in parts}
        mine = None if added is None else {n: a for n, a in added.items() if not n.startswith(_WITHIN)}
        shared, first = trunk(of(fed2.TRUNK), images, mine)
        split = grouped.entry == "split"
        entering = group_major(shared, grouped.groups) if split else shared
        theirs = None
        if added is not None:
            theirs = {
                name.removeprefix(_WITHIN): group_major(value, grouped.groups)
                for name, value in added.items()
                if name.startswith(_WITHIN)
            }
        axes = (0, 0 if split else None, None if theirs is None else 0)
        logits, second = jax.vmap(group, axes)(of(fed2.GROUPS), entering, theirs)
        by_class = logits[np.array(grouped.class_to_group), :, np.array(grouped.slots)].T
        return by_class, {**first, **{_WITHIN + name: channel_major(value) for name, value in second.items()}}

    return call


_WITHIN = f"{fed2.GROUPS}/"


def _of_length_one(vectors: jax.Array, normalise: str | None) -> jax.Array:
    if normalise is None:
        return vectors
    length = jnp.linalg.norm(vectors, ord={"l1": 1, "l2": 2}[normalise], axis=-1, keepdims=True)
    return vectors / jnp.where(length > 0, length, 1)


def primary_classes(preferences: jax.Array) -> jax.Array:
    """The class that each unit does most for, -1 for units that are for none, though against some: [J] from [J, C]."""
    return jnp.where(preferences.max(-1) > 0, preferences.argmax(-1), NOTHING).astype(jnp.int32)


def agreement(preferences: Sequence[jax.Array]) -> float:
    """Share of the units that are for the same class in two networks, a mean over all pairs of them.

    Units that are for no class in one of the two are not counted.

    Args:
      preferences: of one layer in each network, [J, C].

    Raises:
      ValueError: for fewer than two networks.
    """
    if len(preferences) < 2:
        raise ValueError(f"networks are compared in pairs, got {len(preferences)}")
    primary = np.stack([np.asarray(primary_classes(vectors)) for vectors in preferences])
    pairs = np.triu_indices(len(primary), 1)
    a, b = primary[pairs[0]], primary[pairs[1]]
    alive = (a != NOTHING) & (b != NOTHING)
    return float(((a == b) & alive).sum() / max(1, alive.sum()))
