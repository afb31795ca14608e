"""Training methods as three pure functions, and the one for image classification."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxeff.training.state import TrainState

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


class Method(NamedTuple):
    """A way to train something: the whole of what the training loop knows about it.

    Attributes:
      init: `(key, batch) -> state`; the state is any pytree of arrays. The batch only shows shapes and dtypes.
      step: `(state, batch) -> (state, metrics)`; the new state has the shapes and dtypes of the old one, metrics are
        scalars and one of them is called "loss". It is compiled once and its state argument is donated.
      evaluate: `(state, batch) -> sums`; scalars summed over the valid examples of the batch, one of them is
        "count", their number. The loop adds up the batches and divides by the count.
    """

    init: Callable[[jax.Array, Batch], Any]
    step: Callable[[Any, Batch], tuple[Any, Metrics]]
    evaluate: Callable[[Any, Batch], Metrics]


def unit_range(images: jax.Array) -> jax.Array:
    """Returns images as float32: uint8 is scaled from 0..255 to 0..1, floating point values are kept.

    Args:
      images: array of any shape, uint8 or floating point.

    Returns:
      float32 array of the same shape.

    Raises:
      TypeError: for other dtypes, whose range is not known.
    """
    if images.dtype == np.uint8:
        return jnp.asarray(images, jnp.float32) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images: expected uint8 or a floating point dtype, got {images.dtype}; pass your own preprocess"
        )
    return jnp.asarray(images, jnp.float32)


def classification(
    model_init: Callable[[jax.Array, jax.Array], Mapping[str, Any]],
    model_apply: Callable[[Mapping[str, Any], jax.Array, bool, jax.Array | None], tuple[jax.Array, Any]],
    tx: optax.GradientTransformation,
    *,
    num_classes: int,
    label_smoothing: float = 0.0,
    ema_decay: float | None = None,
    augment: Callable[..., Any] | None = None,
    preprocess: Callable[[jax.Array], jax.Array] = unit_range,
    axis_name: str | None = None,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = optax.softmax_cross_entropy,
    penalty: Callable[[Any, Any], jax.Array] | None = None,
) -> Method:
    """Returns the method that trains a classifier on batches {"image": [B, ...], "label": int [B] or float [B, K]}.

    Labels are class indices or rows of class probabilities. Evaluation batches may carry "mask" float [B], 1 for
    valid examples and 0 for padding. Evaluation uses the moving average of the parameters where one is kept.

    Args:
      model_init: `(key, images) -> variables`, a dictionary with "params" and the model's other variables.
      model_apply: `(variables, images, train, key) -> (logits [B, K], model_state)`. `from_linen` makes both.
      tx: the optimiser; `jaxeff.training.optimizer` or any optax transformation.
      num_classes: number of classes K.
      label_smoothing: weight in [0, 1) of the uniform distribution in the training targets.
      ema_decay: decay in (0, 1) per step of the parameters' moving average; None keeps none.
      augment: `(key, images) -> images` or `(key, images, targets) -> (images, targets)` with targets float32
        [B, K]; applied after `preprocess`, in training only.
      preprocess: `images -> images`, applied in training and evaluation; the default scales uint8 to 0..1.
      axis_name: mapped axis (shard_map, pmap, vmap) that splits the batch: gradients, metrics and model_state are
        averaged over it and each shard draws its own random numbers. `evaluate` is always a whole-batch function.
      loss: `(logits [B, K], targets [B, K]) -> [B]`.
      penalty: `(params, model_state) -> scalar`, added to the mean loss of a step; model_state is that of the step.

    Returns:
      The method. Its state is a `TrainState`; step reports "loss", "accuracy", "grad_norm" (global L2 norm before
      clipping) and "learning_rate" where the optimiser's state shows one; evaluate sums "loss" and "accuracy".

    Raises:
      ValueError: for `label_smoothing`, `ema_decay` or `num_classes` out of range; from `init` when the model's
        outputs or the labels do not fit `num_classes`.
    """
    _check_settings(num_classes, label_smoothing, ema_decay)
    augmented = _augmentation(augment)

    @jax.jit  # one compilation for the zeros of every moment, where eager code compiles once per shape
    def create(params: Any, model_state: Any, key: jax.Array) -> TrainState:
        return TrainState.create(params, model_state, tx, key, ema=ema_decay is not None)

    def init(key: jax.Array, batch: Batch) -> TrainState:
        _check_batch(batch, num_classes)
        images = jax.eval_shape(preprocess, batch["image"])
        images = jnp.zeros(images.shape, images.dtype)
        init_key, step_key = jax.random.split(key)
        variables = dict(model_init(init_key, images))
        params = variables.pop("params")
        _check_outputs(model_apply, {"params": params, **variables}, images, num_classes)
        return create(params, variables, step_key)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        augment_key, model_key = jax.random.split(key)
        images, targets = augmented(augment_key, preprocess(batch["image"]), _targets(batch["label"], num_classes))
        smoothed = optax.smooth_labels(targets, label_smoothing) if label_smoothing else targets

        def mean_loss(params: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
            logits, model_state = model_apply({"params": params, **state.model_state}, images, True, model_key)
            logits = logits.astype(jnp.float32)
            # The mean over the axis belongs inside the differentiated function: shard_map with checked replication
            # sums the gradient of replicated parameters by itself, and this makes that sum the mean as well.
            value = loss(logits, smoothed).mean()
            if penalty is not None:
                value = value + penalty(params, model_state)
            value = _mean_over(value, axis_name)
            return value, (model_state, _correct(logits, targets).mean())

        (value, (model_state, accuracy)), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        grads, accuracy = _mean_over((grads, accuracy), axis_name)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if ema_decay is None else optax.incremental_update(params, state.ema, 1 - ema_decay)
        metrics = {"loss": value, "accuracy": accuracy, "grad_norm": optax.tree.norm(grads)}
        learning_rate = _learning_rate(opt_state)
        if learning_rate is not None:
            metrics["learning_rate"] = learning_rate
        new_state = TrainState(state.step + 1, params, _mean_over(model_state, axis_name), opt_state, ema, state.key)
        return new_state, metrics

    def evaluate(state: TrainState, batch: Batch) -> Metrics:
        variables = {"params": state.evaluation_params, **state.model_state}
        logits, _ = model_apply(variables, preprocess(batch["image"]), False, None)
        logits = logits.astype(jnp.float32)
        targets = _targets(batch["label"], num_classes)
        mask = jnp.asarray(batch.get("mask", jnp.ones(logits.shape[0])), jnp.float32)
        # where, not a product: a padded example may give NaN, which a zero weight would not silence.
        losses = jnp.where(mask > 0, loss(logits, targets) * mask, 0)
        return {"loss": losses.sum(), "accuracy": (_correct(logits, targets) * mask).sum(), "count": mask.sum()}

    return Method(init, step, evaluate)


def _targets(labels: jax.Array, num_classes: int) -> jax.Array:
    """Class indices [B] as one-hot float32 [B, K]; probabilities [B, K] as they are."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return jnp.asarray(labels, jnp.float32)


def _correct(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """1.0 where the largest logit is at the most probable class; float32 [B]."""
    return (logits.argmax(-1) == targets.argmax(-1)).astype(jnp.float32)


def _mean_over(tree: Any, axis_name: str | None) -> Any:
    return tree if axis_name is None else lax.pmean(tree, axis_name)


def _learning_rate(opt_state: Any) -> jax.Array | None:
    """The scalar called learning_rate in the optimiser's state, where there is one (ours, optax.inject_hyperparams)."""
    found = [leaf for _, leaf in optax.tree.get_all_with_path(opt_state, "learning_rate")]
    found = [leaf for leaf in found if getattr(leaf, "ndim", None) == 0]  # inject_hyperparams has states of that name
    return found[0] if found else None


def _augmentation(augment: Callable[..., Any] | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Gives every augmentation the form (key, images, targets) -> (images, targets)."""
    if augment is None:
        return lambda key, images, targets: (images, targets)
    required = [
        p
        for p in inspect.signature(augment).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) == 3:
        return augment
    if len(required) == 2:
        return lambda key, images, targets: (augment(key, images), targets)
    raise ValueError(
        "augment: expected a function of (key, images) or (key, images, targets), got one that needs "
        f"{len(required)} positional arguments: {inspect.signature(augment)}"
    )


def _check_settings(num_classes: int, label_smoothing: float, ema_decay: float | None) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"ema_decay: expected a number in (0, 1) or None, got {ema_decay}")


def _check_batch(batch: Batch, num_classes: int) -> None:
    missing = [name for name in ("image", "label") if name not in batch]
    if missing:
        raise ValueError(f"batch: has no {' and no '.join(missing)}; its entries are {', '.join(sorted(batch))}")
    labels = batch["label"]
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if jnp.ndim(labels) != 1:
            raise ValueError(f"batch['label']: expected class indices of shape [B], got shape {labels.shape}")
        if not isinstance(labels, jax.core.Tracer | jax.ShapeDtypeStruct):
            low, high = int(np.min(labels)), int(np.max(labels))
            if low < 0 or high >= num_classes:
                raise ValueError(
                    f"batch['label']: expected classes 0..{num_classes - 1} (num_classes={num_classes}), "
                    f"got values from {low} to {high}"
                )
    elif jnp.ndim(labels) != 2 or labels.shape[-1] != num_classes:
        raise ValueError(
            f"batch['label']: expected int [B] or float [B, {num_classes}], got {labels.dtype} {tuple(labels.shape)}"
        )


def _check_outputs(model_apply: Callable[..., Any], variables: Any, images: jax.Array, num_classes: int) -> None:
    logits, _ = jax.eval_shape(lambda v, x: model_apply(v, x, False, None), variables, images)
    expected = (images.shape[0], num_classes)
    if logits.shape != expected:
        raise ValueError(
            f"model_apply: expected logits of shape {expected} (batch, num_classes), got {logits.shape}; "
            "make num_classes of the model and of the data agree"
        )
