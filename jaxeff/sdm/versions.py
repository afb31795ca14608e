"""Versions of a store: their names, which one is served, and how a reader keeps the one it reads."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
from typing import BinaryIO

from jaxeff.sdm.stored_file import CorruptTable, NoStore

MANIFEST, CURRENT, LOCK = "manifest.json", "CURRENT", "LOCK"

_VERSION = re.compile(r"v(\d{6,12})")


def current_version(folder: str | os.PathLike[str]) -> str:
    """Name of the version that a store serves.

    Raises:
      NoStore: there is no `CURRENT` in the folder.
      CorruptTable: it names no version.
    """
    path = pathlib.Path(folder) / CURRENT
    try:
        text = path.read_text("utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoStore(f"{path} does not exist: {folder} is no store, or nothing was published in it") from error
    name = text.removesuffix("\n")
    if not _VERSION.fullmatch(name):
        raise CorruptTable(
            f"{path} says {text[:40]!r}, expected the name of a version; write one of {versions(folder)}"
        )
    return name


def versions(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the versions in the folder of a store, oldest first."""
    folder = pathlib.Path(folder)
    names = [path.name for path in folder.iterdir() if _VERSION.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(names, key=version_number)


def version_number(version: str) -> int:
    """Number of a version, 1 of "v000001"."""
    return int(version[1:])


def version_name(number: int) -> str:
    """Name of a version, "v000001" of 1."""
    return f"v{number:06d}"


def hold(folder: pathlib.Path, version: str | None) -> tuple[BinaryIO, str]:
    """Opens the manifest of a version, so that no writer removes it until the file is closed.

    Args:
      folder: the folder of the store.
      version: name of the version; None for the one that `CURRENT` names.

    Returns:
      The file, and the name of the version.

    Raises:
      NoStore: there is no such store or version.
      CorruptTable: `CURRENT` names no version.
    """
    while True:
        name = version or current_version(folder)
        if file := _locked(folder / name / MANIFEST):
            return file, name
        # Between reading CURRENT and locking, a writer may have published others and removed this one.
        if version or current_version(folder) == name:
            there = versions(folder)
            raise NoStore(
                f"{folder} has no version {name!r}{'' if version else ', which CURRENT names'}; "
                f"{'there are ' + ', '.join(there) if there else 'there is none'}"
            )


def _locked(path: pathlib.Path) -> BinaryIO | None:
    """The file with a shared lock, or None when it is not there, or about to be removed."""
    try:
        file = open(path, "rb")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        # File systems without locks refuse the writer's as well, which then removes nothing.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return None
        if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            return file
    except FileNotFoundError:
        pass
    file.close()
    return None
