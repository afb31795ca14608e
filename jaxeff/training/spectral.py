"""Spectral normalisation as a pure function on parameters (Miyato et al. 2018, arXiv 1802.05957).

It knows kernels by name, not layers, so every projection of every kind of neuron is normalised alike, and a network is
normalised by calling it with other parameters. The linear maps between features that some kinds have behind their
projections ("mix" of CCP and NCP) are not called kernels: a `select` that is to reach them names them too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxeff import trees
from jaxeff.trees.leaves import quoted
from jaxeff.trees.parts import Pattern

KERNELS = "*kernel*"
EPSILON = 1e-12

Vectors = dict[str, jax.Array]


def spectral_vectors(key: jax.Array, params: Any, select: Pattern = KERNELS) -> Vectors:
    """Draws the vectors from which the power iteration starts.

    Args:
      key: PRNG key.
      params: pytree of arrays.
      select: which leaves are kernels [..., out]: a glob over their names ("conv1/layer/kernel_a"), several globs, or
        `predicate(name, leaf) -> bool`.

    Returns:
      A unit vector [out], of the kernel's dtype, by the name of every selected leaf.

    Raises:
      ValueError: if nothing is selected, or a selected leaf has fewer than two axes and so is no kernel.
    """
    kernels = _kernels(params, select)
    keys = jax.random.split(key, len(kernels))
    return {
        name: _unit(jax.random.normal(k, kernel.shape[-1:], kernel.dtype))
        for k, (name, kernel) in zip(keys, kernels.items(), strict=True)
    }


def spectral_normalise(
    params: Any, state: Vectors, select: Pattern = KERNELS, *, iterations: int = 1
) -> tuple[Any, Vectors]:
    """Divides every selected kernel by its largest singular value as a matrix [fan in, out].

    The singular value is estimated by power iteration from the vectors of the last call, which a slowly changing
    kernel keeps accurate. As in the paper the vectors are constants to differentiation, and the estimate is not.

    Args:
      params: pytree of arrays.
      state: vectors of `spectral_vectors` or of the last call, for the same `params` and `select`.
      select: as in `spectral_vectors`.
      iterations: steps of the power iteration, at least 1.

    Returns:
      The parameters, structured as `params` and with its shapes and dtypes, and the new vectors.

    Raises:
      ValueError: as `spectral_vectors`; if `state` belongs to other kernels, which are named; for `iterations` < 1.

    Example:
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 2.0]]), "bias": jnp.ones(2)}
      >>> vectors = spectral_vectors(jax.random.key(0), params)
      >>> normalised, vectors = spectral_normalise(params, vectors, iterations=50)
      >>> [round(float(x), 4) for x in jnp.diag(normalised["kernel"])], normalised["bias"].tolist()
      ([1.0, 0.6667], [1.0, 1.0])
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    kernels = _kernels(params, select)
    if set(kernels) != set(state):
        raise ValueError(
            f"state: has vectors for {quoted(sorted(state))}, but the selected kernels are "
            f"{quoted(sorted(kernels))}; make it with spectral_vectors of the same params and select"
        )
    vectors: Vectors = {}
    normalised: Vectors = {}
    for name, kernel in kernels.items():
        if state[name].shape != kernel.shape[-1:]:
            raise ValueError(
                f"state[{name!r}]: expected a vector {kernel.shape[-1:]} for the kernel {kernel.shape}, got shape "
                f"{state[name].shape}"
            )
        norm, vectors[name] = _spectral_norm(kernel.reshape(-1, kernel.shape[-1]), state[name], iterations)
        normalised[name] = kernel / norm
    return trees.map_named(lambda name, leaf: normalised.get(name, leaf), params), vectors


def _spectral_norm(matrix: jax.Array, vector: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    fixed = lax.stop_gradient(matrix)
    further = lax.fori_loop(1, iterations, lambda _, v: _unit(_unit(fixed @ v) @ fixed), vector)
    left = _unit(fixed @ further)
    new = _unit(left @ fixed)
    # A kernel of zeros has no direction: it stays as it is, and the vector waits for it to move.
    moved = left @ fixed @ new > EPSILON
    new = jnp.where(moved, new, vector)
    return jnp.where(moved, left @ matrix @ new, 1.0), new


def _unit(vector: jax.Array) -> jax.Array:
    return vector / jnp.maximum(jnp.linalg.norm(vector), EPSILON)


def _kernels(params: Any, select: Pattern) -> dict[str, jax.Array]:
    kernels = trees.flatten_names(trees.select(params, select))
    if not kernels:
        raise ValueError(f"select: nothing is selected of {quoted(trees.paths(params))}")
    for name, kernel in kernels.items():
        if kernel.ndim < 2:
            raise ValueError(f"select: {name!r} has shape {kernel.shape}; a kernel has at least two axes [..., out]")
    return kernels
