"""Weights from network to network: a quadratic network that starts as exactly a trained first-order one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff import spec
from jaxeff.ops.norms import EPSILON
from jaxeff.quadratic import kinds
from jaxeff.quadratic.layers import STARTS
from jaxeff.spec import Architecture, Conv, Dense

Variables = Mapping[str, Any]


def transplant(variables: Variables, architecture: Architecture, start: Variables, target: Architecture) -> Variables:
    """Gives a network the weights that another one has learned.

    Layers are the same if they have the same path; those whose kernel has another shape keep their new values, see
    `fresh_layers`. A layer of the same kind is copied. A first-order layer becomes a neuron of another kind that
    computes the same: the projection of the kind that is its twin takes over its weights, and the quadratic part is
    switched off in the way of ReLinear (Fan et al. 2023, arXiv 2110.06081), so that it can learn: quadralib's c is the
    twin, a zero and b free. A quadratic layer becomes a first-order one by leaving out all but its twin.

    The network's outputs stay the same to rounding, in evaluation and in training, if the new layers have

    * no branch norm and the norm that they had; or
    * a branch norm in the place of the norm that they had, and norm=None; or
    * a batch norm in both places, in evaluation. In training the output's batch norm divides by the deviation once more
      what the branch norm has divided by it already. The branch norm's scale is chosen such that the error vanishes
      where the batch has the running variance V; if it has v, the outputs of the channel are wrong by the factor
      1 + 0.5e-5 (1/v - 1/V). For an exact start choose one of the others.

    Args:
      variables: of the trained network: {"params": ..., "batch_stats": ...}, made by first-order factories or by those
        of `jaxeff.quadratic`.
      architecture: of the trained network.
      start: initial variables of the new network; free projections and fresh layers keep these values.
      target: architecture of the new network.

    Returns:
      Variables of the new network, in the structure and dtypes of `start`.

    Raises:
      ValueError: for a kind that cannot start as a first-order layer (those that can are listed), norms other than the
        above, a bias without a place, or variables that do not belong to their architecture; the layer is named.
    """
    old, new = (dict(weighted_layers(net)) for net in (architecture, target))
    fresh = set(fresh_layers(architecture, target))
    result = {name: copied(tree) for name, tree in start.items()}
    for path in new:
        if path in fresh:
            continue
        given, there = _Layer.read(variables, path), _Layer.read(start, path)
        made = _converted(path, old[path], given, new[path], there)
        made = jax.tree.map(lambda value, like: jnp.asarray(value, like.dtype), made, there.values)
        there.write(result, path, made)
        for collection, tree in result.items():
            node, source = node_of(tree, path), node_of(variables.get(collection, {}), path)
            node.update({name: source[name] for name in node if name in source and name not in ("layer", "norm")})
    return result


def fresh_layers(architecture: Architecture, target: Architecture) -> tuple[str, ...]:
    """Paths of those layers of `target` for which `architecture` has no weights that fit, in order."""
    old, new = dict(weighted_layers(architecture)), dict(weighted_layers(target))
    ours, theirs = spec.shapes(architecture), spec.shapes(target)

    def fits(path):
        if path not in old or type(old[path]) is not type(new[path]):
            return False
        return all(
            form(old[path], ours[path]) == form(new[path], theirs[path])
            for form in (
                lambda layer, shape: (layer.features, shape.input[-1]),
                lambda layer, shape: getattr(layer, "kernel", None),
                lambda layer, shape: getattr(layer, "groups", 1) or shape.input[-1],
            )
        )

    return tuple(path for path in new if not fits(path))


class _Layer(NamedTuple):
    """Parameters and running statistics of a layer as `jaxeff.quadratic` names them, whoever made them.

    `values` holds {"params": {"kernel_c", "norm_out": {"scale", "bias"}, ...}, "batch_stats": {"norm_out": ...}};
    `stock` says that the tree has it in the form of Flax's own layers: "kernel", "bias" and, beside them, "norm".
    """

    values: dict[str, dict[str, Any]]
    stock: bool

    @classmethod
    def read(cls, variables: Variables, path: str) -> "_Layer":
        values: dict[str, dict[str, Any]] = {}
        stock = False
        for collection in ("params", "batch_stats"):
            node = node_of(variables.get(collection, {}), path)
            own: dict[str, Any] = dict(node.get("layer", {}))
            if collection == "params" and not own:
                raise ValueError(f"variables have no parameters of layer {path!r}; give those of its architecture")
            stock |= "kernel" in own
            values[collection] = {_STOCK.get(name, name): value for name, value in own.items()}
            if "norm" in node:
                values[collection]["norm_out"] = node["norm"]
        return cls(values, stock)

    def write(self, variables: Variables, path: str, values: Mapping[str, Mapping[str, Any]]) -> None:
        for collection, given in values.items():
            node, own = node_of(variables.get(collection, {}), path), dict(given)
            if "norm" in node:
                node["norm"] = own["norm_out"]
                own = {name: value for name, value in own.items() if name != "norm_out"}
            if own:
                back = {ours: theirs for theirs, ours in _STOCK.items()} if self.stock else {}
                node["layer"] = {back.get(name, name): value for name, value in own.items()}


_STOCK: dict[str, str] = {"kernel": "kernel_c", "bias": "bias_c"}


def _converted(path: str, old: Any, given: _Layer, new: Any, there: _Layer) -> dict[str, dict[str, Any]]:
    params, stats = given.values["params"], given.values["batch_stats"]
    result = {collection: dict(tree) for collection, tree in there.values.items()}
    if (old.kind, old.branch_norm, old.norm) == (new.kind, new.branch_norm, new.norm):
        made = {collection: dict(tree) for collection, tree in given.values.items()}
    elif new.kind == "first_order" and old.kind != "first_order":
        made = _linear_part(path, old, params, stats, new, result)
    elif old.kind == "first_order":
        made = _with_twin(path, old, params, stats, new, result)
    else:
        raise ValueError(
            f"layer {path!r}: kind {old.kind!r} (branch_norm={old.branch_norm!r}, norm={old.norm!r}) does not become "
            f"{new.kind!r} (branch_norm={new.branch_norm!r}, norm={new.norm!r}); start from a first-order layer"
        )
    for collection, tree in made.items():
        for name, value in tree.items():
            if name in result[collection]:
                result[collection][name] = value
            elif any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(value)):
                raise ValueError(
                    f"layer {path!r}: {name!r} is not zero and has no place in the new layer of kind {new.kind!r}, "
                    f"which has {sorted(result[collection])}; give both layers the same bias="
                )
    return result


def _with_twin(path, old, params, stats, new, start) -> dict[str, dict[str, Any]]:
    """Parameters of a neuron that computes what a first-order layer does."""
    kind = kinds.get(new.kind)
    starts = kinds.relinear_starts(kind)
    twins = [p for p in kind.projections if starts[p.name] == "twin"]
    if sum(p.rank for p in twins) != kind.outputs:
        raise ValueError(f"layer {path!r}: kind {kind.name!r} has other than one twin per output; it cannot start so")
    made: dict[str, Any] = {}
    for p in kind.projections:
        if starts[p.name] in ("zero", "one"):
            made |= _switched(path, p, starts[p.name], new, start["params"])
    for extra in kind.extras:
        if extra.name in start["params"]:
            shape = start["params"][extra.name].shape
            made[extra.name] = STARTS[starts[extra.name]](None, shape, jnp.float32)
    pieces = _pieces(params["kernel_c"], kind, twins)
    made |= {f"kernel_{p.name}": pieces[p.name] for p in twins}
    for p in twins:
        if f"bias_{p.name}" in start["params"]:
            made[f"bias_{p.name}"] = jnp.zeros_like(start["params"][f"bias_{p.name}"])
    if "bias_c" in params:
        # Some kinds have one offset behind all of their projections.
        offsets = [extra.name for extra in kind.extras if extra.bias and extra.name in start["params"]]
        for p in twins:
            bare = f"bias_{p.name}" not in start["params"] and len(offsets) == len(twins) == 1
            made[offsets[0] if bare else f"bias_{p.name}"] = _pieces(params["bias_c"], kind, twins)[p.name]
    norms, moments = _norms_with_twin(path, old, params, stats, new, kind, twins)
    return {"params": made | norms, "batch_stats": moments}


def _switched(path, projection, start, new, params) -> dict[str, Any]:
    """A projection that is constantly zero or one: through the norm behind it, or else its kernel and bias."""
    name = projection.name
    carrier = f"norm_{name}" if new.branch_norm else f"kernel_{name}"
    offset = params[carrier].get("bias") if new.branch_norm else params.get(f"bias_{name}")
    if start == "one" and offset is None:
        raise ValueError(
            f"layer {path!r}: kind {new.kind!r} starts with {name} = 1, which needs an offset: bias=True, or a "
            f"branch_norm with one; got bias={new.bias} and branch_norm={new.branch_norm!r}"
        )
    level = float(start == "one")
    if new.branch_norm:
        return {carrier: {n: jnp.full_like(v, level if n == "bias" else 0.0) for n, v in params[carrier].items()}}
    kernel = {carrier: jnp.zeros_like(params[carrier])}
    return kernel if offset is None else kernel | {f"bias_{name}": jnp.full_like(offset, level)}


def _norms_with_twin(path, old, params, stats, new, kind, twins) -> tuple[dict[str, Any], dict[str, Any]]:
    out, moments = params.get("norm_out"), stats.get("norm_out")

    def behind(norm):
        """What a norm of the output becomes behind the twins."""
        split = {name: _pieces(value, kind, twins) for name, value in norm.items()}
        return {f"norm_{p.name}": {name: pieces[p.name] for name, pieces in split.items()} for p in twins}

    same_norm = old.norm == new.norm
    if old.branch_norm is not None:
        if same_norm and old.branch_norm == new.branch_norm and _splits(new.branch_norm, twins):
            kept = [{"norm_out": tree["norm_out"]} if "norm_out" in tree else {} for tree in (params, stats)]
            behind_twins = [behind(tree["norm_c"]) if "norm_c" in tree else {} for tree in (params, stats)]
            return kept[0] | behind_twins[0], kept[1] | behind_twins[1]
    elif new.branch_norm is None and same_norm:
        return ({} if out is None else {"norm_out": out}), ({} if moments is None else {"norm_out": moments})
    elif new.norm is None and new.branch_norm == old.norm and _splits(new.branch_norm, twins):
        return behind(out), {} if moments is None else behind(moments)
    elif old.norm == new.norm == new.branch_norm == "batch":
        mean, var = moments["mean"], moments["var"]
        first = {"scale": jnp.sqrt(var + EPSILON), "bias": jnp.zeros_like(mean)}
        second = {"mean": jnp.zeros_like(mean), "var": var}
        return behind(first) | {"norm_out": out}, behind(moments) | {"norm_out": second}
    raise ValueError(
        f"layer {path!r}: norm={old.norm!r}, branch_norm={old.branch_norm!r} of the first-order layer cannot be kept "
        f"by norm={new.norm!r}, branch_norm={new.branch_norm!r} of kind {new.kind!r}; give the new layer the same norm "
        "and branch_norm=None, or branch_norm the norm and norm=None (both are exact), or 'batch' for all of them"
    )


def _splits(norm: str, twins: Sequence[kinds.Projection]) -> bool:
    """Whether a norm of all channels is the norms of their parts: only where it does not mix channels."""
    return len(twins) == 1 or norm == "batch"


def _linear_part(path, old, params, stats, new, start) -> dict[str, dict[str, Any]]:
    """What a quadratic layer computes without its products: its twin alone."""
    kind = kinds.get(old.kind)
    starts = kinds.relinear_starts(kind)
    twins = [p for p in kind.projections if starts[p.name] == "twin"]
    if len(twins) > 1 or new.branch_norm is not None or new.norm != (old.norm or old.branch_norm):
        raise ValueError(
            f"layer {path!r}: to leave out the products of kind {old.kind!r} (norm={old.norm!r}, "
            f"branch_norm={old.branch_norm!r}) give the new layer branch_norm=None and norm="
            f"{old.norm or old.branch_norm!r}; kinds with several outputs cannot"
        )
    name = twins[0].name
    params, gain = dict(params), _slope(path, kind, twins[0], old, params)
    if old.branch_norm is not None:
        scaled = {key: jnp.diagonal(gain.slope) * value for key, value in params[f"norm_{name}"].items()}
        params[f"norm_{name}"] = scaled
        made = {"kernel_c": params[f"kernel_{name}"]}
    else:
        made = {"kernel_c": params[f"kernel_{name}"] @ gain.slope}
        offset = gain.offset + params.get(f"bias_{name}", jnp.zeros(len(gain.slope))) @ gain.slope
        if f"bias_{name}" in params or jnp.any(offset != 0):
            made["bias_c"] = offset
    norm = "norm_out" if old.norm else f"norm_{name}"
    scale_bias = params.get(norm)
    moments = stats.get(norm)
    if old.norm == old.branch_norm == "batch":
        # Two batch norms one after the other are one, up to the statistics of the next batch.
        inner, outer = params[f"norm_{name}"], params["norm_out"]
        gain = outer["scale"] / jnp.sqrt(stats["norm_out"]["var"] + EPSILON)
        scale_bias = {
            "scale": gain * inner["scale"],
            "bias": gain * (inner["bias"] - stats["norm_out"]["mean"]) + outer["bias"],
        }
        moments = stats[f"norm_{name}"]
    if "bias_c" in made and "bias_c" not in start["params"] and new.norm == "batch":
        # The norm takes a bias away again, so that it only counts in the running mean.
        moments = {**moments, "mean": moments["mean"] - made.pop("bias_c")}
    if scale_bias is not None:
        made["norm_out"] = scale_bias
    return {"params": made, "batch_stats": {} if moments is None else {"norm_out": moments}}


def has_linear_part(layer: Any) -> bool:
    """Whether a layer without its products is a first-order layer, as which `transplant` can go on with it."""
    kind = kinds.get(layer.kind)
    mixes = any(extra.relinear == "identity" for extra in kind.extras)
    twins = [p for p in kind.projections if p.relinear == "twin"]
    return all(p.relinear for p in kind.projections) and len(twins) == 1 and not (mixes and layer.branch_norm)


class _Slope(NamedTuple):
    """A neuron as a function of its twin alone: offset + twin @ slope, [O] and [M, O]."""

    slope: jax.Array
    offset: jax.Array


def _slope(path, kind: kinds.Kind, twin: kinds.Projection, old, params) -> _Slope:
    """What becomes of the twin behind the product, with every other projection at what it is where it sees nothing."""
    starts, neurons = kinds.relinear_starts(kind), params[f"kernel_{twin.name}"].shape[-1]

    def others(p):
        if starts[p.name] != "one":
            return jnp.zeros(neurons)
        return params[f"norm_{p.name}"]["bias"] if old.branch_norm is not None else params[f"bias_{p.name}"]

    extras = {extra.name: params.get(extra.name) for extra in kind.extras}

    def run(value):
        values = [value if p is twin else jnp.broadcast_to(others(p), value.shape) for p in kind.projections]
        return kind.apply(*values, **extras)

    offset = run(jnp.zeros((1, neurons)))[0]
    slope = run(jnp.eye(neurons)) - offset
    if old.branch_norm is not None and (jnp.any(offset != 0) or jnp.any(slope != jnp.diag(jnp.diagonal(slope)))):
        raise ValueError(
            f"layer {path!r}: kind {kind.name!r} mixes its features behind branch_norm={old.branch_norm!r}, which no "
            "first-order layer does; give it no branch_norm"
        )
    return _Slope(slope, offset)


def _pieces(array, kind: kinds.Kind, twins: Sequence[kinds.Projection]) -> dict[str, jax.Array]:
    """Splits the output channels [..., O] of a first-order layer among the twins: [..., M * r] for each."""
    by_neuron = jnp.reshape(array, (*array.shape[:-1], -1, kind.outputs))
    pieces, first = {}, 0
    for p in twins:
        pieces[p.name] = by_neuron[..., first : first + p.rank].reshape(*array.shape[:-1], -1)
        first += p.rank
    return pieces


def weighted_layers(architecture: Architecture) -> Iterator[tuple[str, Any]]:
    """Yields (path, layer) of the convolutions and dense layers in order."""
    return ((path, layer) for path, layer in spec.walk(architecture) if isinstance(layer, Conv | Dense))


def node_of(tree: Any, path: str) -> Any:
    """The subtree of a layer, by its path; {} where there is none."""
    for name in path.split("/"):
        tree = tree.get(name, {})
    return tree


def copied(tree: Any) -> Any:
    """A copy of nested dictionaries with the same leaves."""
    return {name: copied(value) for name, value in tree.items()} if isinstance(tree, Mapping) else tree
