"""The one training loop of the library: every method, with exact resume."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff import parallel
from jaxeff.training.checkpoint import Checkpoints, ForeignCheckpoint
from jaxeff.training.finite import FiniteWatch, non_finite
from jaxeff.training.interrupt import Interrupted, StopRequest
from jaxeff.training.metrics import EvaluationSums, MetricsWriter, Row, mean_of, read_metrics
from jaxeff.training.progress import Progress
from jaxeff.training.state import owned, placed
from jaxeff.training.step import Batch, Method
from jaxeff.training.workdir import CHECKPOINTS, config_differences, plain_config, prepare_workdir

TRAIN, EVALUATION = "train/", "eval/"


class FitResult(NamedTuple):
    """What a finished run hands back.

    Attributes:
      state: the final state.
      step: number of finished steps.
      history: rows of metrics, `{"step", "train/loss", ...}` and `{"step", "eval/accuracy", ...}`; with a work
        directory also those of the earlier runs that this one continued.
      evaluation: the last evaluation's means by name, `{}` when there was none.
    """

    state: Any
    step: int
    history: list[Row]
    evaluation: dict[str, float]


def fit(
    method: Method,
    batches_from: Callable[[int], Iterator[Batch]],
    *,
    steps: int,
    key: jax.Array,
    workdir: str | os.PathLike[str] | None = None,
    evaluate_on: Callable[[], Iterable[Batch]] | None = None,
    eval_every: int | None = None,
    log_every: int = 50,
    checkpoint_every: int | None = None,
    keep: int = 3,
    config: Any = None,
    examples_per_step: int | None = None,
    progress: bool = True,
    step_transform: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    state_sharding: jax.sharding.Sharding | None = None,
    overwrite: bool = False,
    tensorboard: bool = False,
) -> FitResult:
    """Trains until `steps` steps are finished, from the start or from where the work directory ends.

    With a work directory the run can be stopped at any step and started again: the parameters at its end are bit-equal
    to those of a run that was not stopped, because the state with its key, the position in the data and the metrics not
    yet logged are all in the checkpoint. The first SIGTERM or Ctrl-C ends the step in progress, saves and raises
    `Interrupted`; the second one stops at once.

    On several hosts (`jaxeff.parallel.initialize_distributed`) all of them call this with the same arguments, a work
    directory that they share, and batches and a state over the devices of all. The first one writes the files. A signal
    to any host stops all of them after the same step, within about a second.

    Steps are counted from 1 in metrics, checkpoints and messages: checkpoint 10 is the state after ten steps. The loop
    waits for the device only at log intervals, evaluations and checkpoints.

    Args:
      method: `init`, `step` and `evaluate`; `step` is compiled once and the state is donated to it.
      batches_from: `start -> iterator` over the batches from the one that step `start + 1` takes; a pure function of
        `start`, such as `jaxeff.data.Batches(...).starting_at`, so that a resumed run sees the same data.
      steps: number of steps of the whole run.
      key: typed PRNG key (`jax.random.key(seed)`) for `method.init`.
      workdir: directory for `config.json`, `metrics.jsonl` and `checkpoints/`; None keeps nothing.
      evaluate_on: returns the evaluation batches, at each evaluation anew; None for no evaluation.
      eval_every: steps between evaluations; None evaluates at the end only.
      log_every: steps between rows of metrics; a row holds the means over its interval.
      checkpoint_every: steps between checkpoints; None saves at the end and when interrupted only.
      keep: how many of the newest checkpoints to keep.
      config: mapping (or ConfigDict) that identifies the run; a work directory of another config is refused.
      examples_per_step: for the throughput in examples per second; by default the length of the batch's first axis
        where all its arrays share one, else steps are counted.
      progress: show progress on standard error.
      step_transform: makes the compiled, donating function from `method.step`, in place of `jax.jit` with donation:
        `lambda step: jaxeff.parallel.data_parallel(step, mesh)`.
      state_sharding: how every leaf of the state is placed, `NamedSharding(mesh, P())` for a replicated one; None
        leaves it on the default device.
      overwrite: delete the run in the work directory and start again.
      tensorboard: also write TensorBoard event files to the work directory.

    Returns:
      The final state, the metrics and the last evaluation.

    Raises:
      Interrupted: (a SystemExit) on SIGTERM or Ctrl-C, after saving.
      NonFiniteLoss: if the loss is NaN or infinite; names the step and the last good checkpoint. A state with new
        non-finite values is never saved.
      ForeignWorkdir: if the work directory belongs to another config.
      CheckpointError: if the newest checkpoint is damaged or belongs to something else, or a save fails.
      ValueError, TypeError: for arguments out of range, or batches that end too early.
    """
    # ---- Arguments --------------------------------------------------------------------------------------------------
    _check_arguments(steps, key, eval_every, log_every, checkpoint_every, workdir, tensorboard)
    directory = None
    plain = plain_config(config)
    if workdir is not None:
        directory, plain = prepare_workdir(workdir, config, overwrite)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        checkpoints = None
        if directory is not None:
            checkpoints = stack.enter_context(Checkpoints(directory / CHECKPOINTS, keep))

        # ---- State: new, or where the last run ended ----------------------------------------------------------------
        start = parallel.on_first(lambda: checkpoints.latest() or 0) if checkpoints else 0
        if start > steps:
            raise ValueError(f"steps: the work directory {directory} is at step {start} already, beyond steps={steps}")
        batches = _Feed(batches_from, start, steps, stack)
        example = batches.peek()
        recent: list[Mapping[str, Any]] = []  # metrics of the steps since the last row; on the device until looked at
        if start and checkpoints is not None:
            like = jax.eval_shape(method.init, key, example)
            state, meta = checkpoints.restore(placed(like, state_sharding), start)
            _check_config(checkpoints.directory / str(start), meta, plain)
            recent = list(meta["recent"])
        else:
            state = owned(method.init(key, example), state_sharding)
        watch = FiniteWatch(state)

        # ---- Compiled functions, outputs ----------------------------------------------------------------------------
        compiled = step_transform or functools.partial(jax.jit, donate_argnums=0)
        train_step = compiled(method.step)
        evaluate = jax.jit(method.evaluate)
        log = _Log(directory, start, tensorboard, stack)
        rate = _Rate(examples_per_step, example, start)
        progress = progress and parallel.is_first()
        bar = stack.enter_context(Progress(steps, start=start, enabled=progress))
        if start and progress:
            bar.note(f"{directory}: continues after step {start}")
        saved = finished = start

        def settle(step: int) -> None:
            """Waits for the metrics up to this step and makes sure that they are finite."""
            recent[:] = [{name: float(value) for name, value in row.items()} for row in jax.device_get(recent)]
            for number, row in enumerate(recent, step - len(recent) + 1):
                if not math.isfinite(row["loss"]):
                    raise non_finite(f"the loss is {row['loss']} at step {number}", number, checkpoints)

        def save(step: int) -> None:
            nonlocal saved
            if checkpoints is None or saved == step:
                return
            settle(step)
            broken = watch.broken(state)
            if broken is not None:
                raise non_finite(f"the loss is finite but {broken} is not after step {step}", step, checkpoints)
            checkpoints.save(step, state, {"config": plain, "recent": recent})
            saved = step
            rate.restart(step)

        def evaluate_if_due(step: int) -> None:
            due = step == steps or (eval_every is not None and step % eval_every == 0)
            if evaluate_on is None or not due or log.evaluation(step):
                return
            sums = EvaluationSums()
            stop.agreed(now=True)
            for batch in evaluate_on():
                if stop.agreed() is not None:
                    return  # the run that continues this one finds the row missing and evaluates first
                sums.add(evaluate(state, batch))
            log.write(step, EVALUATION, sums.means())
            stop.agreed(now=True)
            rate.restart(step)

        # ---- The loop -----------------------------------------------------------------------------------------------
        if start:
            evaluate_if_due(start)
        for step in range(start + 1, steps + 1):
            if stop.agreed() is not None:
                break
            state, metrics = train_step(state, batches.next())
            recent.append(metrics)
            bar.tick(step)
            if step == start + 1:
                _check_metrics(metrics)
                rate.restart(step)  # without the compilation

            if step % log_every == 0 or step == steps:
                settle(step)
                means = mean_of(recent)
                recent.clear()
                log.write(step, TRAIN, {**means, **rate.until(step)})
                bar.report(step, {"loss": means["loss"]}, **rate.shown())
                if checkpoints is not None:
                    checkpoints.check()

            if step == steps or (checkpoint_every is not None and step % checkpoint_every == 0):
                save(step)
            evaluate_if_due(step)
            finished = step

        # ---- The end ------------------------------------------------------------------------------------------------
        if stop.agreed(now=True) is not None:
            save(finished)
        if checkpoints is not None:
            checkpoints.wait()
        signum = stop.agreed(now=True)
        if signum is not None:
            message = _how_to_resume(signum, finished, steps, directory)
            bar.note(message)
            raise Interrupted(finished, signum, message)
    return FitResult(state, steps, log.rows, log.evaluation(steps))


# ---- Data -----------------------------------------------------------------------------------------------------------


class _Feed:
    """The batches of the run, with a look at the first one; says clearly where they end too early."""

    def __init__(
        self, batches_from: Callable[[int], Iterator[Batch]], start: int, steps: int, stack: contextlib.ExitStack
    ):
        self._position = min(start, max(steps - 1, 0))  # a finished run looks at its last batch again, for the shapes
        self._steps = steps
        self._iterator = iter(batches_from(self._position))
        close = getattr(self._iterator, "close", None)
        if close is not None:
            stack.callback(close)
        self._first: Batch | None = self._pull()

    def peek(self) -> Batch:
        assert self._first is not None
        return self._first

    def next(self) -> Batch:
        first, self._first = self._first, None
        self._position += 1
        return self._pull() if first is None else first

    def _pull(self) -> Batch:
        try:
            return next(self._iterator)
        except StopIteration:
            raise ValueError(
                f"batches_from: the batches end before step {self._position} of {self._steps}; "
                "give an iterator that goes on, or fewer steps"
            ) from None


# ---- Metrics --------------------------------------------------------------------------------------------------------


class _Log:
    """Rows of metrics in memory, the same on every host but for the speed, and on disk where there is a directory."""

    def __init__(self, directory: pathlib.Path | None, start: int, tensorboard: bool, stack: contextlib.ExitStack):
        self.rows: list[Row] = []
        self._writer = None
        if directory is None:
            return

        def opened() -> list[Row]:
            self._writer = stack.enter_context(MetricsWriter(directory, resume_from=start, tensorboard=tensorboard))
            return read_metrics(self._writer.path)

        self.rows = parallel.on_first(opened)

    def write(self, step: int, prefix: str, values: Mapping[str, float]) -> None:
        named = {prefix + name: value for name, value in values.items()}
        if self._writer is not None:
            self._writer.write(step, named)
        self.rows.append({"step": step, **named})

    def evaluation(self, step: int) -> dict[str, float]:
        """The evaluation at this very step, by this run or the one it continues; {} when there is none."""
        for row in reversed(self.rows):
            values = {k.removeprefix(EVALUATION): v for k, v in row.items() if k.startswith(EVALUATION)}
            if row["step"] == step and values:
                return values
        return {}


class _Rate:
    """Throughput of training alone: evaluation, saving and compiling do not count."""

    def __init__(self, examples_per_step: int | None, example: Batch, start: int):
        self._examples = examples_per_step or _common_length(example)
        self._steps_since, self._since, self._last = start, time.perf_counter(), 0.0

    def restart(self, step: int) -> None:
        self._steps_since, self._since = step, time.perf_counter()

    def until(self, step: int) -> dict[str, float]:
        """Steps or examples per second since the last call; {} when no whole step lies between."""
        now = time.perf_counter()
        steps, seconds = step - self._steps_since, now - self._since
        self._steps_since, self._since = step, now
        if not steps or not seconds:
            return {}
        self._last = steps * (self._examples or 1) / seconds
        return {"examples_per_second" if self._examples else "steps_per_second": self._last}

    def shown(self) -> dict[str, Any]:
        return {"rate": self._last, "unit": "examples/s" if self._examples else "steps/s"}


def _common_length(batch: Batch) -> int | None:
    lengths = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else None for leaf in jax.tree.leaves(batch)}
    return lengths.pop() if len(lengths) == 1 else None


# ---- Errors ---------------------------------------------------------------------------------------------------------


def _how_to_resume(signum: int, step: int, steps: int, directory: pathlib.Path | None) -> str:
    name = signal.Signals(signum).name
    if directory is None:
        return f"{name}: stopped after step {step} of {steps}; nothing was saved, because there is no workdir"
    # The same command would delete what was just saved, or a job's earlier runs, if it said overwrite.
    again = f"run the same command again, without overwrite, to go on (workdir {directory})"
    if step == 0:
        return f"{name}: stopped before the first of {steps} steps; there was nothing to save yet; {again}"
    return f"{name}: saved after step {step} of {steps}; {again}"


def _check_config(path: pathlib.Path, meta: Mapping[str, Any], config: dict[str, Any]) -> None:
    differences = config_differences(meta["config"], config)
    if differences:
        raise ForeignCheckpoint(
            f"{path}: the checkpoint belongs to a run with another config: {'; '.join(differences[:8])}. "
            "Choose another workdir or pass overwrite (--overwrite). Nothing was changed"
        )


def _check_metrics(metrics: Any) -> None:
    if not isinstance(metrics, dict) or "loss" not in metrics:
        got = ", ".join(sorted(metrics)) if isinstance(metrics, dict) else type(metrics).__name__
        raise ValueError(f'method.step: the metrics must be a dictionary with a "loss", got {got}')
    for name, value in metrics.items():
        if jnp.ndim(value):
            raise ValueError(f"method.step: metric {name!r} must be a scalar, got shape {jnp.shape(value)}")


def _check_arguments(
    steps: int,
    key: jax.Array,
    eval_every: int | None,
    log_every: int,
    checkpoint_every: int | None,
    workdir: Any,
    tensorboard: bool,
) -> None:
    counts = {"steps": steps, "log_every": log_every, "eval_every": eval_every, "checkpoint_every": checkpoint_every}
    for name, value in counts.items():
        if value is None and name in ("eval_every", "checkpoint_every"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape != ():
        raise TypeError(f"key: expected one typed PRNG key, jax.random.key(seed), got {key!r}")
    if tensorboard and workdir is None:
        raise ValueError("tensorboard: event files need a workdir, got workdir=None")
