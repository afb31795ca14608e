"""Measures the engines of every gated convolution of a network, and remembers the fastest of each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeff.dynamic import convolution
from jaxeff.dynamic.linen import GatedCall, gated_calls
from jaxeff.ops import autotune


def tune(module: nn.Module, x: Any, *, train: bool = False) -> dict[str, str]:
    """Measures every exact engine of every gated convolution; takes seconds per layer.

    Args:
      module: a Linen module, for example `jaxeff.models.Network` or `jaxeff.dynamic.Gated`.
      x: an input of the batch size that matters, an array or `jax.ShapeDtypeStruct`.
      train: whether forward and backward pass are measured together, or the forward pass alone.

    Returns:
      The fastest engine by the signature of the layer; "mask" where none is faster than masking. Layers with
      `engine="auto"` that are traced from now on, in this process and in later ones, use it.
    """
    calls = {convolution.signature(c.settings, c.x, c.kernel, c.window): c for c in gated_calls(module, x)}
    found = {}
    for name, call in calls.items():
        names = convolution.candidates(call.settings, call.x, call.window)
        forms = {engine: with_engine(call, engine) for engine in names}
        if train:
            forms = {engine: _step(form) for engine, form in forms.items()}
        found[name] = autotune.fastest(forms, (call.x, call.kernel), rounds=9)
    autotune.remember(found)
    return found


def with_engine(call: GatedCall, engine: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A gated convolution of a network, computed by one engine: a function of x and kernel."""
    settings = dataclasses.replace(call.settings, engine=engine)
    return lambda x, kernel: convolution.conv(x, kernel, settings, **call.window._asdict())


def _step(function):
    def step(x, kernel):
        y, pullback = jax.vjp(function, x, kernel)
        return pullback(jnp.ones_like(y))

    return step
