"""The work directory of a run: whose it is, and what a run may write to and clear from it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxeff import parallel
from jaxeff.training.metrics import FILE_NAME as METRICS

CONFIG = "config.json"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
FIGURES = "figures"
# In config.json while an overwrite is under way: the folders that it clears.
CLEARING = "clearing"


class ForeignWorkdir(ValueError):
    """The work directory belongs to a run with another config."""


def prepare_workdir(
    workdir: str | os.PathLike[str], config: Any = None, overwrite: bool = False, runs: Iterable[str] = ()
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Makes a directory the work directory of a run, or finds that it is already.

    The first time, `config.json` is written: the config, the git revision, versions and device. Later runs must have
    the same config. On several hosts all of them call this, and the first one does it.

    Args:
      workdir: the directory; created when missing.
      config: mapping (nested mappings, sequences, numbers, strings), or a ConfigDict; None is an empty one.
      overwrite: start again: delete what runs write here (config, metrics, summary, checkpoints, TensorBoard files,
        PNGs in figures/) and nothing else. An overwrite that is cut short is completed by the next start, with or
        without overwrite.
      runs: where a job of several runs has their work directories below this one ("quadratic/seed0"). They are noted
        in `config.json`; to overwrite the job is to overwrite those of this job and those of the job that was here.

    Returns:
      The absolute path and the config as plain JSON values.

    Raises:
      ForeignWorkdir: if the directory belongs to another config; lists the fields that differ. Nothing is changed.
      TypeError: if `config` is not a mapping.
      ValueError: if one of `runs` is not below the directory, or several hosts have different configs.
      FileNotFoundError: if several hosts do not share the directory.
    """
    path = pathlib.Path(workdir).absolute()
    plain, runs = plain_config(config), list(runs)
    for run in runs:
        if not _below(run):
            raise ValueError(f"runs: {run!r} is not a folder below the workdir {path}; give a relative path without ..")
    for index, other in enumerate(parallel.gather(plain)):
        if differences := config_differences(plain, other):
            raise ValueError(
                f"config: process {jax.process_index()} and process {index} were started with different ones: "
                f"{_listed(differences)}; start every host with the same. Nothing was changed"
            )
    parallel.on_first(lambda: _prepare(path, plain, overwrite, runs))
    if not all(seen := parallel.gather((path / CONFIG).is_file())):
        raise FileNotFoundError(
            f"workdir: {path / CONFIG} was written by process 0 but process {seen.index(False)} does not see it; "
            "hosts that train together need a workdir on a file system that they share"
        )
    return path, plain


def _prepare(path: pathlib.Path, plain: dict[str, Any], overwrite: bool, runs: list[str]) -> None:
    if path.exists() and not path.is_dir():
        raise ForeignWorkdir(f"workdir: {path} is a file, expected a directory; choose another name")
    there = _read_config(path / CONFIG, overwrite)
    if there and not overwrite:
        differences = config_differences(there["config"], plain)
        if differences:
            raise ForeignWorkdir(
                f"workdir: {path} belongs to a run with another config: {_listed(differences)}. "
                "Choose another workdir, or pass overwrite (--overwrite) to delete that run. Nothing was changed"
            )
        if CLEARING not in there:
            return
    elif not overwrite and any((path / name).exists() for name in (METRICS, CHECKPOINTS)):
        raise ForeignWorkdir(
            f"workdir: {path} holds a run whose {CONFIG} is missing, so it cannot be told whether it is this one. "
            "Put the file back, choose another workdir, or pass overwrite (--overwrite). Nothing was changed"
        )
    path.mkdir(parents=True, exist_ok=True)
    content = {"config": plain, "runs": runs, **run_environment()}
    if there or overwrite:
        stale = list(dict.fromkeys([*there.get("runs", ()), *there.get(CLEARING, ()), *runs]))
        # Said before anything is deleted, so that no start can take what a killed one left for results of its own.
        write_json(path / CONFIG, {**content, CLEARING: stale})
        for run in filter(_below, stale):
            _clear(path, run)
        _clear(path, ".")
    write_json(path / CONFIG, content)


def plain_config(config: Any) -> dict[str, Any]:
    """Returns a config as it looks after being written as JSON and read again.

    Args:
      config: mapping, ConfigDict or None. Values JSON does not know (dtypes, functions) become their `str`.

    Raises:
      TypeError: for anything else.
    """
    if config is None:
        return {}
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected a mapping or None, got {type(config).__name__}")
    return json.loads(json.dumps(_plain(config), default=str))


def config_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Returns one line per field in which two plain configs differ, `optimizer.name: 'sgd' there, 'adam' here`.

    Args:
      there: the config that was found.
      here: the config of this run.
    """
    flat_there, flat_here = _flat(there), _flat(here)
    names = [*flat_there, *(name for name in flat_here if name not in flat_there)]
    absent = object()
    lines = []
    for name in names:
        old, new = flat_there.get(name, absent), flat_here.get(name, absent)
        said = ["not set" if value is absent else repr(value) for value in (old, new)]
        # As text: 1 and True and 1.0 are equal in Python but are not one setting, and NaN is not equal to itself.
        if said[0] != said[1]:
            lines.append(f"{name}: {said[0]} there, {said[1]} here")
    return lines


def run_environment() -> dict[str, Any]:
    """Returns where a run takes place: git revision (None outside a repository), versions, devices."""
    devices = jax.devices()
    return {
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "host_cpus": os.cpu_count(),
    }


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON so that the file is at every moment the old one or the new one.

    Args:
      path: the file.
      value: what `json` can write; other objects become their `str`.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _clear(path: pathlib.Path, run: str) -> None:
    """Deletes what a run wrote in a folder below `path`, or in `path` itself, and the folders left empty by that."""
    folder = path / run
    for name in (METRICS, SUMMARY) if folder == path else (METRICS, SUMMARY, CONFIG):
        (folder / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, TENSORBOARD):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    for figure in (folder / FIGURES).glob("*.png"):
        figure.unlink()
    for emptied in (folder / FIGURES, folder, *folder.parents):
        if emptied == path or not emptied.is_relative_to(path):
            break
        with contextlib.suppress(OSError):
            emptied.rmdir()


def _below(run: str) -> bool:
    parts = pathlib.PurePath(run).parts
    return bool(parts) and ".." not in parts and not pathlib.PurePath(run).is_absolute()


def _read_config(path: pathlib.Path, overwrite: bool) -> dict[str, Any]:
    """What `config.json` says; {} where there is none, or one of something else that may be overwritten."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(there["config"], dict):
            raise TypeError("config is not an object")
        for name in ("runs", CLEARING):
            folders = there.get(name, [])
            if not isinstance(folders, list) or not all(isinstance(folder, str) for folder in folders):
                raise TypeError(f"{name} is not a list of folders")
        return there
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        if overwrite:
            return {}
        raise ForeignWorkdir(
            f"{path}: is not a config written by a run ({error!r}); choose another workdir or pass overwrite"
        ) from error


def _plain(value: Any) -> Any:
    """Mappings as dictionaries with text keys; JSON does the rest."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    return value


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _git_revision() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _listed(differences: list[str]) -> str:
    return "; ".join(differences[:8]) + (f"; and {len(differences) - 8} more" if len(differences) > 8 else "")
