"""One mesh of devices: where arrays lie, how a training step runs on all of them, how several hosts start together.

``placement`` makes meshes and puts batches and states on them; ``steps`` turns a training step into a data-parallel one
(sharded ``jit``, ``shard_map`` or ``pmap``) and accumulates gradients over microbatches; ``hosts`` starts multi-host
runs and assembles global batches from what each host loaded.
"""

from jaxeff.parallel.hosts import global_batch, initialize_distributed, process_slice
from jaxeff.parallel.placement import batch_sharding, divide_batch, mesh, replicate, replicated, shard_batch
from jaxeff.parallel.steps import accumulate_gradients, data_parallel, pmap_step

__all__ = [
    "accumulate_gradients",
    "batch_sharding",
    "data_parallel",
    "divide_batch",
    "global_batch",
    "initialize_distributed",
    "mesh",
    "pmap_step",
    "process_slice",
    "replicate",
    "replicated",
    "shard_batch",
]
