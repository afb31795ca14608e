"""Which axes of a traced program must move together, and which keep their order.

Every axis is a node; what the equations of a jaxpr show to be the same axis becomes one node. A reshape makes a node
the product of others, a concatenation their sum. An axis of inputs, outputs, space, or of what is not understood is
pinned, with the reason.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxeff import compat


class Node:
    """An axis, or a part of one: itself, or the product or sum of parts; those found to be the same are one."""

    __slots__ = ("kind", "parent", "parts", "reason", "size")

    def __init__(self, size: int, kind: str = "atom", parts: Sequence["Node"] = ()):
        self.size, self.kind, self.parts = size, kind, list(parts)
        self.parent: Node | None = None
        self.reason: str | None = None


def fixed(size: int, reason: str) -> Node:
    """A new axis that keeps its order."""
    node = Node(size)
    node.reason = reason
    return node


def find(node: Node) -> Node:
    """The node that this one and all found to be the same have become."""
    while node.parent is not None:
        node = node.parent
    return node


def pin(node: Node, reason: str) -> None:
    """Makes an axis, with all its parts, keep its order; the first reason stays."""
    node = find(node)
    if node.kind == "atom":
        node.reason = node.reason or reason
    for part in node.parts:
        pin(part, reason)


def _factors(node: Node) -> list[Node]:
    """The parts of a product of products; what is of size 1 has no order to keep."""
    node = find(node)
    if node.kind != "product":
        return [node] if node.size != 1 else []
    return [factor for part in node.parts for factor in _factors(part)]


def _product(parts: Sequence[Node]) -> Node:
    factors = [factor for part in parts for factor in _factors(part)]
    if len(factors) == 1:
        return factors[0]
    return Node(int(np.prod([factor.size for factor in factors])), "product", factors)


def _same(a: Node, b: Node, reason: str = "of two orders") -> None:
    """Two axes that must move together."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise AssertionError(f"axes of sizes {a.size} and {b.size} cannot be one")
    if a.kind != "atom" and b.kind == "atom":
        a, b = b, a
    if a.kind == "atom":
        a.parent = b
        if a.reason:
            pin(b, a.reason)
        return
    if a.kind == b.kind == "sum" and [p.size for p in a.parts] == [p.size for p in b.parts]:
        for x, y in zip(a.parts, b.parts, strict=True):
            _same(x, y)
    elif a.kind == b.kind == "product":
        _refine(_factors(a), _factors(b), reason)
    else:
        _sum_of_copies(*((a, b) if a.kind == "sum" else (b, a)), reason)
    if find(a) is not find(b):
        find(a).parent = find(b)


def _refine(left: list[Node], right: list[Node], reason: str) -> None:
    """Matches the factors of two products of one size, splitting those that the other one has as several."""
    while left and right:
        (x, *left), (y, *right) = map(find, left), map(find, right)
        if x.kind == "product" or y.kind == "product":
            left, right = [*_factors(x), *left], [*_factors(y), *right]
            continue
        if x.size == y.size:
            _same(x, y)
            continue
        if x.size < y.size:
            x, y, left, right = y, x, right, left
        if x.size % y.size or x.kind == "sum":
            for node in (x, y, *left, *right):
                pin(node, reason)
            return
        rest = Node(x.size // y.size)
        if x.reason:
            rest.reason = x.reason
            pin(y, x.reason)
        x.kind, x.parts, x.reason = "product", [y, rest], None
        left = [rest, *left]


def _sum_of_copies(total: Node, other: Node, reason: str) -> None:
    """A sum of parts alike, such as patches, beside the product of their number and one of them."""
    sizes = {part.size for part in total.parts}
    if len(sizes) == 1 and other.kind == "product":
        count, inner = Node(len(total.parts)), Node(sizes.pop())
        _refine(_factors(other), [node for node in (count, inner) if node.size != 1], reason)
        pin(count, "of copies, one after the other")
        for part in total.parts:
            _same(part, inner)
        return
    pin(total, reason)
    pin(other, reason)


# --- primitives -------------------------------------------------------------------------------------------------------

ELEMENTWISE = frozenset(
    "abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf erf_inv exp exp2 expm1 floor "
    "ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow real "
    "reduce_precision rem round rsqrt select_n sign sin sqrt square stop_gradient sub tan tanh xor".split()
)
REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or".split())
CALLS: tuple[str, ...] = ("jaxpr", "call_jaxpr", "fun_jaxpr")


class Tracer:
    """Follows axes through a jaxpr, equation by equation."""

    def run(self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[list[Node]]) -> list[list[Node]]:
        """Axes of the results, from those of the arguments."""
        env: dict[Any, list[Node]] = {}
        for var, value in zip(jaxpr.constvars, constants, strict=True):
            env[var] = _constant(value)
        env.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom):
            return _constant(atom.val) if compat.is_literal(atom) else env[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            shapes = [tuple(var.aval.shape) for var in equation.outvars]
            env.update(zip(equation.outvars, self.step(equation, operands, shapes), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, equation: Any, operands: list[list[Node]], shapes: list[tuple[int, ...]]) -> list[list[Node]]:
        """Axes of what an equation gives."""
        name, params = equation.primitive.name, equation.params
        inner = next((params[key] for key in CALLS if compat.is_jaxpr(params.get(key))), None)
        if inner is not None and name not in ("scan", "while", "cond"):
            body = getattr(inner, "jaxpr", inner)
            return self.run(body, compat.jaxpr_constants(inner), operands)
        if name == "optimization_barrier":
            return operands
        if name in ELEMENTWISE:
            return [_elementwise(operands, shape) for shape in shapes]
        if name in REDUCTIONS:
            return [[node for i, node in enumerate(operands[0]) if i not in params["axes"]]]
        rule = getattr(self, f"_{name}", None)
        found = rule(params, operands, shapes[0]) if rule is not None else None
        if found is not None:
            return [found]
        for node in (node for axes in operands for node in axes):
            pin(node, f"of an operand of {name}")
        return [[fixed(size, f"of a result of {name}") for size in shape] for shape in shapes]

    def _broadcast_in_dim(self, params, operands, shape):
        axes: list[Node] = [Node(size) for size in shape]
        for node, dim in zip(operands[0], params["broadcast_dimensions"], strict=True):
            if node.size == shape[dim]:
                axes[dim] = node
        return axes

    def _transpose(self, params, operands, shape):
        return [operands[0][dim] for dim in params["permutation"]]

    def _squeeze(self, params, operands, shape):
        return [node for i, node in enumerate(operands[0]) if i not in params["dimensions"]]

    def _expand_dims(self, params, operands, shape):
        rest = iter(operands[0])
        return [Node(1) if i in params["dimensions"] else next(rest) for i in range(len(shape))]

    def _reshape(self, params, operands, shape):
        if params.get("dimensions") is not None:
            return None
        axes = [Node(size) for size in shape]
        if 0 not in shape:
            _same(_product(operands[0]), _product(axes), "of a reshape that cuts through it")
        return axes

    def _concatenate(self, params, operands, shape):
        along = params["dimension"]
        axes = [_elementwise_axis([axes[i] for axes in operands]) for i in range(len(shape)) if i != along]
        axes.insert(along, Node(shape[along], "sum", [axes[along] for axes in operands]))
        return axes

    def _pad(self, params, operands, shape):
        axes = []
        for node, (low, high, inside), size in zip(operands[0], params["padding_config"], shape, strict=True):
            if inside or low < 0 or high < 0:
                pin(node, "of what is cropped or spread")
                axes.append(fixed(size, "of what is cropped or spread"))
            elif low or high:
                around = [[Node(int(n))] if n else [] for n in (low, high)]
                axes.append(Node(size, "sum", [*around[0], node, *around[1]]))
            else:
                axes.append(node)
        return axes

    def _slice(self, params, operands, shape):
        axes = []
        strides = params["strides"] or (1,) * len(shape)
        limits = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        for node, (start, stop, stride) in zip(operands[0], limits, strict=True):
            axes.append(node if (start, stop, stride) == (0, node.size, 1) else _cut(node, start, stop, stride))
        return axes

    def _dot_general(self, params, operands, shape):
        (left, right), (left_batch, right_batch) = params["dimension_numbers"]
        a, b = operands
        for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
            _same(a[i], b[j])
        free = [node for i, node in enumerate(a) if i not in (*left, *left_batch)]
        return [*(a[i] for i in left_batch), *free, *(n for j, n in enumerate(b) if j not in (*right, *right_batch))]

    def _conv_general_dilated(self, params, operands, shape):
        if params["batch_group_count"] != 1:
            return None
        numbers, groups = params["dimension_numbers"], params["feature_group_count"]
        (batch, channels, *_), (out, within, *_), (out_batch, out_channels, *_) = numbers
        x, kernel = operands
        for nodes, spec in ((x, numbers.lhs_spec), (kernel, numbers.rhs_spec)):
            for i in spec[2:]:
                pin(nodes[i], "of space")
        if groups == 1:
            _same(x[channels], kernel[within])
        else:
            group = Node(groups)
            _same(x[channels], _product([group, kernel[within]]))
            _same(kernel[out], _product([group, Node(kernel[out].size // groups)]))
        axes = [fixed(size, "of space") for size in shape]
        axes[out_batch], axes[out_channels] = x[batch], kernel[out]
        return axes

    def _window(self, params, operands, shape):
        axes = []
        for i, (node, size) in enumerate(zip(operands[0], shape, strict=True)):
            still = params["window_dimensions"][i] == 1 and size == node.size
            if not still:
                pin(node, "of space")
            axes.append(node if still else fixed(size, "of space"))
        return axes

    _reduce_window_sum = _reduce_window_max = _reduce_window_min = _window

    def _reduce_window(self, params, operands, shape):
        return self._window(params, operands, shape)

    def _argmax(self, params, operands, shape):
        for i in params["axes"]:
            pin(operands[0][i], "of an argmax")
        return [node for i, node in enumerate(operands[0]) if i not in params["axes"]]

    _argmin = _argmax

    def _iota(self, params, operands, shape):
        return [fixed(n, "of numbers that count") if i == params["dimension"] else Node(n) for i, n in enumerate(shape)]


def _constant(value: Any) -> list[Node]:
    """Axes along which a constant does not change have no order."""
    array = np.asarray(value) if not jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.extended) else None
    if array is None:
        return [fixed(size, "of a constant") for size in np.shape(value)]
    return [
        Node(size) if array.size and (array == array.take([0], i)).all() else fixed(size, "of a constant")
        for i, size in enumerate(array.shape)
    ]


def _elementwise(operands: list[list[Node]], shape: tuple[int, ...]) -> list[Node]:
    """Operands are scalars, or have these axes; one of size 1 may stand for any size."""
    wide = [axes for axes in operands if len(axes) == len(shape)]
    return [_elementwise_axis([axes[i] for axes in wide if axes[i].size == size]) for i, size in enumerate(shape)]


def _elementwise_axis(nodes: Sequence[Node]) -> Node:
    first, *others = nodes
    for node in others:
        _same(first, node)
    return first


def _cut(node: Node, start: int, stop: int, stride: int) -> Node:
    """A slice of an axis: whole parts of a sum, or anything of it, which then has an order."""
    found = find(node)
    if found.kind == "sum" and stride == 1:
        ends = np.cumsum([0, *(part.size for part in found.parts)]).tolist()
        if start in ends and stop in ends:
            parts = found.parts[ends.index(start) : ends.index(stop)]
            return parts[0] if len(parts) == 1 else Node(stop - start, "sum", parts)
    pin(found, "of what is sliced")
    return fixed(-(-(stop - start) // stride), "of what is sliced")
