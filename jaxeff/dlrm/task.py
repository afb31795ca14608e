"""Training and evaluation of recommendation models: a method for `jaxeff.training.fit`, log-loss and exact AUC.

The dense parameters learn by any optax optimiser, the tables by row-wise Adagrad on the rows that a batch read. The
state is one pytree, so checkpoints and exact resume are those of every method.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxeff.dlrm.adagrad import SparseTransformation, apply_updates, sparse_gradient
from jaxeff.dlrm.model import DLRM, Architecture, bags_of, init_tables, pool
from jaxeff.training import Method
from jaxeff.training.step import Batch, Metrics


class RecommenderState(NamedTuple):
    """What a step of `recommendation` reads and writes.

    Attributes:
      step: int32 scalar, the number of finished steps.
      params: of the core, `{"bottom": ..., "top": ...}`.
      opt_state: state of its optimiser.
      tables: float32 [rows, D] by name.
      table_state: state of theirs.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    tables: dict[str, jax.Array]
    table_state: Any


def recommendation(
    architecture: Architecture,
    tx: optax.GradientTransformation,
    table_tx: SparseTransformation,
    *,
    mode: str = "sum",
) -> Method:
    """Returns the method that trains a model on batches {"dense", "ids", "lengths", "label"}.

    `dense` is float [B, n_d], absent or [B, 0] where there are no dense features; `label` is [B], 1 for a click. `ids`,
    `lengths` and `weights` (the latter two may be absent) are as in `jaxeff.dlrm.model.bags_of`. Evaluation batches may
    carry "mask" float [B], 1 for valid examples and 0 for padding.

    Args:
      architecture: of the model.
      tx: optimiser of the core.
      table_tx: of the tables, `jaxeff.dlrm.adagrad.rowwise_adagrad`.
      mode: how bags are pooled, "sum" or "mean".

    Returns:
      The method. Its state is a `RecommenderState`; step reports "loss", "accuracy" and "grad_norm" (of the core, L2);
      evaluate sums "loss", the log-loss, and "accuracy". The AUC, which is no sum, is from `evaluation`.

    Raises:
      ValueError: from `init` for a batch that does not fit the architecture.
    """

    def init(key: jax.Array, batch: Batch) -> RecommenderState:
        _check_batch(batch, architecture)
        core_key, table_key = jax.random.split(key)

        @jax.jit
        def create(core_key: jax.Array, table_key: jax.Array) -> RecommenderState:
            shapes = jnp.zeros((1, architecture.dense)), jnp.zeros((1, len(architecture.rows), architecture.dim))
            params = DLRM(architecture).init(core_key, *shapes)["params"]
            tables = init_tables(table_key, architecture)
            return RecommenderState(jnp.zeros((), jnp.int32), params, tx.init(params), tables, table_tx.init(tables))

        return create(core_key, table_key)

    def step(state: RecommenderState, batch: Batch) -> tuple[RecommenderState, Metrics]:
        labels = jnp.asarray(batch["label"], jnp.float32)
        bags = bags_of(architecture, *_bags(batch))
        pooled = pool(architecture, state.tables, *_bags(batch), mode)

        def mean_loss(params: Any, pooled: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = _logits(architecture, params, batch, pooled)
            return log_losses(logits, labels).mean(), logits

        # By the pooled vectors, not by the tables, whose gradient would be as large as they are.
        grad = jax.value_and_grad(mean_loss, (0, 1), has_aux=True)
        (loss, logits), (of_params, of_pooled) = grad(state.params, pooled)
        updates, opt_state = tx.update(of_params, state.opt_state, state.params)
        sparse = {
            name: sparse_gradient(of_pooled[:, t], len(state.tables[name]), *bag, mode)
            for t, (name, bag) in enumerate(zip(architecture.table_names, bags, strict=True))
        }
        changes, table_state = table_tx.update(sparse, state.table_state)
        metrics = {
            "loss": loss,
            "accuracy": ((logits > 0) == (labels > 0.5)).mean(),
            "grad_norm": optax.tree.norm(of_params),
        }
        params, tables = optax.apply_updates(state.params, updates), apply_updates(state.tables, changes)
        return RecommenderState(state.step + 1, params, opt_state, tables, table_state), metrics

    def evaluate(state: RecommenderState, batch: Batch) -> Metrics:
        labels = jnp.asarray(batch["label"], jnp.float32)
        logits = predict(architecture, state.params, state.tables, batch, mode)
        mask = jnp.asarray(batch.get("mask", jnp.ones(len(labels))), jnp.float32)
        # where, not a product: a padded example may give NaN, which a zero weight would not silence.
        losses = jnp.where(mask > 0, log_losses(logits, labels) * mask, 0)
        right = ((logits > 0) == (labels > 0.5)) * mask
        return {"loss": losses.sum(), "accuracy": right.sum(), "count": mask.sum()}

    return Method(init, step, evaluate)


def predict(
    architecture: Architecture, params: Any, tables: Mapping[str, jax.Array], batch: Batch, mode: str = "sum"
) -> jax.Array:
    """Logits of a batch whose tables are in memory; call it inside jit.

    Args:
      architecture: of the model.
      params: of the core.
      tables: float [rows, D] by name.
      batch: as in `recommendation`, without label if need be.
      mode: how bags are pooled.

    Returns:
      float32 [B].
    """
    return _logits(architecture, params, batch, pool(architecture, tables, *_bags(batch), mode))


class Evaluation(NamedTuple):
    """How good predictions are.

    Attributes:
      log_loss: mean over examples, in nats.
      auc: area under the ROC curve, exact.
      examples: how many.
    """

    log_loss: float
    auc: float
    examples: int


def evaluation(
    architecture: Architecture,
    params: Any,
    tables: Mapping[str, jax.Array],
    batches: Iterable[Batch],
    mode: str = "sum",
) -> Evaluation:
    """Predicts batches and scores them together.

    Args:
      architecture: of the model.
      params: of the core.
      tables: float [rows, D] by name.
      batches: as in `recommendation`; those of one shape compile once.
      mode: how bags are pooled.

    Raises:
      ValueError: without examples, or with those of one class alone.
    """
    logits, labels = [], []
    for batch in batches:
        valid = np.asarray(batch.get("mask", np.ones(len(batch["label"])))) > 0
        inputs = {name: value for name, value in batch.items() if name not in ("label", "mask")}
        logits.append(np.asarray(_predict(architecture, params, tables, inputs, mode))[valid])
        labels.append(np.asarray(batch["label"])[valid])
    if not logits:
        raise ValueError("batches: expected at least one, got none")
    return score(np.concatenate(logits), np.concatenate(labels))


def score(logits: np.ndarray, labels: np.ndarray) -> Evaluation:
    """The measures of `Evaluation` of logits [N] and labels [N] in 0..1, in float64; ValueError as `auc`."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    area = auc(logits, labels > 0.5)
    losses = np.logaddexp(0, logits) - labels * logits
    return Evaluation(float(losses.mean()), area, len(labels))


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive example has the higher score, ties counting half.

    Exact, as ranks are added up in whole numbers.

    Args:
      scores: [N], any real numbers.
      positive: bool [N].

    Returns:
      0..1.

    Raises:
      ValueError: for shapes that differ, scores that are NaN, or examples of one class alone.

    >>> auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True]))
    0.875
    """
    scores, positive = np.asarray(scores), np.asarray(positive, bool)
    if scores.ndim != 1 or scores.shape != positive.shape:
        raise ValueError(f"expected scores [N] and positive [N], got {scores.shape} and {positive.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"scores: {int(np.isnan(scores).sum())} of {len(scores)} are NaN; the model has diverged")
    ones = int(positive.sum())
    pairs = ones * (len(positive) - ones)
    if not pairs:
        raise ValueError(f"positive: needs examples of both classes, got {ones} positive ones of {len(positive)}")
    _, level, count = np.unique(scores, return_inverse=True, return_counts=True)
    # Twice the mean rank, from 1, of those that share a score.
    ranks = 2 * np.cumsum(count) - count + 1
    return (int(ranks[level[positive]].sum()) - ones * (ones + 1)) / (2 * pairs)


def log_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Binary cross entropy of logits [...] and labels [...] in 0..1, in nats."""
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), labels)


@partial(jax.jit, static_argnums=(0, 4))
def _predict(architecture, params, tables, batch, mode):
    return predict(architecture, params, tables, batch, mode)


def _logits(architecture: Architecture, params: Any, batch: Batch, pooled: jax.Array) -> jax.Array:
    dense = batch.get("dense")
    dense = jnp.zeros((len(pooled), 0)) if dense is None else jnp.asarray(dense, jnp.float32)
    return DLRM(architecture).apply({"params": params}, dense, pooled)  # type: ignore[return-value]


def _bags(batch: Batch) -> tuple[Any, Any, Any]:
    return batch["ids"], batch.get("lengths"), batch.get("weights")


def _check_batch(batch: Batch, architecture: Architecture) -> None:
    needed = ("ids", "label", *(("dense",) if architecture.dense else ()))
    if missing := [name for name in needed if name not in batch]:
        raise ValueError(f"batch: has no {' and no '.join(missing)}; its entries are {', '.join(sorted(batch))}")
    bags_of(architecture, *_bags(batch))
    labels = batch["label"]
    if jnp.ndim(labels) != 1:
        raise ValueError(f"batch['label']: expected shape [B], got {jnp.shape(labels)}")
    if not isinstance(labels, jax.core.Tracer | jax.ShapeDtypeStruct):
        low, high = float(np.min(labels)), float(np.max(labels))
        if low < 0 or high > 1:
            raise ValueError(f"batch['label']: expected 0 or 1, got values from {low} to {high}")
