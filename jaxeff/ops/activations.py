"""Activation functions by name: every part of the library that takes one means the same by it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str | None) -> Callable[[jax.Array], jax.Array]:
    """The activation function of that name; None is the identity.

    Raises:
      ValueError: listing the valid names.
    """
    if name is None:
        return lambda x: x
    if name not in ACTIVATIONS:
        raise ValueError(f"act must be None or one of {', '.join(map(repr, ACTIVATIONS))}, got {name!r}")
    return ACTIVATIONS[name]
