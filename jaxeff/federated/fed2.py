"""Fed2 and Psi-Net: networks whose features have owners before training, so that averaging is aligned by construction.

A network is cut in two. What comes first is shared. The rest becomes G narrow networks side by side, of 1 / G of the
width each: group g reads its own channels only, and answers with the logits of its own classes only, so that gradients
of a class reach its group and the shared part and nothing else (Fed2, KDD 2021). All groups are one network under
`vmap`, with the group as the first axis of every parameter: who owns, sends or averages a group indexes that axis.

Psi-Net (arXiv 2008.06767) is the same with a group for each class and all but the first layer in groups; its own
defaults could not be read, these are ours.

Letters: N clients, C classes, G groups, B batch.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import models, spec
from jaxeff.federated.aggregates import Aggregate, paired
from jaxeff.federated.paired import group_weights
from jaxeff.ops.grouped import group_major
from jaxeff.ops.norms import GROUPS as NORM_GROUPS

Entry = Literal["split", "all"]
ENTRIES: tuple[str, ...] = ("split", "all")
TRUNK, GROUPS = "trunk", "groups"
MODES: tuple[str, ...] = ("full", "subset")


@dataclasses.dataclass(frozen=True)
class Grouped:
    """A network in groups, as data.

    Attributes:
      trunk: what all classes share.
      group: the network of one group; its output has the logits of its classes, and unused ones where others have more.
      class_to_group: the group of each class.
      entry: "split", a group reads its channels of the trunk; "all", it reads all of them.
      rounded: widths that G does not divide, as (wanted, got), by layer.
    """

    trunk: spec.Architecture
    group: spec.Architecture
    class_to_group: tuple[int, ...]
    entry: Entry
    rounded: Mapping[str, tuple[int, int]]

    @property
    def groups(self) -> int:
        """G."""
        return max(self.class_to_group) + 1

    @property
    def slots(self) -> tuple[int, ...]:
        """The place of each class among the logits of its group."""
        return tuple(self.class_to_group[:c].count(g) for c, g in enumerate(self.class_to_group))


def classes_in_turn(num_classes: int, groups: int) -> tuple[int, ...]:
    """Classes dealt to groups in order: of ten classes and five groups the first two to the first.

    Raises:
      ValueError: for no groups, or more than classes.
    """
    if not 1 <= groups <= num_classes:
        raise ValueError(f"groups must be in 1..{num_classes}, as each owns a class, got {groups}")
    return tuple(c * groups // num_classes for c in range(num_classes))


def adapt(
    architecture: spec.Architecture,
    first: str,
    *,
    groups: int | None = None,
    class_to_group: Sequence[int] | None = None,
    entry: Entry = "split",
    norm: str | None = "group",
) -> Grouped:
    """Divides a network into a shared trunk and groups.

    Args:
      architecture: a classifier; its last layer gives the logits.
      first: the top-level layer or residual block with which the groups begin, as of `jaxeff.spec.cut`.
      groups: G; None for as many as `class_to_group` has, or one for each class up to ten.
      class_to_group: the group of each class; None for `classes_in_turn`.
      entry: "split" or "all", see `Grouped`.
      norm: takes the place of batch norm, whose statistics differ from client to client; "batch" leaves it. A norm
        never crosses groups.

    Returns:
      The network as data. Widths that G does not divide are rounded up, and said so in `rounded`.

    Raises:
      ValueError: for an unknown layer, entry or map, a network that has no last dense layer, or an entry that does not
        fit a residual block.
    """
    if entry not in ENTRIES:
        raise ValueError(f"entry must be one of {', '.join(map(repr, ENTRIES))}, got {entry!r}")
    head = architecture.layers[-1]
    if not isinstance(head, spec.Dense):
        raise ValueError(f"the last layer of {architecture.name!r} must be the dense one of the logits, got {head}")
    owner = _owners(head.features, groups, class_to_group)
    count = max(owner) + 1
    architecture = _with_norm(architecture, norm)
    trunk, rest = spec.cut(architecture, first)
    opening = next((x for x in rest.layers if isinstance(x, spec.Conv | spec.Dense | spec.Residual)), head)
    if entry == "all" and isinstance(opening, spec.Residual) and not isinstance(opening.shortcut, spec.Conv):
        raise ValueError(
            f"entry='all': the shortcut of {opening.name!r} hands on all channels of the trunk, and a group has fewer; "
            "take 'split', or a projection for a shortcut"
        )
    rounded: dict[str, tuple[int, int]] = {}
    if entry == "split":
        trunk = _dividing(trunk, count, rounded)
    of_trunk = spec.shapes(trunk)[trunk.layers[-1].name].output
    most = max(owner.count(g) for g in range(count))
    widths = {}
    for path, layer in spec.walk(rest):
        if isinstance(layer, spec.Conv | spec.Dense):
            part = -(-layer.features // count)
            widths[path] = most if layer is rest.layers[-1] else part
            if layer is not rest.layers[-1] and part * count != layer.features:
                rounded[path] = (layer.features, part * count)
    shape = (*of_trunk[:-1], of_trunk[-1] // count) if entry == "split" else of_trunk
    follows = {path for path, layer in spec.walk(rest) if getattr(layer, "groups", 1) == spec.DEPTHWISE}
    widths = {path: width for path, width in widths.items() if path not in follows}
    return Grouped(trunk, spec.shrink(rest, widths, input_shape=shape), owner, entry, rounded)


def psi_net(architecture: spec.Architecture, *, norm: str | None = "group") -> Grouped:
    """Psi-Net: a group for each class, and all layers but the first in groups.

    Raises:
      ValueError: as `adapt`; if the network has one layer with weights only.
    """
    weighted = [x for x in architecture.layers if isinstance(x, spec.Conv | spec.Dense | spec.Residual)]
    if len(weighted) < 2:
        raise ValueError(f"{architecture.name!r} has one layer with weights only, nothing of it can be shared")
    # `adapt` refuses a network whose last layer has no features to be classes.
    return adapt(architecture, weighted[1].name, groups=getattr(weighted[-1], "features", None), norm=norm)


class GroupedNetwork(nn.Module):
    """Runs a network in groups. Parameters are {"trunk": ..., "groups": ...}; the latter have leaves [G, ...].

    Attributes:
      grouped: of `adapt`.
      conv, dense, gate, dtype, param_dtype: as of `jaxeff.models.Network`.
    """

    grouped: Grouped
    conv: Callable[..., nn.Module] = models.first_order_conv
    dense: Callable[..., nn.Module] = models.first_order_dense
    gate: Callable[[spec.Conv], Any] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps x [B, *input_shape] to logits [B, C] in the order of the classes."""
        grouped = self.grouped
        trunk, group = parts(self)
        shared = trunk(x, train)
        if grouped.entry == "split":
            entering, axis = group_major(shared, grouped.groups), 0
        else:
            entering, axis = shared, None
        side_by_side = nn.vmap(
            lambda network, part: network(part, train),
            in_axes=(axis,),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "dropout": True},
            axis_size=grouped.groups,
        )
        logits = side_by_side(group, entering)
        return logits[np.array(grouped.class_to_group), :, np.array(grouped.slots)].T


def parts(module: GroupedNetwork) -> tuple[models.Network, models.Network]:
    """The trunk of a network, and the network of one of its groups.

    A group norm divides the channels of a group by its share of the norm groups that a network without groups has, one
    at least. Norms make channels forget their size, so where groups are narrow it is compared within a group, and no
    longer between groups: networks without norms learn faster in many groups.
    """
    grouped = module.grouped
    settings: dict[str, Any] = dict(
        conv=module.conv, dense=module.dense, gate=module.gate, dtype=module.dtype, param_dtype=module.param_dtype
    )
    return (
        models.Network(grouped.trunk, name=TRUNK, **settings),
        models.Network(grouped.group, name=GROUPS, norm_groups=max(1, NORM_GROUPS // grouped.groups), **settings),
    )


def group_axes(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The group axes of the variables of a `GroupedNetwork`, for `jaxeff.federated.paired_average`."""
    return {
        collection: {name: 0 if name == GROUPS else None for name in parts} for collection, parts in variables.items()
    }


def aggregate(
    grouped: Grouped,
    variables: Mapping[str, Any],
    class_counts: Any,
    *,
    by: str = "class_counts",
    shared_by: str = "size",
) -> Aggregate:
    """Feature-paired averaging of a network in groups, for any algorithm of `jaxeff.federated.algorithms`.

    Warns of groups that nobody owns: these stay as they begin.

    Args:
      grouped: of `adapt`.
      variables: of the `GroupedNetwork`, for their structure.
      class_counts: [N, C], as of `Partition`.
      by: how owners count in a group: "class_counts", "uniform" or "size".
      shared_by: how clients count in the trunk: "size" or "uniform".

    Raises:
      ValueError: for class counts that do not fit.
    """
    omega = group_weights(class_counts, grouped.class_to_group, grouped.groups, by)
    if len(nobody := np.flatnonzero(omega.sum(0) == 0)):
        classes = [c for c, group in enumerate(grouped.class_to_group) if group in nobody]
        warnings.warn(
            f"groups {', '.join(map(str, nobody))} stay as they begin, as nobody has examples of classes "
            f"{', '.join(map(str, classes))}",
            stacklevel=2,
        )
    return paired(group_axes(variables), omega, shared_by)


def owned_groups(grouped: Grouped, class_counts: Any) -> np.ndarray:
    """Which groups each client owns, as it has examples of one of their classes: bool [N, G]."""
    return group_weights(class_counts, grouped.class_to_group, grouped.groups, "uniform") > 0


def brought(grouped: Grouped, class_counts: Any, mode: str) -> dict[str, np.ndarray]:
    """What clients bring to their batches, for `clients_of`.

    Args:
      grouped: of `adapt`.
      class_counts: [N, C].
      mode: "full", clients train all groups, and those they do not own by their silence alone; "subset", they get,
        train and send the groups that they own, and their softmax runs over the classes of these.

    Raises:
      ValueError: for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if mode == "full":
        return {}
    return {"classes": owned_groups(grouped, class_counts)[:, np.array(grouped.class_to_group)]}


def _owners(classes: int, groups: int | None, class_to_group: Sequence[int] | None) -> tuple[int, ...]:
    if class_to_group is None:
        return classes_in_turn(classes, min(classes, 10) if groups is None else groups)
    owner = tuple(int(g) for g in class_to_group)
    count = max(owner, default=0) + 1 if groups is None else groups
    if len(owner) != classes or sorted(set(owner)) != list(range(count)):
        raise ValueError(
            f"class_to_group must give each of {classes} classes a group in 0..{count - 1}, and every group a class, "
            f"got {owner}"
        )
    return owner


def _with_norm(architecture: spec.Architecture, norm: str | None) -> spec.Architecture:
    def change(layer):
        if layer.norm == "batch" or layer.branch_norm == "batch":
            other = lambda name: norm if name == "batch" else name
            return dataclasses.replace(layer, norm=other(layer.norm), branch_norm=other(layer.branch_norm))
        return layer

    return spec.edit(architecture, change, lambda path, layer: True)


def _dividing(trunk: spec.Architecture, groups: int, rounded: dict[str, tuple[int, int]]) -> spec.Architecture:
    """The trunk with as many channels at its end as divide by the groups."""
    last = trunk.layers[-1]
    width = spec.shapes(trunk)[last.name].output[-1]
    wanted = -(-width // groups) * groups
    if wanted == width:
        return trunk
    # Layers that a sum ties together have one width, and depthwise ones that of the layer before.
    tied = isinstance(last, spec.Residual)
    own = {
        path: layer.features
        for path, layer in spec.walk(trunk)
        if isinstance(layer, spec.Conv | spec.Dense) and getattr(layer, "groups", 1) != spec.DEPTHWISE
    }
    widths = {path: wanted for path, has in own.items() if has == width and (tied or path == list(own)[-1])}
    rounded.update({path: (width, wanted) for path in widths})
    return spec.shrink(trunk, widths)
