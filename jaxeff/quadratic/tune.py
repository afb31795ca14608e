"""Measures the forms of every quadratic layer of a network and remembers the faster of each."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeff.ops import autotune
from jaxeff.quadratic import kinds
from jaxeff.quadratic.layers import QuadraticConv, QuadraticDense
from jaxeff.quadratic.projections import Window, signature, stackable


def tune(module: nn.Module, x: Any) -> dict[str, str]:
    """Measures every form of every quadratic layer, forward and backward; takes seconds per layer.

    Args:
      module: a Linen module, for example `jaxeff.models.Network`.
      x: an input of the batch size that matters, an array or `jax.ShapeDtypeStruct`.

    Returns:
      The faster form, "separate" or "stacked", by the signature of the layer. Layers with `impl="auto"` that are
      traced from now on, in this process and in later ones, use it.
    """
    seen: list[tuple[Any, jax.ShapeDtypeStruct]] = []

    def watch(next_function, args, kwargs, context):
        layer = context.module
        if isinstance(layer, QuadraticConv | QuadraticDense) and context.method_name == "__call__":
            shown = jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)
            seen.append((layer.clone(parent=None, name=None), shown))
        return next_function(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(x.shape, x.dtype))
    named = [(_signature(layer, shape), layer, shape) for layer, shape in seen]
    layers = {name: (layer, shape) for name, layer, shape in named if name is not None}
    found = {}
    for name, (layer, shape) in layers.items():
        variables = jax.eval_shape(layer.init, jax.random.key(0), shape)
        forms = {impl: _step(layer.clone(impl=impl)) for impl in ("separate", "stacked")}
        found[name] = autotune.fastest(forms, (variables, shape))
    autotune.remember(found)
    return found


def _signature(layer, x) -> str | None:
    """The name under which the layer will look itself up; None for a kind with a single projection of the input."""
    kernels = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    of_x = stackable(kinds.get(layer.kind))
    if len(of_x) < 2:
        return None
    dtype = layer.dtype or jnp.result_type(x.dtype, *(leaf.dtype for leaf in jax.tree.leaves(kernels)))
    window = layer.window if isinstance(layer, QuadraticConv) else Window()
    shapes = [jax.ShapeDtypeStruct(kernels[f"kernel_{name}"].shape, dtype) for name in of_x]
    return signature(jax.ShapeDtypeStruct(x.shape, dtype), shapes, window)


def _step(layer):
    def step(variables, x):
        rest = {name: value for name, value in variables.items() if name != "params"}

        def run(params, x):
            return layer.apply({"params": params, **rest}, x, True, mutable=list(rest))[0]

        y, pullback = jax.vjp(run, variables["params"], x)
        return pullback(jnp.ones_like(y))

    return step
