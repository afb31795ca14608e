"""What a checkpoint says of its leaves, by which a damaged one and one of something else are told apart."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import trees

Leaves = Mapping[str, Mapping[str, Any]]


def encode(state: Any) -> Any:
    """Returns the state with PRNG keys as the unsigned integers behind them.

    Args:
      state: pytree of arrays.
    """
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def describe(state: Any) -> dict[str, dict[str, Any]]:
    """Returns the record of every leaf by its name, as plain JSON values.

    Args:
      state: pytree of arrays.

    Returns:
      "shape", "dtype", for a PRNG key its implementation "key", and, where every process sees the whole array, the
      "crc32" of its bytes.
    """
    encoded = jax.tree.leaves(encode(state))
    for leaf in encoded:
        if isinstance(leaf, jax.Array) and _seen_whole(leaf):
            leaf.copy_to_host_async()
    described = {}
    for (name, leaf), plain in zip(trees.flatten_names(state).items(), encoded, strict=True):
        entry: dict[str, Any] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if _is_key(leaf):
            entry["key"] = str(jax.random.key_impl(leaf))
        if _seen_whole(plain):
            entry["crc32"] = _crc32(plain)
        described[name] = entry
    return described


def other_tree(leaves: Leaves, like: Any) -> str | None:
    """Returns how the recorded leaves differ from the expected ones, None when they do not.

    Args:
      leaves: the record.
      like: pytree of arrays or `jax.ShapeDtypeStruct`.
    """
    expected = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in trees.flatten_names(like).items()}
    found = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in leaves.items()}
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is not expected" for name in found if name not in expected]
    differences += [
        f"{name} is {_written(*found[name])}, expected {_written(*expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if not differences:
        return None
    return "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")


def template(like: Any) -> Any:
    """Returns what Orbax has to read: the encoded leaves, with a sharding or as NumPy arrays.

    Args:
      like: pytree of arrays or `jax.ShapeDtypeStruct`; the shardings of the latter are kept.
    """

    def one(leaf: Any) -> Any:
        # By eval_shape, because only jax knows how many integers a key of this kind is made of.
        plain = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
        if sharding is None:
            return np.empty(plain.shape, plain.dtype)
        return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)

    return jax.tree.map(one, like)


def check_sums(encoded: Any, leaves: Leaves) -> None:
    """Compares the bytes that were read with the record.

    Args:
      encoded: the state with keys as integers.
      leaves: the record.

    Raises:
      ValueError: names the first leaf whose bytes differ.
    """
    for name, leaf in trees.flatten_names(encoded).items():
        expected = leaves[name].get("crc32")
        if expected is not None and _seen_whole(leaf) and _crc32(leaf) != expected:
            raise ValueError(f"the bytes of {name} are not those that were saved")


def decode(encoded: Any, like: Any, leaves: Leaves) -> Any:
    """Returns the state in the containers of `like`, with typed PRNG keys.

    Args:
      encoded: what was read.
      like: the expected tree.
      leaves: the record.
    """

    def one(name: str, leaf: Any) -> jax.Array:
        # A copy: on CPU the array would otherwise share NumPy's memory, which cannot be donated.
        array = leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)
        return jax.random.wrap_key_data(array, impl=leaves[name]["key"]) if "key" in leaves[name] else array

    decoded = [one(name, leaf) for name, leaf in zip(trees.paths(like), jax.tree.leaves(encoded), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), decoded)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _seen_whole(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def _crc32(leaf: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)


def _written(shape: tuple[int, ...], dtype: str) -> str:
    return f"{dtype}{list(shape)}"
