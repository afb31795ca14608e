"""Flattens a jaxpr, with all that is nested inside it, to one list of primitive operations on unique values."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxeff import compat
from jaxeff.costs import macs
from jaxeff.costs.scopes import Scope, equation_scope


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """One array of the program; inside a loop, the array of one trip.

    Attributes:
      shape: its shape.
      nbytes: its size in bytes; 0 for literals, for tokens and inside kernels, whose values stay on the chip.
      sources: values that this one is a view of, with no operation in between (a slice that a scan hands out, a
        stacked output).
      controls: values that decide which source it is (the predicate of a loop or branch).
      producer: the operation that computed it; None for arguments, constants and views.
      carried: True for the carry as a loop body sees it.
      constant: its Python value where that is known while tracing (scalar literals).
    """

    shape: tuple[int, ...]
    nbytes: int
    sources: list["Value"] = dataclasses.field(default_factory=list)
    controls: tuple["Value", ...] = ()
    producer: "Operation | None" = None
    carried: bool = False
    constant: Any = None

    def bases(self) -> Iterator[tuple["Value", bool]]:
        """Yields the computed or given values behind this one, and whether each came through the carry of a loop."""
        seen: set[int] = set()
        stack = [(self, False)]
        while stack:
            value, carried = stack.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            carried |= value.carried
            if value.sources:
                stack.extend((source, carried) for source in value.sources)
            else:
                yield value, carried


@dataclasses.dataclass(eq=False, slots=True)
class Operation:
    """One primitive operation.

    Attributes:
      primitive: name of the jax primitive, or of the code of `jaxeff.ops` that it calls.
      scope: its layer, from the outermost name to the innermost; for a layout change in an enclosing scope, the layer
        that first reads the result.
      inputs: what it reads.
      outputs: what it computes.
      macs: multiply-accumulates of one execution.
      trips: how often it is executed; 0 in a branch that is not taken.
      effects: True when it must run although nothing reads its outputs.
    """

    primitive: str
    scope: Scope
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    macs: int
    trips: int
    effects: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """A function as a flat list of operations in the order of execution, without those whose results nobody reads.

    Attributes:
      operations: the operations.
      inputs: one value for each argument leaf.
      outputs: one value for each result leaf.
      notes: sentences about what could not be counted exactly.
    """

    operations: tuple[Operation, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    notes: tuple[str, ...]


def flatten(jaxpr: Any, convention: str) -> Program:
    """Flattens a closed jaxpr.

    Args:
      jaxpr: what `jax.make_jaxpr` returned.
      convention: how `macs.equation_macs` counts.

    Returns:
      The program.
    """
    flattener = _Flattener(convention)
    inputs = tuple(_value(var.aval) for var in jaxpr.jaxpr.invars)
    outputs = tuple(flattener.inline(jaxpr, inputs, (), 1))
    operations = _live(flattener.operations, outputs)
    _give_layouts_to_readers(operations)
    uncounted: dict[tuple[str, str], None] = {}
    for operation in operations:
        if operation.primitive in macs.UNCOUNTED:
            uncounted[operation.primitive, "/".join(operation.scope) or "(outside)"] = None
    notes = [f"{primitive} in {layer} does arithmetic that is not counted" for primitive, layer in uncounted]
    return Program(operations, inputs, outputs, tuple(dict.fromkeys([*flattener.notes, *notes])))


class _Flattener:
    """Collects operations while it descends; the position in the program is `scope` and `trips`."""

    def __init__(self, convention: str):
        self.convention = convention
        self.operations: list[Operation] = []
        self.notes: list[str] = []
        self.constants: dict[int, Value] = {}
        self.on_chip = False

    def inline(self, jaxpr: Any, inputs: Sequence[Value], scope: Scope, trips: int) -> list[Value]:
        """Appends the operations of `jaxpr` called with `inputs`; returns its outputs."""
        constants = (self.constant(value) for value in compat.jaxpr_constants(jaxpr))
        environment: dict[Any, Value] = dict(zip(jaxpr.constvars, constants, strict=False))
        for var, value in zip(jaxpr.invars, inputs, strict=True):
            same = value.shape == _shape(var.aval)
            environment[var] = value if same else self.value(var.aval, sources=[value])

        def read(atom):
            return Value((), 0, constant=atom.val) if compat.is_literal(atom) else environment[atom]

        for equation in jaxpr.eqns:
            layer = equation_scope(scope, equation)
            outputs = self.equation(equation, [read(atom) for atom in equation.invars], layer, trips)
            environment.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, inputs: list[Value], scope: Scope, trips: int) -> Sequence[Value]:
        """Appends one equation, descending into whatever it holds; returns its outputs."""
        name, params = equation.primitive.name, equation.params
        control = {"scan": self.scan, "while": self.loop, "cond": self.branches}.get(name)
        if control is not None:
            return control(equation, inputs, scope, trips)
        if name == "custom_linear_solve":  # also holds the matrix and both transposes; only the solver runs
            inner = [params["jaxprs"].solve]
        else:
            inner = [jaxpr for param in params.values() for jaxpr in _jaxprs(param)]
        if name == "shard_map":  # the jaxpr is the work of one device, on its shard
            devices = math.prod(params["mesh"].shape[axis] for axis in compat.manual_axes(params))
            outputs = self.inline(inner[0], inputs, scope, trips * devices)
            return [self.value(var.aval, sources=[out]) for var, out in zip(equation.outvars, outputs, strict=True)]
        if len(inner) == 1 and _is_call(inner[0], equation):
            outputs = self.inline(inner[0], inputs, scope, trips)
            if (extra := macs.call_macs(equation, self.convention)) and outputs[0].producer is not None:
                outputs[0].producer.macs += extra
            return outputs
        return self.opaque(equation, inner, inputs, scope, trips)

    def opaque(self, equation: Any, inner: list[Any], inputs: list[Value], scope: Scope, trips: int) -> Sequence[Value]:
        """Appends an equation as one operation; what it holds adds its arithmetic and no traffic."""
        body: list[Value] = []
        on_chip, self.on_chip = self.on_chip, True
        for jaxpr in inner:
            start = len(self.operations)
            arguments = [self.value(var.aval) for var in jaxpr.invars]
            self.inline(jaxpr, arguments, scope, trips * self.grid(equation, scope))
            body.extend(value for operation in self.operations[start:] for value in operation.outputs)
        self.on_chip = on_chip
        operation = Operation(
            primitive=equation.params["target_name"] if macs.counts_itself(equation) else equation.primitive.name,
            scope=scope,
            inputs=(*inputs, *body),  # reading the body keeps it alive with the equation
            outputs=tuple(self.value(var.aval) for var in equation.outvars),
            macs=macs.equation_macs(equation, self.convention),
            trips=trips,
            effects=compat.has_side_effects(equation.effects),
        )
        for output in operation.outputs:
            output.producer = operation
        self.operations.append(operation)
        return operation.outputs

    def grid(self, equation: Any, scope: Scope) -> int:
        """Counts the programs of a Pallas kernel; 1 for any other equation."""
        grid = getattr(equation.params.get("grid_mapping"), "grid", ())
        if any(not isinstance(size, int) for size in grid):
            self.note(scope, "a kernel grid of a size unknown while tracing; that axis is counted once")
        return math.prod(size for size in grid if isinstance(size, int))

    def scan(self, equation: Any, inputs: list[Value], scope: Scope, trips: int) -> list[Value]:
        """A loop of known length: the carry flows around, slices flow in, and stacked outputs flow out."""
        body = equation.params["jaxpr"]
        constants, carry = compat.scan_operands(equation.params)
        inside = inputs[:constants]
        for index, value in enumerate(inputs[constants:], start=constants):
            carried = index < constants + carry
            inside.append(self.value(body.invars[index].aval, sources=[value], carried=carried))
        outputs = self.inline(body, inside, scope, trips * equation.params["length"])
        for value, output in zip(inside[constants : constants + carry], outputs, strict=False):
            value.sources.append(output)
        return [self.value(var.aval, sources=[out]) for var, out in zip(equation.outvars, outputs, strict=True)]

    def branches(self, equation: Any, inputs: list[Value], scope: Scope, trips: int) -> list[Value]:
        """Branches: the most expensive one counts; the others are kept, never executed, for the parameters they use."""
        branches, outputs = [], []
        for branch in equation.params["branches"]:
            start = len(self.operations)
            outputs.append(self.inline(branch, inputs[1:], scope, trips))
            branches.append(self.operations[start:])
        taken = max(branches, key=_cost)
        for branch in branches:
            if branch is not taken:
                for operation in branch:
                    operation.trips = 0
        index = (inputs[0],)
        results = zip(equation.outvars, zip(*outputs, strict=True), strict=True)
        return [self.value(var.aval, sources=list(sources), controls=index) for var, sources in results]

    def loop(self, equation: Any, inputs: list[Value], scope: Scope, trips: int) -> list[Value]:
        """A loop: counted as often as its bounds say where these are known, else once, with a note."""
        params = equation.params
        cond, body = params["cond_jaxpr"], params["body_jaxpr"]
        of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
        start = inputs[of_cond + of_body :]
        length = _counted_trips(cond, body, inputs, of_cond, of_body)
        if length is None:
            self.note(scope, "a while loop of unknown trip count; its body is counted once")
            length = 1
        carry = [
            self.value(var.aval, sources=[v], carried=True) for var, v in zip(cond.invars[of_cond:], start, strict=True)
        ]
        predicate = self.inline(cond, [*inputs[:of_cond], *carry], scope, trips * length)
        outputs = self.inline(body, [*inputs[of_cond : of_cond + of_body], *carry], scope, trips * length)
        for value, output in zip(carry, outputs, strict=True):
            value.sources.append(output)
        controls = tuple(predicate)
        return [
            self.value(o.aval, sources=[out], controls=controls)
            for o, out in zip(equation.outvars, outputs, strict=True)
        ]

    def value(self, aval: Any, **fields: Any) -> Value:
        """Makes a value of the shape and dtype of `aval`."""
        value = _value(aval, **fields)
        if self.on_chip:
            value.nbytes = 0
        return value

    def constant(self, array: Any) -> Value:
        """Returns the one value of an array that jaxprs closed over, however many of them did."""
        if id(array) not in self.constants:
            self.constants[id(array)] = _value(array, constant=array if not _shape(array) else None)
        return self.constants[id(array)]

    def note(self, scope: Scope, sentence: str) -> None:
        """Adds a note about a layer."""
        self.notes.append(f"{'/'.join(scope) or '(outside)'}: {sentence}")


def _value(aval: Any, **fields: Any) -> Value:
    shape = _shape(aval)
    dtype = getattr(aval, "dtype", None)
    itemsize = 0 if dtype is None or dtype == jax.dtypes.float0 else dtype.itemsize
    return Value(shape, math.prod(shape) * itemsize, **fields)


def _shape(aval: Any) -> tuple[int, ...]:
    return tuple(getattr(aval, "shape", ()))  # tokens have none


def _jaxprs(param: Any) -> Iterator[Any]:
    if compat.is_jaxpr(param):
        yield param
    elif isinstance(param, tuple | list):
        for item in param:
            yield from _jaxprs(item)


def _is_call(jaxpr: Any, equation: Any) -> bool:
    """Says whether the equation only calls the jaxpr on its inputs, as jit, remat and custom_vjp do."""
    inner = ([_shape(atom.aval) for atom in atoms] for atoms in (jaxpr.invars, jaxpr.outvars))
    outer = ([_shape(atom.aval) for atom in atoms] for atoms in (equation.invars, equation.outvars))
    return all(a == b for a, b in zip(inner, outer, strict=True))


def _cost(operations: list[Operation]) -> tuple[int, int]:
    """The measure by which branches are compared: arithmetic first, then bytes written."""
    arithmetic = sum(operation.macs * operation.trips for operation in operations)
    return arithmetic, sum(value.nbytes * operation.trips for operation in operations for value in operation.outputs)


def _counted_trips(cond: Any, body: Any, inputs: list[Value], of_cond: int, of_body: int) -> int | None:
    """Counts the trips of `while i < bound: i += step`; None unless start, bound and step are known."""
    start = inputs[of_cond + of_body :]
    before, after = body.invars[of_body:], body.outvars
    if len(cond.eqns) != 1 or cond.eqns[0].primitive.name != "lt":
        return None
    counter, bound = cond.eqns[0].invars
    carry = cond.invars[of_cond:]
    if counter not in carry:
        return None
    index = carry.index(counter)
    if compat.is_literal(bound):
        upper = bound.val
    elif bound in carry:
        place = carry.index(bound)
        upper = start[place].constant if after[place] is before[place] else None
    else:
        upper = inputs[cond.invars.index(bound)].constant if bound in cond.invars else None
    increments = (e for e in body.eqns if e.primitive.name == "add" and e.outvars[0] is after[index])
    steps = [e.invars[1].val for e in increments if e.invars[0] is before[index] and compat.is_literal(e.invars[1])]
    first = start[index].constant
    if upper is None or first is None or not steps or steps[0] <= 0:
        return None
    return max(0, math.ceil((upper - first) / steps[0]))


def _live(operations: list[Operation], outputs: Sequence[Value]) -> tuple[Operation, ...]:
    """Keeps the operations that the outputs depend on, and those that act on the world."""
    kept: set[int] = set()
    seen: set[int] = set()
    waiting = list(outputs)

    def keep(operation: Operation) -> None:
        if id(operation) not in kept:
            kept.add(id(operation))
            waiting.extend(operation.inputs)

    for operation in operations:
        if operation.effects:
            keep(operation)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        waiting.extend([*value.sources, *value.controls])
        if value.producer is not None:
            keep(value.producer)
    return tuple(operation for operation in operations if id(operation) in kept)


def _give_layouts_to_readers(operations: Sequence[Operation]) -> None:
    readers: dict[int, Operation] = {}
    for operation in operations:
        for value in operation.inputs:
            for base, _ in value.bases():
                readers.setdefault(id(base), operation)
    for operation in reversed(operations):
        reader = readers.get(id(operation.outputs[0])) if operation.primitive in macs.LAYOUT else None
        if reader is not None and reader.scope[: len(operation.scope)] == operation.scope:
            operation.scope = reader.scope
