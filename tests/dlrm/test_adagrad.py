"""Row-wise Adagrad on sparse rows against a dense loop in NumPy, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.dlrm.adagrad import SparseRows, apply_updates, rowwise_adagrad, sparse_gradient
from jaxeff.ops.embedding_bag import pooled_lookup

ROWS, DIM = 11, 3


def dense_gradient(gradient, indices, lengths, weights, mode):
    """Of a table from that of its bags, entry by entry."""
    found = np.zeros((ROWS, DIM))
    for b, row in enumerate(indices):
        for j in range(lengths[b]):
            if 0 <= row[j] < ROWS:
                share = weights[b, j] / (max(lengths[b], 1) if mode == "mean" else 1)
                found[row[j]] += share * gradient[b].astype(np.float64)
    return found


def some(rng, bags=5, longest=4):
    indices = rng.integers(0, ROWS, (bags, longest)).astype(np.int32)
    lengths = rng.integers(0, longest + 1, bags).astype(np.int32)
    weights = rng.normal(size=indices.shape).astype(np.float32)
    return rng.normal(size=(bags, DIM)).astype(np.float32), indices, lengths, weights


def spread(sparse):
    """As a dense gradient."""
    return jnp.zeros((ROWS, DIM)).at[sparse.rows].add(sparse.values, mode="drop")


of_rows = jax.jit(lambda *arrays, mode: sparse_gradient(arrays[0], ROWS, *arrays[1:], mode), static_argnames="mode")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["sum", "mean"]))
def test_sparse_gradients_are_the_dense_ones(seed, mode):
    gradient, indices, lengths, weights = some(np.random.default_rng(seed))
    indices[0, 0] = seed % 3 * 10 - 7  # out of range now and then
    found = of_rows(gradient, indices, lengths, weights, mode=mode)
    expected = dense_gradient(gradient, indices, lengths, weights, mode)
    np.testing.assert_allclose(spread(found), expected, rtol=1e-5, atol=1e-6)


def test_rows_are_distinct_ascending_and_the_rest_reaches_none():
    gradient, indices, lengths, weights = some(np.random.default_rng(1))
    found = of_rows(gradient, indices, lengths, weights, mode="sum")
    read = np.unique(np.concatenate([row[:n] for row, n in zip(indices, lengths, strict=True)]))
    assert found.rows.shape == (20,) and found.values.shape == (20, DIM)
    assert (np.diff(found.rows) > 0).all()
    np.testing.assert_array_equal(found.rows[found.rows < ROWS], read)
    assert not np.asarray(found.values)[len(read) + 1 :].any()


def test_sparse_gradients_are_those_of_the_look_up():
    gradient, indices, lengths, weights = some(np.random.default_rng(2))
    table = jnp.zeros((ROWS, DIM))

    @functools.partial(jax.jit, static_argnums=2)
    def both(lengths, weights, mode):
        value = lambda t: (pooled_lookup(t, indices, lengths, weights, mode) * gradient).sum()
        sparse = sparse_gradient(jnp.asarray(gradient), ROWS, jnp.asarray(indices), lengths, weights, mode)
        return spread(sparse), jax.grad(value)(table)

    for arguments in ((lengths, weights, "sum"), (None, None, "mean")):
        np.testing.assert_allclose(*both(*arguments), rtol=1e-5, atol=1e-6)


def test_steps_are_those_of_a_dense_loop():
    rng = np.random.default_rng(3)
    optimizer = rowwise_adagrad(lambda steps: 0.1 / (1 + steps), eps=1e-3, initial=0.2)
    tables = {"a": jnp.asarray(rng.normal(size=(ROWS, DIM)), jnp.float32), "b": jnp.ones((ROWS, DIM))}
    expected = {name: np.asarray(table, np.float64) for name, table in tables.items()}
    sums = {name: np.full(ROWS, 0.2) for name in tables}
    state = optimizer.init(tables)

    @jax.jit
    def step(tables, state, batch):
        sparse = {name: sparse_gradient(arrays[0], ROWS, *arrays[1:]) for name, arrays in batch.items()}
        updates, state = optimizer.update(sparse, state)
        return apply_updates(tables, updates), state

    for number in range(4):
        batch = {name: some(rng) for name in tables}
        tables, state = step(tables, state, batch)
        for name, arrays in batch.items():
            dense = dense_gradient(*arrays, "sum")
            sums[name] += (dense**2).mean(1)
            expected[name] -= 0.1 / (1 + number) * dense / (np.sqrt(sums[name]) + 1e-3)[:, None]
    assert state.steps == 4
    for name in tables:
        np.testing.assert_allclose(tables[name], expected[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.sums[name], sums[name], rtol=1e-5)


def test_rows_that_were_not_read_keep_their_bits():
    rng = np.random.default_rng(4)
    table = jnp.asarray(rng.normal(size=(ROWS, DIM)), jnp.float32)
    optimizer = rowwise_adagrad(0.5)
    state = optimizer.init(table)
    sparse = SparseRows(jnp.array([2, 7, ROWS, ROWS + 3], jnp.int32), jnp.ones((4, DIM)))
    updates, after = optimizer.update(sparse, state)
    moved = apply_updates(table, updates)
    others = np.delete(np.arange(ROWS), [2, 7])
    np.testing.assert_array_equal(moved[others], table[others])
    assert not after.sums[others].any() and (after.sums[jnp.array([2, 7])] == 1).all()
    np.testing.assert_allclose(moved[2], table[2] - 0.5, rtol=1e-6)


def test_a_step_costs_what_it_reads_and_not_what_the_table_holds():
    optimizer = rowwise_adagrad(0.1)

    def step(tables, state, gradient, indices):
        sparse = sparse_gradient(gradient, len(tables), indices)
        updates, state = optimizer.update(sparse, state)
        return apply_updates(tables, updates), state

    def accessed(rows):
        table = jax.ShapeDtypeStruct((rows, DIM), jnp.float32)
        state = jax.eval_shape(optimizer.init, table)
        batch = jax.ShapeDtypeStruct((2, DIM), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.int32)
        donated = jax.jit(step, donate_argnums=(0, 1))
        return donated.lower(table, state, *batch).compile().memory_analysis()

    small, large = accessed(10), accessed(10**6)
    # All of the table's bytes are those of the argument, whose memory the result takes over.
    assert large.alias_size_in_bytes - small.alias_size_in_bytes == (10**6 - 10) * 4 * (DIM + 1)
    assert large.temp_size_in_bytes <= small.temp_size_in_bytes + 1024


def test_numbers_out_of_range_are_refused():
    for settings_, match in (
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": 1.0, "eps": 0.0}, "eps"),
        ({"learning_rate": 1.0, "initial": -1.0}, "initial"),
    ):
        with pytest.raises(ValueError, match=match):
            rowwise_adagrad(**settings_)
    with pytest.raises(ValueError, match="rows: 2147483640 and 20 entries"):
        sparse_gradient(jnp.zeros((5, DIM)), 2**31 - 8, jnp.zeros((5, 4), jnp.int32))
