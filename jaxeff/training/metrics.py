"""Metrics of a run: written as one JSON object per line, read back, averaged."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

FILE_NAME = "metrics.jsonl"
Row = dict[str, Any]


class MetricsWriter:
    """Appends rows to `metrics.jsonl` in a directory and, on request, to TensorBoard event files.

    Every row is handed to the operating system when it is written, so rows survive the death of the process.

    Args:
      directory: work directory; created when missing.
      resume_from: step the run continues from; rows after it, left by a run that was killed, are dropped. None keeps
        every row.
      tensorboard: also write event files to `directory/tensorboard` (needs tensorboardX).

    Raises:
      ImportError: if tensorboard is asked for and tensorboardX is missing.
    """

    def __init__(self, directory: str | os.PathLike[str], *, resume_from: int | None = None, tensorboard: bool = False):
        self.path = pathlib.Path(directory) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._events = _event_writer(self.path.parent / "tensorboard", resume_from) if tensorboard else None
        if resume_from is not None:
            _drop_rows_after(self.path, resume_from)
        self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float]) -> Row:
        """Writes one row and returns it.

        Args:
          step: number of finished steps.
          values: numbers by name. Not-a-number and infinity, which JSON lacks, are written as null.

        Returns:
          The row `{"step": step, **values}`.

        Raises:
          OSError: if the file cannot be written; names it.
        """
        row = {"step": int(step), **{name: float(value) for name, value in values.items()}}
        plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
        try:
            self._file.write(json.dumps(plain, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:  # it does not say by itself which file it was
            reason = f"{error.strerror}; the metrics of step {step} could not be written, checkpoints are untouched"
            raise OSError(error.errno, reason, str(self.path)) from error
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, float(value), step)
        return row

    def close(self) -> None:
        """Closes the files."""
        with contextlib.suppress(OSError):  # a row that could not be written was reported by `write`
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: str | os.PathLike[str]) -> list[Row]:
    """Returns the rows of a metrics file in the order in which they were written.

    Args:
      path: the file, or the work directory that holds it.

    Returns:
      Dictionaries with an int "step" and floats; null is read as NaN. A last line that was cut off is left out.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if another line is not JSON; names the line.
    """
    path = pathlib.Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # no newline behind it: the process died while writing
            raise ValueError(f"{path}, line {number}: not a JSON object ({error}); the file was damaged") from error
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def mean_of(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of every name over rows that all have the same names, in float64.

    Args:
      rows: dictionaries of numbers.

    Returns:
      The means; empty for no rows.
    """
    rows = list(rows)
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else ())}


class EvaluationSums:
    """Adds up what `Method.evaluate` returns for each batch and divides by the number of valid examples.

    Sums are kept on the device until the end, so batches are not waited for one by one; the total is float64.
    """

    def __init__(self) -> None:
        self._parts: list[Mapping[str, jax.Array]] = []

    def add(self, sums: Mapping[str, jax.Array]) -> None:
        """Adds the sums of one batch.

        Args:
          sums: scalars by name, "count" among them.

        Raises:
          ValueError: if there is no "count".
        """
        if "count" not in sums:
            raise ValueError(f'evaluate: the sums need a "count" of valid examples, got {", ".join(sorted(sums))}')
        self._parts.append(sums)

    def means(self) -> dict[str, float]:
        """Returns the mean over all valid examples of every name but "count".

        Raises:
          ValueError: if no valid example was added.
        """
        parts = jax.device_get(self._parts)
        count = math.fsum(float(part["count"]) for part in parts)
        if count == 0:
            raise ValueError("evaluate_on: the batches hold no valid example; give at least one")
        names = [name for name in parts[0] if name != "count"]
        return {name: math.fsum(float(part[name]) for part in parts) / count for name in names}


def _drop_rows_after(path: pathlib.Path, step: int) -> None:
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    plain = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in plain), encoding="utf-8")
    os.replace(temporary, path)


def _event_writer(directory: pathlib.Path, resume_from: int | None) -> Any:
    try:
        import tensorboardX
    except ImportError as error:
        raise ImportError('TensorBoard files need tensorboardX: pip install "jaxeff[tensorboard]"') from error
    purge = None if resume_from is None else resume_from + 1
    return tensorboardX.SummaryWriter(str(directory), purge_step=purge)
