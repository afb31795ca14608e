"""Every branch on the version of jax: the rest of the package asks here and never looks at a version.

Covers jax 0.10 (Python 3.11) to 0.11 (Python 3.12), which changed two things in jaxprs: the closed and the open class
became one, and `scan` says where its constants and carry lie through a pair of flat trees where it used to say it
through two integers. And `compute_on`, which was a context, is what `compute_on2` was.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import compute_on
from jax.extend import core

__all__ = [
    "ffi_result_like",
    "has_side_effects",
    "is_jaxpr",
    "is_literal",
    "jaxpr_constants",
    "manual_axes",
    "on_host",
    "result_like",
    "scan_operands",
    "vary",
    "varying_axes",
]


def is_jaxpr(value: Any) -> bool:
    """Says whether `value` is a jaxpr, closed or open."""
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def is_literal(atom: Any) -> bool:
    """Says whether an input or output of an equation is a literal, whose value is `atom.val`, and not a variable."""
    return isinstance(atom, core.Literal)


def jaxpr_constants(jaxpr: Any) -> tuple[Any, ...]:
    """Returns the values that a jaxpr closed over, one for each of its `constvars`; an open jaxpr has none."""
    return tuple(getattr(jaxpr, "consts", ()))


def scan_operands(params: Mapping[str, Any]) -> tuple[int, int]:
    """Counts the operands of a `scan` equation by role.

    Args:
      params: the parameters of the equation.

    Returns:
      How many operands are constants, and how many of those that follow are the carry; the rest is scanned over.
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()
    return len(constants), len(carry)


def manual_axes(params: Mapping[str, Any]) -> frozenset[str]:
    """Names the mesh axes over which a `shard_map` equation with these parameters splits its operands."""
    return frozenset(params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"])


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays in the host's memory that the host computes, also inside a program of a device."""
    wrap: Any = getattr(compute_on, "compute_on2", compute_on.compute_on)
    return wrap(function, compute_type="device_host", out_memory_spaces=jax.memory.Space.Host)


def has_side_effects(effects: Any) -> bool:
    """Says whether an equation with these effects must be kept even when nothing reads its results.

    The effect of naming a mesh axis, which every collective has, orders nothing and keeps nothing alive.
    """
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in effects)


def varying_axes(array: Any) -> frozenset[str]:
    """Names the mesh axes of a surrounding `shard_map` along which an array differs between devices."""
    aval = jax.typeof(array)
    return frozenset(aval.mat.varying if hasattr(aval, "mat") else aval.vma)


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """Makes arrays ones that may differ along these axes of a `shard_map`, whose gradients are then summed."""

    def one(array: Any) -> Any:
        missing = axes - varying_axes(array)
        return lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array

    return jax.tree.map(one, tree) if axes else tree


def result_like(array: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a kernel's result that differs along the axes of a `shard_map` along which an array does."""
    aval: Any = jax.typeof(array)
    axes: dict[str, Any] = {"manual_axis_type": aval.mat} if hasattr(aval, "mat") else {"vma": aval.vma}
    return jax.ShapeDtypeStruct(shape, dtype, **axes)


def ffi_result_like(array: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """`result_like` for `jax.ffi.ffi_call`, which takes the axes from an abstract value alone, as it has the mesh."""
    aval: Any = jax.typeof(array)
    whole = aval.sharding.update(spec=jax.P(*(None,) * len(shape)))
    return aval.update(shape=shape, dtype=np.dtype(dtype), weak_type=False, sharding=whole)
