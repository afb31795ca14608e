"""The average of a network round beside the simulator's: equal bit for bit, or not."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import federated, models, trees
from jaxeff.federated import fed2
from launch.bench import results

CLIENTS, CLASSES = 10, 10


def network(pairs: int) -> Iterator[dict[str, Any]]:
    """Updates of ten Fed2 clients of a VGG-9, averaged by the Flower strategy in another order of replies.

    Raises:
      ImportError: without the extra "flower".
    """
    from jaxeff.federated import flower, records

    records.need_flwr()
    from flwr.app import Message, MetricRecord, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # messages belong to a run
    rng = np.random.default_rng(0)
    grouped = fed2.adapt(models.vgg9(), "conv5", groups=10)
    module = fed2.GroupedNetwork(grouped)
    variables = jax.tree.map(np.asarray, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    counts = rng.integers(0, 40, (CLIENTS, CLASSES)) * rng.integers(0, 2, (CLIENTS, CLASSES))
    counts[:, 0] += 1
    moved = lambda leaf: (leaf + rng.normal(size=leaf.shape)).astype(leaf.dtype)
    updates = [jax.tree.map(moved, variables) for _ in range(CLIENTS)]
    members = federated.Member(
        jnp.arange(CLIENTS), jnp.asarray(counts.sum(1), jnp.float32), jnp.ones(CLIENTS), jnp.zeros(CLIENTS, jnp.int32)
    )
    simulated = jax.jit(fed2.aggregate(grouped, variables, counts).combine)(trees.stack(updates), members, variables)
    for mode in fed2.MODES:
        layout = flower.Layout(variables, CLASSES, fed2.group_axes(variables), grouped.class_to_group, mode)
        replies = []
        for number in rng.permutation(CLIENTS).tolist():
            owned = layout.owned(counts[number]) if mode == "subset" else None
            told = {"num-examples": int(counts[number].sum()), "class-counts": counts[number].tolist()}
            content = RecordDict(
                {
                    "arrays": layout.record(updates[number], owned),
                    "metrics": MetricRecord({**told, "partition-id": number}),
                }
            )
            request = Message(RecordDict(), dst_node_id=number + 1, message_type="train")
            replies.append(Message(content, reply_to=request))
        strategy = flower.Fed2Strategy(variables, layout)
        strategy.aggregate_train(1, replies)
        leaves = zip(jax.tree.leaves(strategy.variables), jax.tree.leaves(simulated), strict=True)
        same = [np.array_equal(a, b) for a, b in leaves]
        yield results.case(
            f"network.{mode}", "share of parameters that are bit-equal", float(np.mean(same)), better="higher",
            target=1.0, n=len(same), against=f"the simulator; {CLIENTS} clients of a VGG-9 in groups",
        )  # fmt: skip
