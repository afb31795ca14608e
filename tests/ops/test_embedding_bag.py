"""Bags against a plain loop over their entries in NumPy, and torch's numbers frozen here."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.ops import embedding_bag, native
from jaxeff.ops.bags import Bags, check_bags, padded
from jaxeff.ops.embedding_bag import embedding_bag_csr, native_lookup, pooled_lookup

missing = embedding_bag.unavailable()
compiled = pytest.mark.skipif(bool(missing), reason=str(missing))


def loop(rows: np.ndarray, bags: Bags, mode: str = "sum", dtype=np.float32) -> np.ndarray:
    """What a bag is, entry by entry, each product and each sum rounded to the dtype."""
    sums = np.zeros((len(bags.offsets) - 1, rows.shape[1]), dtype)
    for b, (begin, end) in enumerate(zip(bags.offsets[:-1], bags.offsets[1:], strict=True)):
        for j in range(begin, end):
            row = rows[bags.indices[j]].astype(dtype)
            sums[b] += row if bags.weights is None else row * dtype(bags.weights[j])
        if mode == "mean":
            sums[b] /= dtype(max(end - begin, 1))
    return sums


def some_bags(rng, rows, lengths, weighted=False):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    indices = rng.integers(0, rows, offsets[-1])
    return Bags(indices, offsets, rng.normal(size=len(indices)).astype(np.float32) if weighted else None)


def spelled(kind, rng, rows, dim):
    """Rows of a kind as bytes, and the numbers that they stand for, each rounded as it is defined."""
    if kind in ("float32", "float16", "bfloat16"):
        values = rng.normal(size=(rows, dim)).astype(jnp.dtype(kind))
        values[0, 0] = 3e-7  # below the smallest normal number of half precision
        return values.view(np.uint8), values.astype(np.float32)
    dtype = np.float32 if kind == "int8" else np.float16
    scale, bias = rng.uniform(0.01, 0.1, (rows, 1)).astype(dtype), rng.normal(size=(rows, 1)).astype(dtype)
    whole = rng.integers(0, 256 if kind == "int8" else 16, (rows, dim)).astype(np.uint8)
    numbers = whole.astype(np.float32) * scale.astype(np.float32) + bias.astype(np.float32)
    if kind == "int4":
        whole = np.pad(whole, ((0, 0), (0, dim % 2)))
        whole = whole[:, ::2] | whole[:, 1::2] << 4
    return np.concatenate([whole, scale.view(np.uint8), bias.view(np.uint8)], 1), numbers


# --- bags on the host -------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=6), st.integers(0, 3), st.booleans())
def test_a_rectangle_holds_each_bag_and_nothing_else(lists, extra, weighted):
    lengths = [len(one) for one in lists]
    indices = np.array([i for one in lists for i in one], np.int64)
    weights = np.arange(1, len(indices) + 1, dtype=np.float32) if weighted else None
    bags = Bags(indices, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), weights)
    length = max(lengths, default=0) + extra
    rectangle, found, spread = padded(check_bags(bags, 10), length, fill=7)
    assert rectangle.shape == (len(lists), length) and rectangle.dtype == np.int32 and found.dtype == np.int32
    assert [row[:n].tolist() for row, n in zip(rectangle, found, strict=True)] == lists
    assert all((row[n:] == 7).all() for row, n in zip(rectangle, found, strict=True))
    if weighted:
        kept = [w for row, n in zip(spread, found, strict=True) for w in row[:n]]
        assert kept == weights.tolist() and spread.sum() == weights.sum()
    else:
        assert spread is None


BAGS = Bags(np.array([3, -1, 5, 12, 4]), np.array([0, 2, 2, 5]), np.arange(5, dtype=np.float32))


def test_ids_out_of_range_are_refused_by_name():
    with pytest.raises(ValueError, match=r"indices: 2 of 5 are outside 0..9, the first is -1 in bag 0"):
        check_bags(BAGS, 10)


def test_ids_out_of_range_are_dropped_with_their_weights():
    bags = check_bags(BAGS, 10, "drop")
    assert bags.indices.tolist() == [3, 5, 4] and bags.offsets.tolist() == [0, 1, 1, 3]
    assert bags.weights.tolist() == [0, 2, 4]


def test_ids_out_of_range_are_hashed_into_it():
    bags = check_bags(BAGS, 10, "hash")
    assert bags.indices.tolist() == [3, 9, 5, 2, 4] and bags.offsets.tolist() == [0, 2, 2, 5]


def test_each_bag_may_be_of_its_own_table():
    bags = Bags(np.array([3, 8, 1]), np.array([0, 1, 3]))
    assert check_bags(bags, np.array([4, 9])).indices.tolist() == [3, 8, 1]
    with pytest.raises(ValueError, match="outside 0..7, the first is 8 in bag 1"):
        check_bags(bags, np.array([4, 8]))


def test_arrays_in_order_are_not_copied():
    bags = Bags(np.zeros(2, np.int32), np.array([0, 2]), np.ones(2, np.float32))
    assert all(a is b for a, b in zip(bags, check_bags(bags, 1), strict=True))


@pytest.mark.parametrize(
    ("bags", "error", "match"),
    [
        (Bags(np.array([1, 2]), np.array([0, -1, 2])), ValueError, "offsets: expected no negative ones, got -1 at 1"),
        (Bags(np.array([1, 2]), np.array([1, 2])), ValueError, "offsets: must begin with 0"),
        (Bags(np.array([1, 2]), np.array([0, 2, 1, 2])), ValueError, "offsets: must not decrease, got 2 and then 1"),
        (Bags(np.array([1, 2]), np.array([0, 1])), ValueError, "offsets: must end at the number of indices, 2, got 1"),
        (Bags(np.array([1, 2]), np.array([], np.int64)), ValueError, r"offsets: expected B \+ 1"),
        (Bags(np.array([[1, 2]]), np.array([0, 2])), ValueError, "indices: expected one dimension"),
        (Bags(np.array([1.0, 2]), np.array([0, 2])), TypeError, "indices: expected integers"),
        (Bags(np.array([1, 2]), np.array([0, 2]), np.array([1, np.nan])), ValueError, "weights: expected finite"),
        (Bags(np.array([1, 2]), np.array([0, 2]), np.ones(3)), ValueError, r"weights: expected shape \(2,\)"),
        (Bags(np.array([1, 2]), np.array([0, 2]), np.array(["a", "b"])), TypeError, "weights: expected real"),
    ],
)
def test_bags_that_are_none_are_refused_by_name(bags, error, match):
    with pytest.raises(error, match=match):
        check_bags(bags, 10)


def test_what_does_not_fit_the_table_is_refused():
    good = Bags(np.array([1, 2]), np.array([0, 2]))
    with pytest.raises(ValueError, match="rows: expected 1 to 2147483647"):
        check_bags(good, 2**31)
    assert check_bags(good, 2**40, dtype=np.int64).indices.dtype == np.int64
    with pytest.raises(ValueError, match="rows: expected 1"):
        check_bags(good, 0)
    with pytest.raises(ValueError, match="policy: expected one of raise, drop, hash, got 'clip'"):
        check_bags(good, 10, "clip")
    with pytest.raises(ValueError, match="bag 0 has 2 entries, more than length=1"):
        padded(good, 1)
    with pytest.raises(ValueError, match="2147483648 does not fit int32"):
        padded(Bags(np.array([2**31]), np.array([0, 1])))


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", embedding_bag.MODES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dim", [1, 5, 16, 67])
def test_sums_are_those_of_a_plain_loop_to_the_bit(mode, weighted, dim):
    rng = np.random.default_rng(dim)
    table = rng.normal(size=(40, dim)).astype(np.float32)
    bags = some_bags(rng, 40, [3, 0, 1, 11, 20], weighted)  # an empty one, and more than a turn of the loop
    expected = loop(table, bags, mode)
    np.testing.assert_allclose(expected, loop(table, bags, mode, np.float64), rtol=1e-4, atol=1e-5)
    indices, lengths, weights = padded(bags)
    ours = jax.jit(lambda *a: pooled_lookup(*a, mode=mode))(table, indices, lengths, weights)
    np.testing.assert_array_equal(ours, expected)
    with native.off():  # nothing compiled: position by position, too
        ours = embedding_bag_csr(table, *bags, mode)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_bits_depend_neither_on_the_padding_nor_on_where_rows_lie(weighted):
    rng = np.random.default_rng(1)
    table = rng.normal(size=(50, 24)).astype(np.float32)
    bags = some_bags(rng, 50, rng.integers(0, 9, 12), weighted)
    expected = pooled_lookup(table, *padded(bags))
    order = rng.permutation(50)
    moved, place = table[order], np.argsort(order)
    for length, fill in ((9, 3), (17, -1), (32, 10**6)):
        there = bags._replace(indices=place[bags.indices])
        found = jax.jit(pooled_lookup)(moved, *padded(there, length, fill))
        np.testing.assert_array_equal(found, expected)


def test_equal_lengths_need_none():
    rng = np.random.default_rng(2)
    table, indices = rng.normal(size=(9, 4)).astype(np.float32), rng.integers(0, 9, (3, 5))
    expected = pooled_lookup(table, jnp.asarray(indices), jnp.full(3, 5), mode="mean")
    np.testing.assert_array_equal(pooled_lookup(table, jnp.asarray(indices), mode="mean"), expected)
    assert not pooled_lookup(table, jnp.zeros((3, 0), jnp.int32), mode="mean").any()


@pytest.mark.parametrize("wrong", [9, -1, 2**31 - 1])
def test_an_index_out_of_range_is_loud_where_it_counts(wrong):
    table = jnp.ones((9, 4))
    sums = pooled_lookup(table, jnp.array([[1, wrong], [1, wrong]]), jnp.array([1, 2]))
    assert sums[0].tolist() == [1] * 4 and jnp.isnan(sums[1]).all()


def test_indices_of_a_byte_name_rows_of_a_large_table():
    table = np.arange(600, dtype=np.float32).reshape(300, 2)
    np.testing.assert_array_equal(pooled_lookup(table, np.array([[3, 200]], np.uint8)), [[406, 408]])


def test_rows_of_any_spelling_are_decoded():
    rng = np.random.default_rng(3)
    stored = rng.integers(0, 255, (9, 6)).astype(np.uint8)
    decode = lambda rows: rows[..., :4].astype(jnp.float32) / 2
    bags = some_bags(rng, 9, [2, 4, 0])
    expected = loop(stored[:, :4].astype(np.float32) / 2, bags)
    np.testing.assert_array_equal(pooled_lookup(stored, *padded(bags), decode=decode), expected)
    half = jnp.asarray(rng.normal(size=(9, 4)), jnp.bfloat16)
    np.testing.assert_array_equal(pooled_lookup(half, *padded(bags)), loop(np.asarray(half, np.float32), bags))


@pytest.mark.parametrize("mode", embedding_bag.MODES)
def test_gradients_of_weights_and_of_the_table(mode):
    rng = np.random.default_rng(4)
    table = rng.normal(size=(7, 3)).astype(np.float32)
    bags = some_bags(rng, 7, [3, 0, 10], weighted=True)
    indices, lengths, weights = padded(bags)
    g = rng.normal(size=(3, 3)).astype(np.float32)
    value = lambda table, weights: (pooled_lookup(table, indices, lengths, weights, mode) * g).sum()
    by_table, by_weights = jax.jit(jax.grad(value, (0, 1)))(table, weights)
    expected, spread = np.zeros((7, 3)), np.zeros(weights.shape)
    for b in range(3):
        for j in range(lengths[b]):
            divisor = max(lengths[b], 1) if mode == "mean" else 1
            expected[indices[b, j]] += weights[b, j] * g[b] / divisor
            spread[b, j] = table[indices[b, j]] @ g[b] / divisor
    np.testing.assert_allclose(by_table, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(by_weights, spread, rtol=1e-4, atol=1e-6)
    _, along = jax.jvp(lambda w: value(table, w), (weights,), (np.ones_like(weights),))
    np.testing.assert_allclose(along, spread.sum(), rtol=1e-4)


def test_tables_are_mapped_over():
    rng = np.random.default_rng(5)
    tables = rng.normal(size=(2, 9, 4)).astype(np.float32)
    parts = [some_bags(rng, 9, [2, 4, 1], weighted=True) for _ in range(2)]
    stacked = [np.stack(arrays) for arrays in zip(*(padded(bags) for bags in parts), strict=True)]
    expected = np.stack([loop(table, bags) for table, bags in zip(tables, parts, strict=True)])
    np.testing.assert_array_equal(jax.vmap(pooled_lookup)(tables, *stacked), expected)
    if not missing:
        np.testing.assert_array_equal(jax.vmap(native_lookup)(tables, *stacked), expected)


def test_products_are_rounded_by_themselves():
    x, y = np.float32(1 + 2**-12), np.float32(1 - 2**-13)
    total = jax.jit(lambda x, y, z: embedding_bag.rounded_product(x, y) + z)(x, y, -(x * y))
    assert total == 0  # and not what the rounding lost


def test_torch_numbers():
    # torch 2.13: F.embedding_bag(arange(12.).reshape(4, 3) / 8, [3, 3, 0, 2, 1], offsets=[0, 3, 3], mode)
    table = np.arange(12, dtype=np.float32).reshape(4, 3) / 8
    bags = Bags(np.array([3, 3, 0, 2, 1]), np.array([0, 3, 3, 5]), np.array([0.5, 2, -1, 1, 0.25], np.float32))
    summed = [[2.25, 2.625, 3.0], [0, 0, 0], [1.125, 1.375, 1.625]]
    means = [[0.75, 0.875, 1.0], [0, 0, 0], [0.5625, 0.6875, 0.8125]]
    weighted = [[2.8125, 3.0, 3.1875], [0, 0, 0], [0.84375, 1.0, 1.15625]]
    bare = bags._replace(weights=None)
    np.testing.assert_array_equal(pooled_lookup(table, *padded(bare)), np.float32(summed))
    np.testing.assert_array_equal(pooled_lookup(table, *padded(bare), mode="mean"), np.float32(means))
    np.testing.assert_array_equal(pooled_lookup(table, *padded(bags)), np.float32(weighted))


# --- compiled code ----------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("dim", [1, 3, 72, 150])
@pytest.mark.parametrize("kind", embedding_bag.KINDS)
def test_compiled_code_has_the_bits_of_the_loop(kind, dim):
    rng = np.random.default_rng(dim)
    stored, numbers = spelled(kind, rng, 40, dim)
    rows, wider = jnp.asarray(stored), jnp.asarray(np.pad(stored, ((0, 0), (0, 7))))
    for mode, weighted in itertools.product(embedding_bag.MODES, (False, True)):
        bags = some_bags(rng, 40, [3, 0, 1, 11, 80], weighted)
        expected = loop(numbers, bags, mode)
        found = native_lookup(rows, *padded(bags), mode, kind=kind, dim=dim)
        np.testing.assert_array_equal(found, expected)
        found = embedding_bag_csr(rows, *bags, mode, kind=kind, dim=dim)
        np.testing.assert_array_equal(found, expected)
        found = embedding_bag_csr(wider, *bags, mode, kind=kind, dim=dim)
        np.testing.assert_array_equal(found, expected)


@compiled
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_compiled_code_takes_tables_of_floating_point(dtype):
    rng = np.random.default_rng(6)
    table = jnp.asarray(rng.normal(size=(30, 20)), dtype)
    bags = some_bags(rng, 30, [4, 6, 0])
    np.testing.assert_array_equal(embedding_bag_csr(table, *bags), loop(np.asarray(table, np.float32), bags))


@compiled
def test_many_bags_are_shared_out():
    rng = np.random.default_rng(7)
    table = rng.normal(size=(1000, 8)).astype(np.float32)
    bags = some_bags(rng, 1000, rng.integers(0, 40, 2000))
    found = embedding_bag_csr(table, *bags)
    np.testing.assert_array_equal(found, pooled_lookup(table, *padded(bags)))


@compiled
def test_halves_at_their_limits_are_read_exactly():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    stored = every.reshape(-1, 16).view(np.uint8)
    ids = jnp.arange(2**12)[:, None]
    found = np.asarray(native_lookup(stored, ids, kind="float16")).reshape(-1)
    np.testing.assert_array_equal(found, every.astype(np.float32))


@compiled
def test_what_compiled_code_cannot_read_is_refused_while_it_runs():
    table, refused = jnp.ones((9, 4)), pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="EmbeddingBag")
    for indices, offsets in (([9], [0, 1]), ([-1], [0, 1]), ([1], [0, 2]), ([1, 2], [0, 2, 1]), ([1], [-1, 1])):
        with refused:
            jax.block_until_ready(embedding_bag_csr(table, jnp.array(indices), jnp.array(offsets)))
    with refused:
        jax.block_until_ready(native_lookup(table, jnp.array([[1, 2]]), jnp.array([3])))


def test_arguments_that_do_not_fit_are_refused():
    table, ids = jnp.ones((9, 4)), jnp.zeros((2, 3), jnp.int32)
    refused = lambda error, match: pytest.raises(error, match=match)
    with refused(ValueError, "mode: expected one of sum, mean, got 'max'"):
        pooled_lookup(table, ids, mode="max")
    with refused(TypeError, "indices: expected integers"):
        pooled_lookup(table, ids.astype(jnp.float32))
    with refused(ValueError, r"weights: expected shape \(2, 3\)"):
        pooled_lookup(table, ids, weights=jnp.ones(3))
    with refused(ValueError, r"lengths: expected shape \(2,\)"):
        pooled_lookup(table, ids, jnp.ones(3, jnp.int32))
    with refused(TypeError, "rows of uint8 need decode"):
        pooled_lookup(table.astype(jnp.uint8), ids)
    with refused(ValueError, "kind: rows of uint8 are of one of"):
        native_lookup(table.astype(jnp.uint8), ids)
    with refused(ValueError, "rows of 4 bytes hold 1 to 1 numbers of 'float32', got dim=2"):
        native_lookup(table.astype(jnp.uint8), ids, kind="float32", dim=2)
    with refused(TypeError, "table: expected float32, float16, bfloat16 or rows of uint8"):
        native_lookup(table.astype(jnp.int32), ids)
    with refused(ValueError, r"indices \[nnz\] and offsets"):
        embedding_bag_csr(table, ids, jnp.zeros(3, jnp.int32))
    with native.off(), refused(ValueError, "decode: rows of uint8 need it"):
        embedding_bag_csr(table.astype(jnp.uint8), ids[0], jnp.array([0, 3]), kind="float32")
