import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxeff import parallel

ONE = jax.devices()[:1]


def test_default_mesh_holds_every_device_on_the_data_axis():
    assert dict(parallel.mesh().shape) == {"data": jax.device_count()}


def test_wildcard_takes_the_devices_that_are_left():
    # Only the arithmetic matters here; meshes over several devices are tested in their own process.
    assert dict(parallel.mesh({"data": -1, "model": 1}, devices=ONE).shape) == {"data": 1, "model": 1}


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ({"data": 3}, ValueError, r"shape \{'data': 3\} needs 3 devices, but there are 1"),
        ({"data": -1, "model": 2}, ValueError, r"needs a multiple of 2 devices, but there are 1"),
        ({"data": -1, "model": -1}, ValueError, r"only one axis may be -1, got \['data', 'model'\]"),
        ({"data": 0}, ValueError, r"the size of axis 'data' must be positive, or -1 for the rest, got 0"),
        ({"data": -2}, ValueError, r"must be positive"),
        ({"data": 1.0}, TypeError, r"the size of axis 'data' must be an integer, got 1\.0"),
        ({}, ValueError, r"names no axis"),
    ],
)
def test_impossible_mesh_shapes_are_explained(shape, error, message):
    with pytest.raises(error, match=message):
        parallel.mesh(shape, devices=ONE)


def test_mesh_of_no_devices_is_an_error():
    with pytest.raises(ValueError, match="there are 0"):
        parallel.mesh(devices=[])


@pytest.mark.parametrize(
    "function", [parallel.batch_sharding, lambda m, axis: parallel.shard_batch(np.ones(2), m, axis)]
)
def test_an_unknown_axis_lists_those_of_the_mesh(function):
    with pytest.raises(ValueError, match=r"axis 'batch' is not an axis of the mesh; its axes are \['data'\]"):
        function(parallel.mesh(devices=ONE), "batch")


def test_batch_sharding_splits_the_leading_axis():
    assert parallel.batch_sharding(parallel.mesh(devices=ONE)).spec == PartitionSpec("data")


def test_replicate_and_shard_batch_keep_values():
    one = parallel.mesh(devices=ONE)
    batch = {"x": np.arange(6).reshape(3, 2), "y": np.arange(3)}
    for placed in (parallel.replicate(batch, one), parallel.shard_batch(batch, one)):
        jax.tree.map(np.testing.assert_array_equal, placed, batch)


def test_divide_batch_makes_contiguous_parts_and_stays_on_the_host():
    parts = parallel.divide_batch({"x": np.arange(12).reshape(6, 2), "k": jax.random.split(jax.random.key(0), 6)}, 3)
    assert isinstance(parts["x"], np.ndarray)
    assert parts["x"].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    assert parts["k"].shape == (3, 2)


def test_divide_batch_names_sizes_that_would_do():
    with pytest.raises(
        ValueError, match=r"batch of 30 does not divide by 8 devices: .*a multiple of 8, for example 24 or 32"
    ):
        parallel.divide_batch({"x": np.ones(30)}, 8, "devices")
    with pytest.raises(ValueError, match=r"batch of 3 does not divide by 8 parts: .*for example 8$"):
        parallel.divide_batch({"x": np.ones(3)}, 8)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": np.ones(4), "y": np.ones(6)}, r"disagree about the number of rows: \{'x': 4, 'y': 6\}"),
        ({"x": np.float32(1)}, "'x' is a scalar"),
        ({}, "no leaves"),
        ({"x": np.ones((0, 2))}, "batch of 0 does not divide"),
    ],
)
def test_batches_without_a_common_number_of_rows_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        parallel.divide_batch(batch, 2)


def test_a_number_of_parts_must_be_positive():
    with pytest.raises(ValueError, match="the number of parts must be positive, got 0"):
        parallel.divide_batch({"x": np.ones(4)}, 0)
