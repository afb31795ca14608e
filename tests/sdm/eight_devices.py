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
    table = sharded.pad_rows(jnp.asarray(rng.normal(size=(93, 5)), jnp.float32), 8)
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
