"""Bags of several tables laid end to end, and what is wrong with them found before anything is read."""

import numpy as np
import pytest

from jaxeff.ops.bags import Bags
from jaxeff.sdm import queries


def bags(*lists, weights=None):
    offsets = np.cumsum([0, *map(len, lists)])
    return Bags(np.array(sum(lists, []), np.int64), offsets, weights)


def test_bags_of_all_tables_lie_end_to_end():
    asked = queries.query([bags([1, 2], []), bags([5]), bags([], [7, 7, 7])])
    np.testing.assert_array_equal(asked.indices, [1, 2, 5, 7, 7, 7])
    np.testing.assert_array_equal(asked.offsets, [0, 2, 2, 3, 3, 6])
    np.testing.assert_array_equal(asked.tables, [0, 0, 1, 2, 2])
    np.testing.assert_array_equal(queries.bag_of_lookup(asked), [0, 0, 2, 4, 4, 4])
    assert asked.weights is None


def test_no_tables_and_empty_bags_are_queries_too():
    nothing = queries.query([])
    assert len(nothing.indices) == len(nothing.tables) == 0 and list(nothing.offsets) == [0]
    empty = queries.query([bags([], [])], tables=[4])
    assert list(empty.tables) == [4, 4] and list(empty.offsets) == [0, 0, 0]
    assert len(queries.checked(empty, np.full(5, 10)).indices) == 0


def test_some_bags_can_be_taken_and_all_sorted():
    weights = np.arange(6, dtype=np.float32)
    asked = queries.query([bags([3, 1], [9, 8, 7], [2], weights=weights)])
    some = queries.chosen(asked, np.array([0, 2]))
    np.testing.assert_array_equal(some.indices, [3, 1, 2])
    np.testing.assert_array_equal(some.offsets, [0, 2, 3])
    np.testing.assert_array_equal(some.weights, [0, 1, 5])
    neighbours = queries.chosen(asked, np.array([1, 2]))
    np.testing.assert_array_equal(neighbours.indices, [9, 8, 7, 2])
    np.testing.assert_array_equal(neighbours.offsets, [0, 3, 4])
    np.testing.assert_array_equal(neighbours.weights, [2, 3, 4, 5])
    ordered = queries.sorted_bags(asked)
    np.testing.assert_array_equal(ordered.indices, [1, 3, 7, 8, 9, 2])
    np.testing.assert_array_equal(ordered.weights, [1, 0, 4, 3, 2, 5])


def test_rows_are_checked_against_their_own_table():
    asked = queries.query([bags([4]), bags([9], [10])])
    rows = np.array([5, 10])
    with pytest.raises(ValueError, match=r"outside.*the first is 10 in bag 2"):
        queries.checked(asked, rows)
    dropped = queries.checked(asked, rows, "drop")
    np.testing.assert_array_equal(dropped.indices, [4, 9])
    np.testing.assert_array_equal(dropped.offsets, [0, 1, 2, 2])
    np.testing.assert_array_equal(queries.checked(asked, rows, "hash").indices, [4, 9, 0])


def test_ids_beyond_int32_are_those_of_large_tables():
    asked = queries.query([bags([2**35])])
    assert queries.checked(asked, np.array([2**36])).indices[0] == 2**35
    with pytest.raises(ValueError, match="outside"):
        queries.checked(asked, np.array([2**35]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.array([0, 2])}, "must end at the number of indices, 3, got 2"),
        ({"offsets": np.array([0, -1])}, "no negative ones, got -1"),
        ({"weights": np.array([1, np.nan, 1], np.float32)}, "weights"),
        ({"tables": np.array([3], np.int32)}, "a bag is of table 3, but there are tables 0 .. 1"),
        ({"tables": np.array([0, 1], np.int32)}, "tables names 2 bags, but offsets has 1"),
        ({"indices": np.array([0.5, 1, 2])}, "indices: expected integers"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    asked = queries.query([bags([1, 2, 3])])._replace(**change)
    with pytest.raises((ValueError, TypeError), match=message):
        queries.checked(asked, np.array([10, 10]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Bags(np.arange(3), np.array([0, 2]), None), "table 1: offsets: must end at the number of indices, 3, got 2"),
        (Bags(np.arange(3), np.array([0, 7]), None), "table 1: offsets: must end at the number of indices, 3, got 7"),
        (Bags(np.arange(3), np.array([0, -3]), None), "table 1: offsets: expected no negative ones"),
        (Bags(np.array([1.7]), np.array([0, 1]), None), "table 1: indices: expected integers, got float64"),
        (Bags(np.arange(3), np.array([0, 3]), np.ones(2, np.float32)), "table 1: weights"),
    ],
)
def test_bags_are_checked_when_they_are_laid_end_to_end(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        queries.query([bags([1]), wrong])


def test_tables_that_are_no_integers_are_refused():
    asked = queries.query([bags([1])])
    with pytest.raises(TypeError, match=r"tables: expected integers \[G\], got float64"):
        queries.checked(asked._replace(tables=np.array([0.0])), np.array([10]))
    with pytest.raises(ValueError, match="a bag is of table 4294967296, but there are tables 0 .. 0"):
        queries.checked(asked._replace(tables=np.array([2**32])), np.array([10]))
    with pytest.raises(ValueError, match="9223372036854775813 is more than int64 holds"):
        queries.query([Bags(np.array([2**63 + 5], np.uint64), np.array([0, 1]))])
    assert queries.checked(asked._replace(tables=[0]), np.array([10])).tables.dtype == np.int32


def test_look_ups_of_one_id_are_sorted_by_their_weights():
    weights = np.array([0.5, 3.0, 0.25, 1.0], np.float32)
    asked = queries.query([bags([5, 7, 5, 5], weights=weights)])
    order = np.array([3, 1, 0, 2])
    mixed = asked._replace(indices=asked.indices[order], weights=asked.weights[order])
    for one in (asked, mixed):
        ordered = queries.sorted_bags(one)
        np.testing.assert_array_equal(ordered.indices, [5, 5, 5, 7])
        np.testing.assert_array_equal(ordered.weights, [0.25, 0.5, 1.0, 3.0])


def test_weights_for_some_tables_alone_are_refused():
    with pytest.raises(ValueError, match="some bags have weights and others none"):
        queries.query([bags([1], weights=np.ones(1, np.float32)), bags([2])])
    with pytest.raises(ValueError, match="tables must name one table for each of the 1 entries"):
        queries.query([bags([1])], tables=[0, 1])
