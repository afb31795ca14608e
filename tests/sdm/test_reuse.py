"""Reuse distances and bounds against plain lists and exhaustive search."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.sdm import reuse

traces = st.lists(st.integers(0, 12), max_size=60).map(lambda keys: np.array(keys, np.uint64))


def stack_distances(keys):
    """By moving keys to the front of a list."""
    stack, found = [], []
    for key in keys.tolist():
        found.append(stack.index(key) if key in stack else -1)
        if key in stack:
            stack.remove(key)
        stack.insert(0, key)
    return np.array(found, np.int64)


def most_hits(keys, capacity, bypass):
    """Over all choices of what is evicted, by trying every one."""
    states = {frozenset(): 0}
    for key in keys:
        following: dict[frozenset, int] = {}
        for state, hits in states.items():
            if key in state:
                choices = {state: hits + 1}
            else:
                choices = {state: hits} if bypass or not capacity else {}
                if len(state) < capacity:
                    choices[state | {key}] = hits
                elif capacity:
                    choices |= {state - {gone} | {key}: hits for gone in state}
            for choice, count in choices.items():
                following[choice] = max(count, following.get(choice, 0))
        states = following
    return max(states.values())


@given(traces)
@settings(deadline=None)
def test_distances_are_those_of_a_list_in_the_order_of_use(keys):
    np.testing.assert_array_equal(reuse.reuse_distances(keys), stack_distances(keys))


@pytest.mark.parametrize("length, distinct", [(1000, 400), (1025, 3), (700, 10**9)])
def test_distances_of_longer_traces(length, distinct):
    keys = np.random.default_rng(0).integers(0, distinct, length)
    np.testing.assert_array_equal(reuse.reuse_distances(keys), stack_distances(keys))


def test_distances_of_a_cycle_are_its_length_less_one():
    keys = np.tile(np.arange(1000), 5)
    distances = reuse.reuse_distances(keys)
    np.testing.assert_array_equal(distances, np.repeat([-1, 999], [1000, 4000]))


def test_keys_may_take_64_bits():
    keys = np.array([2**63, 1, 2**64 - 1, 2**63, 1], np.uint64)
    np.testing.assert_array_equal(reuse.reuse_distances(keys), [-1, -1, -1, 2, 2])


@given(traces, st.integers(0, 15))
@settings(deadline=None)
def test_hits_and_curve_are_those_of_a_simulated_lru_cache(keys, capacity):
    held, hits = [], 0
    for key in keys.tolist():
        hits += key in held
        held = [key, *(other for other in held if other != key)][:capacity]
    assert reuse.lru_hits(keys, capacity) == hits
    curve = reuse.lru_curve(keys, np.array([10**6, capacity]))
    assert curve[1] == pytest.approx(hits / max(1, len(keys)))
    # However large, a cache that was empty misses every first use.
    assert curve[0] == pytest.approx(1 - len(np.unique(keys)) / len(keys) if len(keys) else 0)


@given(st.lists(st.integers(0, 5), max_size=14), st.integers(0, 4), st.booleans())
@settings(deadline=None, max_examples=60)
def test_belady_finds_the_most_hits_that_there_are(keys, capacity, bypass):
    assert reuse.belady_hits(np.array(keys, np.int64), capacity, bypass=bypass) == most_hits(keys, capacity, bypass)


@given(traces, st.integers(1, 12))
@settings(deadline=None)
def test_no_cache_beats_belady(keys, capacity):
    with_bypass = reuse.belady_hits(keys, capacity)
    assert reuse.lru_hits(keys, capacity) <= reuse.belady_hits(keys, capacity, bypass=False) <= with_bypass


def test_what_is_no_trace_is_refused():
    with pytest.raises(ValueError, match=r"keys must be \[n\].*\(2, 2\)"):
        reuse.reuse_distances(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="capacity must be at least 0 rows, got -1"):
        reuse.belady_hits(np.zeros(3), -1)
    with pytest.raises(ValueError, match="sizes must be integers"):
        reuse.lru_curve(np.zeros(3), np.array([0.5]))
