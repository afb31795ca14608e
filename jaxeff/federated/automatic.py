"""Which backend is fastest for a round on this machine: measured once on shortened clients, and remembered.

Measured are rounds of the very same clients with examples enough for a few steps each; they keep their proportions, as
what clients of unequal size cost differs between backends. What was found is kept by `jaxeff.ops.autotune`, under all
that the traced round depends on.
"""

import hashlib
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.federated.clients import Clients
from jaxeff.ops import autotune

Round = Callable[[Any, Clients], tuple[Any, Any]]
STEPS = 2
"""Steps of a client in an epoch while it is measured, on average."""
TURNS = 3


def candidates() -> tuple[str, ...]:
    """Backends worth a measurement here, all of them one program; on CPU all clients at once never paid."""
    return ("stream", "chunk") if jax.default_backend() == "cpu" else ("stream", "chunk", "vmap")


def fastest(rounds: Mapping[str, Round], state: Any, clients: Clients, batch_size: int) -> str:
    """The fastest of several rounds that give the same, from the table, or measured and remembered.

    Args:
      rounds: by the name of the backend; the first one is taken where another is not faster by a tenth.
      state: of the federation; it stays as it is.
      clients: that the rounds are for.
      batch_size: of them.

    Returns:
      The name.

    Raises:
      ValueError: under `jit`, where nothing can be measured, if nothing is remembered.
    """
    first, *others = rounds
    name = _signature(rounds[first], state, clients, list(rounds))
    if (known := autotune.lookup(name)) in rounds:
        return str(known)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, clients))):
        raise ValueError("backend 'auto' measures its first round: call federation.tune(state, clients) outside of jit")
    took = _seconds(rounds, state, _shortened(clients, batch_size), optional=others)
    best = min(took, key=took.__getitem__)
    chosen = best if took[best] < (1 - autotune.MARGIN) * took[first] else first
    autotune.remember({name: chosen})
    return chosen


def _shortened(clients: Clients, batch_size: int) -> Clients:
    """The same clients with fewer examples, in proportion."""
    wanted = STEPS * batch_size * clients.number
    share = jnp.minimum(1.0, wanted / jnp.maximum(clients.sizes.sum(), 1))
    return clients._replace(sizes=jnp.ceil(clients.sizes * share).astype(jnp.int32))


def _seconds(rounds: Mapping[str, Round], state: Any, clients: Clients, optional: Sequence[str]) -> dict[str, float]:
    """The least time of each of a few interleaved rounds."""
    took: dict[str, float] = {}
    left = dict(rounds)
    for turn in range(TURNS + 1):
        for name, run in list(left.items()):
            own = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # a round gives up its state
            start = time.perf_counter()
            try:
                jax.block_until_ready(run(own, clients)[0])
            except Exception as error:  # out of memory, or what a compiler does not know
                if name not in optional:
                    raise
                warnings.warn(f"backend {name!r} is left out, as it fails here: {error}", stacklevel=4)
                del left[name]
                continue
            if turn:  # the first one compiles
                took[name] = min(took.get(name, float("inf")), time.perf_counter() - start)
    return {name: took[name] for name in left}


def _signature(run: Round, state: Any, clients: Clients, names: list[str]) -> str:
    """Names a round by its program, in which addresses of this process do not count."""
    program = re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(run)(state, clients)))
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(clients)]
    return autotune.signature("federated.round", shapes, hashlib.sha256(program.encode()).hexdigest()[:16], *names)
