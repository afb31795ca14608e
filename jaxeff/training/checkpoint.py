"""Checkpoints of a run: saved in the background by Orbax, verified when they are read.

A checkpoint holds the state, a dictionary `meta` of the caller's, and a record of every leaf (shape, dtype, CRC-32), by
which a damaged file and a checkpoint of something else are told apart and named. Reading never changes the directory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxeff import parallel
from jaxeff.training.record import check_sums, decode, describe, encode, other_tree, template


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which and what to do."""


class NoCheckpoint(CheckpointError):
    """The directory holds no finished checkpoint."""


class CorruptCheckpoint(CheckpointError):
    """Files of a checkpoint are missing, cut off or changed."""


class ForeignCheckpoint(CheckpointError):
    """A sound checkpoint of something else: other leaves, shapes, dtypes or another config."""


class SaveFailed(CheckpointError):
    """A checkpoint could not be written, for example because the disk is full; older ones are untouched."""


class Checkpoints:
    """The newest checkpoints of a run in one directory, one folder per step; a context manager.

    Saving returns as soon as the values are copied off the device and is finished in the background. A step appears
    under its name only when it is complete, and an older one is deleted only after that. The directory is not created
    or changed before the first save. On several hosts all of them save, wait and restore together, in one directory
    that all of them see.

    Args:
      directory: folder of the checkpoints.
      keep: how many of the newest to keep, at least 1.

    Raises:
      ImportError: if orbax-checkpoint is missing.
      ValueError: if `keep` is less than 1.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
        self._orbax = _import_orbax()
        self.directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._manager: Any = None
        self._saving: int | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            self.wait()
        except SaveFailed:
            if kind is None:  # an exception that is already under way says more
                raise
        self.close()

    def steps(self) -> tuple[int, ...]:
        """Returns the steps of the complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return ()
        found = [int(path.name) for path in self.directory.iterdir() if path.is_dir() and path.name.isdecimal()]
        return tuple(sorted(found))

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, None when there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, meta: Mapping[str, Any] | None = None) -> None:
        """Saves the state in the background; waits only for an earlier save that is still being written.

        Args:
          step: number of finished steps, the checkpoint's name.
          state: pytree of arrays; typed PRNG keys are allowed. It may be donated as soon as this returns.
          meta: what else belongs to it; anything JSON can hold.

        Raises:
          SaveFailed: if this save or an earlier one in the background failed.
          TypeError: if `meta` holds what JSON cannot.
          CheckpointError: if there is a checkpoint of this step already.
        """
        self.wait()
        if step in self.steps():
            raise CheckpointError(f"{self.directory / str(step)}: there is a checkpoint of step {step} already")
        # Written out now: the caller may change its dictionary while the background thread is at work.
        text = json.dumps({"leaves": describe(state), "meta": dict(meta or {})})
        args = self._orbax.args
        items = args.Composite(
            state=args.StandardSave(encode(state)),
            record=args.JsonSave({"text": text, "crc32": zlib.crc32(text.encode())}),
        )
        self._saving = step
        self._attempt(lambda: self._open().save(step, args=items, force=True))

    def check(self) -> None:
        """Raises SaveFailed when a save in the background has failed, without waiting for one that goes on."""
        if self._manager is not None:
            self._attempt(self._manager.check_for_errors)

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
          SaveFailed: if it could not be written.
        """
        if self._manager is None:
            return
        self._attempt(self._manager.wait_until_finished)
        self._attempt(self._manager.check_for_errors)
        # The others may see a directory of a network file system later than the host that renamed it.
        if self._saving is not None and parallel.is_first() and self._saving not in self.steps():
            raise self._failed("the finished checkpoint did not appear in the directory")
        self._saving = None

    def close(self) -> None:
        """Releases Orbax's threads, after what is being written; a failure that was reported is not raised again."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):
                manager.close()
            logging.getLogger("absl").removeFilter(_already_raised)

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Returns a saved state and what was saved beside it, after checking both.

        Args:
          like: the tree that is expected, of arrays or `jax.ShapeDtypeStruct`; where such a leaf has a sharding, the
            array is restored to it, otherwise to the default device, uncommitted.
          step: which one; None for the newest.

        Returns:
          `(state, meta)`; bit-equal to what was saved.

        Raises:
          NoCheckpoint: if there is none, or none of that step.
          CorruptCheckpoint: if files are missing, cut off or changed; names the path and the newest older step that
            can be read.
          ForeignCheckpoint: if leaves, shapes or dtypes differ; names the first that do.
        """
        step = self._existing(step)
        path = self.directory / str(step)
        leaves, meta = self._record(step)
        difference = other_tree(leaves, like)
        if difference:
            raise ForeignCheckpoint(
                f"{path}: the checkpoint belongs to something else: {difference}. Use the model and optimiser it was "
                "made with, another work directory, or overwrite. Nothing was changed"
            )
        arguments = self._orbax.args.StandardRestore(template(like))
        try:
            encoded = self._read(step, state=arguments)["state"]
            check_sums(encoded, leaves)
        except Exception as error:
            raise self._corrupt(step, error) from None
        return decode(encoded, like, leaves), meta

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """Returns what was saved beside a state, without reading the state.

        Args:
          step: which one; None for the newest.

        Raises:
          NoCheckpoint: if there is none, or none of that step.
          CorruptCheckpoint: if it cannot be read.
        """
        return self._record(self._existing(step))[1]

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise NoCheckpoint(f"{self.directory}: there is no checkpoint; train first, or check the path")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise NoCheckpoint(f"{self.directory}: there is no checkpoint of step {step}, only of {_listed(steps)}")
        return step

    def _open(self) -> Any:
        """The manager that writes; made at the first save because making it prepares the directory."""
        if self._manager is None:
            options = self._orbax.CheckpointManagerOptions(
                max_to_keep=self._keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=True
            )
            self._manager = self._orbax.CheckpointManager(self.directory, options=options)
            logging.getLogger("absl").addFilter(_already_raised)
        return self._manager

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            reason = _first_line(error)
        else:
            return
        raise self._failed(reason)  # out here, so that the long traceback of Orbax's threads is not kept with it

    def _read(self, step: int, **items: Any) -> Any:
        # Not the manager: even a read-only one prepares things in the directory and logs warnings.
        with self._orbax.Checkpointer(self._orbax.CompositeCheckpointHandler()) as reader:
            return reader.restore(self.directory / str(step), args=self._orbax.args.Composite(**items))

    def _record(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is known of every leaf, and the caller's meta."""
        try:
            return self._read_record(step)
        except Exception as error:
            raise self._corrupt(step, error) from None

    def _read_record(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        record = self._read(step, record=self._orbax.args.JsonRestore())["record"]
        if zlib.crc32(record["text"].encode()) != record["crc32"]:
            raise ValueError("the bytes of the record are not those that were saved")
        content = json.loads(record["text"])
        return content["leaves"], content["meta"]

    def _sound(self, step: int) -> bool:
        try:
            leaves, _ = self._read_record(step)
            check_sums(self._read(step, state=self._orbax.args.StandardRestore())["state"], leaves)
        except Exception:
            return False
        return True

    def _corrupt(self, step: int, error: Exception) -> CheckpointError:
        path = self.directory / str(step)
        if self._sound(step):
            return CheckpointError(f"{path}: the files are sound but cannot be read as asked ({_first_line(error)})")
        older = next((s for s in reversed(self.steps()) if s < step and self._sound(s)), None)
        remedy = (
            f"step {older} is still good: move {path} away to go on from there"
            if older is not None
            else "no older step can be read: restore the files from a copy, or start again with overwrite"
        )
        return CorruptCheckpoint(
            f"{path}: the checkpoint of step {step} is damaged ({_first_line(error)}); {remedy}. Nothing was changed"
        )

    def _failed(self, reason: str) -> SaveFailed:
        step, self._saving = self._saving, None
        self.close()
        if parallel.is_first():  # where another host failed, the first may be writing still
            for unfinished in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)  # it would only take more of the room that is missing
        good = max((s for s in self.steps() if s != step), default=None)
        kept = "there is no older one"
        if good is not None:
            kept = f"the checkpoint of step {good} is complete and is the newest"
        return SaveFailed(
            f"{self.directory}: the checkpoint of step {step} could not be written ({reason}); {kept}. "
            "Make room or correct the path, then start again with the same work directory"
        )


def _already_raised(record: logging.LogRecord) -> bool:
    """Log filter: Orbax's tracebacks of errors that are raised here as well, in one sentence."""
    return not (record.exc_info and "orbax" in record.pathname)


def _import_orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError('checkpoints need orbax-checkpoint: pip install "jaxeff[train]"') from error
    return orbax.checkpoint


def _first_line(error: BaseException) -> str:
    """What went wrong, in one line; first the operating system's reason, which tensorstore puts last, as a number."""
    text = str(error).strip() or "no message"
    number = re.search(r"os_error_code=\\?'(\d+)", text)
    reason = f"{os.strerror(int(number[1]))}, " if number else ""
    return f"{reason}{type(error).__name__}: {text.splitlines()[0][:300]}"


def _listed(steps: tuple[int, ...]) -> str:
    return ", ".join(map(str, steps))
