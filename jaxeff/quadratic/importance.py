"""What each layer of a network is worth: the loss of accuracy when its weights are masked, against what it costs."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxeff import costs, spec
from jaxeff.costs.report import aligned
from jaxeff.quadratic.transplant import Variables, copied, node_of
from jaxeff.spec import Architecture


class LayerScore(NamedTuple):
    """What a layer costs and what it is worth.

    Attributes:
      layer: its path in the architecture.
      params_share: its share of the network's parameters, 0..1.
      macs_share: its share of the network's multiply-accumulates, 0..1.
      drop: the loss of accuracy when a part of its weights is zero, a fraction, averaged over the masks.
      ri: params_share * macs_share / drop, infinite where nothing is lost: high for what is expensive and unimportant.
    """

    layer: str
    params_share: float
    macs_share: float
    drop: float
    ri: float


class Scores(NamedTuple):
    """The scores of the layers in their order, and the accuracy without a mask; text as a table."""

    rows: tuple[LayerScore, ...]
    accuracy: float

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("layer", "params", "MACs", "drop", "RI")]
        for row in self.rows:
            shares = (f"{100 * share:.1f} %" for share in (row.params_share, row.macs_share))
            cells.append((row.layer, *shares, f"{100 * row.drop:.2f}", f"{row.ri:.3g}"))
        return "\n".join(aligned(cells))


def mask(variables: Variables, layer: str, ratio: float | jax.Array, key: jax.Array) -> Variables:
    """Sets weights of all projections of a layer to zero, each with probability `ratio`; the others stay as they are.

    Args:
      variables: of a network: {"params": ..., ...}.
      layer: path of the layer in its architecture.
      ratio: in 0..1; may be traced.
      key: PRNG key.

    Returns:
      Variables of the same structure; only the kernels of the layer differ.

    Raises:
      ValueError: for a layer without kernels, or a ratio out of range.
    """
    _check_ratio(ratio)
    kernels = _masked(_kernels(variables, layer), ratio, key)
    params = copied(variables["params"])
    node_of(params, layer)["layer"].update(kernels)
    return {**variables, "params": params}


def score(
    network: nn.Module,
    variables: Variables,
    architecture: Architecture,
    images: Any,
    labels: Any,
    key: jax.Array,
    *,
    ratio: float = 0.5,
    masks: int = 4,
    select: spec.Select = None,
    batch_size: int = 50,
) -> Scores:
    """Scores layers by QuadraLib's RI: parameter share * MAC share / loss of accuracy when weights are masked.

    One compiled call evaluates all masks of all layers. A mask changes nothing before its layer, so the network runs
    once over a batch that grows: behind every layer the outputs of its masked forms join those of all earlier masks,
    and go on together through the unmasked rest. That is half of the work of evaluating every mask from the start, and
    in few large convolutions.

    Args:
      network: runs the architecture; its layers are the modules of these names, as in `jaxeff.models.Network`. It is
        evaluated with `network.apply(variables, images)`.
      variables: of the trained network.
      architecture: of the network.
      images: [N, *input_shape], floating point, preprocessed; not the test set.
      labels: int [N].
      key: PRNG key; mask m of the l-th scored layer is `mask(..., jax.random.split(key, (layers, masks))[l, m])`.
      ratio: share of a layer's weights that are masked, in 0..1.
      masks: number of masks per layer.
      select: which layers, as in `spec.edit`; by default those of role "body".
      batch_size: how many images are evaluated together; memory grows with this times layers times masks.

    Returns:
      The scores in the order of the layers.

    Raises:
      ValueError: if nothing is selected, or an argument is out of range or does not fit.
    """
    layers = spec.selected(architecture, select)
    check_masking(ratio, masks, batch_size)
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    wrong = images.shape[1:] != tuple(architecture.input_shape) or labels.shape != images.shape[:1]
    if wrong or not len(images) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"images and labels must be [N, *{tuple(architecture.input_shape)}] and integers [N], N at least 1, got "
            f"{images.shape} and {labels.dtype}{list(labels.shape)}"
        )
    count = len(images)
    size = min(batch_size, count)
    short = -count % size
    batches = jax.tree.map(
        lambda a: jnp.pad(a, [(0, short)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, size, *a.shape[1:]),
        (images, labels, jnp.ones(count)),
    )
    keys = jax.random.split(key, (len(layers), masks))

    clean, *rest = (_right(network, tuple(layers), variables, batches, keys, ratio) / count).tolist()
    report = _report(network, variables, images[:1])
    rows = []
    for index, path in enumerate(layers):
        drop = clean - sum(rest[index * masks : (index + 1) * masks]) / masks
        params_share, macs_share = shares(report, [path])
        rows.append(LayerScore(path, params_share, macs_share, drop, ri(params_share * macs_share, drop)))
    return Scores(tuple(rows), clean)


def check_masking(ratio: float, masks: int, batch_size: int) -> None:
    """Raises ValueError if these arguments of `score` are out of range."""
    _check_ratio(ratio)
    if masks < 1 or batch_size < 1:
        raise ValueError(f"masks and batch_size must be at least 1, got {masks} and {batch_size}")


@partial(jax.jit, static_argnums=(0, 1))
def _right(network, layers, variables, batches, keys, ratio):
    """How many images every masked network gets right, the one without a mask first; compiled once per network."""
    masked = {
        path: jax.vmap(lambda key, path=path: _masked(_kernels(variables, path), ratio, key))(keys[index])
        for index, path in enumerate(layers)
    }

    def right(batch):
        images, labels, valid = batch
        logits = _with_masks(network, variables, masked, images)
        hits = logits.reshape(-1, len(labels), logits.shape[-1]).argmax(-1) == labels
        return (hits * valid).sum(-1)

    return lax.map(right, batches).sum(0)


def _with_masks(network, variables, masked, images):
    """Outputs [(1 + layers * masks) * N, K]: without a mask, then with each mask of each layer in turn."""
    rows = len(images)
    stages: dict[str, list[str]] = {}
    for path in masked:
        stages.setdefault(path.split("/")[0], []).append(path)

    inside = False  # of a layer that runs alone, whose own layers may have the names of stages

    def grow(call, args, kwargs, context):
        nonlocal inside
        module = context.module
        if inside or context.method_name != "__call__" or len(module.path) != 1 or module.path[0] not in stages:
            return call(*args, **kwargs)
        x, *others = args
        name, outputs = module.path[0], [call(*args, **kwargs)]
        own = {collection: tree[name] for collection, tree in variables.items() if name in tree}
        alone = module.clone(parent=None)

        def run(kernels, inner):
            params = copied(own["params"])
            (node_of(params, inner) if inner else params)["layer"].update(kernels)
            return alone.apply({**own, "params": params}, x[:rows], *others, **kwargs)

        inside = True
        for path in stages[name]:
            y = jax.vmap(lambda kernels, path=path: run(kernels, path.partition("/")[2]))(masked[path])
            outputs.append(y.reshape(-1, *y.shape[2:]))
        inside = False
        return jnp.concatenate(outputs)

    with nn.intercept_methods(grow):
        return network.apply(variables, images)


def _kernels(variables: Variables, layer: str) -> dict[str, jax.Array]:
    own = node_of(variables["params"], layer).get("layer", {})
    kernels = {name: value for name, value in own.items() if name.startswith("kernel")}
    if not kernels:
        raise ValueError(f"variables hold no kernels of layer {layer!r}; give a path such as 'stage1_block1/conv1'")
    return kernels


def _masked(kernels: Mapping[str, jax.Array], ratio, key) -> dict[str, jax.Array]:
    # One draw for all kernels: each more would take seconds to compile.
    chances = jax.random.uniform(key, (sum(kernel.size for kernel in kernels.values()),))
    masked, first = {}, 0
    for name in sorted(kernels):
        kernel = kernels[name]
        chance = chances[first : first + kernel.size].reshape(kernel.shape)
        masked[name] = jnp.where(chance < ratio, 0, kernel)
        first += kernel.size
    return masked


def _check_ratio(ratio) -> None:
    if not isinstance(ratio, jax.core.Tracer) and not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in 0..1, got {ratio}")


def _report(network, variables, images) -> costs.CostReport:
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    shown = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    return costs.analyze(
        lambda params, x: network.apply({"params": params, **rest}, x), variables["params"], shown, residuals=False
    )


def shares(report: costs.CostReport, paths: Sequence[str]) -> tuple[float, float]:
    """Shares of the parameters and of the MACs that layers have; rows are called <network>/<path>/..."""
    wanted = {tuple(path.split("/")) for path in paths}
    rows = [row for row in report.rows if any(tuple(row.name.split("/")[1 : 1 + len(w)]) == w for w in wanted)]
    params, macs = sum(row.params for row in rows), sum(row.macs for row in rows)
    return params / max(report.total.params, 1), macs / max(report.total.macs, 1)


def ri(share: float, drop: float) -> float:
    """RI of a product of shares and a loss of accuracy, averaged over masks; infinite where nothing is lost."""
    return share / drop if drop > 0 else float("inf")
