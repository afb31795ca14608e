"""Measures the engines of every gated convolution of a network, and remembers the fastest of each."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.dynamic import convolution
from jaxeff.dynamic.linen import GatedCall, gated_calls, parameter_bytes
from jaxeff.dynamic.selection import Reader, select
from jaxeff.ops import autotune


def tune(
    module: nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None, train: bool = False
) -> dict[str, str]:
    """Measures every exact engine of every gated convolution; takes seconds per layer.

    Args:
      module: a Linen module, for example `jaxeff.models.Network` or `jaxeff.dynamic.Gated`.
      *inputs: what it is called with, of the batch size that matters: pytrees of arrays, `jax.ShapeDtypeStruct` and
        numbers.
      options: keyword arguments of its call, such as {"train": True} where the network is another while it learns.
      train: whether forward and backward pass are measured together, or the forward pass alone. The table has one
        engine for each shape, that of the last measurement: who trains and serves at one batch size measures before
        each.

    Returns:
      The fastest engine by the signature of the layer; "mask" where none saves a tenth of its time. Layers with
      `engine="auto"` that are traced from now on, in this process and in later ones, use it. Engines that do not
      compile for a layer are left out with a warning.
    """
    calls = {call.signature: call for call in gated_calls(module, *inputs, options=options)}
    footprint, found = parameter_bytes(module, *inputs, options=options), {}
    for name, call in calls.items():
        names = convolution.candidates(call.settings, call.x, call.window, call.features)
        forms = {engine: with_engine(call, engine) for engine in names}
        if train:
            forms = {engine: _step(form) for engine, form in forms.items()}
        found[name] = autotune.fastest(forms, (call.x, call.kernel), 9, standard="mask", footprint=footprint)
    autotune.remember(found)
    return found


def with_engine(call: GatedCall, engine: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A gated convolution of a network, computed by one engine: a function of x and kernel."""
    settings, window = dataclasses.replace(call.settings, engine=engine), call.window._asdict()
    if call.features is None:
        return lambda x, kernel: convolution.conv(x, kernel, settings, **window)
    reader = Reader(call.window, (call.kernel.shape[0], call.kernel.shape[1]))
    spread = np.arange(call.features, dtype=np.int32) * call.kernel.shape[-1] // call.features
    features = np.broadcast_to(spread, (call.x.shape[0], call.features))

    def some(x, kernel):
        kept = select(x, settings, reader)._replace(features=jnp.asarray(features))
        return convolution.conv(x, kernel, settings, **window, kept=kept)

    return some


def _step(function):
    def step(x, kernel):
        y, pullback = jax.vjp(function, x, kernel)
        return pullback(jnp.ones_like(y))

    return step
