import contextlib
import json
import resource
import shutil
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import training
from jaxeff.training import Checkpoints, CorruptCheckpoint, ForeignCheckpoint, NoCheckpoint, SaveFailed

# When a read or write fails, Orbax closes its event loop under the operations that are still going on.
ORBAX_NOISE = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


class State(NamedTuple):
    step: Any
    params: Any
    ema: Any
    model_state: Any
    key: Any


def state(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "dense": {"kernel": jnp.asarray(rng.normal(size=(60, 50)), jnp.float32), "bias": jnp.zeros(50)},
        "half": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
        "layers": [jnp.arange(3), jnp.asarray(True)],
    }
    return State(jnp.int32(seed), params, None, {}, jax.random.key(seed))


def raw(tree):
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(tree)
    ]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(raw(one), raw(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def snapshot(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with sound checkpoints of steps 10 and 20."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(10, state(1), {"note": "older"})
        checkpoints.save(20, state(2), {"note": "newer"})
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_restores_every_kind_of_leaf_bit_by_bit(saved):
    restored, meta = Checkpoints(saved).restore(state())
    assert_same(restored, state(2))
    assert meta == {"note": "newer"}
    assert jax.random.key_impl(restored.key) == jax.random.key_impl(state().key)


def test_restores_an_older_step_into_abstract_arrays(saved):
    restored, meta = Checkpoints(saved).restore(jax.eval_shape(state), 10)
    assert_same(restored, state(1))
    assert meta == Checkpoints(saved).meta(10) == {"note": "older"}


def test_restores_to_the_sharding_that_is_asked_for(saved):
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(state))
    restored, _ = Checkpoints(saved).restore(like)
    assert_same(restored, state(2))
    assert restored.params["dense"]["kernel"].sharding == sharding


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    big = {"w": jnp.arange(400_000, dtype=jnp.float32)}
    expected = np.asarray(big["w"]).copy()
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        for step in range(5):
            current = jax.tree.map(jnp.copy, big)
            checkpoints.save(step, current)
            spoil(current)
        checkpoints.wait()
        for step in range(5):
            np.testing.assert_array_equal(checkpoints.restore(big, step)[0]["w"], expected)


def test_meta_may_be_changed_as_soon_as_save_returns(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        meta = {"rows": [1, 2]}
        checkpoints.save(1, state(), meta)
        meta["rows"].clear()
    assert Checkpoints(tmp_path).meta() == {"rows": [1, 2]}


def test_keeps_the_newest(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 5, 7, 100):
            checkpoints.save(step, state(step))
        checkpoints.wait()
        assert checkpoints.steps() == (7, 100)
        assert checkpoints.latest() == 100


def test_reading_neither_creates_nor_changes_a_directory(saved, tmp_path):
    before = snapshot(saved)
    Checkpoints(saved).restore(state())
    assert snapshot(saved) == before
    missing = Checkpoints(tmp_path / "nothing")
    assert missing.latest() is None
    with pytest.raises(NoCheckpoint, match="nothing: there is no checkpoint"):
        missing.restore(state())
    assert not (tmp_path / "nothing").exists()


def test_a_step_that_is_not_there_lists_those_that_are(saved):
    with pytest.raises(NoCheckpoint, match="no checkpoint of step 15, only of 10, 20"):
        Checkpoints(saved).restore(state(), 15)


def test_one_step_is_not_saved_twice(copy):
    with pytest.raises(training.CheckpointError, match="there is a checkpoint of step 20 already"):
        Checkpoints(copy).save(20, state())


def test_meta_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        Checkpoints(tmp_path / "new").save(1, state(), {"x": object()})
    assert not (tmp_path / "new").exists()


# ---- Damaged files --------------------------------------------------------------------------------------------------


def damage(path, how):
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut off":
        path.write_bytes(content[:middle])
    elif content:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :])


@ORBAX_NOISE
@pytest.mark.parametrize("how", ["missing", "empty", "cut off", "one bit changed"])
def test_whatever_happens_to_a_file_the_state_is_right_or_refused(saved, tmp_path, how):
    files = [path.relative_to(saved) for path in (saved / "20").rglob("*") if path.is_file()]
    refused = 0
    for index, name in enumerate(files):
        directory = shutil.copytree(saved, tmp_path / str(index))
        damage(directory / name, how)
        before = snapshot(directory)
        try:
            restored, meta = Checkpoints(directory).restore(state())
        except CorruptCheckpoint as error:
            refused += 1
            assert str(directory / "20") in str(error)
            assert "step 20 is damaged" in str(error)
            assert "step 10 is still good" in str(error)
        else:
            assert_same(restored, state(2))
            assert meta == {"note": "newer"}
        assert snapshot(directory) == before
    assert refused >= 3  # the record, the index and the data are not to be spared


@ORBAX_NOISE
def test_when_no_step_is_good_the_message_says_so(copy):
    for path in copy.glob("*/record/metadata"):
        path.write_text("{")
    with pytest.raises(CorruptCheckpoint, match="no older step can be read"):
        Checkpoints(copy).restore(state())
    with pytest.raises(CorruptCheckpoint):
        Checkpoints(copy).meta()


def test_files_of_an_unfinished_save_are_no_checkpoint(copy):
    shutil.copytree(copy / "20", copy / "30.orbax-checkpoint-tmp")
    assert Checkpoints(copy).latest() == 20


# ---- Checkpoints of something else ----------------------------------------------------------------------------------


def changed(**params):
    return state()._replace(params={**state().params, **params})


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (changed(half=jnp.zeros(8, jnp.bfloat16)), r"params/half is bfloat16\[7\], expected bfloat16\[8\]"),
        (changed(half=jnp.zeros(7, jnp.float16)), r"params/half is bfloat16\[7\], expected float16\[7\]"),
        (changed(extra=jnp.zeros(2)), "params/extra is missing"),
        (state()._replace(params={"half": state().params["half"]}), "params/dense/bias is not expected"),
        (state()._replace(ema=jnp.zeros(3)), "ema is missing"),
        (state()._replace(key=jax.random.key(0, impl="rbg")), r"key is key<fry>\[\], expected key<rbg>\[\]"),
    ],
)
def test_a_checkpoint_of_another_tree_names_the_leaves(saved, like, message):
    before = snapshot(saved)
    with pytest.raises(ForeignCheckpoint, match=message):
        Checkpoints(saved).restore(like)
    assert snapshot(saved) == before


# ---- A full disk ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(largest):
    """No file can grow beyond this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def large(seed):
    return {"w": jnp.asarray(np.random.default_rng(seed).normal(size=300_000), jnp.float32)}


@ORBAX_NOISE
def test_a_full_disk_leaves_the_old_checkpoint_valid_and_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, large(1))
    checkpoints.wait()
    older, newer = large(1), large(2)
    with (
        full_disk(400_000),
        pytest.raises(SaveFailed, match=r"step 2 could not be written \(File too large, .*step 1 is complete"),
    ):
        checkpoints.save(2, newer)
        checkpoints.wait()
    assert checkpoints.latest() == 1
    np.testing.assert_array_equal(checkpoints.restore(older)[0]["w"], older["w"])
    checkpoints.save(2, newer)  # room again: saving goes on
    checkpoints.wait()
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


@ORBAX_NOISE
def test_a_run_on_a_full_disk_stops_with_its_older_checkpoint_intact(tmp_path):
    def step(state, batch):
        return {"w": state["w"] + batch["x"]}, {"loss": jnp.float32(1)}

    method = training.Method(lambda key, batch: large(1), step, lambda state, batch: {})
    newest = tmp_path / "checkpoints" / "4"

    def source(start, disk=None):
        for number in range(start + 1, 100):
            if disk and number == 6:
                while not newest.exists():
                    time.sleep(0.01)  # that save is to be finished before the disk is full
                disk.enter_context(full_disk(400_000))
            yield {"x": np.float32(number)}

    def fit(**options):
        return training.fit(
            method, options.pop("source", source), steps=12, key=jax.random.key(0), checkpoint_every=4,
            progress=False, **options,
        )  # fmt: skip

    with contextlib.ExitStack() as disk, pytest.raises(SaveFailed, match=r"step 8 could not .*step 4 is complete"):
        fit(workdir=tmp_path, source=lambda start: source(start, disk))
    assert sorted(path.name for path in newest.parent.iterdir()) == ["4"]
    np.testing.assert_array_equal(fit(workdir=tmp_path).state["w"], fit().state["w"])


# ---- Orbax ----------------------------------------------------------------------------------------------------------


def test_without_orbax_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r'pip install "jaxeff\[train\]"'):
        Checkpoints(tmp_path)


def test_without_orbax_a_run_without_work_directory_trains(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    assert tiny.fit(steps=2).step == 2


def test_other_programs_can_read_the_state_with_orbax_alone(saved):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        restored = reader.restore(saved / "20" / "state")
    np.testing.assert_array_equal(restored["params"]["dense"]["kernel"], state(2).params["dense"]["kernel"])
    record = json.loads((saved / "20" / "record" / "metadata").read_text())
    assert json.loads(record["text"])["leaves"]["params/half"]["dtype"] == "bfloat16"


def test_a_save_that_fails_in_the_background_is_reported_by_check(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state())
    checkpoints.wait()

    def failed():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "check_for_errors", failed)
    with pytest.raises(SaveFailed, match="No space left on device"):
        checkpoints.check()
    monkeypatch.undo()
    checkpoints.close()
