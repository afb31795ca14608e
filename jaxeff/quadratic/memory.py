"""How much memory the backward pass of quadratic layers needs: by formula, by trace and as compiled, side by side.

The formulas count what a layer of `jaxeff.quadratic` keeps for each of its policies (`save`), in arrays of the size of
its output (in float32, with batch norms and ReLU; here for QuadraLib's neuron, which has three projections of the
input; squares of it, patches and half products of other kinds come on top under "all"):

| policy | with branch norms | without |
|---|---|---|
| "all" | input + 1 a projection + 2 factors of the product + 1 of the output norm + 1/4 | input + 2 + 1 + 1/4 |
| "ab" | input + 1 a projection | the same |
| "x" | input | the same |

A norm keeps its input ("layer" and "rms" the normalised values as well), ReLU one byte for each value. Mean and
variance of every channel come on top, and kernels in the dtype of the arithmetic where they are kept in another. In
types narrower than float32 input and projections are of that type and all else is float32. An input that several layers
read counts once.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxeff import costs, spec
from jaxeff.costs.report import aligned, in_bytes
from jaxeff.ops import activation
from jaxeff.quadratic import kinds, projections
from jaxeff.quadratic.layers import QuadraticConv, QuadraticDense

# Arrays that a norm keeps under plain differentiation, in units of its input.
_KEPT_BY_NORM = {None: 0, "batch": 1, "group": 1, "layer": 2, "rms": 2}
# Values that it keeps for every position on top: statistics over the channels and what follows from them.
_KEPT_BY_POSITION = {None: 0, "batch": 0, "group": 0, "layer": 4, "rms": 2}


class LayerMemory(NamedTuple):
    """What one layer keeps for the backward pass.

    Attributes:
      name: its path.
      save: its policy; "-" for pooling and sums of residual blocks, which have none.
      residual_bytes: by formula.
      output_bytes: size of its output.
    """

    name: str
    save: str
    residual_bytes: int
    output_bytes: int


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Memory of one gradient.

    Attributes:
      rows: the layers in the order of the forward pass.
      batch: number of examples.
      analytic_bytes: sum of the rows.
      traced: `jaxeff.costs.analyze` of the same gradient.
      compiled: `jaxeff.costs.compiled` of it, or None if it was not compiled.
    """

    rows: tuple[LayerMemory, ...]
    batch: int
    analytic_bytes: int
    traced: costs.CostReport
    compiled: costs.CompiledCost | None

    def __str__(self) -> str:
        body = [
            (r.name, r.save, in_bytes(r.residual_bytes), f"{r.residual_bytes / r.output_bytes:.2f}") for r in self.rows
        ]
        lines = aligned([("layer", "save", "residuals", "of output"), *body])
        totals = {
            "residuals, by formula": self.analytic_bytes,
            "residuals, traced": self.traced.total.residual_bytes,
            "temporaries, compiled": None if self.compiled is None else self.compiled.temp_bytes,
        }
        rule = "-" * max(map(len, lines))
        return "\n".join([f"memory of one gradient, batch {self.batch}", *lines, rule, *aligned(_cells(totals))])


def memory_report(network: nn.Module, x: Any, *, compiled: bool = True) -> MemoryReport:
    """Counts what the gradient of a network by its parameters keeps.

    Args:
      network: a module of quadratic layers (kind "first_order" included), each with its own `save`, called as
        network(x, train). Pooling and residual sums count where it has an architecture.
      x: its input, an array or `jax.ShapeDtypeStruct`; the first axis is the batch.
      compiled: whether to compile the gradient too, which takes seconds.

    Returns:
      The report; `str(report)` is a table.

    Raises:
      ValueError: if the network has no quadratic layer.
    """
    x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)
    params = variables["params"]
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params, rest, x):
        y, _ = network.apply(
            {"params": params, **rest}, x, True, mutable=list(rest), rngs={"dropout": jax.random.key(0)}
        )
        return jnp.sum(y.astype(jnp.float32))

    rows = _rows(network, loss, (params, rest, x))
    if not rows:
        raise ValueError(f"{type(network).__name__} has no quadratic layer, whose memory this report is about")
    return MemoryReport(
        rows,
        x.shape[0],
        sum(row.residual_bytes for row in rows),
        costs.analyze(loss, params, rest, x),
        costs.compiled(jax.grad(loss), params, rest, x) if compiled else None,
    )


def residual_bytes(layer: QuadraticConv | QuadraticDense, x: Any) -> int:
    """What one layer keeps for the backward pass under its policy, by formula; without the parameters as they are kept.

    Args:
      layer: the layer, with its norms and activation.
      x: its input, an array or `jax.ShapeDtypeStruct`.

    Returns:
      Bytes.
    """
    x = jax.ShapeDtypeStruct(x.shape, layer.dtype or jnp.result_type(x.dtype, layer.param_dtype))
    y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    # A fused layer is one projection to everybody outside.
    kind = kinds.get("first_order" if layer.impl == "fused" else layer.kind)
    neurons = math.prod(y.shape[:-1]) * kind.neurons(layer.features)
    values = neurons * sum(p.rank for p in kind.projections)
    channels = sum(p.rank for p in kind.projections) * kind.neurons(layer.features)
    kept = _nbytes(x)
    if x.dtype != layer.param_dtype:
        kernels = [value for name, value in variables["params"].items() if name.startswith("kernel_")]
        kept += sum(kernel.size for kernel in kernels) * x.dtype.itemsize
    kept += 8 * (channels * (layer.branch_norm == "batch") + layer.features * (layer.out_norm == "batch"))
    if layer.save == "x":
        return kept
    if layer.save == "ab":
        return kept + values * x.dtype.itemsize
    wide = jnp.promote_types(x.dtype, jnp.float32).itemsize
    outputs, positions = math.prod(y.shape), math.prod(y.shape[:-1])
    kept += wide * positions * len(kind.projections) * _KEPT_BY_POSITION[layer.branch_norm]
    kept += wide * positions * _KEPT_BY_POSITION[layer.out_norm]
    kept += _kept_by_projecting(layer, kind, x) - _nbytes(x)
    kept += wide * (_KEPT_BY_NORM[layer.branch_norm] * values + _KEPT_BY_NORM[layer.out_norm] * outputs)
    kept += _kept_of_one(layer.branch_act) * values + _kept_of_one(layer.act) * outputs
    return kept + _kept_by_combining(kind) * neurons


def compiled_slope(layer: QuadraticConv | QuadraticDense, x: Any, depths: tuple[int, int] = (4, 8)) -> float:
    """Temporary bytes that one more layer costs in a stack of equal layers under `lax.scan`, as compiled.

    Args:
      layer: a layer whose output has the shape of its input.
      x: the input, an array or `jax.ShapeDtypeStruct`.
      depths: two depths to compile.

    Returns:
      (temporary bytes at the second depth - at the first) / difference of the depths: what layers keep, as nothing
      else grows with their number.

    Raises:
      ValueError: if the layer changes the shape, or the backend does not say how much memory it needs.
    """
    x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    after = jax.eval_shape(layer.apply, variables, x)
    if after.shape != x.shape:
        raise ValueError(f"layer must keep the shape of its input in a stack, got {x.shape} -> {after.shape}")
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params, x):
        def step(x, params):
            # Training normalises by the statistics of its batch, so that these may be anything.
            kept = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
            return layer.apply({"params": params, **kept}, x, True, mutable=list(rest))[0], None

        return jnp.sum(lax.scan(step, x, params)[0])

    sizes = []
    for depth in depths:
        stacked = jax.tree.map(lambda p, d=depth: jax.ShapeDtypeStruct((d, *p.shape), p.dtype), variables["params"])
        size = costs.compiled(jax.grad(loss), stacked, x).temp_bytes
        if size is None:
            raise ValueError(f"backend {jax.default_backend()!r} does not say how much memory a program needs")
        sizes.append(size)
    return (sizes[1] - sizes[0]) / (depths[1] - depths[0])


def _rows(network, loss, args) -> tuple[LayerMemory, ...]:
    seen: list[tuple[Any, Any, Any]] = []

    def watch(next_function, args, kwargs, context):
        y = next_function(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, QuadraticConv | QuadraticDense):
            seen.append((context.module, args[0], y))
        return y

    with nn.intercept_methods(watch):
        jax.eval_shape(loss, *args)
    rows: list[LayerMemory] = []
    for index, (module, x, y) in enumerate(seen):
        kept = residual_bytes(module.clone(parent=None, name=None), x)
        kept -= _nbytes(x) if any(x is other for _, other, _ in seen[:index]) else 0
        path = module.path[:-1] if module.path[-1:] == ("layer",) else module.path
        rows.append(LayerMemory("/".join(path), module.save, kept, _nbytes(y)))
    return tuple(_with_surroundings(network, rows, args[-1]))


def _with_surroundings(network, rows, x):
    """Adds pooling, dropout and the sums of residual blocks, where the network says what it is made of."""
    architecture = getattr(network, "architecture", None)
    if not isinstance(architecture, spec.Architecture) or not rows:
        return rows
    table, by_name, result = spec.shapes(architecture), {row.name: row for row in rows}, []
    for path, layer in spec.walk(architecture):
        size = x.shape[0] * math.prod(table[path].output)
        kept = 0
        if isinstance(layer, spec.Pool) and layer.reduce == "max":
            kept = size  # the position of the maximum, one byte
        elif isinstance(layer, spec.Dropout) and layer.rate:
            kept = size
        elif isinstance(layer, spec.Residual):
            kept = _kept_of_one(layer.act) * size
        if path in by_name:
            result.append(by_name[path])
        elif kept:
            result.append(LayerMemory(path, "-", kept, size * x.dtype.itemsize))
    return result


def _kept_by_projecting(layer: QuadraticConv | QuadraticDense, kind: kinds.Kind, x: jax.ShapeDtypeStruct) -> int:
    """Bytes that the derivative of the projections keeps, the input included, from that derivative itself."""
    if all(p.of == "x" for p in kind.projections):
        return _nbytes(x)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    kernels = {name: value for name, value in params.items() if name.startswith("kernel_")}
    if isinstance(layer, QuadraticConv):
        project = projections.conv(kind, layer.window, None, "separate", layer.conv_general_dilated)
    else:
        project = projections.dense(kind, None, "separate")
    return costs.analyze(project, kernels, x).total.residual_bytes or 0


def _kept_by_combining(kind: kinds.Kind) -> int:
    """Bytes that the derivative of a neuron's combination keeps, in float32, from that derivative itself."""
    zs = [jax.ShapeDtypeStruct((1,) if p.rank == 1 else (1, p.rank), jnp.float32) for p in kind.projections]
    extras = {extra.name: jax.ShapeDtypeStruct(extra.shape(1, 1), jnp.float32) for extra in kind.extras}
    report = costs.analyze(lambda extras, zs: kind.apply(*zs, **extras), extras, zs)
    return report.total.residual_bytes or 0


def _kept_of_one(act: str | None) -> int:
    """Bytes that the derivative of an activation keeps for one float32."""
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    return costs.analyze(activation(act), one, params_argnum=None).total.residual_bytes or 0


def _nbytes(array: Any) -> int:
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


def _cells(totals: dict[str, int | None]) -> list[tuple[str, str]]:
    return [(name, in_bytes(value)) for name, value in totals.items()]
