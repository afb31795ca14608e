"""Training steps on many devices, and on batches that do not fit at once.

A step is ``step(state, batch) -> (state, metrics)``. Three wrappers run it on all devices, and are called alike: the
state goes in and comes out as one tree, the batch has leaves ``[B, ...]``.

* ``data_parallel(..., via="jit")``: the step is written for the whole batch, as on one device. XLA splits the work and
  inserts the reductions, so the result is the single-device result, batch norm included.
* ``data_parallel(..., via="shard_map")``: the step is written for one device's rows, and itself reduces gradients,
  metrics and any statistics in its state with ``jax.lax.pmean(x, axis)``. For control over communication.
* ``pmap_step``: the same per-device step through ``jax.pmap``, for code that is written for it.

Per-device steps that forget a reduction leave replicas that differ, of which only one would be returned. Both wrappers
compare the replicas after the first call and say which leaf differs.

``optax.microbatching`` has further ways to accumulate (sums, running means, concatenation);
``accumulate_gradients`` is the mean over equal parts. The microbatches run in a ``lax.scan``, where on CPU only the
convolution of ``jaxeff.ops`` has a fast gradient.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxeff.parallel.placement import Tree, batch_sharding, check_divides, divide_batch, replicated

Step = Callable[[Tree, Tree], tuple[Tree, Tree]]

_VIA = ("jit", "shard_map")


def data_parallel(step: Step, mesh: Mesh, axis: str = "data", via: str = "jit", donate: bool = True) -> Step:
    """Compiles a training step for all devices of a mesh.

    Args:
      step: ``(state, batch) -> (state, metrics)``; the top of this module says what it computes under each ``via``.
      mesh: the mesh; along axes other than ``axis`` the work is repeated.
      axis: the mesh axis that splits the batch, and the axis name that a ``shard_map`` step reduces over.
      via: ``"jit"`` or ``"shard_map"``.
      donate: whether the memory of the state is reused for the new state, after which the old one cannot be read.

    Returns:
      A function called like ``step``. It takes host arrays or arrays anywhere on the mesh (those of ``shard_batch``
      and ``replicate`` are used where they are) and returns replicated arrays. It raises ``ValueError`` for a batch
      that does not divide by the devices, before anything is traced, and after the first ``shard_map`` call for
      replicas that differ.

    Raises:
      ValueError: unknown ``via``, or the mesh has no such axis.
    """
    if via not in _VIA:
        raise ValueError(f"data_parallel: via must be one of {list(_VIA)}, got {via!r}")
    by_row, whole = batch_sharding(mesh, axis), replicated(mesh)
    body = step
    if via == "shard_map":
        # check_vma=False keeps the meaning the step has under pmap: gradients are this device's until the step reduces
        # them. With the check on, jax.grad of replicated parameters already sums over the axis, and a pmean after that
        # would give gradients too large by the number of devices.
        specs = (PartitionSpec(), PartitionSpec(axis))
        body = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    compiled = jax.jit(body, in_shardings=(whole, by_row), out_shardings=whole, donate_argnums=(0,) if donate else ())
    check_first = _ReplicaCheck(axis if via == "shard_map" else None)

    @functools.wraps(step)
    def parallel_step(state, batch):
        check_divides(batch, mesh.shape[axis], f"devices on axis {axis!r}")
        return check_first(_checked_pair(compiled(state, batch)))

    return parallel_step


def pmap_step(step: Step, axis_name: str = "data", devices: Sequence[jax.Device] | None = None) -> Step:
    """Compiles a per-device training step with ``jax.pmap``, called like those of ``data_parallel``.

    ``jax.pmap`` is in maintenance mode; new code is better served by ``data_parallel``.

    Args:
      step: ``(state, batch) -> (state, metrics)`` on one device's rows; it reduces gradients, metrics and statistics
        with ``jax.lax.pmean(x, axis_name)``.
      axis_name: name of the mapped axis.
      devices: the devices to use, all local ones by default.

    Returns:
      A function called like ``step``: leaves ``[B, ...]`` are cut into ``[devices, B / devices, ...]``, the state is
      broadcast, and one copy of the new state and of the metrics comes back. On several hosts every host passes its
      own rows, and B counts those. It raises ``ValueError`` for a batch
      that does not divide by the devices, and after the first call for replicas that differ.
    """
    used = list(jax.local_devices() if devices is None else devices)
    compiled = jax.pmap(step, axis_name=axis_name, in_axes=(None, 0), out_axes=None, devices=used)
    check_first = _ReplicaCheck(axis_name)

    @functools.wraps(step)
    def parallel_step(state, batch):
        return check_first(_checked_pair(compiled(state, divide_batch(batch, len(used), "devices"))))

    return parallel_step


def accumulate_gradients(grad_fn: Callable[[Tree], Tree], batch: Tree, steps: int) -> Tree:
    """Mean of ``grad_fn`` over equal microbatches, computed one after the other to save memory.

    For a loss that is a mean over rows this is the value and the gradient of the whole batch, up to rounding. Not so
    for what is no mean over rows: batch norm sees microbatches, and a mean over valid rows has unequal weights.
    Microbatch ``i`` holds rows ``i, i + steps, ...``, so that a batch that is sharded by rows stays evenly spread.
    Inside a ``jax.shard_map`` of your own, pass it ``check_vma=False``, as ``data_parallel`` does.

    Args:
      grad_fn: microbatch to a tree of floating-point means, for instance
        ``lambda rows: jax.value_and_grad(loss, has_aux=True)(params, rows)``.
      batch: leaves ``[B, ...]``. Random keys that differ between microbatches go in here, one per row.
      steps: number of microbatches; only one microbatch's activations are alive at a time.

    Returns:
      What ``grad_fn`` returns, averaged. Sums are accumulated in float32 at least and cast back to each leaf's dtype.

    Raises:
      ValueError: B does not divide by ``steps``.
      TypeError: ``grad_fn`` returns leaves that are not floating point, such as integer counts, whose mean has no
        meaning in their dtype.
    """
    rows = check_divides(batch, steps, "accumulation steps") // steps

    def interleaved(leaf):
        return jnp.swapaxes(jnp.reshape(leaf, (rows, steps, *np.shape(leaf)[1:])), 0, 1)

    microbatches = jax.tree.map(interleaved, batch)
    shapes = jax.eval_shape(grad_fn, jax.tree.map(lambda leaf: leaf[0], microbatches))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"accumulate_gradients: output {_name(path)!r} of grad_fn is {leaf.dtype}; "
                "it must return means, in floating point"
            )

    if steps == 1:
        return grad_fn(batch)

    def add(totals, microbatch):
        values = grad_fn(microbatch)
        return jax.tree.map(lambda total, value: total + value.astype(total.dtype), totals, values), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _accumulator(leaf.dtype)), shapes)
    totals, _ = jax.lax.scan(add, zeros, microbatches)
    return jax.tree.map(lambda total, leaf: (total / steps).astype(leaf.dtype), totals, shapes)


def _accumulator(dtype) -> Any:
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _checked_pair(outputs) -> tuple[Tree, Tree]:
    if not isinstance(outputs, tuple) or len(outputs) != 2:
        raise TypeError(f"a step must return the pair (state, metrics), got {type(outputs).__name__}")
    return outputs


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


class _ReplicaCheck:
    """Compares, once, the copies that the devices hold of what should be replicated."""

    def __init__(self, axis: str | None):
        self.axis = axis  # None: nothing left to check

    def __call__(self, outputs):
        # Inside an outer jit there are no values to compare yet.
        if self.axis is None or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(outputs)):
            return outputs
        for part, tree in zip(("state", "metrics"), outputs, strict=True):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                first, *others = [_values(shard.data) for shard in leaf.addressable_shards]
                if not all(_equal(first, other) for other in others):
                    raise ValueError(
                        f"after one step the devices hold different values of {part} {_name(path)!r}: the step must "
                        "reduce what it computes from its rows (gradients, metrics, statistics) with "
                        f"jax.lax.pmean(x, {self.axis!r})"
                    )
        self.axis = None
        return outputs


def _values(array) -> np.ndarray:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array)


def _equal(first: np.ndarray, other: np.ndarray) -> bool:
    if not jnp.issubdtype(first.dtype, jnp.inexact):
        return bool(np.array_equal(first, other))
    # Devices may differ in the last bits (atomic additions on GPUs); a missing reduction differs by far more.
    scale = np.max(np.abs(first), initial=0.0, where=np.isfinite(first))
    tolerance = 16 * float(jnp.finfo(first.dtype).eps) * float(scale)
    return bool(
        np.allclose(np.asarray(first, complex), np.asarray(other, complex), rtol=0, atol=tolerance, equal_nan=True)
    )
