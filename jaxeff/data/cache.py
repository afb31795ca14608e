"""Arrays that are expensive to decode are decoded once, written atomically, and memory-mapped from then on."""

import functools
import hashlib
import os
import pathlib
import uuid
import warnings
from collections.abc import Callable

import numpy as np
from numpy.lib import format as npy


def cache_folder() -> pathlib.Path:
    """Folder for decoded arrays: `$JAXEFF_CACHE`, or `~/.cache/jaxeff/data` when that is not set."""
    chosen = os.environ.get("JAXEFF_CACHE")
    return pathlib.Path(chosen).expanduser() if chosen else pathlib.Path.home() / ".cache" / "jaxeff" / "data"


def file_key(path: pathlib.Path) -> str:
    """Key of a file's content.

    Args:
      path: an existing file.

    Returns:
      Its size and the first 16 hexadecimal digits of its SHA-256. Content and not time stamps, so a copied file finds
      the arrays decoded before, and a changed one does not.
    """
    status = path.stat()
    return _content_key(str(path), status.st_size, status.st_mtime_ns)


def cached_array(
    name: str, key: str, shape: tuple[int, ...], dtype: np.dtype | type, fill: Callable[[np.ndarray], None]
) -> np.ndarray:
    """Array that is computed on first use and memory-mapped afterwards.

    Args:
      name: what the array is; becomes the beginning of the file name, for example "cifar10_jpeg-train".
      key: identifies the input it was computed from (see `file_key`); becomes the end of the file name.
      shape: shape of the array.
      dtype: element type of the array.
      fill: writes the values into the array it is given.

    Returns:
      Read-only array backed by the file. Two processes may call this at once: each writes a file of its own and the
      last rename wins. When the folder cannot be written, a warning names it and the array is computed in memory.
    """
    path = cache_folder() / f"{name}-{key}.npy"
    array = _open(path, shape, dtype)
    if array is not None:
        return array
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: its files are private, and a cache folder may be shared by several users.
        temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.npy")
        mapped = npy.open_memmap(temporary, mode="w+", dtype=np.dtype(dtype), shape=shape)
    except OSError as error:
        warnings.warn(
            f"cannot write decoded data to {path.parent} ({error}); it is decoded again by every process. "
            "Set JAXEFF_CACHE to a folder that can be written.",
            stacklevel=2,
        )
        memory = np.empty(shape, dtype)
        fill(memory)
        memory.flags.writeable = False
        return memory
    try:
        fill(mapped)
        mapped.flush()
        del mapped
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    array = _open(path, shape, dtype)
    if array is None:
        raise OSError(f"{path} was written but cannot be read back as {np.dtype(dtype)}{list(shape)}")
    return array


def _open(path: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray | None:
    """The cached array, or None when there is none or it is not what it should be (then it is made again)."""
    if not path.is_file():
        return None
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return None
    if array.shape != tuple(shape) or array.dtype != np.dtype(dtype):
        return None
    return np.asarray(array)


@functools.lru_cache(maxsize=64)
def _content_key(path: str, size: int, mtime_ns: int) -> str:
    del mtime_ns  # Only there so that a changed file is hashed again within one process.
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{size}-{digest[:16]}"
