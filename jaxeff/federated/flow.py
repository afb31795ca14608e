"""How values flow through a traced function: what depends on the inputs, in which order, and what reads it.

`jaxeff.federated.derive` says which axes move together; here it is said which values have them, for what is done with
activations, and which axes of parameters read units and which make them, for what is done with networks of other
widths.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxeff import compat, trees
from jaxeff.federated.axes import CALLS, Node, Tracer, find
from jaxeff.federated.permutation import Axis, Fixed, Free, Permutations, Product, Sum
from jaxeff.ops import conv_impl

Tree = Any


class Program(NamedTuple):
    """A traced function of a tree of parameters.

    Attributes:
      jaxpr: closed, of the leaves and the leaves of the inputs.
      paths: of the parameters.
    """

    jaxpr: Any
    paths: tuple[str, ...]


class Place(NamedTuple):
    """A value: the operand or the result with a number, of the equation with a number, as `evaluate` comes to them."""

    equation: int
    position: int
    result: bool


class Live(list[Node]):
    """Axes of a value that depends on the inputs."""


def trace(apply: Callable[..., Any], params: Tree, *inputs: Any) -> Program:
    """Traces a function as `jaxeff.federated.derive` does."""
    flat = trees.flatten_names(params)
    structure: Any = jax.tree.structure(params)
    with conv_impl("lax"):
        made = jax.make_jaxpr(lambda leaves, *rest: apply(structure.unflatten(leaves), *rest))(
            list(flat.values()), *inputs
        )
    return Program(made, tuple(flat))


def inner_jaxpr(equation: Any) -> Any:
    """The program that an equation calls, which is followed; None for one that is taken as a whole."""
    if equation.primitive.name in ("scan", "while", "cond"):
        return None
    return next((equation.params[key] for key in CALLS if compat.is_jaxpr(equation.params.get(key))), None)


def evaluate(program: Program, arguments: Sequence[Any], wanted: set[Place]) -> dict[Place, jax.Array]:
    """Runs a program.

    Args:
      program: of `trace`.
      arguments: the leaves of the parameters and of the inputs.
      wanted: values to keep.

    Returns:
      These values.
    """
    kept: dict[Place, jax.Array] = {}
    numbers = itertools.count()

    def keep(number, values, result):
        for position, value in enumerate(values):
            if (place := Place(number, position, result)) in wanted:
                kept[place] = value

    def run(jaxpr, constants, values):
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *values), strict=True))
        read = lambda atom: atom.val if compat.is_literal(atom) else env[atom]
        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            inner = inner_jaxpr(equation)
            if inner is not None:
                results = run(getattr(inner, "jaxpr", inner), compat.jaxpr_constants(inner), operands)
            else:
                number = next(numbers)
                keep(number, operands, False)
                settings = equation.primitive.get_bind_params(equation.params)
                results = equation.primitive.bind(*operands, **settings)
                results = results if equation.primitive.multiple_results else [results]
                keep(number, results, True)
            env.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    run(getattr(program.jaxpr, "jaxpr", program.jaxpr), compat.jaxpr_constants(program.jaxpr), arguments)
    return kept


class Follower(Tracer):
    """A tracer that remembers the axes of all values that depend on the inputs, and which of these are summed over.

    Attributes:
      made: axes of every such value by place, in the order in which they come to be.
      summed: places of those among them that are products or convolutions.
      read: by place the axes of every such operand, and the number of those that a product or convolution sums over.
    """

    def __init__(self) -> None:
        self.made: dict[Place, list[Node]] = {}
        self.summed: set[Place] = set()
        self.read: dict[Place, tuple[list[Node], tuple[int, ...]]] = {}
        self._numbers = itertools.count()

    def step(self, equation, operands, shapes):
        """Axes of what an equation gives."""
        if inner_jaxpr(equation) is not None:
            return super().step(equation, operands, shapes)
        number = next(self._numbers)
        live = [isinstance(axes, Live) for axes in operands]
        sums = _summed(equation)
        for position, dims in enumerate(sums):
            if dims and live[position]:
                self.read[Place(number, position, False)] = (operands[position], dims)
        results = super().step(equation, operands, shapes)
        if not any(live):
            return results
        results = [Live(axes) for axes in results]
        made = {Place(number, position, True): axes for position, axes in enumerate(results)}
        self.made.update(made)
        self.summed.update(made if sums else ())
        return results


class Roles(Follower):
    """A follower that keeps what a product or convolution sums over apart, so that the two sides stay two.

    Attributes:
      readers: axes of parameters that are summed over against values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[Node] = []

    def _dot_general(self, params, operands, shape):
        return super()._dot_general(params, self._apart(operands, params["dimension_numbers"][0]), shape)

    def _conv_general_dilated(self, params, operands, shape):
        within = params["dimension_numbers"].rhs_spec[1]
        return super()._conv_general_dilated(params, self._apart(operands, ((), (within,))), shape)

    def _apart(self, operands, dims):
        # Of a product of parameters alone, such as one of low rank, the second factor reads the first.
        side = 0 if isinstance(operands[1], Live) and not isinstance(operands[0], Live) else 1
        if isinstance(operands[side], Live):
            return operands
        self.readers += [operands[side][i] for i in dims[side]]
        fresh = [Node(node.size) if i in dims[side] else node for i, node in enumerate(operands[side])]
        return [fresh, operands[1]] if side == 0 else [operands[0], fresh]


def follow(tracer: Tracer, program: Program) -> list[list[Node]]:
    """Sends a tracer through a program; the axes of the parameters."""
    jaxpr = getattr(program.jaxpr, "jaxpr", program.jaxpr)
    axes = [[Node(size) for size in var.aval.shape] for var in jaxpr.invars]
    count = len(program.paths)
    tracer.run(jaxpr, compat.jaxpr_constants(program.jaxpr), [*axes[:count], *map(Live, axes[count:])])
    return axes[:count]


def names_of(found: Permutations, program: Program, axes: Sequence[Sequence[Node]]) -> dict[Node, str]:
    """What `derive` has named, by its node.

    Raises:
      ValueError: if it was found of another function.
    """
    named: dict[Node, str] = {}

    def name(axis: Axis, node: Node) -> bool:
        node = find(node)
        if isinstance(axis, Product | Sum):
            fits = len(axis.parts) == len(node.parts)
            return fits and all(name(part, inner) for part, inner in zip(axis.parts, node.parts, strict=True))
        if node.kind != "atom" or node.size != axis.size:
            return False
        if isinstance(axis, Free):
            return named.setdefault(node, axis.name) == axis.name
        return True

    for path, nodes in zip(program.paths, axes, strict=True):
        of_leaf = found.axes.get(path, ())
        if len(of_leaf) != len(nodes) or not all(map(name, of_leaf, nodes)):
            raise ValueError(
                f"found: {path!r} has other axes in this function; derive them of it, with these parameters"
            )
    return named


def axis_of(node: Node, named: Mapping[Node, str]) -> Axis:
    """The axis that a node stands for; what has no name keeps its order."""
    node = find(node)
    if node.kind == "atom":
        return Free(node.size, named[node]) if node in named else Fixed(node.size, "of no parameter")
    parts = tuple(axis_of(part, named) for part in node.parts)
    return Product(parts) if node.kind == "product" else Sum(parts)


def atoms(node: Node) -> dict[Node, None]:
    """The parts of an axis that are no product and no sum, in their order."""
    node = find(node)
    return {node: None} if node.kind == "atom" else {atom: None for part in node.parts for atom in atoms(part)}


def _summed(equation: Any) -> tuple[tuple[int, ...], ...]:
    """The axes of both operands that a product or a convolution sums over, or has channel by channel."""
    if equation.primitive.name == "dot_general":
        left, right = equation.params["dimension_numbers"][0]
        return tuple(left), tuple(right)
    if equation.primitive.name == "conv_general_dilated":
        numbers = equation.params["dimension_numbers"]
        return (numbers.lhs_spec[1],), (numbers.rhs_spec[1],)
    return ()
