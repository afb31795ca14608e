"""Costs of any function, attributed to its layers."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxeff.costs import walk
from jaxeff.costs.macs import CONVENTIONS
from jaxeff.costs.report import INPUTS, OUTSIDE, UNUSED, CostReport, LayerCost
from jaxeff.costs.residuals import kept_buffers
from jaxeff.costs.scopes import Scope

# Read no more of their first operand than they return.
_SLICING = frozenset(["dynamic_slice", "gather", "slice"])


def analyze(
    fn: Callable[..., Any],
    *args: Any,
    params_argnum: int | None = 0,
    convention: str = "paper",
    residuals: bool = True,
    depth: int | None = None,
) -> CostReport:
    """Counts what one call of a function costs, layer by layer, without running it.

    A *layer* is a name stack: the `jax.named_scope`s and Flax module names around an operation, from the outermost to
    the innermost, also those around the jit, scan, remat or custom derivative that holds it. Operations whose results
    nobody reads cost nothing. Reshapes, transposes and casts in an enclosing scope belong to the first layer that
    reads their result.

    - **macs**: `conv_general_dilated` counts output elements x kernel taps x input channels of a group; "xla" leaves
      out taps that meet padding or the holes of a dilated input, as XLA's own count does (flops / 2). `dot_general`
      and `ragged_dot` count the product of their batch, free and contracted sizes. Elementwise work is not a MAC.
    - **params**: elements of the leaves of argument `params_argnum`, each in the layer of the operation that reads it
      first (through jit, scan and layout changes); leaves that nothing reads stand in the row "(unused)".
    - **activation_bytes**: values computed in the layer and read by another layer or returned.
    - **residual_bytes**: what `jax.vjp(fn, *args)` keeps, differentiating by every inexact argument, each buffer once,
      in the layer that computed it. Parameters, which stay in memory anyway, and what depends on no argument are
      left out; other arguments that are kept stand in the row "(inputs)".
    - **moved_bytes**: the traffic when every layer is one perfect fusion: each value that enters it (parameters
      included; a slice or gather reads only what it takes) plus its activation bytes.

    Everything is multiplied by the trips of the loops around it, and each trip is a layer of its own: the carry leaves
    one and enters the next. `cond` and `switch` count the branch with the most MACs, `shard_map` the sum over its
    devices, a Pallas kernel its whole grid. A while loop whose bounds are not known while tracing is counted once and
    named in the notes.

    Args:
      fn: a function of arrays that jax can trace.
      *args: its arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s.
      params_argnum: position of the argument that holds the parameters; None when there is none.
      convention: "paper" or "xla".
      residuals: whether to count residual bytes, which needs `fn` to be differentiable in reverse mode.
      depth: number of leading names to keep of each layer; None keeps them all.

    Returns:
      The report.

    Raises:
      TypeError: `fn` is not callable, or an argument is not an array.
      ValueError: an unknown convention, a `params_argnum` or `depth` out of range, or residuals asked of a function
        that has no reverse mode.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxeff import costs
      >>> def net(params, x):
      ...     with jax.named_scope("dense"):
      ...         return jnp.tanh(x @ params)
      >>> report = costs.analyze(net, jnp.zeros((4, 3)), jnp.zeros((2, 4)))
      >>> report.total.macs, report.layer("dense").params
      (24, 12)
    """
    params = _checked(fn, args, params_argnum, convention, depth)
    program = walk.flatten(jax.make_jaxpr(fn)(*args), convention)
    ledger = _Ledger(depth, residuals)
    for operation in program.operations:
        ledger.add(operation.scope, macs=operation.macs * operation.trips)
    _add_traffic(ledger, program)
    _add_params(ledger, program, program.inputs[params])
    if residuals:
        for scope, nbytes in kept_buffers(fn, args, params, {operation.scope for operation in program.operations}):
            ledger.add(scope, residual_bytes=nbytes)
    rows = ledger.rows()
    total = {
        field.name: sum(getattr(row, field.name) or 0 for row in rows) for field in dataclasses.fields(LayerCost)[1:]
    }
    total["residual_bytes"] = total["residual_bytes"] if residuals else None
    return CostReport(rows, LayerCost("total", **total), convention, program.notes)


class _Ledger:
    """Adds up costs by layer name, in the order in which the names first come."""

    def __init__(self, depth: int | None, residuals: bool):
        self.depth = depth
        self.residuals = residuals
        self.costs: dict[str, dict[str, int]] = {}

    def name(self, scope: Scope) -> str:
        return "/".join(scope[: self.depth]) or OUTSIDE

    def add(self, layer: Scope | str, **costs: int) -> None:
        row = self.costs.setdefault(layer if isinstance(layer, str) else self.name(layer), {})
        for field, amount in costs.items():
            row[field] = row.get(field, 0) + int(amount)

    def rows(self) -> tuple[LayerCost, ...]:
        last = [name for name in (INPUTS, UNUSED) if name in self.costs]
        order = [name for name in self.costs if name not in last] + last
        return tuple(self.row(name, self.costs[name]) for name in order if any(self.costs[name].values()))

    def row(self, name: str, costs: dict[str, int]) -> LayerCost:
        row = LayerCost(name, **costs)
        return row if self.residuals else dataclasses.replace(row, residual_bytes=None)


def _add_traffic(ledger: _Ledger, program: walk.Program) -> None:
    leaving: set[int] = set()
    entering: dict[tuple[str, int], _Reads] = {}
    for operation in program.operations:
        if not operation.trips:
            continue
        name = ledger.name(operation.scope)
        for position, value in enumerate(operation.inputs):
            enters = False
            for base, carried in value.bases():
                if base.producer is None:
                    enters = True
                elif carried or ledger.name(base.producer.scope) != name:
                    enters = True
                    leaving.add(id(base))
            if enters:
                reads = entering.setdefault((name, id(value)), _Reads(value.nbytes))
                reads.add(operation, sliced=position == 0 and operation.primitive in _SLICING)
    for output in program.outputs:
        for base, _ in output.bases():
            leaving.add(id(base))
    for operation in program.operations:
        written = operation.trips * sum(value.nbytes for value in operation.outputs if id(value) in leaving)
        ledger.add(operation.scope, activation_bytes=written, moved_bytes=written)
    for (name, _), reads in entering.items():
        ledger.add(name, moved_bytes=reads.total())


@dataclasses.dataclass
class _Reads:
    """How much of one value a layer reads."""

    nbytes: int
    trips: int = 0
    whole: bool = False
    sliced: int = 0

    def add(self, operation: walk.Operation, sliced: bool) -> None:
        self.trips = max(self.trips, operation.trips)
        self.whole |= not sliced
        self.sliced += operation.outputs[0].nbytes * operation.trips if sliced else 0

    def total(self) -> int:
        everything = self.nbytes * self.trips
        return everything if self.whole else min(self.sliced, everything)


def _add_params(ledger: _Ledger, program: walk.Program, leaves: Sequence[walk.Value]) -> None:
    waiting = {id(leaf): leaf for leaf in leaves}
    for operation in program.operations:
        for value in operation.inputs:
            for base, _ in value.bases():
                leaf = waiting.pop(id(base), None)
                if leaf is not None:
                    ledger.add(operation.scope, params=math.prod(leaf.shape))
    for leaf in waiting.values():
        ledger.add(UNUSED, params=math.prod(leaf.shape))


def _checked(fn: Any, args: Sequence[Any], params_argnum: Any, convention: Any, depth: Any) -> slice:
    """Returns where the leaves of the parameters lie among all leaves."""
    if not callable(fn):
        raise TypeError(f"fn must be a function of arrays, got {type(fn).__name__}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}; got {convention!r}")
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 1):
        raise ValueError(f"depth must be None or an integer of at least 1, got {depth!r}")
    leaves = [_array_leaves(position, arg) for position, arg in enumerate(args)]
    if params_argnum is None:
        return slice(0, 0)
    if isinstance(params_argnum, bool) or not isinstance(params_argnum, int) or not 0 <= params_argnum < len(args):
        raise ValueError(
            f"params_argnum must be None or the position of one of the {len(args)} arguments, got {params_argnum!r}"
        )
    start = sum(leaves[:params_argnum])
    return slice(start, start + leaves[params_argnum])


def _array_leaves(position: int, arg: Any) -> int:
    leaves = jax.tree_util.tree_flatten_with_path(arg)[0]
    for path, leaf in leaves:
        if isinstance(leaf, bool) or not (
            hasattr(leaf, "shape") and hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)
        ):
            where = f"argument {position}{jax.tree_util.keystr(path)}"
            raise TypeError(
                f"{where} is a {type(leaf).__name__}, not an array or jax.ShapeDtypeStruct; "
                "bind static arguments with functools.partial"
            )
    return len(leaves)
