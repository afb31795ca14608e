"""Scores of examples whose rows come from tiers are those of tables in memory."""

import jax
import numpy as np
import pytest

from jaxeff import dlrm, sdm
from jaxeff.dlrm import lookup

DIM, EXAMPLES = 4, 3
ARCHITECTURE = dlrm.Architecture(2, (30, 50, 20), DIM, (8, DIM), (8, 1), lookups=(3, 2, 1))


def examples(seed, count=EXAMPLES):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 20, (count, 3, 3)).astype(np.int32)
    lengths = np.minimum(rng.integers(0, 4, (count, 3)), [3, 2, 1]).astype(np.int32)
    return {"dense": rng.normal(size=(count, 2)).astype(np.float32), "ids": ids, "lengths": lengths}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tables = dlrm.init_tables(jax.random.key(0), ARCHITECTURE)
    params = dlrm.DLRM(ARCHITECTURE).init(jax.random.key(1), np.zeros((1, 2)), np.zeros((1, 3, DIM)))["params"]
    folder = tmp_path_factory.mktemp("model") / "store"
    sdm.write_tables(folder, tables)
    return params, tables, folder


def test_examples_become_bags_table_after_table():
    asked = lookup.query_of(np.arange(12).reshape(2, 2, 3), np.array([[1, 3], [0, 2]]))
    np.testing.assert_array_equal(asked.indices, [0, 3, 4, 5, 9, 10])
    np.testing.assert_array_equal(asked.offsets, [0, 1, 1, 4, 6])
    np.testing.assert_array_equal(asked.tables, [0, 0, 1, 1])
    weighted = lookup.query_of(np.zeros((1, 1, 2), int), np.array([[2]]), np.array([[[0.5, 2.0]]]))
    np.testing.assert_array_equal(weighted.weights, np.float32([0.5, 2.0]))
    with pytest.raises(TypeError, match="ids: expected integers, got float64"):
        lookup.query_of(np.full((1, 1, 1), 1.9), np.array([[1]]))
    for ids, lengths in (
        (np.zeros((2, 2), int), np.zeros((2, 2), int)),
        (np.zeros((2, 2, 3), int), np.zeros((2, 3), int)),
    ):
        with pytest.raises(ValueError, match=r"expected ids \[B, T, L\] and lengths \[B, T\]"):
            lookup.query_of(ids, lengths)
    with pytest.raises(ValueError, match="lengths: expected 0 .. 3, got 0 .. 4"):
        lookup.query_of(np.zeros((1, 2, 3), int), np.array([[0, 4]]))


def test_bags_of_a_user_are_shared_by_all_examples():
    pooled = np.arange(5.0)[:, None] * np.ones(2)
    vectors = lookup.per_example(pooled, [1, 3, 1], 3)
    np.testing.assert_array_equal(vectors[..., 0], [[0, 1, 4], [0, 2, 4], [0, 3, 4]])
    with pytest.raises(ValueError, match="bags: expected 1 or 3 for each table, got 2"):
        lookup.per_example(pooled, [1, 2, 1], 3)
    with pytest.raises(ValueError, match=r"the query has 5 bags, but \(1, 3\) are 4"):
        lookup.per_example(pooled, [1, 3], 3)


def test_scores_are_those_of_tables_in_memory(model):
    params, tables, folder = model
    batches = [examples(seed) for seed in range(6)]
    requests = [(lookup.query_of(batch["ids"], batch["lengths"]), batch["dense"]) for batch in batches]
    score = lookup.scorer(ARCHITECTURE, [EXAMPLES] * 3, EXAMPLES)
    with sdm.open_store(folder) as store, sdm.Tiers(store, cache_bytes=2000) as tiers:
        served = list(lookup.serve(tiers, score, params, requests))
    for (_, logits), batch in zip(served, batches, strict=True):
        expected = dlrm.predict(ARCHITECTURE, params, tables, batch)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_bags_that_come_again_are_kept_while_serving(model):
    params, _, folder = model
    batch = examples(0)
    request = lookup.query_of(batch["ids"], batch["lengths"]), batch["dense"]
    score = lookup.scorer(ARCHITECTURE, [EXAMPLES] * 3, EXAMPLES)
    with sdm.open_store(folder) as store, sdm.Tiers(store, pooled_bytes=9000, pooled_threshold=1) as tiers:
        scores = [np.asarray(logits) for _, logits in lookup.serve(tiers, score, params, [request] * 8, depth=1)]
        assert tiers.counters.pooled_hits > 0
    assert all(np.array_equal(one, scores[0]) for one in scores)


def test_a_query_that_failed_has_no_scores_and_the_others_their_own(model, monkeypatch):
    params, tables, folder = model
    batches = [examples(seed) for seed in range(4)]
    requests = [(lookup.query_of(batch["ids"], batch["lengths"]), batch["dense"]) for batch in batches]
    score = lookup.scorer(ARCHITECTURE, [EXAMPLES] * 3, EXAMPLES)
    with sdm.open_store(folder) as store, sdm.Tiers(store) as tiers:
        gather, calls = tiers.reader.gather, []

        def second_is_late(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise sdm.DeadlineExceeded(0, 1, 0.1)
            return gather(*arguments)

        monkeypatch.setattr(tiers.reader, "gather", second_is_late)
        served = list(lookup.serve(tiers, score, params, requests, keep_going=True))
    assert isinstance(served[1][0], sdm.Failed) and served[1][1] is None
    for at in (0, 2, 3):
        expected = dlrm.predict(ARCHITECTURE, params, tables, batches[at])
        np.testing.assert_allclose(served[at][1], expected, rtol=1e-5, atol=1e-6)
