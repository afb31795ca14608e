"""What reverse mode keeps between the forward and the backward pass, from the pullback that `jax.vjp` returns."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxeff.costs import macs, walk
from jaxeff.costs.report import INPUTS
from jaxeff.costs.scopes import Scope


def kept_buffers(
    fn: Callable[..., Any], args: Sequence[Any], params: slice, known: set[Scope]
) -> Iterator[tuple[Scope | str, int]]:
    """Yields what reverse mode keeps of a call.

    Args:
      fn: the function.
      args: its arguments; it is differentiated by every inexact leaf.
      params: which of the argument leaves are parameters; these are not yielded, nor is what depends on no argument.
      known: the layers of the forward pass.

    Yields:
      For each buffer the layer that computed it, "(inputs)" for an argument, and its bytes.

    Raises:
      ValueError: `fn` has no reverse mode.
    """
    results, jaxpr = _reverse_jaxpr(fn, args)
    program = walk.flatten(jaxpr, "paper")
    kept = {id(value): value for value in map(_storage, program.outputs[results:])}
    of_params = {id(value) for value in program.inputs[params]}
    varying = _varying(program)
    for value in kept.values():
        bases = [base for base, _ in value.bases()]
        producers = [base.producer for base in bases if base.producer is not None]
        if id(value) in of_params or not any(id(base) in varying for base in bases):
            continue
        yield _known_scope(producers[0].scope, known) if producers else INPUTS, value.nbytes


def _varying(program: walk.Program) -> set[int]:
    """Returns the values that depend on an argument; all others (the zeros of a relu) are made when they are read."""
    varying = {id(value) for value in program.inputs}
    before = -1
    while len(varying) > before:  # a second time round where a loop feeds later values back
        before = len(varying)
        for operation in program.operations:
            if any(id(base) in varying for value in operation.inputs for base, _ in value.bases()):
                varying.update(map(id, operation.outputs))
    return varying


def _reverse_jaxpr(fn: Callable[..., Any], args: Sequence[Any]) -> tuple[int, Any]:
    """Traces `fn` and its residuals; the results come first, and their number is returned."""
    results = 0

    def forward(*args):
        nonlocal results
        leaves, tree = jax.tree.flatten(args)
        inexact = [index for index, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

        def of_inexact(values):
            merged = list(leaves)
            for index, value in zip(inexact, values, strict=True):
                merged[index] = value
            return fn(*jax.tree.unflatten(tree, merged))

        out, pullback = jax.vjp(of_inexact, [leaves[index] for index in inexact])
        pullback(jax.tree.map(_zero_cotangent, out))  # only now a while loop says that it has no reverse mode
        out = jax.tree.leaves(out)
        results = len(out)
        return out, jax.tree.leaves(pullback)

    try:
        jaxpr = jax.make_jaxpr(forward)(*args)
    except Exception as error:  # whatever a primitive without reverse mode raises
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"residuals: fn cannot be differentiated in reverse mode ({reason}); pass residuals=False to leave them out"
        ) from error
    return results, jaxpr


def _zero_cotangent(out: Any) -> Any:
    inexact = jnp.issubdtype(out.dtype, jnp.inexact)
    return jnp.zeros(out.shape, out.dtype) if inexact else np.zeros(out.shape, jax.dtypes.float0)


def _storage(value: walk.Value) -> walk.Value:
    """Returns the value in whose buffer this one lies: views and layout changes of equal size need no other."""
    below = _below(value)
    if below is None:
        return value
    if value.producer is None:
        root = _storage(below)
        if root.producer is None and not root.sources:
            return root  # pieces of an argument, or the copies of it that the devices of a mesh hold anyway
        if below.nbytes != value.nbytes and below.producer is None:
            below = _below(below) or below  # perhaps a stack of the slices of one array
    return _storage(below) if below.nbytes == value.nbytes else value


def _below(value: walk.Value) -> walk.Value | None:
    if value.producer is not None:
        moves = value.producer.primitive in macs.LAYOUT and value.producer.primitive != "convert_element_type"
        return value.producer.inputs[0] if moves and value.producer.inputs else None
    return value.sources[0] if len(value.sources) == 1 and not value.carried else None


def _known_scope(scope: Scope, known: set[Scope]) -> Scope:
    """Finds the layer of the forward pass that a layer of the differentiated one stands for.

    Differentiation loses the outer names of what it hoists out of a loop, and rules of custom derivatives may add
    inner ones.
    """
    if scope in known:
        return scope
    ends = [other for other in known if scope and other[-len(scope) :] == scope]
    if len(ends) == 1:
        return ends[0]
    return next((scope[:length] for length in range(len(scope) - 1, 0, -1) if scope[:length] in known), scope)
