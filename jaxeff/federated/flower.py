"""Federated learning between machines: a Flower strategy and client that compute what the simulator computes.

Flower (`flwr`) carries messages; what is in them, and what becomes of it, is here:

    layout = Layout(variables, classes=10, group_axes=fed2.group_axes(variables), class_to_group=..., mode="subset")
    strategy = Fed2Strategy(variables, layout)
    strategy.start(grid, strategy.record(), num_rounds=50)         # in a ServerApp
    app = client_app(lambda context: Client(...))                  # a ClientApp

The server averages with `jaxeff.federated.paired_average`, clients in the order of their numbers, so that the same
updates give the same bits as in the simulator, whenever they come in. It believes no client: what does not fit is left
out by name, and the round goes on with the others.

Needs the extra `jaxeff[flower]`; this module can be imported without it.

Letters: N clients, M of them whose updates are counted, C classes, G groups.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxeff import trees
from jaxeff.federated.flower_client import Client, client_app, evaluate, train
from jaxeff.federated.paired import WEIGHTS, group_weights, paired_average
from jaxeff.federated.records import (
    ARRAYS,
    CONFIG,
    COUNTS,
    EXAMPLES,
    LIMIT,
    MISSING,
    PARTITION,
    ROUND,
    Layout,
    Refused,
    listed,
    need_flwr,
    short,
)

if MISSING is None:
    from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
    from flwr.serverapp.strategy import Strategy
else:
    Strategy = object  # type: ignore[assignment,misc]

__all__ = ["PARTITION", "Client", "Fed2Strategy", "Layout", "Refused", "client_app", "evaluate", "train"]

Tree = Any
MOST_EXAMPLES = 10**9
"""Of a client, and of each class; `LIMIT` counts on it."""
_log = logging.getLogger(__name__)


class Accepted(NamedTuple):
    """An update that fits.

    Attributes:
      number: of the client.
      node: of Flower.
      variables: arrays of numpy.
      counts: int64 [C].
      metrics: whatever else it tells, by name.
    """

    number: int
    node: int
    variables: Tree
    counts: np.ndarray
    metrics: dict[str, float]


class Fed2Strategy(Strategy):
    """Feature-paired averaging over a network; plain federated averaging for a layout without groups.

    The arrays of a round are those of `paired_average` of the updates that fit. An update is refused, by name in the
    log and in the metric "rejected", if an array is missing, foreign, damaged, of another shape or dtype or not finite;
    if counts are negative, no whole numbers, of another number of classes or do not add up; if it claims groups that it
    does not hold; or if its node has answered twice, or another node for the same client. Nodes that do not answer, or
    answer with an error, count as "missing". If nobody is left the variables stay as they were.

    Replies tell, in one MetricRecord, "num-examples", "class-counts" [C], "partition-id" and any other numbers, of
    which the mean by examples is reported.

    Args:
      variables: of the global model before the first round.
      layout: how they travel.
      by: how owners count in a group: "class_counts", "uniform" or "size".
      shared_by: how clients count in what is shared: "size" or "uniform".
      server_optimizer: takes the mean update of "params" for a gradient, as `jaxeff.federated.fed_opt` does; None for
        the mean itself.
      fraction_train, fraction_evaluate: of the nodes that take part in a round, or test its result on their examples.
      min_available_nodes: for how many nodes the first round waits; later ones wait for one.
      patience: seconds that it waits for them.
      rounds_before: that were finished before this start; rounds are counted on from there.
      seed: of which nodes are drawn.

    Raises:
      ImportError: without flwr.
      ValueError: for settings out of range.
    """

    def __init__(
        self,
        variables: Mapping[str, Any],
        layout: Layout,
        *,
        by: str = "class_counts",
        shared_by: str = "size",
        server_optimizer: optax.GradientTransformation | None = None,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 0.0,
        min_available_nodes: int = 2,
        patience: float = 600.0,
        rounds_before: int = 0,
        seed: int = 0,
    ) -> None:
        need_flwr()
        if by not in WEIGHTS:
            raise ValueError(f"by must be one of {', '.join(map(repr, WEIGHTS))}, got {by!r}")
        if shared_by not in ("size", "uniform"):
            raise ValueError(f"shared_by must be 'size' or 'uniform', got {shared_by!r}")
        if not 0 < fraction_train <= 1 or not 0 <= fraction_evaluate <= 1:
            raise ValueError(
                f"fraction_train must be in (0, 1] and fraction_evaluate in [0, 1], got {fraction_train} and "
                f"{fraction_evaluate}"
            )
        if min_available_nodes < 1 or patience < 0 or rounds_before < 0:
            raise ValueError(
                "min_available_nodes must be at least 1, patience and rounds_before not negative, got "
                f"{min_available_nodes}, {patience} and {rounds_before}"
            )
        self.layout, self.by, self.shared_by, self.seed = layout, by, shared_by, seed
        self.variables = jax.tree.map(np.asarray, dict(variables))
        self.server_optimizer = server_optimizer
        self.opt_state = None if server_optimizer is None else server_optimizer.init(self.variables["params"])
        self.fraction_train, self.fraction_evaluate = fraction_train, fraction_evaluate
        self.min_available_nodes, self.patience, self.rounds_before = min_available_nodes, patience, rounds_before
        self.report: dict[str, float] = {}
        """Metrics of the round before."""
        self._asked: set[int] | None = None
        self._groups: dict[int, tuple[int, ...]] = {}

    def record(self) -> "ArrayRecord":
        """The variables, as the arrays with which `start` begins."""
        return self.layout.record(self.variables)

    def summary(self) -> None:
        """Says what it does."""
        groups = "no groups" if self.layout.class_to_group is None else f"{self.layout.groups} groups"
        _log.info("%s, %s mode; at least %d nodes to begin", groups, self.layout.mode, self.min_available_nodes)

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> list["Message"]:
        """Messages to the nodes of a round, in subset mode with the groups of each."""
        nodes = self._drawn(grid, server_round, self.fraction_train)
        self._asked = set(nodes)
        self.variables = self.layout.read(arrays)
        config[ROUND] = server_round + self.rounds_before
        if self.layout.mode == "full":
            return [self._message(arrays, config, node, MessageType.TRAIN) for node in nodes]
        self._learn_groups([node for node in nodes if node not in self._groups], config, grid)
        known = [node for node in nodes if node in self._groups]
        records = {groups: self.layout.record(self.variables, groups) for groups in set(map(self._groups.get, known))}
        return [self._message(records[self._groups[node]], config, node, MessageType.TRAIN) for node in known]

    def aggregate_train(self, server_round: int, replies: Iterable["Message"]) -> tuple["ArrayRecord", "MetricRecord"]:
        """The arrays after a round and its metrics: "counted", "rejected", "missing", and means over clients."""
        answers, missing = self._answers(replies, self._asked)
        accepted, rejected = self._checked(answers, self._accepted)
        if accepted:
            self._take(accepted)
        self.report = {
            "counted": len(accepted),
            "rejected": rejected,
            "missing": missing,
            **_means([(int(one.counts.sum()), one.metrics) for one in accepted]),
        }
        # Whoever is not counted is asked for its classes again: they may have changed.
        for node in (self._asked or set()) - {one.node for one in accepted}:
            self._groups.pop(node, None)
        self._asked = None
        return self.record(), MetricRecord(dict(self.report))

    def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> list["Message"]:
        """Messages to the nodes that test the global model."""
        if not self.fraction_evaluate:
            return []
        config[ROUND] = server_round + self.rounds_before
        nodes = self._drawn(grid, server_round, self.fraction_evaluate)
        return [self._message(arrays, config, node, MessageType.EVALUATE) for node in nodes]

    def aggregate_evaluate(self, server_round: int, replies: Iterable["Message"]) -> "MetricRecord | None":
        """Means of the clients' tests by their examples; None where nobody tested."""
        answers, missing = self._answers(replies, None)
        accepted, rejected = self._checked(answers, self._told)
        if not answers and not missing:
            return None
        means = _means([(int(one.counts.sum()), one.metrics) for one in accepted])
        return MetricRecord({"counted": len(accepted), "rejected": rejected, "missing": missing, **means})

    def _message(self, arrays: Any, config: Any, node: int, kind: str) -> "Message":
        content = RecordDict({ARRAYS: arrays, CONFIG: config} if arrays is not None else {CONFIG: config})
        return Message(content=content, message_type=kind, dst_node_id=node)

    def _drawn(self, grid: Any, server_round: int, fraction: float) -> list[int]:
        """Nodes of a round, of those that are connected."""
        least = self.min_available_nodes if server_round == 1 else 1
        end, said = time.monotonic() + self.patience, -1
        while len(nodes := sorted(grid.get_node_ids())) < least:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{len(nodes)} nodes are connected after {self.patience:.0f} seconds, {least} are needed: start "
                    "clients, or ask for fewer with min_available_nodes"
                )
            if len(nodes) != said:
                _log.warning("waiting for clients: %d of %d are connected", len(nodes), least)
                said = len(nodes)
            time.sleep(0.5)
        count = max(1, round(fraction * len(nodes)))
        drawn = np.random.default_rng([self.seed, server_round + self.rounds_before]).permutation(len(nodes))[:count]
        return [nodes[place] for place in sorted(drawn)]

    def _learn_groups(self, nodes: Sequence[int], config: Any, grid: Any) -> None:
        """Asks nodes that are new which classes they have, as they are sent their groups alone."""
        if not nodes:
            return
        questions = [self._message(None, config, node, MessageType.QUERY) for node in nodes]
        answers, _ = self._answers(grid.send_and_receive(questions, timeout=self.patience), set(nodes))
        for one in self._checked(answers, self._told)[0]:
            self._groups[one.node] = self.layout.owned(one.counts)

    def _answers(self, replies: Iterable["Message"], asked: set[int] | None) -> tuple[list["Message"], int]:
        """Replies that are no errors, and how many of those asked have not sent one."""
        answers, errors = [], 0
        for reply in replies:
            if reply.has_error():
                errors += 1
                _log.warning("node %d: %s", reply.metadata.src_node_id, short(reply.error.reason))
            else:
                answers.append(reply)
        answered = {reply.metadata.src_node_id for reply in answers}
        if asked is None:
            return answers, errors
        if silent := sorted(asked - answered):
            _log.warning("no update of node %s", ", ".join(map(str, silent)))
        return answers, len(asked - answered)

    def _checked(
        self, answers: Sequence["Message"], read: Callable[["Message"], Accepted]
    ) -> tuple[list[Accepted], int]:
        """Answers that fit, in the order of their clients; and how many do not."""
        times = Counter(answer.metadata.src_node_id for answer in answers)
        accepted: list[Accepted] = []
        rejected = 0

        def refuse(node: int, reason: Any) -> None:
            nonlocal rejected
            rejected += 1
            _log.warning("rejected node %d: %s", node, reason)

        for answer in answers:
            node = answer.metadata.src_node_id
            try:
                if times[node] > 1:
                    raise Refused(f"one answer was expected, {times[node]} came")
                accepted.append(read(answer))
            except Refused as reason:
                refuse(node, reason)
            # Whatever a stranger has thought of, it ends here and not with the server.
            except Exception as reason:
                refuse(node, f"its answer cannot be read: {short(f'{type(reason).__name__}: {reason}')}")
        accepted.sort(key=lambda one: (one.number, one.node))
        kept: list[Accepted] = []
        for one in accepted:
            if kept and kept[-1].number == one.number:
                refuse(one.node, f"{PARTITION!r}: client {one.number} has answered already, as node {kept[-1].node}")
            else:
                kept.append(one)
        return kept, rejected

    def _accepted(self, answer: "Message") -> Accepted:
        told = self._told(answer)
        records = list(answer.content.array_records.values())
        if len(records) != 1:
            raise Refused(f"one ArrayRecord was expected, {len(records)} came")
        groups = self.layout.owned(told.counts) if self.layout.mode == "subset" else None
        return told._replace(variables=self.layout.read(records[0], groups, self.variables))

    def _told(self, answer: "Message") -> Accepted:
        """An answer without its arrays."""
        records = list(answer.content.metric_records.values())
        if len(records) != 1:
            raise Refused(f"one MetricRecord was expected, {len(records)} came")
        told = dict(records[0])
        if absent := [key for key in (EXAMPLES, COUNTS, PARTITION) if key not in told]:
            raise Refused(f"{listed(absent)} must be in its metrics, which are {listed(told)}")
        number, examples, counts = told.pop(PARTITION), told.pop(EXAMPLES), told.pop(COUNTS)
        if not isinstance(counts, list) or len(counts) != self.layout.classes:
            came = f"{len(counts)}" if isinstance(counts, list) else short(counts)
            raise Refused(f"{COUNTS!r} must be a list of {self.layout.classes}, one for each class, got {came}")
        whole = [_whole(COUNTS, value) for value in counts]
        if sum(whole) != _whole(EXAMPLES, examples):
            raise Refused(f"{EXAMPLES!r} must be the sum of its {COUNTS!r}, {sum(whole)}, got {short(examples)}")
        metrics = {}
        for name, value in told.items():
            if isinstance(value, list) or not abs(value) <= LIMIT:
                raise Refused(f"{short(name)} must be a finite number of at most {LIMIT:g}, got {short(value)}")
            metrics[name] = float(value)
        return Accepted(
            _whole(PARTITION, number), answer.metadata.src_node_id, None, np.array(whole, np.int64), metrics
        )

    def _take(self, accepted: Sequence[Accepted]) -> None:
        """The step of the server."""
        layout = self.layout
        counts = np.stack([one.counts for one in accepted])
        sizes = counts.sum(1)
        weights = (sizes if self.shared_by == "size" else sizes > 0).astype(np.float32)
        omega = np.zeros((len(accepted), 1), np.float32)
        if layout.class_to_group is not None:
            omega = group_weights(counts, layout.class_to_group, layout.groups, self.by)
        stacked = trees.stack([one.variables for one in accepted])
        new = dict(paired_average(stacked, layout.group_axes, omega, weights, self.variables))
        opt_state = self.opt_state
        if self.server_optimizer is not None and sizes.any():
            params = self.variables["params"]
            gradient = optax.tree.sub(params, new["params"])
            updates, opt_state = self.server_optimizer.update(gradient, opt_state, params)
            new["params"] = optax.apply_updates(params, updates)
        if not bool(trees.all_finite((new, opt_state))):
            _log.error("the server's step is not finite: the variables stay as they were")
            return
        self.variables, self.opt_state = jax.tree.map(np.asarray, new), opt_state


def _whole(name: str, value: Any) -> int:
    """A count of somebody else."""
    if isinstance(value, list) or not 0 <= value <= MOST_EXAMPLES or value != int(value):
        raise Refused(f"{name!r} must be whole numbers in 0..{MOST_EXAMPLES}, got {short(value)}")
    return int(value)


def _means(told: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Means by examples of all metrics that every client tells."""
    total = sum(size for size, _ in told)
    if not total:
        return {}
    counted = [(size / total, metrics) for size, metrics in told if size]
    names = set.intersection(*(set(metrics) for _, metrics in counted)) - {"counted", "rejected", "missing"}
    return {name: sum(share * metrics[name] for share, metrics in counted) for name in sorted(names)}
