"""Tables whose rows are spread over eight devices; run as tests/parallel/eight_devices.py is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import parallel
from jaxeff.ops.embedding_bag import pooled_lookup
from jaxeff.sdm import sharded


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    table = sharded.padded_table(jnp.asarray(rng.normal(size=(93, 5)), jnp.float32), 8)
    ids = jnp.asarray(rng.integers(0, 93, (24, 7)), jnp.int32)
    lengths = jnp.asarray(rng.integers(0, 8, 24), jnp.int32).at[3].set(0)
    return table, ids, lengths, jnp.asarray(rng.normal(size=(24, 7)), jnp.float32)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("method", sharded.METHODS)
def test_eight_devices_give_what_one_gives(problem, method, mode):
    assert jax.device_count() == 8
    table, ids, lengths, weights = problem
    look_up = jax.jit(sharded.sharded_lookup(parallel.mesh({"rows": 8}), "rows", mode=mode, method=method))
    for arguments in ((ids,), (ids, lengths), (ids, lengths, weights)):
        pooled, lost = look_up(table, *arguments)
        expected = pooled_lookup(table, *arguments, mode=mode)
        assert int(lost) == 0
        if method == "all_to_all":  # which keeps the order of a bag
            np.testing.assert_array_equal(pooled, expected)
        np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", sharded.METHODS)
def test_an_id_out_of_range_makes_its_bag_nan(problem, method):
    table, ids, lengths, _ = problem
    wrong = ids.at[5, 0].set(len(table)).at[9, 1].set(-1).at[3, 0].set(10**6)  # bag 3 is empty
    lengths = lengths.at[jnp.array([5, 9])].set(7)
    pooled, lost = sharded.sharded_lookup(parallel.mesh({"rows": 8}), "rows", method=method)(table, wrong, lengths)
    assert int(lost) == 0
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(pooled).all(1)), [5, 9])
    np.testing.assert_array_equal(np.isnan(pooled), np.isnan(pooled_lookup(table, wrong, lengths)))


def test_rows_of_padding_and_small_integers_are_no_trap(problem):
    table, ids, _, _ = problem
    look_up = sharded.sharded_lookup(parallel.mesh({"rows": 8}), "rows", rows=93)
    pooled, _ = look_up(table, ids.at[0, 0].set(94))
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(pooled).any(1)), [0])
    large = jnp.ones((1000, 2))
    pooled, _ = sharded.sharded_lookup(parallel.mesh({"rows": 8}), "rows")(large, ids.astype(jnp.int8))
    np.testing.assert_array_equal(pooled, np.full((24, 2), 7.0))


def test_a_mesh_with_explicit_axes_is_refused():
    with pytest.raises(ValueError, match="make it by jaxeff.parallel.mesh"):
        sharded.sharded_lookup(jax.make_mesh((8,), ("rows",)), "rows")


def test_look_ups_beyond_the_capacity_are_counted(problem):
    table, ids, _, _ = problem
    mesh = parallel.mesh({"rows": 8})
    _, lost = sharded.sharded_lookup(mesh, "rows", method="all_to_all", capacity=2)(table, ids)
    owners = np.asarray(ids).reshape(8, -1) // (len(table) // 8)
    sent = [np.bincount(one, minlength=8) for one in owners]
    assert int(lost) == np.maximum(np.array(sent) - 2, 0).sum() > 0


def test_tables_and_bags_that_do_not_split_are_named(problem):
    table, ids, _, _ = problem
    look_up = sharded.sharded_lookup(parallel.mesh({"rows": 8}), "rows")
    with pytest.raises(ValueError, match="the 95 rows of the table do not split over 8 devices"):
        look_up(table[:95], ids)
    with pytest.raises(ValueError, match="the 23 bags do not split"):
        look_up(table, ids[:23])
