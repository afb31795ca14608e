import itertools
import json
import os
import subprocess
import sys
import textwrap
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.data import Batches, padded_batches, prefetch


def _rows(length):
    return {"x": np.arange(length), "y": np.arange(length) * 10}


def _epoch(batches, number):
    first = number * batches.steps_per_epoch
    return np.concatenate([batches.batch(first + step)["x"] for step in range(batches.steps_per_epoch)])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.integers(0, 5))
def test_each_epoch_visits_rows_at_most_once_and_leaves_out_only_the_remainder(length, batch_size, seed, epoch):
    batch_size = min(batch_size, length)
    rows = _epoch(Batches(_rows(length), batch_size, seed=seed), epoch)
    assert len(set(rows.tolist())) == len(rows) == length - length % batch_size


def test_each_epoch_is_a_permutation_of_its_own():
    batches = Batches(_rows(60), 10, seed=3)
    epochs = [_epoch(batches, number) for number in range(4)]
    for rows in epochs:
        assert sorted(rows.tolist()) == list(range(60))
    assert len({tuple(rows.tolist()) for rows in epochs}) == 4


def test_rows_left_out_differ_between_epochs():
    batches = Batches(_rows(10), 4, seed=0)
    left_out = {frozenset(range(10)) - frozenset(_epoch(batches, number).tolist()) for number in range(6)}
    assert len(left_out) > 1


def test_arrays_stay_together():
    batch = Batches(_rows(30), 7, seed=1).batch(2)
    np.testing.assert_array_equal(batch["y"], batch["x"] * 10)


def test_seed_decides_the_order():
    one, same, other = (Batches(_rows(50), 50, seed=seed).batch(0)["x"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_order_never_changes_between_versions():
    # Frozen when the pipeline was defined: a checkpoint of an older version resumes with the same data.
    assert Batches(_rows(8), 8, seed=0).batch(0)["x"].tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert Batches(_rows(8), 8, seed=0).batch(1)["x"].tolist() == [3, 7, 4, 2, 1, 6, 5, 0]


def test_without_shuffling_rows_keep_their_order():
    batches = Batches(_rows(6), 2, seed=0, shuffle=False)
    assert [batches.batch(step)["x"].tolist() for step in range(4)] == [[0, 1], [2, 3], [4, 5], [0, 1]]


@pytest.mark.parametrize("stop", [1, 3, 5, 7, 12])
def test_resume_in_the_middle_of_an_epoch_equals_the_uninterrupted_run(stop):
    uninterrupted = [batch["x"] for batch in itertools.islice(Batches(_rows(23), 4, seed=9).starting_at(0), 15)]
    resumed = [batch["x"] for batch in itertools.islice(Batches(_rows(23), 4, seed=9).starting_at(stop), 15 - stop)]
    np.testing.assert_array_equal(uninterrupted[stop:], resumed)


def test_batches_may_be_asked_in_any_order():
    batches = Batches(_rows(20), 5, seed=4)
    forwards = [batches.batch(step)["x"] for step in range(12)]
    backwards = [batches.batch(step)["x"] for step in reversed(range(12))]
    np.testing.assert_array_equal(forwards, backwards[::-1])


def test_a_batch_is_a_copy():
    arrays = _rows(4)
    Batches(arrays, 4, seed=0, shuffle=False).batch(0)["x"][:] = -1
    assert arrays["x"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        (_rows(4), {"batch_size": 5, "seed": 0}, "batch_size=5 is larger than the data, which has 4 rows"),
        (_rows(4), {"batch_size": 0, "seed": 0}, "batch_size=0 is out of range"),
        (_rows(4), {"batch_size": 2, "seed": -1}, "seed=-1 is out of range"),
        ({"x": np.zeros(3), "y": np.zeros(2)}, {"batch_size": 1, "seed": 0}, r"\{'x': 3, 'y': 2\}"),
        ({}, {"batch_size": 1, "seed": 0}, "non-empty"),
        (_rows(0), {"batch_size": 1, "seed": 0}, "non-empty"),
        ({"x": np.float32(1)}, {"batch_size": 1, "seed": 0}, "a scalar"),
    ],
)
def test_bad_values_are_named(arrays, settings, message):
    with pytest.raises(ValueError, match=message):
        Batches(arrays, **settings)


def test_bad_types_are_named():
    from jaxeff.data import load

    with pytest.raises(TypeError, match=r"pass dataset\.arrays"):
        Batches(load("digits"), 4, seed=0)
    with pytest.raises(TypeError, match="batch_size must be an integer, got 2.5"):
        Batches(_rows(4), 2.5, seed=0)
    with pytest.raises(TypeError, match="seed must be an integer"):
        Batches(_rows(4), 2, seed=None)


def test_negative_step_is_refused():
    with pytest.raises(ValueError, match="step=-1"):
        Batches(_rows(4), 2, seed=0).batch(-1)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 8))
def test_padded_batches_hold_every_row_once_and_one_shape(length, batch_size):
    batches = list(padded_batches({"x": np.arange(1, length + 1), "z": np.ones((length, 2), bool)}, batch_size))
    assert len(batches) == -(-length // batch_size)
    assert {(batch["x"].shape, batch["z"].shape) for batch in batches} == {((batch_size,), (batch_size, 2))}
    x, mask = (np.concatenate([batch[name] for batch in batches]) for name in ("x", "mask"))
    assert x[mask == 1].tolist() == list(range(1, length + 1))
    assert not x[mask == 0].any()
    assert mask.dtype == np.float32
    assert mask.sum() == length


def test_an_array_called_mask_is_refused():
    with pytest.raises(ValueError, match="rename it"):
        padded_batches({"mask": np.zeros(3)}, 2)


@pytest.mark.parametrize("size", [1, 2, 10])
def test_prefetch_changes_nothing_but_the_place(size):
    batches = Batches(_rows(20), 5, seed=0)
    plain = [batches.batch(step) for step in range(9)]
    fetched = list(prefetch((batches.batch(step) for step in range(9)), size=size))
    assert len(fetched) == 9
    for one, other in zip(plain, fetched, strict=True):
        assert all(isinstance(array, jax.Array) for array in other.values())
        np.testing.assert_array_equal(one["x"], other["x"])
        np.testing.assert_array_equal(one["y"], other["y"])


def test_prefetch_of_nothing_is_nothing():
    assert list(prefetch([])) == []


def test_exception_of_the_source_reaches_the_consumer_after_the_batches_before_it():
    def source():
        yield {"x": np.zeros(1)}
        yield {"x": np.ones(1)}
        raise RuntimeError("disk 3 is gone")

    fetched = prefetch(source())
    assert [next(fetched)["x"].item() for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="disk 3 is gone"):
        next(fetched)
    assert _no_prefetch_thread()


def _no_prefetch_thread():
    return not [thread for thread in threading.enumerate() if thread.name == "jaxeff-prefetch"]


def test_thread_stops_when_the_consumer_closes():
    fetched = prefetch(Batches(_rows(20), 5, seed=0).starting_at(0))
    next(fetched)
    assert not _no_prefetch_thread()
    fetched.close()
    assert _no_prefetch_thread()


def test_thread_stops_when_the_consumer_drops_the_iterator():
    for _ in prefetch(Batches(_rows(20), 5, seed=0).starting_at(0)):
        break
    assert _no_prefetch_thread()


def test_thread_stops_at_the_end_of_the_batches():
    list(prefetch([_rows(3)]))
    assert _no_prefetch_thread()


def test_no_thread_before_the_first_batch_is_asked_for():
    fetched = prefetch(Batches(_rows(20), 5, seed=0).starting_at(0))
    assert _no_prefetch_thread()
    fetched.close()


def test_prefetch_reads_only_a_few_batches_ahead():
    read = []

    def source():
        for number in itertools.count():
            read.append(number)
            yield {"x": np.full(1, number)}

    fetched = prefetch(source(), size=2)
    assert next(fetched)["x"].item() == 0
    fetched.close()
    # One handed out, two ready, one in the hands of the thread.
    assert len(read) <= 4


def test_bad_prefetch_arguments_are_named():
    with pytest.raises(ValueError, match="size=0"):
        prefetch([], size=0)
    with pytest.raises(TypeError, match="NamedSharding"):
        prefetch([], sharding="data")
    with pytest.raises(TypeError, match="not iterable"):
        prefetch(3)


@pytest.fixture(scope="module")
def eight_devices():
    """What a process with 8 forced host devices reports about sharded prefetching."""
    program = textwrap.dedent("""
        import json
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from jaxeff.data import Batches, prefetch
        mesh = jax.make_mesh((8,), ("data",))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        arrays = {"image": np.arange(64 * 2).reshape(64, 2), "label": np.arange(64)}
        batches = Batches(arrays, 16, seed=0)
        fetched = prefetch(batches.starting_at(0), sharding=sharding)
        batch = next(fetched)
        fetched.close()
        report = {
            "equal": bool((np.asarray(batch["image"]) == batches.batch(0)["image"]).all()),
            "shards": [list(shard.data.shape) for shard in batch["image"].addressable_shards],
            "devices": len(batch["label"].devices()),
        }
        try:
            next(prefetch(Batches(arrays, 12, seed=0).starting_at(0), sharding=sharding))
        except ValueError as error:
            report["error"] = str(error)
        print(json.dumps(report))
    """)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip(),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.multidevice
def test_batches_are_spread_over_the_mesh(eight_devices):
    assert eight_devices["devices"] == 8
    assert eight_devices["shards"] == [[2, 2]] * 8


@pytest.mark.multidevice
def test_sharding_keeps_the_values(eight_devices):
    assert eight_devices["equal"]


@pytest.mark.multidevice
def test_batch_that_the_devices_cannot_share_evenly_is_named(eight_devices):
    assert "batch array 'image' of shape [12, 2] cannot be split over the 8 devices" in eight_devices["error"]
    assert "choose another batch_size" in eight_devices["error"]
