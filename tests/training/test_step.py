import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import training
from jaxeff.training import classification

K, B, D = 3, 8, 4


def init(key, images):
    return {"params": {"kernel": jax.random.normal(key, (images[0].size, K)), "bias": jnp.zeros(K)}}


def apply(variables, images, train, key):
    params = variables["params"]
    return images.reshape(len(images), -1) @ params["kernel"] + params["bias"], {}


def with_statistics(key, images):
    return {**init(key, images), "batch_stats": {"mean": jnp.zeros(D)}}


def apply_with_statistics(variables, images, train, key):
    logits, _ = apply(variables, images, train, key)
    mean = variables["batch_stats"]["mean"]
    return logits, {"batch_stats": {"mean": 0.5 * mean + 0.5 * images.mean(0) if train else mean}}


def batch(seed=0, size=B):
    rng = np.random.default_rng(seed)
    return {"image": rng.normal(size=(size, D)).astype(np.float32), "label": rng.integers(0, K, size).astype(np.int32)}


def make(jit=True, **options):
    method = classification(init, apply, options.pop("tx", optax.sgd(0.1)), num_classes=K, **options)
    return method._replace(step=jax.jit(method.step), evaluate=jax.jit(method.evaluate)) if jit else method


def start(method, data=None):
    return method.init(jax.random.key(0), batch() if data is None else data)


# ---- The loss by NumPy, in float64 ----------------------------------------------------------------------------------


def by_hand(params, data, smoothing=0.0, targets=None):
    """(loss, gradient of kernel, gradient of bias, accuracy) of softmax cross-entropy."""
    x = np.asarray(data["image"], np.float64)
    z = x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    one_hot = np.eye(K)[data["label"]] if targets is None else np.asarray(targets, np.float64)
    y = (1 - smoothing) * one_hot + smoothing / K
    loss = -(y * np.log(p)).sum(1)
    dz = (p - y) / len(x)
    return loss, x.T @ dz, dz.sum(0), (z.argmax(1) == one_hot.argmax(1)).astype(np.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_a_step_is_gradient_descent_on_the_smoothed_cross_entropy(smoothing):
    method = make(label_smoothing=smoothing)
    state, data = start(method), batch()
    loss, kernel_grad, bias_grad, correct = by_hand(state.params, data, smoothing)
    new, metrics = method.step(state, data)
    np.testing.assert_allclose(metrics["loss"], loss.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], correct.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt((kernel_grad**2).sum() + (bias_grad**2).sum()), rtol=1e-5)
    np.testing.assert_allclose(new.params["kernel"], state.params["kernel"] - 0.1 * kernel_grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new.params["bias"], state.params["bias"] - 0.1 * bias_grad, rtol=1e-4, atol=1e-6)
    assert new.step == 1


def test_labels_may_be_probabilities():
    method = make()
    soft = np.random.default_rng(1).dirichlet(np.ones(K), B).astype(np.float32)
    data = {**batch(), "label": soft}
    state = start(method, data)
    loss, kernel_grad, _, correct = by_hand(state.params, data, targets=soft)
    new, metrics = method.step(state, data)
    np.testing.assert_allclose(metrics["loss"], loss.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], correct.mean(), rtol=1e-6)
    np.testing.assert_allclose(new.params["kernel"], state.params["kernel"] - 0.1 * kernel_grad, rtol=1e-4, atol=1e-6)


def test_mixup_of_the_data_room_fits_as_augmentation():
    from jaxeff.data import mixup

    method = make(augment=functools.partial(mixup, alpha=0.4))
    _, metrics = method.step(start(method), batch())
    assert np.isfinite(metrics["loss"])


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_of_a_padded_batch_sums_only_valid_examples():
    method = make(label_smoothing=0.3)
    state, data = start(method), batch(size=5)
    padded = {
        "image": np.concatenate([data["image"], np.full((3, D), np.nan, np.float32)]),
        "label": np.concatenate([data["label"], np.zeros(3, np.int32)]),
        "mask": np.array([1] * 5 + [0] * 3, np.float32),
    }
    sums = method.evaluate(state, padded)
    loss, _, _, correct = by_hand(state.params, data)  # no smoothing in evaluation
    assert sums["count"] == 5
    np.testing.assert_allclose(sums["loss"], loss.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["accuracy"], correct.sum(), rtol=1e-6)


def test_evaluation_over_padded_batches_is_the_mean_over_the_data_set():
    from jaxeff.data import padded_batches

    method = make()
    state, data = start(method), batch(size=21)
    sums = training.EvaluationSums()
    for part in padded_batches(data, 8):
        sums.add(method.evaluate(state, part))
    loss, _, _, correct = by_hand(state.params, data)
    means = sums.means()
    np.testing.assert_allclose(means["loss"], loss.mean(), rtol=1e-5)
    assert means["accuracy"] == pytest.approx(correct.mean(), rel=1e-7)


def test_the_moving_average_follows_its_formula_and_is_what_is_evaluated():
    method = make(ema_decay=0.7)
    state = start(method)
    expected = np.asarray(state.params["kernel"], np.float64)
    for seed in range(4):
        state, _ = method.step(state, batch(seed))
        expected = 0.7 * expected + 0.3 * np.asarray(state.params["kernel"], np.float64)
    np.testing.assert_allclose(state.ema["kernel"], expected, rtol=1e-5)
    loss, *_ = by_hand(state.ema, batch(9))
    np.testing.assert_allclose(method.evaluate(state, batch(9))["loss"], loss.sum(), rtol=1e-5)


# ---- Preparation of the images --------------------------------------------------------------------------------------


def test_bytes_are_scaled_to_the_unit_range_and_floats_kept():
    np.testing.assert_allclose(training.unit_range(np.array([0, 51, 255], np.uint8)), [0, 0.2, 1])
    np.testing.assert_array_equal(training.unit_range(np.array([-2.0, 300.0], np.float32)), [-2, 300])
    with pytest.raises(TypeError, match="images: expected uint8 or a floating point dtype, got int32"):
        training.unit_range(np.zeros(2, np.int32))


def test_augmentation_changes_training_only():
    method = make(augment=lambda key, images: images * 0)
    state = start(method)
    _, metrics = method.step(state, batch())
    np.testing.assert_allclose(metrics["loss"], np.log(K), rtol=1e-6)  # zero images, zero bias
    loss, *_ = by_hand(state.params, batch())
    np.testing.assert_allclose(method.evaluate(state, batch())["loss"], loss.sum(), rtol=1e-5)


def test_randomness_depends_on_the_step_and_nothing_else():
    method = make(augment=lambda key, images: jnp.broadcast_to(jax.random.normal(key), images.shape), tx=optax.sgd(0.0))
    state = start(method)
    losses = []
    for _ in range(3):
        again = method.step(state, batch(1))[1]["loss"]  # the images of another batch do not matter: all are noise
        state, metrics = method.step(state, {**batch(0), "label": batch(1)["label"]})
        assert metrics["loss"] == again
        losses.append(float(again))
    assert len(set(losses)) == 3
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(start(method).key))


# ---- Averages over a mapped axis ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_step_over_a_mapped_axis_equals_the_whole_batch_step(shards):
    def method(axis_name):
        return classification(
            with_statistics, apply_with_statistics, optax.sgd(0.1, 0.9), num_classes=K, axis_name=axis_name,
            label_smoothing=0.1, ema_decay=0.9,
        )  # fmt: skip

    state = start(method(None))
    whole, whole_metrics = jax.jit(method(None).step)(state, batch())
    parts = jax.tree.map(lambda x: x.reshape(shards, B // shards, *x.shape[1:]), batch())
    mapped, metrics = jax.jit(jax.vmap(method("shards").step, in_axes=(None, 0), axis_name="shards"))(state, parts)
    for shard in range(shards):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=shard: x[i], (mapped.params, mapped.ema, mapped.model_state, metrics)),
            (whole.params, whole.ema, whole.model_state, whole_metrics),
            rtol=1e-5,
            atol=1e-6,
        )


def test_shards_draw_their_own_random_numbers():
    seen = []

    def augment(key, images):
        seen.append(jax.random.key_data(key))
        return images

    method = make(jit=False, axis_name="shards", augment=augment)
    state = start(method)

    @jax.jit
    @functools.partial(jax.vmap, axis_name="shards")
    def keys(data):
        method.step(state, data)
        return seen.pop()

    drawn = keys(jax.tree.map(lambda x: np.stack([x, x]), batch()))
    assert not np.array_equal(drawn[0], drawn[1])


# ---- Learning rate in the metrics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        training.optimizer("sgd", training.schedule("linear", 0.4, 4)),
        optax.inject_hyperparams(optax.sgd)(learning_rate=training.schedule("linear", 0.4, 4)),
    ],
)
def test_the_learning_rate_is_reported_where_the_optimiser_shows_it(tx):
    method = make(tx=tx)
    state, rates = start(method), []
    for _ in range(3):
        state, metrics = method.step(state, batch())
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [0.4, 0.3, 0.2], rtol=1e-6)


def test_without_a_shown_learning_rate_none_is_reported():
    method = make(tx=optax.adam(0.1))
    assert "learning_rate" not in method.step(start(method), batch())[1]


# ---- Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing: expected a number in \[0, 1\), got 1.0"),
        ({"label_smoothing": float("nan")}, "label_smoothing: expected"),
        ({"ema_decay": 0.0}, r"ema_decay: expected a number in \(0, 1\) or None, got 0.0"),
        ({"augment": lambda images: images}, r"augment: expected a function of \(key, images\)"),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="num_classes: expected at least 2, got 1"):
        classification(init, apply, optax.sgd(0.1), num_classes=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": np.full(B, K, np.int32)}, r"expected classes 0..2 \(num_classes=3\), got values from 3 to 3"),
        ({"label": np.full(B, -1, np.int32)}, "got values from -1 to -1"),
        ({"label": np.zeros((B, 1), np.int32)}, r"expected class indices of shape \[B\], got shape \(8, 1\)"),
        ({"label": np.zeros((B, 5), np.float32)}, r"expected int \[B\] or float \[B, 3\], got float32 \(8, 5\)"),
    ],
)
def test_labels_that_do_not_fit_are_explained(change, message):
    with pytest.raises(ValueError, match=message):
        start(make(), {**batch(), **change})


def test_a_batch_without_labels_says_what_it_has():
    with pytest.raises(ValueError, match="batch: has no label; its entries are image"):
        start(make(), {"image": batch()["image"]})


def test_a_model_with_other_outputs_than_classes_is_refused():
    method = classification(init, apply, optax.sgd(0.1), num_classes=7)
    with pytest.raises(ValueError, match=r"expected logits of shape \(8, 7\) \(batch, num_classes\), got \(8, 3\)"):
        start(method)
