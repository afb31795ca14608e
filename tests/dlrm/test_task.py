"""Training and scores of recommendation models."""

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import data, training
from jaxeff.dlrm.adagrad import rowwise_adagrad
from jaxeff.dlrm.model import WithTables, preset
from jaxeff.dlrm.task import auc, evaluation, predict, recommendation, score

ARCHITECTURE = preset("small", dense=2, rows=(6, 9), lookups=(1, 3), dim=4)


def examples(count, seed=0):
    """Clicks that depend on an id and on a dense feature."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 6, (count, 2, 3)).astype(np.int32)
    lengths = np.stack([np.ones(count), rng.integers(0, 4, count)], 1).astype(np.int32)
    dense = rng.normal(size=(count, 2)).astype(np.float32)
    label = (ids[:, 0, 0] % 2 + dense[:, 0] > 0.5).astype(np.float32)
    return {"dense": dense, "ids": ids, "lengths": lengths, "label": label}


def method(rate=0.1):
    return recommendation(ARCHITECTURE, optax.adam(1e-2), rowwise_adagrad(rate))


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_step_is_that_of_the_dense_gradient():
    batch = examples(8)
    rate, eps = 0.05, 1e-8
    ours = recommendation(ARCHITECTURE, optax.sgd(rate), rowwise_adagrad(rate, eps=eps))
    state = ours.init(jax.random.key(0), batch)
    after, metrics = jax.jit(ours.step)(state, batch)

    def loss(params):
        whole = WithTables(ARCHITECTURE)
        logits = whole.apply({"params": params}, batch["dense"], batch["ids"], batch["lengths"])
        return optax.sigmoid_binary_cross_entropy(logits, batch["label"]).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))({"core": state.params, "tables": state.tables})
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads["core"]), rtol=1e-5)
    core = jax.tree.map(lambda p, g: p - rate * g, state.params, grads["core"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after.params, core)
    for name, grad in grads["tables"].items():
        root = np.sqrt(np.square(grad).mean(1, keepdims=True))
        np.testing.assert_allclose(after.tables[name], state.tables[name] - rate * grad / (root + eps), atol=1e-4)


def test_training_learns_and_continues_where_it_was_stopped(tmp_path):
    arrays = examples(400)
    batches = data.Batches(arrays, 50, seed=0)
    held_out = examples(200, seed=1)
    settings_ = {"key": jax.random.key(0), "progress": False}
    whole = training.fit(
        method(), batches.starting_at, steps=80, **settings_,
        evaluate_on=lambda: data.padded_batches(held_out, 64),
    )  # fmt: skip
    found = evaluation(ARCHITECTURE, whole.state.params, whole.state.tables, data.padded_batches(held_out, 64))
    assert found.examples == 200 and found.auc > 0.9
    np.testing.assert_allclose(found.log_loss, whole.evaluation["loss"], rtol=1e-5)
    training.fit(method(), batches.starting_at, steps=33, workdir=tmp_path, **settings_)
    resumed = training.fit(method(), batches.starting_at, steps=80, workdir=tmp_path, **settings_)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)


def test_padding_does_not_count():
    batch = examples(6)
    state = method().init(jax.random.key(0), batch)
    padded = {name: np.concatenate([array, array[:2]]) for name, array in batch.items()}
    padded["dense"][6:] = np.nan
    mask = np.float32([1] * 6 + [0] * 2)
    ours, theirs = (method().evaluate(state, b) for b in (batch, {**padded, "mask": mask}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), theirs, ours)
    one = evaluation(ARCHITECTURE, state.params, state.tables, [{**padded, "mask": mask}])
    assert one == pytest.approx(evaluation(ARCHITECTURE, state.params, state.tables, [batch]), rel=1e-6)


def test_predictions_need_no_label():
    batch = examples(5)
    state = method().init(jax.random.key(0), batch)
    del batch["label"]
    assert predict(ARCHITECTURE, state.params, state.tables, batch).shape == (5,)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"label": None}, "batch: has no label"),
        ({"dense": None, "ids": None}, "batch: has no ids and no dense"),
        ({"label": np.full(5, 2.0)}, "expected 0 or 1, got values from 2.0 to 2.0"),
        ({"label": np.zeros((5, 1))}, r"expected shape \[B\], got \(5, 1\)"),
        ({"ids": np.zeros((5, 3, 3), np.int32)}, "ids: expected shape"),
    ],
)
def test_batches_that_do_not_fit_are_refused(changes, match):
    batch = {name: array for name, array in {**examples(5), **changes}.items() if array is not None}
    with pytest.raises(ValueError, match=match):
        method().init(jax.random.key(0), batch)


# --- scores -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_the_area_is_the_share_of_pairs_in_order(rows):
    scores, positive = np.array([s for s, _ in rows], float), np.array([p for _, p in rows])
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    if not pairs:
        with pytest.raises(ValueError, match="needs examples of both classes"):
            auc(scores, positive)
        return
    assert auc(scores, positive) == pytest.approx(sum(pairs) / len(pairs), abs=1e-15)


def test_the_area_is_exact_where_floats_would_round():
    half = 2_000_000
    scores = np.concatenate([np.arange(half), np.arange(half) + 0.5])
    positive = np.arange(2 * half) >= half
    assert auc(scores, positive) == (half + 1) / (2 * half)


def test_scores_of_large_logits_are_finite():
    found = score(np.array([1000.0, -1000.0, 0.0]), np.array([1.0, 0.0, 1.0]))
    assert found.log_loss == pytest.approx(np.log(2) / 3) and found.auc == 1 and found.examples == 3


def test_scores_that_are_none_are_refused():
    with pytest.raises(ValueError, match="1 of 2 are NaN; the model has diverged"):
        auc(np.array([np.nan, 1]), np.array([True, False]))
    with pytest.raises(ValueError, match=r"scores \[N\] and positive \[N\]"):
        auc(np.zeros(2), np.zeros(3, bool))
    with pytest.raises(ValueError, match="batches: expected at least one"):
        evaluation(ARCHITECTURE, {}, {}, [])


@pytest.mark.data
@pytest.mark.slow
def test_films_that_users_will_like():
    from jaxeff.dlrm.features import of_ratings

    train, test = of_ratings(data.load("movielens"), split="random")
    architecture = train.architecture("small")
    batches = data.Batches(train.arrays, 256, seed=0)
    ours = recommendation(architecture, optax.adam(1e-3), rowwise_adagrad(0.1))
    steps = 2 * batches.steps_per_epoch
    state = training.fit(ours, batches.starting_at, steps=steps, key=jax.random.key(0), progress=False).state
    found = evaluation(architecture, state.params, state.tables, data.padded_batches(test.arrays, 1024))
    assert found.auc > 0.78
