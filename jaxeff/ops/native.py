"""C++ for what no program of XLA's does: compiled once for this machine, called through `jax.ffi`.

Nothing needs it. Where it cannot be had, `reason` says why, and callers take another form.

A program that is to leave this process, by `jax.export`, is traced under `off()`: another process has no such code.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import jax
import jaxlib

from jaxeff.ops import autotune

# Multiply-adds are contracted, as no program here depends on two roundings; the rest is IEEE.
FLAGS: tuple[str, ...] = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-fPIC", "-shared", "-w")
COMPILERS: tuple[str, ...] = ("c++", "g++", "clang++")

# Part of what JAX remembers traces by.
_OFF = jax.make_user_context(False)


class UnavailableError(RuntimeError):
    """Compiled code cannot be had on this machine; the message says why."""


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Leaves compiled code out of every program traced inside the `with` block, as JAXEFF_NATIVE=0 does everywhere."""
    with _OFF(True):
        yield


def register(source: pathlib.Path, *symbols: str) -> None:
    """Makes handlers of a C++ file targets of `jax.ffi.ffi_call` on CPU, by their names.

    The first call on a machine compiles, for seconds, into `jaxeff.ops.autotune.cache_folder`; later ones, in any
    process, load what is there.

    Args:
      source: a file that defines them with XLA_FFI_DEFINE_HANDLER_SYMBOL.
      *symbols: their names.

    Raises:
      UnavailableError: under `off` or JAXEFF_NATIVE=0, or if nothing compiles or the result does not load.
    """
    if failure := reason(source, *symbols):
        raise UnavailableError(failure)


def reason(source: pathlib.Path, *symbols: str) -> str | None:
    """Why `register` fails, or None where it does not."""
    return _switched_off() or _undivided() or _register(source, symbols)


def load(source: pathlib.Path) -> ctypes.CDLL:
    """The library of a C++ file, for code of the host that calls it by ctypes, outside every program of XLA's.

    Raises:
      UnavailableError: under `off` or JAXEFF_NATIVE=0, or if nothing compiles or the result does not load.
    """
    library = _switched_off() or _load(source)
    if isinstance(library, str):
        raise UnavailableError(library)
    return library


def compiled(source: pathlib.Path) -> bool:
    """Whether `register` takes no time, as the library of a file is made or even loaded already."""
    if _switched_off():
        return False
    if source in _LOADED:
        return True
    try:
        return _library(source).exists()
    except (OSError, RuntimeError):  # a folder that cannot be read, or no home to have one in
        return False


# What this process has loaded stays, whichever folder the environment names later.
_LOADED: set[pathlib.Path] = set()


def _switched_off() -> str | None:
    if _OFF.value:
        return "compiled code is switched off by jaxeff.ops.native.off"
    return "compiled code is switched off by JAXEFF_NATIVE=0" if os.environ.get("JAXEFF_NATIVE") == "0" else None


def _undivided() -> str | None:
    """Why a program of several devices must not have compiled code: XLA would gather its operands on each of them."""
    if jax.default_backend() != "cpu" or jax.device_count() == 1 or jax.sharding.get_abstract_mesh().manual_axes:
        return None
    return f"XLA does not divide compiled code over {jax.device_count()} devices; inside jax.shard_map it is divided"


@functools.cache
def _register(source: pathlib.Path, symbols: tuple[str, ...]) -> str | None:
    library = _load(source)
    if isinstance(library, str):
        return library
    try:
        for symbol in symbols:
            jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except (RuntimeError, AttributeError) as error:
        return _not_loaded(source, error)
    return None


@functools.cache
def _load(source: pathlib.Path) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        path = _library(source)
        if not path.exists() and (failure := _compile(source, path)):
            return failure
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # damaged, or made where the C library is another
            if failure := _compile(source, path):
                return failure
            library = ctypes.CDLL(str(path))
        _LOADED.add(source)
        return library
    except (OSError, RuntimeError) as error:
        return _not_loaded(source, error)


def _not_loaded(source: pathlib.Path, error: Exception) -> str:
    return f"the library of {source.name} cannot be made or loaded: {error}; set JAXEFF_CACHE_DIR to another folder"


def _compile(source: pathlib.Path, path: pathlib.Path) -> str | None:
    """Makes the library, whole at every moment; why that failed, or None."""
    named = os.environ.get("CXX")
    commands = [shlex.split(named)] if named else [[name] for name in COMPILERS]
    commands = [command for command in commands if command and shutil.which(command[0])]
    if not commands:
        names = named or ", ".join(COMPILERS)
        return f"there is no C++ compiler among {names}; install one, or name one by CXX"
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = pathlib.Path(folder) / path.name
        folders = ("-I", str(source.parent), "-I", jax.ffi.include_dir())
        for command in commands:
            call = [*command, *FLAGS, *folders, str(source), "-o", str(made)]
            done = subprocess.run(call, capture_output=True, text=True)
            if not done.returncode:
                made.replace(path)
                return None
            failures.append(f"{command[0]} does not compile {source.name}: {done.stderr.strip()[:500]}")
    return "; ".join(failures)


def _library(source: pathlib.Path) -> pathlib.Path:
    return (autotune.cache_folder() / f"{source.stem}-{_fingerprint(source)}.so").absolute()


@functools.cache
def _fingerprint(source: pathlib.Path) -> str:
    """Of everything the library depends on but the compiler, which need not be there when it is loaded."""
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    parts = [*texts, *FLAGS, jaxlib.__version__, platform.platform(), *autotune.processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
