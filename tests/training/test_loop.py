import os
import signal
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import training
from jaxeff.training import Checkpoints, Method, read_metrics


class Crash(Exception):
    pass


def crash_at(tiny, step):
    """Batches that fail instead of giving the one of this step."""

    def source(start):
        for number, batch in enumerate(tiny.batches_from(start), start + 1):
            if number == step:
                raise Crash
            yield batch

    return source


def signal_at(tiny, step, signum=signal.SIGTERM):
    """Batches that send this process a signal while the one of this step is prepared."""

    def source(start):
        for number, batch in enumerate(tiny.batches_from(start), start + 1):
            if number == step:
                os.kill(os.getpid(), signum)
            yield batch

    return source


def assert_same_state(tiny, one, other):
    for a, b in zip(tiny.leaves(one), tiny.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def without_speed(rows):
    return [{k: v for k, v in row.items() if "per_second" not in k} for row in rows]


# ---- Exact resume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 4, 6, 9, 15, 16])
def test_a_run_stopped_by_a_signal_at_any_step_ends_in_the_same_state(tiny, uninterrupted, tmp_path, step):
    with pytest.raises(training.Interrupted) as stopped:
        tiny.fit(tmp_path, signal_at(tiny, step))
    assert stopped.value.step == step
    assert Checkpoints(tmp_path / "checkpoints").latest() == step
    resumed = tiny.fit(tmp_path)
    assert_same_state(tiny, resumed.state, uninterrupted.state)
    assert resumed.evaluation == uninterrupted.evaluation
    assert without_speed(resumed.history) == without_speed(uninterrupted.history)


@pytest.mark.parametrize("step", [3, 8, 14])
def test_a_run_that_crashed_goes_on_from_its_last_checkpoint_to_the_same_state(tiny, uninterrupted, tmp_path, step):
    with pytest.raises(Crash):
        tiny.fit(tmp_path, crash_at(tiny, step))
    assert (Checkpoints(tmp_path / "checkpoints").latest() or 0) == (step - 1) // 6 * 6
    resumed = tiny.fit(tmp_path)
    assert_same_state(tiny, resumed.state, uninterrupted.state)
    assert without_speed(resumed.history) == without_speed(uninterrupted.history)


def test_a_run_may_be_stopped_again_and_again(tiny, uninterrupted, tmp_path):
    for step in range(2, 9, 2):
        with pytest.raises(training.Interrupted):
            tiny.fit(tmp_path, signal_at(tiny, step))
    assert_same_state(tiny, tiny.fit(tmp_path).state, uninterrupted.state)


def test_a_signal_before_the_first_step_saves_nothing(tiny, uninterrupted, tmp_path):
    with pytest.raises(training.Interrupted, match="stopped before the first of 16 steps") as stopped:
        tiny.fit(tmp_path, signal_at(tiny, 1))
    assert stopped.value.step == 0
    assert Checkpoints(tmp_path / "checkpoints").steps() == ()
    assert_same_state(tiny, tiny.fit(tmp_path).state, uninterrupted.state)


def test_a_signal_during_evaluation_leaves_it_to_the_next_run(tiny, uninterrupted, tmp_path):
    calls = []

    def evaluate_on():
        calls.append(None)
        for index, batch in enumerate(tiny.test_batches()):
            if len(calls) == 2 and index == 0:  # the evaluation after step 10
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.raises(training.Interrupted) as stopped:
        tiny.fit(tmp_path, evaluate_on=evaluate_on)
    assert stopped.value.step == 10
    resumed = tiny.fit(tmp_path)
    assert without_speed(resumed.history) == without_speed(uninterrupted.history)


def test_metrics_have_no_duplicates_after_a_resume(tiny, tmp_path):
    with pytest.raises(Crash):
        tiny.fit(tmp_path, crash_at(tiny, 12))
    assert [row["step"] for row in read_metrics(tmp_path)] == [4, 5, 8, 10]
    tiny.fit(tmp_path)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == [4, 8, 12, 16]
    assert [row["step"] for row in rows if "eval/loss" in row] == [5, 10, 15, 16]


def test_a_finished_run_trains_no_step_when_started_again(tiny, tmp_path):
    first = tiny.fit(tmp_path)
    taken = []

    def source(start):
        for batch in tiny.batches_from(start):
            taken.append(batch)
            yield batch

    again = tiny.fit(tmp_path, source)
    assert len(taken) == 1  # for its shapes
    assert_same_state(tiny, first.state, again.state)
    assert again.evaluation == first.evaluation
    assert again.history == first.history


def test_a_run_resumes_on_the_batches_of_the_data_room(tiny, tmp_path):
    from jaxeff.data import Batches

    rows = [tiny.batch(index) for index in range(5)]
    arrays = {name: np.concatenate([row[name] for row in rows]) for name in ("image", "label")}
    source = Batches(arrays, 7, seed=1).starting_at
    whole = tiny.fit(None, source)
    with pytest.raises(training.Interrupted):
        tiny.fit(tmp_path, lambda start: _with_signal(source(start), 8 - start))
    assert_same_state(tiny, tiny.fit(tmp_path, source).state, whole.state)


def _with_signal(batches, position):
    for index, batch in enumerate(batches):
        if index == position:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def test_keeps_only_the_newest_checkpoints(tiny, tmp_path):
    tiny.fit(tmp_path, checkpoint_every=3, keep=2)
    assert Checkpoints(tmp_path / "checkpoints").steps() == (15, 16)


def test_without_work_directory_nothing_is_written(tiny, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_same_state(tiny, tiny.fit().state, uninterrupted.state)
    assert list(tmp_path.iterdir()) == []


# ---- Signals --------------------------------------------------------------------------------------------------------


def test_signal_handlers_are_put_back(tiny):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(training.Interrupted) as stopped:
        tiny.fit(None, signal_at(tiny, 3, signal.SIGINT))
    assert stopped.value.code == 128 + signal.SIGINT
    assert "nothing was saved" in str(stopped.value)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_trains_in_a_thread_that_cannot_handle_signals(tiny, uninterrupted):
    results = []
    thread = threading.Thread(target=lambda: results.append(tiny.fit()))
    thread.start()
    thread.join()
    assert_same_state(tiny, results[0].state, uninterrupted.state)


# ---- Values that are not finite -------------------------------------------------------------------------------------


def quadratic_method(rate=0.1):
    """Minimises (w - batch)^2; a NaN in the batch is a NaN in the loss."""
    tx = optax.sgd(rate)

    def init(key, batch):
        w = jnp.float32(0)
        return {"w": w, "best": jnp.float32(jnp.inf), "opt": tx.init(w)}

    def step(state, batch):
        loss, grad = jax.value_and_grad(lambda w: (w - batch["x"].mean()) ** 2)(state["w"])
        return {**state, "w": state["w"] - rate * grad}, {"loss": loss}

    return Method(init, step, lambda state, batch: {"loss": jnp.float32(1), "count": jnp.float32(1)})


def numbers(bad=None):
    def source(start):
        while True:
            start += 1
            yield {"x": np.full(2, np.nan if start == bad else 1.0, np.float32)}

    return source


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_nan_names_its_step_and_the_last_good_checkpoint(tmp_path, log_every):
    with pytest.raises(training.NonFiniteLoss, match=r"nan at step 8.*last good checkpoint is step 6") as stopped:
        training.fit(
            quadratic_method(), numbers(bad=8), steps=20, key=jax.random.key(0), workdir=tmp_path, checkpoint_every=3,
            log_every=log_every, progress=False,
        )  # fmt: skip
    assert (stopped.value.step, stopped.value.last_good) == (8, 6)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == (3, 6)
    state, _ = checkpoints.restore(jax.eval_shape(quadratic_method().init, jax.random.key(0), next(numbers()(0))))
    assert np.isfinite(state["w"])


def test_nan_without_work_directory_says_that_nothing_was_saved():
    with pytest.raises(training.NonFiniteLoss, match="step 2; nothing was saved"):
        training.fit(quadratic_method(), numbers(bad=2), steps=4, key=jax.random.key(0), progress=False)


def test_a_state_that_became_infinite_under_a_finite_loss_is_not_saved(tmp_path):
    method = quadratic_method()

    def step(state, batch):
        new, metrics = method.step(state, batch)
        return {**new, "w": jnp.where(jnp.isnan(batch["x"][0]), jnp.inf, new["w"])}, {"loss": jnp.float32(1)}

    with pytest.raises(training.NonFiniteLoss, match="but w is not after step 6"):
        training.fit(
            method._replace(step=step), numbers(bad=6), steps=9, key=jax.random.key(0), workdir=tmp_path,
            checkpoint_every=3, progress=False,
        )  # fmt: skip
    assert Checkpoints(tmp_path / "checkpoints").steps() == (3,)


# ---- Compilation and buffers ----------------------------------------------------------------------------------------


def test_a_run_with_a_changing_schedule_compiles_its_step_once(tiny):
    method = tiny.method()
    traced = method._replace(
        step=chex.assert_max_traces(method.step, n=1), evaluate=chex.assert_max_traces(method.evaluate, n=1)
    )
    chex.clear_trace_counter()
    result = training.fit(
        traced, tiny.batches_from, steps=10, key=jax.random.key(0), log_every=2, progress=False,
        evaluate_on=tiny.test_batches, eval_every=3,
    )  # fmt: skip
    rates = [row["train/learning_rate"] for row in result.history if "train/learning_rate" in row]
    assert len(set(rates)) == len(rates)


def test_a_state_with_weak_types_compiles_once():
    def step(state, batch):
        return {"w": state["w"] + batch["x"].sum(), "n": state["n"] + jnp.int32(1)}, {"loss": state["w"]}

    method = quadratic_method()._replace(
        init=lambda key, batch: {"w": jnp.asarray(0.0), "n": jnp.asarray(0)}, step=chex.assert_max_traces(step, n=1)
    )
    chex.clear_trace_counter()
    assert training.fit(method, numbers(), steps=3, key=jax.random.key(0), progress=False).state["n"] == 3


def test_arrays_given_by_init_stay_usable():
    pretrained = jnp.ones(3)

    def step(state, batch):
        return jax.tree.map(lambda x: x + 1, state), {"loss": state["a"].sum()}

    method = quadratic_method()._replace(init=lambda key, batch: {"a": pretrained, "b": pretrained}, step=step)
    training.fit(method, numbers(), steps=2, key=jax.random.key(0), progress=False)
    np.testing.assert_array_equal(pretrained, np.ones(3))


# ---- Other configs, other models ------------------------------------------------------------------------------------


def snapshot(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_work_directory_of_another_config_is_refused_and_not_touched(tiny, tmp_path):
    tiny.fit(tmp_path)
    before = snapshot(tmp_path)
    other = {"width": 6, "optimizer": {"name": "sgd", "rate": 0.2}}
    with pytest.raises(training.ForeignWorkdir, match=r"optimizer.rate: 0.1 there, 0.2 here.*overwrite"):
        tiny.fit(tmp_path, config=other)
    assert snapshot(tmp_path) == before


def test_overwrite_starts_again_and_keeps_what_others_wrote(tiny, uninterrupted, tmp_path):
    tiny.fit(tmp_path, config={"width": 4})
    (tmp_path / "notes.txt").write_text("mine")
    result = tiny.fit(tmp_path, overwrite=True)
    assert_same_state(tiny, result.state, uninterrupted.state)
    assert without_speed(read_metrics(tmp_path)) == without_speed(uninterrupted.history)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_checkpoint_of_another_network_is_refused_and_not_touched(tiny, tmp_path):
    with pytest.raises(training.Interrupted):
        tiny.fit(tmp_path, signal_at(tiny, 3))
    before = snapshot(tmp_path)
    with pytest.raises(
        training.ForeignCheckpoint, match=r"params/BatchNorm_0/bias is float32\[6\], expected float32\[5\]"
    ):
        training.fit(
            tiny.method(width=5), tiny.batches_from, steps=16, key=jax.random.key(3), workdir=tmp_path, progress=False,
            config={"width": 6, "optimizer": {"name": "sgd", "rate": 0.1}},
        )  # fmt: skip
    assert snapshot(tmp_path) == before


def test_a_checkpoint_moved_in_from_another_run_is_refused(tiny, tmp_path):
    tiny.fit(tmp_path / "a", config={"width": 6, "seed": 1})
    with pytest.raises(Crash):
        tiny.fit(tmp_path / "b", crash_at(tiny, 1), config={"width": 6, "seed": 2})
    (tmp_path / "a" / "checkpoints").rename(tmp_path / "b" / "checkpoints")
    with pytest.raises(training.ForeignCheckpoint, match="seed: 1 there, 2 here"):
        tiny.fit(tmp_path / "b", config={"width": 6, "seed": 2})


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")  # from Orbax's reads
def test_a_damaged_checkpoint_stops_the_run_and_names_the_older_good_one(tiny, uninterrupted, tmp_path):
    with pytest.raises(Crash):
        tiny.fit(tmp_path, crash_at(tiny, 14))
    newest = tmp_path / "checkpoints" / "12"
    for path in (newest / "state" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    before = snapshot(tmp_path)
    with pytest.raises(training.CorruptCheckpoint, match=r"12: .*step 12 is damaged.*step 6 is still good"):
        tiny.fit(tmp_path)
    assert snapshot(tmp_path) == before
    newest.rename(tmp_path / "damaged")
    assert_same_state(tiny, tiny.fit(tmp_path).state, uninterrupted.state)


# ---- Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: expected a whole number of at least 1, got 0"),
        ({"steps": 2.0}, ValueError, "steps: expected a whole number"),
        ({"log_every": 0}, ValueError, "log_every: expected"),
        ({"eval_every": -1}, ValueError, "eval_every: expected"),
        ({"checkpoint_every": True}, ValueError, "checkpoint_every: expected"),
        ({"key": jnp.zeros(2, jnp.uint32)}, TypeError, r"key: expected one typed PRNG key, jax.random.key\(seed\)"),
        ({"key": 0}, TypeError, "key: expected one typed PRNG key"),
        ({"tensorboard": True}, ValueError, "tensorboard: event files need a workdir"),
        ({"config": [1]}, TypeError, "config: expected a mapping"),
    ],
)
def test_arguments_out_of_range_are_named(change, error, message):
    arguments = {"steps": 3, "key": jax.random.key(0), "progress": False, **change}
    with pytest.raises(error, match=message):
        training.fit(quadratic_method(), numbers(), **arguments)


def test_keep_must_be_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep: expected at least 1"):
        training.fit(quadratic_method(), numbers(), steps=2, key=jax.random.key(0), workdir=tmp_path, keep=0)


def test_batches_that_end_early_say_at_which_step():
    with pytest.raises(ValueError, match="batches_from: the batches end before step 3 of 5"):
        training.fit(
            quadratic_method(), lambda start: iter([{"x": np.ones(2, np.float32)}] * 2), steps=5,
            key=jax.random.key(0), progress=False,
        )  # fmt: skip


def test_fewer_steps_than_the_work_directory_has_is_an_error(tmp_path):
    training.fit(quadratic_method(), numbers(), steps=4, key=jax.random.key(0), workdir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="is at step 4 already, beyond steps=2"):
        training.fit(quadratic_method(), numbers(), steps=2, key=jax.random.key(0), workdir=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [({"error": 1.0}, 'a "loss", got error'), ({"loss": 1.0, "v": np.ones(2)}, "'v' must be a scalar")],
)
def test_metrics_of_a_method_are_checked(metrics, message):
    method = quadratic_method()
    broken = method._replace(step=lambda state, batch: (state, jax.tree.map(jnp.asarray, metrics)))
    with pytest.raises(ValueError, match=message):
        training.fit(broken, numbers(), steps=2, key=jax.random.key(0), progress=False)


def test_an_evaluation_without_examples_is_an_error():
    with pytest.raises(ValueError, match="evaluate_on: the batches hold no valid example"):
        training.fit(
            quadratic_method(), numbers(), steps=2, key=jax.random.key(0), evaluate_on=lambda: [], progress=False
        )


def test_the_rate_is_in_examples_where_the_batch_shows_how_many():
    result = training.fit(quadratic_method(), numbers(), steps=6, key=jax.random.key(0), log_every=3, progress=False)
    assert result.history[-1]["train/examples_per_second"] > 0
