"""Layer names: the name stacks of equations, freed of the marks that transformations leave in them.

An inner jaxpr holds names relative to the equation that calls it, so the stacks of all callers compose from the
outside in. Transformations wrap the name that follows them: `transpose(jvp(net))/conv` and `net/conv` are the same
layer.
"""

import functools
import re
from typing import Any

Scope = tuple[str, ...]

_WRAPPED = re.compile(r"(?:jvp|vmap|transpose)\((.*)\)")
_SEPARATOR = re.compile(r"/(?![^(]*\))")  # a slash that is not inside parentheses
# What `jaxeff.ops` tells `jaxeff.costs.macs` about the form of one convolution; no layer.
_FORM = re.compile(r"real_positions_\d+_of_\d+|with_margins(?:_-?\d+x-?\d+x\d+)+")
_RECOMPUTED = "rematted_computation"  # what jax names the second forward pass of a checkpointed function


def equation_scope(outer: Scope, equation: Any) -> Scope:
    """Names the layer of an equation.

    Args:
      outer: the layer of the equation that holds the jaxpr of this one; empty at the top.
      equation: a jaxpr equation.

    Returns:
      The names from the outermost to the innermost; empty outside every scope.
    """
    return outer + _names(str(equation.source_info.name_stack))


@functools.lru_cache(maxsize=4096)
def _names(stack: str) -> Scope:
    marked = [part for part in _SEPARATOR.split(stack) if part and part != _RECOMPUTED]
    names = [_unwrapped(part) for part in marked]
    if marked and "transpose(" in marked[0]:
        # The backward pass of a checkpointed function repeats the path of its forward pass:
        # transpose(jvp(net))/block/jvp(net)/block.
        for start in range(1, len(names)):
            if names[start] != marked[start] and names[start : 2 * start] == names[:start]:
                names = names[start:]
                break
    return tuple(name for part in names for name in part.split("/") if name and not _FORM.fullmatch(name))


def _unwrapped(part: str) -> str:
    while match := _WRAPPED.fullmatch(part):
        part = match.group(1)
    return part
