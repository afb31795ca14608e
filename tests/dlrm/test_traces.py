"""Traces: published popularity, returns at the depths that were asked for, sessions, and real logs."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import data
from jaxeff.dlrm import popularity, recency, recorded, traces
from jaxeff.dlrm.popularity import PUBLISHED, Zipf
from jaxeff.dlrm.recency import CoAccess, Recency
from jaxeff.dlrm.traces import Feature
from jaxeff.ops.bags import check_bags

NEWEST = PUBLISHED["2022_t788_bs131072_0"]
FEATURES = (
    Feature("history", 100_000, 12, "user", "poisson"),
    Feature("country", 50, 1, "user"),
    Feature("item", 200_000, 1.5, "item"),
    Feature("tags", 5_000, 3, "item", "geometric"),
)


def distances(keys):
    """Reuse distances with a list as the stack."""
    stack, found = [], []
    for key in keys:
        found.append(stack.index(key) if key in stack else -1)
        if found[-1] >= 0:
            stack.remove(key)
        stack.insert(0, key)
    return np.array(found)


# --- popularity


@pytest.mark.data
def test_published_histograms_are_those_of_the_data_file():
    found = data.locality_traces()
    assert found.keys() == PUBLISHED.keys()
    for name, trace in found.items():
        for mine, theirs in zip(PUBLISHED[name], trace, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_have_the_published_shares_of_rows_and_of_reads(name):
    histogram, lookups = PUBLISHED[name], 4_000_000
    counts = popularity.draw_counts(histogram, lookups, np.random.default_rng(0))
    assert counts.sum() == lookups and (np.diff(counts) <= 0).all()
    edges = np.append(0, histogram.reuse_high)
    rows, _ = np.histogram(counts, edges + 0.5)
    reads, _ = np.histogram(counts, edges + 0.5, weights=counts)
    np.testing.assert_allclose(rows / len(counts), histogram.rows_share, atol=0.002)
    np.testing.assert_allclose(reads / lookups, histogram.lookups_share, atol=0.001)
    assert lookups / len(counts) == pytest.approx(histogram.lookups / histogram.distinct_rows, rel=0.004)


def test_counts_are_log_uniform_within_a_bin():
    counts = popularity.draw_counts(NEWEST, 3_000_000, np.random.default_rng(0))
    inside = counts[(counts > 16) & (counts <= 32)]
    # The bin's mean reuse is published through its shares, so the power that bends the law is near 1.
    middle = (inside <= 16 * np.sqrt(2)).mean()
    assert 0.4 < middle < 0.6


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(st.floats(0.01, 1), min_size=17, max_size=17),
    lookups=st.integers(0, 30_000),
    reuse=st.floats(1.5, 40),
    seed=st.integers(0, 9),
)
def test_any_histogram_gives_positive_counts_that_sum_to_the_lookups(shares, lookups, reuse, seed):
    share = np.array(shares) / sum(shares)
    histogram = NEWEST._replace(lookups_share=share, rows_share=share[::-1], distinct_rows=int(NEWEST.lookups / reuse))
    counts = popularity.draw_counts(histogram, lookups, np.random.default_rng(seed))
    assert counts.sum() == lookups
    assert counts.min(initial=1) >= 1


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0, 1.4])
def test_zipf_has_its_weights_at_the_head_and_in_the_tail(exponent, monkeypatch):
    monkeypatch.setattr(popularity, "_HEAD", 64)
    popularity._head_sums.cache_clear()
    draws, rows = 400_000, 1000
    ranks = popularity._zipf_ranks(exponent, rows, np.random.default_rng(0).random(draws))
    popularity._head_sums.cache_clear()
    weights = np.arange(1, rows + 1) ** -exponent
    expected = draws * weights / weights.sum()
    found = np.bincount(ranks, minlength=rows)
    assert ((found - expected) ** 2 / expected).sum() < rows + 6 * np.sqrt(2 * rows)  # chi square


def test_zipf_of_a_huge_table_reads_rows_everywhere():
    counts = popularity.draw_counts(Zipf(0.5), 1000, np.random.default_rng(0), rows=10**12)
    assert counts.sum() == 1000 and len(counts) > 990


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 1000), min_size=1, max_size=50), rows=st.integers(1, 60))
def test_folding_keeps_the_sum_and_the_shape(counts, rows):
    counts = np.sort(np.array(counts))[::-1]
    kept = popularity.fold(counts, rows)
    assert kept.sum() == counts.sum() and len(kept) == min(rows, len(counts))
    scaled = counts[: len(kept)] * (counts.sum() / counts[: len(kept)].sum())
    assert abs(kept - scaled).max() < 1


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.integers(0, 400), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_rows_are_dealt_whole_but_for_one_at_most_for_each_table(parts, seed):
    rng = np.random.default_rng(seed)
    drawn = np.array(parts)
    counts = popularity.draw_counts(Zipf(1.1), int(drawn.sum()), rng, rows=200)
    dealt = popularity._deal(counts, drawn, rng)
    assert [one.sum() for one in dealt] == parts
    assert all((one > 0).all() and (np.diff(one) <= 0).all() for one in dealt)
    found = np.sort(np.concatenate(dealt))
    whole = sum(min((found == count).sum(), (counts == count).sum()) for count in np.unique(counts))
    assert len(counts) - len(parts) < whole <= len(found) < len(counts) + len(parts)


# --- recency


def test_the_working_set_is_the_mean_over_all_windows():
    keys = np.random.default_rng(0).zipf(1.5, 60) % 20
    windows = np.array([1, 2, 7, 33, 60])
    slow = [np.mean([len(set(keys[i : i + w])) for i in range(len(keys) - w + 1)]) for w in windows]
    np.testing.assert_allclose(recency.working_set(keys, windows), slow, rtol=1e-12)
    with pytest.raises(ValueError, match=r"windows must be in 1\.\.60"):
        recency.working_set(keys, np.array([61]))


def test_moments_keep_every_read_and_returns_have_the_depths_of_the_law():
    law = Recency(share=1.0, exponent=1.0, shallowest=4, deepest=200)
    counts = np.full(600, 5)
    moment = recency.moments(counts, law, np.random.default_rng(0))
    keys = np.repeat(np.arange(600), counts)[np.argsort(moment, kind="stable")]
    np.testing.assert_array_equal(np.bincount(keys), counts)
    found = distances(keys)
    depth = found[found >= 0] + 1
    for share in (0.25, 0.5, 0.75):
        quantile = 4 * (201 / 4) ** share  # of the law whose density falls as 1 / depth
        assert np.quantile(depth, share) == pytest.approx(quantile, rel=0.2)


def test_returns_among_popular_rows_have_the_depths_of_the_law():
    law = Recency(share=0.5, exponent=1.0, shallowest=1, deepest=100)
    counts = popularity.draw_counts(NEWEST, 8000, np.random.default_rng(0))
    drawn_alone = recency.moments(counts, law._replace(share=0.0), np.random.default_rng(1))
    moment = recency.moments(counts, law, np.random.default_rng(1))
    order = np.argsort(moment, kind="stable")
    found = distances(np.repeat(np.arange(len(counts)), counts)[order])
    # Both draw the same uniform moments, so what moved is a return.
    depth = found[(moment != drawn_alone)[order]] + 1
    depth = depth[depth > 0]  # those that went once around the ring are the first of their row
    assert len(depth) == pytest.approx(0.5 * (8000 - len(counts)), rel=0.05)
    for quantile in (2, 4, 10, 30):
        assert (depth <= quantile).mean() == pytest.approx(np.log(quantile + 1) / np.log(101), abs=0.06)


def test_more_returns_make_reuse_nearer():
    counts = popularity.draw_counts(NEWEST, 4000, np.random.default_rng(0))
    near = []
    for share in (0.0, 0.4, 0.8):
        moment = recency.moments(counts, Recency(share, shallowest=1), np.random.default_rng(1))
        found = distances(np.repeat(np.arange(len(counts)), counts)[np.argsort(moment, kind="stable")])
        near.append((found[found >= 0] < 8).mean())
    assert near[0] + 0.03 < near[1] < near[2] - 0.03


# --- traces


def test_a_trace_has_bags_for_every_query_and_table_that_pass_the_check():
    trace = traces.generate(FEATURES, 30, batch_items=4, seed=1)
    assert len(trace) == 30 and len(list(trace)) == 30
    for bags in trace:
        assert [len(one.offsets) - 1 for one in bags] == [1, 1, 4, 4]
        for feature, one in zip(FEATURES, bags, strict=True):
            check_bags(one, feature.rows)


def test_flat_accesses_are_the_queries_one_after_the_other():
    trace = traces.generate(FEATURES, 20, batch_items=3, seed=2)
    expected = [
        (t, row, q) for q, bags in enumerate(trace) for t, one in enumerate(bags) for row in one.indices.tolist()
    ]
    found = trace.accesses()
    assert list(zip(*(part.tolist() for part in found), strict=True)) == expected
    part = trace[5:12]
    assert part.accesses().rows.tolist() == [row for _, row, q in expected if 5 <= q < 12]
    assert [one.indices.tolist() for one in part[-1]] == [one.indices.tolist() for one in trace[11]]


def test_the_histogram_holds_over_all_tables_together():
    features = [Feature(f"t{i}", 10**6, pooling) for i, pooling in enumerate((1, 3, 10, 2.5))]
    trace = traces.generate(features, 12_000, batch_items=5, recency=None, seed=0)
    found = trace.statistics()
    assert found.accesses == pytest.approx(16.5 * 60_000, rel=0.001)
    np.testing.assert_allclose(found.shares.rows, NEWEST.rows_share, atol=0.002)
    # A row of more than 32,768 reads weighs 3 % here, so the last bins hold whole rows and no fractions.
    np.testing.assert_allclose(found.shares.lookups[:14], NEWEST.lookups_share[:14], atol=0.003)
    assert found.hit_bound == pytest.approx(0.922, abs=0.001)
    np.testing.assert_allclose(found.pooling, [1, 3, 10, 2.5], rtol=0.01)


def test_statistics_count_what_is_there():
    trace = traces.generate(FEATURES, 25, batch_items=3, seed=3, popularity=Zipf(1.0))
    reads = {}
    for t, row in zip(*trace.accesses()[:2], strict=True):
        reads[t, row] = reads.get((t, row), 0) + 1
    unique = sum(len(set(one.indices.tolist())) for bags in trace for one in bags)
    found = trace.statistics()
    assert (found.accesses, found.distinct_rows) == (sum(reads.values()), len(reads))
    assert found.mean_reuse == pytest.approx(found.accesses / found.distinct_rows)
    assert found.unique_share == pytest.approx(unique / found.accesses)
    assert found.shares.rows[0] == pytest.approx(sum(count == 1 for count in reads.values()) / len(reads))


def test_one_seed_gives_one_trace_and_another_seed_another():
    first, again, other = (traces.generate(FEATURES, 40, batch_items=2, seed=seed) for seed in (5, 5, 6))
    for a, b in zip(first.tables, again.tables, strict=True):
        np.testing.assert_array_equal(a.indices, b.indices)
        np.testing.assert_array_equal(a.offsets, b.offsets)
    assert not np.array_equal(first.tables[0].indices, other.tables[0].indices)


def test_sessions_repeat_the_bags_of_their_user_and_take_turns():
    trace = traces.generate(FEATURES, 400, batch_items=2, session_queries=5, users_online=3, seed=0)
    seen = {}
    for q, bags in enumerate(trace):
        mine = [one.indices.tolist() for one in bags[:2]]
        assert seen.setdefault(trace.sessions[q], mine) == mine
    assert len(seen) == pytest.approx(80, abs=25)
    for turn in range(3):  # each user's queries are every third one, and a session never comes back
        assert (np.diff(trace.sessions[turn::3]) >= 0).all()
    assert trace.sessions[:3].tolist() == [0, 1, 2]
    items = [tuple(bags[2].indices) for bags in trace]
    assert len(set(items)) > 350


def test_a_session_of_one_query_repeats_nothing():
    assert traces.generate(FEATURES, 10, users_online=4, seed=0).sessions.tolist() == list(range(10))


@pytest.mark.parametrize(("lengths", "variance"), [("fixed", 0.25), ("poisson", 2.5), ("geometric", 2.5 * 3.5)])
def test_bag_lengths_have_their_mean_and_variance(lengths, variance):
    found = traces.LENGTHS[lengths](2.5, 40_000, np.random.default_rng(0))
    assert found.mean() == pytest.approx(2.5, rel=0.03)
    assert found.var() == pytest.approx(variance, rel=0.05)


def test_a_small_table_is_read_in_all_its_rows_and_no_others():
    trace = traces.generate([Feature("tiny", 3), Feature("large", 10**6, 4)], 3000, seed=0)
    assert np.unique(trace.tables[0].indices).tolist() == [0, 1, 2]


def test_groups_are_read_in_the_same_query():
    features = [Feature("rows", 10**6, 64)]
    together, alone = (
        traces.generate(features, 300, coaccess=some, popularity=Zipf(0.3, rows=2000), seed=0)
        for some in (CoAccess(8, 1.0, page_locality=1.0), None)
    )

    def neighbours_present(trace):
        """Share of the reads whose next lower or higher read row is in the same query."""
        rank = {row: i for i, row in enumerate(np.unique(trace.tables[0].indices).tolist())}
        found = []
        for (bag,) in trace:
            mine = {rank[row] for row in bag.indices.tolist()}
            found += [row - 1 in mine or row + 1 in mine for row in mine]
        return np.mean(found)

    assert neighbours_present(together) > 0.9
    assert neighbours_present(alone) < 0.2


def test_ids_of_groups_are_scattered_by_default():
    settings = dict(popularity=Zipf(0.3, rows=2000), seed=0)
    trace = traces.generate([Feature("rows", 10**6, 64)], 300, coaccess=CoAccess(8, 1.0), **settings)
    gaps = [np.diff(np.unique(bag.indices)).min() for (bag,) in trace]
    assert np.median(gaps) > 10


def test_rows_without_queries_have_the_histogram():
    rows = traces.draw_rows(50_000, 10**6, recency=None, seed=0)
    counts = np.unique(rows, return_counts=True)[1]
    assert len(rows) == 50_000 and rows.max() < 10**6
    np.testing.assert_allclose(popularity.shares(counts, NEWEST).rows, NEWEST.rows_share, atol=0.003)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(features=[]), "at least one table"),
        (dict(features=[FEATURES[0]] * 2), "history more than once"),
        (dict(batch_items=0), "batch_items must be at least 1, got 0"),
        (dict(queries=-1), "queries must be at least 0"),
        (dict(session_queries=0.5), r"session_queries must be finite and at least 1, got 0\.5"),
        (dict(recency=Recency(share=2)), r"Recency\(share=2\) must be in 0\.\.1"),
        (dict(recency=Recency(shallowest=9, deepest=3)), "shallowest <= deepest"),
        (dict(coaccess=CoAccess(size=1)), "at least 2"),
        (dict(coaccess=CoAccess(page_locality=-1)), "page_locality=-1"),
        (dict(popularity=Zipf(-1.0)), "exponent must be finite and at least 0"),
        (dict(popularity=NEWEST._replace(rows_share=np.ones(3))), "rows_share of the histogram must hold 17 shares"),
    ],
)
def test_what_cannot_be_drawn_is_said(change, message):
    arguments = {"features": FEATURES, "queries": 5, **change}
    with pytest.raises(ValueError, match=message):
        traces.generate(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rows=0), "table 'x': rows must be at least 1"),
        (dict(pooling=np.nan), "pooling must be finite"),
        (dict(side="both"), "side must be one of user, item"),
        (dict(lengths="normal"), "lengths must be one of fixed, poisson, geometric"),
    ],
)
def test_a_feature_that_is_none_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Feature("x", 5), **change)


def test_queries_that_are_not_there_are_refused():
    trace = traces.generate(FEATURES, 3)
    with pytest.raises(IndexError, match="query 3 of a trace of 3"):
        trace.query(3)
    with pytest.raises(ValueError, match="step 1"):
        trace[::2]
    with pytest.raises(ValueError, match="table 'history': 2 queries of 1 bags need 3 offsets, got 4"):
        traces.Trace(trace.tables, 1, np.arange(2))


def test_no_queries_are_an_empty_trace():
    trace = traces.generate(FEATURES, 0)
    assert len(trace) == 0 and len(trace.accesses().rows) == 0 and trace.statistics().accesses == 0


# --- real logs


def ratings(**changes):
    arrays = {
        "user": np.array([0, 0, 1, 0, 1]),
        "item": np.array([4, 2, 2, 3, 0]),
        "rating": np.ones(5, np.float32),
        "timestamp": np.array([10, 30, 20, 40, 50]),
    }
    facts = {"num_users": 2, "num_items": 5, "item_genre_bits": np.array([1, 0, 6, 4, 2], np.uint32), "genres": "abc"}
    return data.Dataset("ratings", "train", arrays, data.DatasetInfo("ratings", facts=facts), **changes)


def test_ratings_are_queries_with_what_the_user_rated_before():
    trace = recorded.ratings_trace(ratings(), history=2)
    by_table = {table.name: [bags[t].indices.tolist() for bags in trace] for t, table in enumerate(trace.tables)}
    assert by_table["user"] == [[0], [1], [0], [0], [1]]
    assert by_table["item"] == [[4], [2], [2], [3], [0]]
    assert by_table["history"] == [[], [], [4], [4, 2], [2]]
    assert by_table["genres"] == [[1], [1, 2], [1, 2], [2], [0]]
    assert trace.sessions.tolist() == [0, 1, 2, 2, 3]


def test_clicks_are_grouped_into_queries():
    info = data.DatasetInfo("clicks", num_classes=2, facts={"table_sizes": (9, 7), "table_names": ("a", "b")})
    arrays = {"cat": np.array([[1, 2], [3, 4], [5, 6], [7, 0], [8, 1]], np.int32)}
    trace = recorded.clicks_trace(data.Dataset("log", "train", arrays, info), batch_items=2)
    assert [[one.indices.tolist() for one in bags] for bags in trace] == [[[1, 3], [2, 4]], [[5, 7], [6, 0]]]
    with pytest.raises(ValueError, match=r"batch_items must be in 1\.\.5"):
        recorded.clicks_trace(data.Dataset("log", "train", arrays, info), batch_items=6)
    with pytest.raises(ValueError, match="must hold ratings, got 'log' of task 'clicks'"):
        recorded.ratings_trace(data.Dataset("log", "train", arrays, info))
    with pytest.raises(ValueError, match="must hold clicks, got 'ratings' of task 'ratings'"):
        recorded.clicks_trace(ratings())


@pytest.mark.data
def test_real_logs_are_valid_traces():
    films = recorded.ratings_trace(data.load("movielens"))
    assert len(films) == 100_836 and films.tables[1].indices.max() < films.tables[1].rows
    for name, tables in (("criteo", 26), ("avazu", 22)):
        trace = recorded.clicks_trace(data.load(name), batch_items=8)
        assert len(trace.tables) == tables
        assert all(table.indices.max() < table.rows for table in trace.tables)
        assert 0.5 < trace.statistics().hit_bound < 1
