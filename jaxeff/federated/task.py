"""What clients learn: the loss of a batch, and how a network is tested."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxeff import training

Variables = Mapping[str, Any]
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Loss = Callable[[Variables, Batch, jax.Array], tuple[jax.Array, tuple[dict[str, Any], Metrics]]]

CLASSES = "classes"
"""Name of what a client of Fed2's subset mode brings of its own: the classes that it may answer with, bool [C]."""
NEVER = -1e9


class Task(NamedTuple):
    """What clients learn, as pure functions of variables: {"params": ..., and the model's other collections}.

    Attributes:
      loss: (variables, batch, key) -> (mean loss of the examples whose mask is 1, (the other collections, metrics)).
      evaluate: (variables, batch) -> sums over those examples by name, scalars or arrays; one of them is "count".
      features: (variables, batch) -> [B, F], the representation that MOON compares; None where there is none.
    """

    loss: Loss
    evaluate: Callable[[Variables, Batch], Metrics]
    features: Callable[[Variables, Batch], jax.Array] | None = None


def classification(
    apply: Callable[[Variables, jax.Array, bool, jax.Array | None], tuple[jax.Array, dict[str, Any]]],
    num_classes: int,
    *,
    preprocess: Callable[[jax.Array], jax.Array] = training.unit_range,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    features: Callable[[Variables, jax.Array], jax.Array] | None = None,
) -> Task:
    """Classification of batches {"image": [B, ...], "label": int [B], "mask": [B]}.

    Where a client brings "classes" of its own, bool [C], the logits of all others are left out of its loss.

    Args:
      apply: (variables, images, train, key) -> (logits [B, C], model_state), as of `jaxeff.training.from_linen`.
      num_classes: C.
      preprocess: of images, in training and testing.
      augment: (key, images) -> images, in training.
      features: (variables, preprocessed images) -> [B, F], for MOON.

    Returns:
      The task. Its metrics are "accuracy"; `evaluate` sums "loss", "accuracy", "count", and for each class "correct"
      and "examples", [C].
    """

    def loss(variables, batch, key):
        augment_key, model_key = jax.random.split(key)
        images = preprocess(batch["image"])
        if augment is not None:
            images = augment(augment_key, images)
        logits, model_state = apply(variables, images, True, model_key)
        logits = logits.astype(jnp.float32)
        if CLASSES in batch:
            logits = jnp.where(batch[CLASSES], logits, NEVER)
        mask, count = batch["mask"], jnp.maximum(batch["mask"].sum(), 1)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        right = (logits.argmax(-1) == batch["label"]) * mask
        return jnp.where(mask > 0, losses, 0).sum() / count, (model_state, {"accuracy": right.sum() / count})

    def evaluate(variables, batch):
        logits = apply(variables, preprocess(batch["image"]), False, None)[0].astype(jnp.float32)
        mask = jnp.asarray(batch["mask"], jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        right = (logits.argmax(-1) == batch["label"]) * mask
        by_class = jax.nn.one_hot(batch["label"], num_classes) * mask[:, None]
        return {
            "loss": jnp.where(mask > 0, losses, 0).sum(),
            "accuracy": right.sum(),
            "count": mask.sum(),
            "correct": right @ by_class,
            "examples": by_class.sum(0),
        }

    def represented(variables, batch):
        assert features is not None
        return features(variables, preprocess(batch["image"]))

    return Task(loss, evaluate, None if features is None else represented)
