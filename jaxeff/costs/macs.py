"""Multiply-accumulates of one equation: convolutions and matrix products, counted from shapes alone."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxeff import compat

CONVENTIONS = ("paper", "xla")

# Arithmetic that is neither elementwise nor counted; a report that meets one of these says so in its notes.
UNCOUNTED = frozenset(
    "cholesky cholesky_update eig eigh ffi_call fft hessenberg householder_product io_callback lu "
    "pure_callback qr schur svd symmetric_product triangular_solve tridiagonal tridiagonal_solve".split()
)

# Only rearrange or relabel: in an enclosing scope they belong to the layer that reads the result.
LAYOUT = frozenset(
    "broadcast_in_dim convert_element_type copy copy_p device_put expand_dims mesh_cast name pvary reshape reshard "
    "sharding_constraint squeeze stop_gradient transpose".split()
)

_MARGINS = re.compile(r"with_margins_([-\dx_]+)")
_REAL = re.compile(r"real_positions_(\d+)_of_(\d+)")
_DEPTHWISE = re.compile(r"depthwise_(convolution|weight_gradient)_\dd")


def call_macs(equation: Any, convention: str) -> int:
    """Counts the multiply-accumulates of a call that stands for one operation written element by element.

    Depthwise convolutions are faster on CPU as one multiply-add per kernel tap; `jaxeff.ops` puts them into calls named
    "depthwise_convolution_2d" (x, kernel) and "depthwise_weight_gradient_2d" (x, output gradient), with the number of
    spatial axes at the end. A call of such a name is counted if every product in it is that of a tap: a slice of the
    padded x times values of the other operand. Otherwise it is a call like any other.

    Args:
      equation: a jaxpr equation of any primitive.
      convention: as for `equation_macs`.

    Returns:
      A number of multiply-accumulates; 0 for every other call.
    """
    body = equation.params.get("jaxpr")
    if body is None or not _DEPTHWISE.fullmatch(str(equation.params.get("name"))):
        return 0
    makers = {var: step for step in body.eqns for var in step.outvars}
    total = 0
    for step in body.eqns:
        if step.primitive.name == "mul":
            count = _tap_product(step, body.invars, makers, convention)
            if count is None:
                return 0
            total += count
    return total


def equation_macs(equation: Any, convention: str) -> int:
    """Counts the multiply-accumulates of one jaxpr equation, once.

    Args:
      equation: a jaxpr equation of any primitive.
      convention: "paper" counts every tap of a convolution at every output position; "xla" leaves out the taps that
        fall into padding or into the holes of a dilated input, as XLA's own cost analysis does.

    Returns:
      A number of multiply-accumulates; 0 for everything that is not a convolution or a matrix product.
    """
    count = _COUNTERS.get(equation.primitive.name)
    return 0 if count is None else count(equation, convention)


def valid_taps(size: int, outputs: int, taps: int, stride: int, low: int, dilation: int, kernel_dilation: int) -> int:
    """Counts the (output position, kernel tap) pairs along one axis whose input is a real element.

    Args:
      size: length of the input axis.
      outputs: length of the output axis.
      taps: length of the kernel axis.
      stride: step between windows.
      low: padding before the first element; negative when elements are cut off.
      dilation: distance between neighbouring elements of the input (1: no holes).
      kernel_dilation: distance between neighbouring taps of the kernel.

    Returns:
      A count between 0 and `outputs * taps`.
    """
    if not size:
        return 0
    position = np.arange(outputs)[:, None] * stride - low + np.arange(taps)[None, :] * kernel_dilation
    real = (position >= 0) & (position <= (size - 1) * dilation) & (position % dilation == 0)
    return int(np.count_nonzero(real))


def _convolution(equation: Any, convention: str) -> int:
    inputs, kernel = (list(atom.aval.shape) for atom in equation.invars)
    outputs = equation.outvars[0].aval.shape
    params = equation.params
    in_spec, kernel_spec, out_spec = params["dimension_numbers"]
    lows = [low for low, _ in params["padding"]]
    dilations = list(params["lhs_dilation"])
    if margins := _MARGINS.search(str(equation.source_info.name_stack)):
        # `jaxeff.ops` crops and pads the input beforehand where XLA's convolution does it wrongly.
        for axis, margin in enumerate(margins[1].split("_")):
            low, high, dilation = map(int, margin.split("x"))
            size = inputs[in_spec[2 + axis]] - low - high
            inputs[in_spec[2 + axis]] = (size - 1) // dilation + 1
            lows[axis] += low * dilations[axis]
            dilations[axis] *= dilation
    # The kernel's input channels are already those of one group, and the output's batch that of one batch group.
    channels = outputs[out_spec[0]] * outputs[out_spec[1]] * kernel[kernel_spec[1]]
    if convention == "paper":
        return channels * math.prod(outputs[d] for d in out_spec[2:]) * math.prod(kernel[d] for d in kernel_spec[2:])
    spatial = (
        valid_taps(inputs[i], outputs[o], kernel[k], stride, low, dilation, kernel_dilation)
        for i, o, k, stride, low, dilation, kernel_dilation in zip(
            in_spec[2:],
            out_spec[2:],
            kernel_spec[2:],
            params["window_strides"],
            lows,
            dilations,
            params["rhs_dilation"],
            strict=True,
        )
    )
    return channels * math.prod(spatial)


def _tap_product(product: Any, operands: Sequence[Any], makers: Mapping[Any, Any], convention: str) -> int | None:
    """Counts the product of one kernel tap, wherever `vmap` has put its axes; None if it is another product."""
    (x, steps), (other, _) = (_history(atom, makers) for atom in product.invars)
    steps = [step for step in steps if step.primitive.name not in LAYOUT]
    if [x, other] != list(operands) or [step.primitive.name for step in steps] != ["slice", "pad"]:
        return None
    size = math.prod(product.outvars[0].aval.shape)
    if convention == "paper" or not size:
        return size
    view, pad = steps
    shape = view.outvars[0].aval.shape
    # Along each axis the view is a convolution with a single tap, whose first window is where the slice starts.
    real = math.prod(
        valid_taps(length, outputs, 1, stride, low - start, interior + 1, 1)
        for length, outputs, start, stride, (low, _, interior) in zip(
            pad.invars[0].aval.shape,
            shape,
            view.params["start_indices"],
            view.params["strides"] or (1,) * len(shape),
            pad.params["padding_config"],
            strict=True,
        )
    )
    return size // math.prod(shape) * real  # the other operand may have mapped axes that the view has not


def _history(atom: Any, makers: Mapping[Any, Any]) -> tuple[Any, list[Any]]:
    """Follows an array back through operations on one array: where it began, and the operations, last one first."""
    steps: list[Any] = []
    while not compat.is_literal(atom) and atom in makers:
        arrays = [operand for operand in makers[atom].invars if not compat.is_literal(operand)]
        if len(arrays) != 1:
            break
        steps.append(makers[atom])
        (atom,) = arrays
    return atom, steps


def _dot(equation: Any, convention: str) -> int:
    left = equation.invars[0].aval.shape
    (contracting, _), _ = equation.params["dimension_numbers"]
    count = math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in contracting)
    # A product over a shifted view is one tap of a convolution of `jaxeff.ops`; it says how much of it is no padding.
    real = _REAL.search(str(equation.source_info.name_stack)) if convention == "xla" else None
    return count // int(real[2]) * int(real[1]) if real and count else count


def _ragged_dot(equation: Any, convention: str) -> int:
    """Every element of the left operand belongs to one group, so it meets the right operand's free axes once."""
    del convention
    left, right = (atom.aval.shape for atom in equation.invars[:2])
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = numbers.dot_dimension_numbers
    shared = {*contracting, *batch, *numbers.rhs_group_dimensions}
    return math.prod(left) * math.prod(size for axis, size in enumerate(right) if axis not in shared)


def counts_itself(equation: Any) -> bool:
    """Whether an equation calls compiled code of `jaxeff.ops`, which says how many multiply-accumulates it does."""
    return equation.primitive.name == "ffi_call" and "paper_macs" in dict(equation.params["attributes"])


def _compiled(equation: Any, convention: str) -> int:
    return int(dict(equation.params["attributes"])[f"{convention}_macs"]) if counts_itself(equation) else 0


_COUNTERS = {
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "ffi_call": _compiled,
}
