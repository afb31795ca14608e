"""One mesh of devices: where arrays lie, how a training step runs on all of them, how several hosts start together.

``placement`` makes meshes and puts batches and states on them; ``steps`` turns a training step into a data-parallel one
(sharded ``jit``, ``shard_map`` or ``pmap``) and accumulates gradients over microbatches; ``hosts`` starts multi-host
runs, assembles global batches from what each host loaded, and lets hosts agree.
"""

from jaxeff.parallel.hosts import gather, global_batch, initialize_distributed, is_first, on_first, process_slice
from jaxeff.parallel.placement import batch_sharding, divide_batch, mesh, put, replicate, replicated, shard_batch
from jaxeff.parallel.steps import accumulate_gradients, data_parallel, pmap_step

__all__ = [
    "accumulate_gradients",
    "batch_sharding",
    "data_parallel",
    "divide_batch",
    "gather",
    "global_batch",
    "initialize_distributed",
    "is_first",
    "mesh",
    "on_first",
    "pmap_step",
    "process_slice",
    "put",
    "replicate",
    "replicated",
    "shard_batch",
]
