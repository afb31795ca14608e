"""Several hosts as one machine: starting them together, assembling their batches, agreeing on what to do next.

Every host runs the same program with its own ``process_id``; after ``initialize_distributed`` the devices of all hosts
are in ``jax.devices()``, one ``mesh()`` spans them, and ``data_parallel`` works as on one host.

What runs on the devices of all hosts must be started by all hosts in the same order, or they wait for each other for
ever. So what a host sees alone (a signal, a clock, a file) may decide what is computed next only after ``gather`` or
``on_first`` made it known to all. A host that fails alone ends the others too, but only after the minutes that JAX
waits for it.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxeff.parallel.placement import Tree, batch_sharding, check_axis, check_divides, check_rows

_REQUIRED = ("coordinator_address", "num_processes", "process_id")


def initialize_distributed(
    config: Any = None,
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: int | Sequence[int] | None = None,
    timeout: int = 300,
) -> bool:
    """Starts the multi-host runtime when the fields for it are set, and does nothing otherwise.

    Call it before anything computes: JAX fixes its devices at the first use. On clusters that JAX knows (TPU pods,
    Slurm, Open MPI) ``jax.distributed.initialize()`` finds the fields itself; call that instead.

    Args:
      config: a mapping or an object with attributes that holds the four fields below; fields that it lacks, or holds
        as ``None`` or ``""``, are unset. Keyword arguments win over it.
      coordinator_address: ``"host:port"`` of process 0, reachable from every host.
      num_processes: number of processes in all.
      process_id: which of them this is, from 0.
      local_device_ids: which of this host's accelerators the process uses; all by default.
      timeout: seconds to wait for the other processes.

    Returns:
      Whether this call started the runtime: ``False`` when nothing is set, or when it runs already as asked.

    Raises:
      ValueError: some of the first three fields are set but not all (the message names the missing ones), a field has
        an impossible value, or the runtime runs already with other fields.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
        "local_device_ids": local_device_ids,
    }
    fields: dict[str, Any] = {name: _field(config, name) if value is None else value for name, value in given.items()}
    fields = {name: value for name, value in fields.items() if value is not None and value != ""}
    if not fields:
        return False
    missing = [name for name in _REQUIRED if name not in fields]
    if missing:
        raise ValueError(
            f"initialize_distributed: {missing} not set, but {sorted(fields)} set; "
            f"a multi-host run needs {list(_REQUIRED)}, a single-host run none of them"
        )
    _check_fields(**{name: fields[name] for name in _REQUIRED})
    if jax.distributed.is_initialized():
        running = jax.process_index(), jax.process_count()
        asked = fields["process_id"], fields["num_processes"]
        if running != asked:
            raise ValueError(
                f"initialize_distributed: already running as process {running[0]} of {running[1]}, "
                f"asked to be process {asked[0]} of {asked[1]}; start a new Python process for that"
            )
        return False
    jax.distributed.initialize(**fields, initialization_timeout=timeout)
    return True


def process_slice(n: int, mesh: Mesh | None = None, axis: str = "data") -> slice:
    """Rows of a global batch that this host has to load.

    Args:
      n: rows of the global batch.
      mesh: the mesh the batch goes to. Needed when its axes do not simply run through the hosts in order; hosts that
        hold copies of the same rows (an axis for the model across hosts) then get the same slice.
      axis: the mesh axis that splits the batch.

    Returns:
      ``slice(start, stop)`` into the global batch; the whole batch on a single host.

    Raises:
      ValueError: the rows do not divide by the processes (with a mesh: by the devices along the axis), or the mesh
        orders its devices so that this host's rows are not contiguous.
    """
    if mesh is None:
        count, index = jax.process_count(), jax.process_index()
        check_rows(n, count, "processes")
        return slice(index * n // count, (index + 1) * n // count)
    check_axis(mesh, axis)
    check_rows(n, mesh.shape[axis], f"devices on axis {axis!r}")
    pieces = _row_ranges(mesh, axis, n)
    if any(stop != start for (_, stop), (start, _) in itertools.pairwise(pieces)):
        raise ValueError(
            f"process_slice: the mesh gives this host rows {pieces}, which are not contiguous; "
            "order the devices of the mesh by process along the batch axis"
        )
    return slice(pieces[0][0], pieces[-1][1])


def global_batch(local_batch: Tree, mesh: Mesh, axis: str = "data") -> Tree:
    """Assembles the global batch from the rows that each host loaded.

    Args:
      local_batch: leaves ``[B_local, ...]``: the rows ``process_slice(B, mesh, axis)`` of the global batch, as many
        on every host.
      mesh: the mesh.
      axis: the mesh axis that splits the rows.

    Returns:
      Leaves ``[B, ...]``: global arrays, row-sharded, of which each host holds its part. On a single host the same as
      ``shard_batch``.

    Raises:
      ValueError: the local rows do not divide by this host's devices along the axis, or the leaves disagree.
    """
    sharding = batch_sharding(mesh, axis)
    size = mesh.shape[axis]
    here = len(_row_ranges(mesh, axis, size))
    check_divides(local_batch, here, f"devices of this host on axis {axis!r}")

    def assemble(leaf):
        rows = np.asarray(leaf)
        shape = (rows.shape[0] // here * size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(assemble, local_batch)


def is_first() -> bool:
    """Whether this is the host that writes files and talks to people; of a single host always true."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """What every host says, known to all hosts.

    Must be called by all hosts alike; waits for the slowest, and for what the devices are still computing.

    Args:
      value: anything JSON can hold.

    Returns:
      The values in the order of the hosts; on a single host ``[value]``, at once.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    # A power of two, so that texts of many lengths need few compilations.
    padded = np.zeros(max(256, 1 << (int(lengths.max()) - 1).bit_length()), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(texts, lengths, strict=True)]


def on_first(action: Callable[[], Any]) -> Any:
    """Does something on the first host alone, such as work on files, while the others wait for it.

    Must be called by all hosts alike.

    Args:
      action: returns anything JSON can hold; it must not compute on devices of other hosts.

    Returns:
      The result of ``action``, on all hosts; on several hosts as it is after a way through JSON.

    Raises:
      Exception: what ``action`` raises, on the first host.
      RuntimeError: on the others, with the message of that.
    """
    if jax.process_count() == 1:
        return action()
    result, failed = None, None
    if is_first():
        try:
            result = json.loads(json.dumps(action()))
        except Exception as error:
            failed = error
    result, message = gather([result, None if failed is None else f"{type(failed).__name__}: {failed}"])[0]
    if failed is not None:
        raise failed
    if message is not None:
        raise RuntimeError(f"the first host stopped with {message}")
    return result


def _field(config: Any, name: str) -> Any:
    if config is None:
        return None
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _row_ranges(mesh: Mesh, axis: str, rows: int) -> list[tuple[int, int]]:
    """The [start, stop) of the rows that this host's devices hold, in order."""
    held = batch_sharding(mesh, axis).addressable_devices_indices_map((rows,)).values()
    return sorted({index[0].indices(rows)[:2] for index in held if index is not None})


def _check_fields(coordinator_address: Any, num_processes: Any, process_id: Any) -> None:
    host, _, port = str(coordinator_address).rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"initialize_distributed: coordinator_address must be 'host:port', got {coordinator_address!r}"
        )
    if not isinstance(num_processes, int) or num_processes < 1:
        raise ValueError(f"initialize_distributed: num_processes must be a positive integer, got {num_processes!r}")
    if not isinstance(process_id, int) or not 0 <= process_id < num_processes:
        raise ValueError(
            f"initialize_distributed: process_id must be an integer in 0 .. {num_processes - 1}, got {process_id!r}"
        )
