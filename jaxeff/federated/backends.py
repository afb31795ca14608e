"""How the clients of a round are computed: one after the other, in groups, all at once, or on many devices.

Every backend adds up the terms of all members and hands back what they return beside them, stacked; they differ in
time and memory alone.

    loop     a compiled client after the other, called from Python
    threads  a stream on each core, from a thread of Python each: for clients too small to keep several cores busy
    map      one program, a client after the other; all their variables are kept
    stream   one program, a client after the other; only sums are kept, so memory does not grow with the clients
    chunk    one program, some clients at a time under `vmap`
    vmap     one program, all at once
    shard    a stream on each device of a mesh

Under `chunk` and `vmap` a client waits until the slowest one beside it is done; chunks are of clients alike in size.

On CPU convolutional clients are fastest one after the other; on accelerators many at once fill the device.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxeff.federated.paired import add

Tree = Any
One = Callable[[Tree, Tree], tuple[Tree, Tree]]

BACKENDS: tuple[str, ...] = ("loop", "threads", "map", "stream", "chunk", "vmap", "shard")
FROM_PYTHON: tuple[str, ...] = ("loop", "threads")
"""Those that call compiled programs, and are none themselves."""
ALIASES: dict[str, str] = {"pmap": "shard"}
"""Other words for them: `jax.pmap` itself has become what "shard" is."""
AXIS = "clients"


def added_up(
    backend: str,
    one: One,
    context: Tree,
    members: Tree,
    zero: Tree,
    *,
    idle: Tree,
    lengths: jax.Array | None = None,
    chunk: int = 8,
    mesh: Mesh | None = None,
) -> tuple[Tree, Tree]:
    """Runs every member and adds up their terms.

    Args:
      backend: one of `BACKENDS`; those of `FROM_PYTHON` call compiled functions, the others are to be traced.
      one: (context, member) -> (terms, results).
      context: what all members see.
      members: leaves [M, ...].
      zero: terms of nobody.
      lengths: int [M], what each member has to do; those alike come together in a chunk.
      idle: a member that does nothing, with which the last chunk is filled up.
      chunk: members at a time.
      mesh: of "shard": with an axis "clients".

    Returns:
      The sums, and the results, leaves [M, ...].
    """
    if backend == "loop":
        return _loop(one, context, members, zero)
    if backend == "threads":
        return _threads(one, context, members, zero)
    if backend in ("map", "stream"):
        return _scan(one, context, members, zero)
    if backend == "vmap":
        return _at_once(one, context, members, zero)
    total = len(jax.tree.leaves(members)[0])
    if backend == "chunk":
        order = jnp.arange(total) if lengths is None else jnp.argsort(lengths, stable=True)
        members = jax.tree.map(lambda leaf: leaf[order], members)
        padded, count = _padded(members, idle, chunk)
        parts = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), padded)

        def some(total, part):
            terms, results = jax.vmap(one, (None, 0))(context, part)
            return add(total, _summed(terms)), results

        sums, results = lax.scan(some, zero, parts)
        place = jnp.argsort(order)
        return sums, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[place], results)
    assert mesh is not None
    padded, _ = _padded(members, idle, mesh.shape[AXIS], divide=True)

    def shard(context, part):
        sums, results = _scan(one, context, part, zero)
        over = lambda leaf: (lax.psum if jnp.issubdtype(leaf.dtype, jnp.inexact) else lax.pmax)(leaf, AXIS)
        return jax.tree.map(over, sums), results

    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    run = jax.shard_map(shard, mesh=mesh, in_specs=(whole, split), out_specs=(whole, split), check_vma=False)
    sums, results = run(context, padded)
    return sums, jax.tree.map(lambda leaf: leaf[:total], results)


def padding_waste(steps: Any, backend: str, chunk: int = 8) -> float:
    """Share of the work of a round that is done for clients that have finished already: 0 for none.

    Args:
      steps: int [M], what each client has done, as of `Report.steps`.
      backend: as of `added_up`.
      chunk: members at a time.
    """
    steps = np.sort(np.asarray(steps))
    size = {"chunk": chunk, "vmap": max(1, len(steps))}.get(backend, 1)
    parts = [steps[start : start + size] for start in range(0, len(steps), size)]
    done = sum(len(part) * int(part.max()) for part in parts)
    return 1 - steps.sum() / done if done else 0.0


def _scan(one, context, members, zero):
    def step(total, member):
        terms, results = one(context, member)
        return add(total, terms), results

    return lax.scan(step, zero, members)


def _at_once(one, context, members, zero):
    terms, results = jax.vmap(one, (None, 0))(context, members)
    return add(zero, _summed(terms)), results


def _loop(one, context, members, zero):
    sums, results = zero, []
    for number in range(len(jax.tree.leaves(members)[0])):
        terms, result = _compiled(one)(context, jax.tree.map(lambda leaf, number=number: leaf[number], members))
        sums = _add(sums, terms)
        results.append(result)
    return sums, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def _threads(one, context, members, zero):
    parts = _split(members, min(_cores(), len(jax.tree.leaves(members)[0])))
    run = _compiled_scan(one)
    return _gathered(list(_pool().map(lambda part: jax.block_until_ready(run(context, part, zero)), parts)))


@functools.partial(jax.jit, static_argnums=1)
def _split(members: Tree, number: int) -> list[Tree]:
    """Members in parts of nearly one length."""
    ends = np.linspace(0, len(jax.tree.leaves(members)[0]), number + 1).astype(int).tolist()
    cut = lambda start, stop: jax.tree.map(lambda leaf: leaf[start:stop], members)
    return [cut(*part) for part in zip(ends, ends[1:], strict=False)]


@jax.jit
def _gathered(parts: list[tuple[Tree, Tree]]) -> tuple[Tree, Tree]:
    """The sums of all parts, each of which began with zero, and their results one after the other."""
    sums, results = zip(*parts, strict=True)
    return functools.reduce(add, sums), jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="clients")


@functools.lru_cache(maxsize=32)
def _compiled_scan(one: One) -> Any:
    return jax.jit(lambda context, members, zero: _scan(one, context, members, zero))


@functools.lru_cache(maxsize=32)
def _compiled(one: One) -> Any:
    return jax.jit(one)


_add = jax.jit(add)


def _summed(terms: Tree) -> Tree:
    """Terms of several members, [k, ...], as one."""
    return jax.tree.map(lambda leaf: leaf.sum(0) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf.max(0), terms)


def _padded(members: Tree, idle: Tree, size: int, divide: bool = False) -> tuple[Tree, int]:
    """Members up to a multiple of `size`; and how many chunks of it there are."""
    total = len(jax.tree.leaves(members)[0])
    size = size if divide else min(size, total)
    count = -(-total // size)
    missing = count * size - total
    fill = lambda leaf, one: jnp.concatenate([leaf, jnp.repeat(jnp.asarray(one, leaf.dtype)[None], missing, 0)])
    return (jax.tree.map(fill, members, idle) if missing else members), count
