"""Forecasts of caches agree with caches that were run row by row."""

import collections
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.sdm import forecast

QUERIES = 400
ROW_BYTES = (64, 128)
LOOKUPS = (24, 6)
CHANCES = tuple(np.arange(1, rows + 1) ** -0.9 for rows in (800, 200))
IDS = tuple(
    np.random.default_rng(seed).choice(len(chances), (QUERIES, n), p=chances / chances.sum())
    for seed, (chances, n) in enumerate(zip(CHANCES, LOOKUPS, strict=True))
)


def trace():
    queries = np.concatenate([np.repeat(np.arange(QUERIES), n) for n in LOOKUPS])
    tables = np.repeat(np.arange(2), [ids.size for ids in IDS])
    return queries, tables, np.concatenate([ids.ravel() for ids in IDS])


def misses_per_query(size, start=0):
    """Of each table, in an LRU cache of whole rows that both share; the queries before `start` only warm it."""
    cache, used, misses = collections.OrderedDict(), 0, np.zeros(2)
    for query in range(QUERIES):
        for table, ids in enumerate(IDS):
            for row in np.unique(ids[query]).tolist():
                if (table, row) in cache:
                    cache.move_to_end((table, row))
                    continue
                misses[table] += query >= start
                cache[table, row] = None
                used += ROW_BYTES[table]
                while used > size:
                    used -= ROW_BYTES[cache.popitem(last=False)[0][0]]
    return misses / (QUERIES - start)


def test_measure_counts_rows_once_in_a_query_and_look_ups_each_time():
    queries, tables, rows = [0, 0, 0, 1, 1, 2], [0, 0, 2, 0, 0, 2], [5, 5, 1, 5, 6, 1]
    first, empty, third = forecast.measure(queries, tables, rows, 3)
    assert first.lookups == pytest.approx(4 / 3) and third.lookups == pytest.approx(2 / 3)
    assert first.popularity.shares.tolist() == pytest.approx([1 / 3, 2 / 3]) and first.popularity.rows.tolist() == [
        1,
        1,
    ]
    assert first.popularity.distinct == pytest.approx(1.0)
    assert empty.lookups == 0 and not len(empty.popularity.rows) and empty.popularity.distinct == 0


def test_measured_distinct_rows_are_those_of_the_trace():
    for one, ids, lookups in zip(forecast.measure(*trace(), 2), IDS, LOOKUPS, strict=True):
        assert one.lookups == lookups
        assert one.popularity.distinct == pytest.approx(np.mean([len(np.unique(row)) for row in ids]))


@pytest.mark.parametrize("size", [8_000, 20_000, 40_000])
def test_misses_of_a_cold_trace_are_forecast_from_its_counts(size):
    populations = [one.popularity for one in forecast.measure(*trace(), 2)]
    found = forecast.forecast_lru(populations, ROW_BYTES, [size])
    np.testing.assert_allclose(found.misses[:, 0], misses_per_query(size), rtol=0.05)


def test_hit_rates_of_a_trace_are_those_of_its_cache():
    rng = np.random.default_rng(0)
    # Bursts: most reads are of the query before.
    ids = rng.integers(0, 500, (60, 2, 8))
    for query in range(1, 60):
        again = rng.random((2, 8)) < 0.6
        ids[query][again] = ids[query - 1][again]
    queries, tables, _ = (axis.ravel() for axis in np.indices(ids.shape))
    sizes = [0, 10, 160, 640, 10**6]
    found = forecast.trace_hit_rates(queries, tables, ids.ravel(), [8, 8], sizes)
    for place, size in enumerate(sizes):
        cache, hits, reads = collections.OrderedDict(), [0, 0], [0, 0]
        for query in ids:
            for table, rows in enumerate(query):
                for row in np.unique(rows).tolist():
                    reads[table] += 1
                    hits[table] += cache.pop((table, row), False)
                    cache[table, row] = True
                    while len(cache) > size // 8:
                        cache.popitem(last=False)
        np.testing.assert_allclose(found[:, place], np.divide(hits, reads))
    assert forecast.trace_hit_rates([0, 1], [1, 1], [3, 3], [8, 8], [8]).tolist() == [[0], [0.5]]


def test_misses_of_a_warm_cache_are_forecast_from_the_law():
    populations = [forecast.steady(chances, n) for chances, n in zip(CHANCES, LOOKUPS, strict=True)]
    found = forecast.forecast_lru(populations, ROW_BYTES, [20_000])
    np.testing.assert_allclose(found.misses[:, 0], misses_per_query(20_000, start=100), rtol=0.07)


def test_a_cache_of_all_rows_misses_first_uses_alone_and_an_empty_one_everything():
    populations = [one.popularity for one in forecast.measure(*trace(), 2)]
    found = forecast.forecast_lru(populations, ROW_BYTES, [0, 1e9])
    distinct = [len(np.unique(ids)) for ids in IDS]
    np.testing.assert_allclose(found.misses[:, 1], np.array(distinct) / QUERIES)
    np.testing.assert_allclose(found.misses[:, 0], [one.distinct for one in populations])
    np.testing.assert_allclose(found.hit_rates[:, 0], 0, atol=1e-12)
    assert found.time.tolist() == [0, np.inf]


def test_steady_distinct_rows_are_expected_ones():
    chances = np.array([0.5, 0.3, 0.2, 0.0])
    one = forecast.steady(chances, 3)
    assert one.distinct == pytest.approx(sum(1 - (1 - p) ** 3 for p in chances))
    assert one.rows.sum() == 3


def test_many_kinds_of_rows_are_put_together_without_change():
    chances = np.random.default_rng(0).gamma(0.5, size=30_000)
    grouped = forecast.steady(chances, 20)
    assert len(grouped.rows) <= forecast.GROUPS < 30_000 == grouped.rows.sum()
    shares = 1 - (1 - chances / chances.sum()) ** 20
    assert grouped.distinct == pytest.approx(shares.sum())
    found = forecast.forecast_lru([grouped], [1], [3000.0])
    # Che's equation, solved for the ungrouped rows: as many rows are touched in T as there is room.
    assert (1 - (1 - shares) ** found.time[0]).sum() == pytest.approx(3000, rel=1e-3)
    assert found.misses[0, 0] == pytest.approx((shares * (1 - shares) ** found.time[0]).sum(), rel=1e-3)


def test_a_row_of_every_query_is_hit_from_the_second_on():
    one = forecast.counted([10, 1], 10)
    found = forecast.forecast_lru([one], [1], [1.5])
    assert found.misses[0, 0] == pytest.approx(0.2, abs=0.01)
    law = forecast.steady([1.0], 3)
    assert forecast.forecast_lru([law], [1], [0.5]).hit_rates[0, 0] == pytest.approx(1.0, abs=1e-6)
    assert forecast.forecast_lru([law], [1], [0.0]).hit_rates[0, 0] == 0


def test_an_empty_cache_warms_up_to_its_steady_state():
    populations = [forecast.steady(chances, n) for chances, n in zip(CHANCES, LOOKUPS, strict=True)]
    misses = forecast.forecast_warm_up(populations, ROW_BYTES, 20_000, [0, 1, 5, 1000])
    np.testing.assert_allclose(misses[:, 0], [one.distinct for one in populations])
    np.testing.assert_allclose(misses[:, 3], forecast.forecast_lru(populations, ROW_BYTES, [20_000]).misses[:, 0])
    assert (np.diff(misses, axis=1) < 0).all()
    counted = [np.mean([np.isin(ids[q], ids[q - 1], invert=True)[np.unique(ids[q], return_index=True)[1]].sum()
                        for q in range(1, QUERIES)]) for ids in IDS]  # fmt: skip
    np.testing.assert_allclose(misses[:, 1], counted, rtol=0.05)


@settings(max_examples=60, deadline=None)
@given(queries=st.integers(1, 60), data=st.data())
def test_a_window_avoids_uses_as_often_as_counting_says(queries, data):
    uses, window = data.draw(st.integers(1, queries)), data.draw(st.integers(1, queries))
    # One row: no other use falls into the window after a use with probability (N-T choose c) / (N choose c).
    expected = math.comb(queries - window, uses) / math.comb(queries, uses)
    one = forecast.Popularity(np.array([uses / queries]), np.array([1]), float(queries))
    assert forecast._untouched(one, np.array([float(window)]))[0, 0] == pytest.approx(expected, abs=0.15 / queries)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: forecast.counted([3], 2), "queries must be at least 1 and no fewer"),
        (lambda: forecast.counted([-1], 2), "counts must be finite numbers of 0 or more, got .-1"),
        (lambda: forecast.steady([0.0, 0.0], 2), "must not all be 0"),
        (lambda: forecast.steady([0.5, np.nan], 2), "probabilities must be finite"),
        (lambda: forecast.steady([0.5], -1), "lookups be finite"),
        (lambda: forecast.measure([], [], [], 1), "one length, not 0"),
        (lambda: forecast.measure([0], [1], [0], 1), "tables 0 to 0"),
        (lambda: forecast.measure([0, 1], [0], [0], 1), "one length"),
        (lambda: forecast.trace_hit_rates([0], [0], [0], [0], [1]), "row_bytes must be above 0"),
        (lambda: forecast.trace_hit_rates([0], [0], [-1], [1], [1]), "rows must be 0 or more"),
        (lambda: forecast.forecast_lru([forecast.counted([1], 1)], [0], [1]), "row_bytes must have a number above 0"),
        (lambda: forecast.forecast_lru([forecast.counted([1], 1)], [1], [-1]), "sizes must be finite"),
        (lambda: forecast.forecast_lru([], [], [1]), "row_bytes"),
        (
            lambda: forecast.forecast_lru([forecast.counted([1], 1), forecast.steady([1], 1)], [1, 1], [1]),
            "of the same queries",
        ),
        (lambda: forecast.forecast_warm_up([forecast.counted([1], 1)], [1], 1, [0]), "must be steady"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
