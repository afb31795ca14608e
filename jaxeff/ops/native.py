"""C++ for what no program of XLA's does: compiled once for this machine, called through `jax.ffi`.

Nothing needs it. Where it cannot be had, `reason` says why, and callers take another form.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax
import jaxlib

from jaxeff.ops import autotune

# Multiply-adds are contracted, as no program here depends on two roundings; the rest is IEEE.
FLAGS: tuple[str, ...] = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-fPIC", "-shared", "-w")
COMPILERS: tuple[str, ...] = ("c++", "g++", "clang++")


class UnavailableError(RuntimeError):
    """Compiled code cannot be had on this machine; the message says why."""


def register(source: pathlib.Path, *symbols: str) -> None:
    """Makes handlers of a C++ file targets of `jax.ffi.ffi_call` on CPU, by their names.

    The first call on a machine compiles, for seconds, into `jaxeff.ops.autotune.cache_folder`; later ones, in any
    process, load what is there.

    Args:
      source: a file that defines them with XLA_FFI_DEFINE_HANDLER_SYMBOL.
      *symbols: their names.

    Raises:
      UnavailableError: if $JAXEFF_NATIVE is 0, nothing compiles or the result does not load.
    """
    if failure := _register(source, symbols):
        raise UnavailableError(failure)


def reason(source: pathlib.Path, *symbols: str) -> str | None:
    """Why `register` fails, or None where it does not."""
    return _register(source, symbols)


def compiled(source: pathlib.Path) -> bool:
    """Whether `register` finds the library of a file made already, and takes no time."""
    return os.environ.get("JAXEFF_NATIVE", "1") != "0" and _library(source).exists()


def _library(source: pathlib.Path) -> pathlib.Path:
    return autotune.cache_folder() / f"{source.stem}-{_fingerprint(source)}.so"


@functools.cache
def _register(source: pathlib.Path, symbols: tuple[str, ...]) -> str | None:
    if os.environ.get("JAXEFF_NATIVE", "1") == "0":
        return "compiled code is switched off by JAXEFF_NATIVE=0"
    path = _library(source)
    try:
        if not path.exists() and (failure := _compile(source, path)):
            return failure
        library = ctypes.CDLL(str(path))
        for symbol in symbols:
            jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except OSError as error:
        return f"{path} cannot be made or loaded: {error}; remove it, or set JAXEFF_CACHE_DIR to another folder"
    return None


def _compile(source: pathlib.Path, path: pathlib.Path) -> str | None:
    """Makes the library, whole at every moment; why that failed, or None."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        return f"there is no C++ compiler among {', '.join(names)}; install one, or name one by CXX"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = pathlib.Path(folder) / path.name
        folders = ("-I", str(source.parent), "-I", jax.ffi.include_dir())
        command = [compiler, *FLAGS, *folders, str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{compiler} does not compile {source.name}: {done.stderr.strip()[-500:]}"
        made.replace(path)
    return None


@functools.cache
def _fingerprint(source: pathlib.Path) -> str:
    """Of everything the library depends on but the compiler, which need not be there when it is loaded."""
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    parts = [*texts, *FLAGS, jaxlib.__version__, platform.machine(), _processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on: caches move between machines with the home folder."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
