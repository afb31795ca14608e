"""Settings shared by every test: CPU by default, compilation cache on, data only when it is asked for."""

import os
import pathlib

# Before the first import of jax: tests run on CPU unless the caller chose a platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Most of the time goes to compiling programs that run for a millisecond, so LLVM need not optimise them; nor in the
# processes that tests start. A flag of the caller's comes later, and wins.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()

# Of this process and of those that tests start: a program is compiled once, whoever needs it first.
os.environ.setdefault("XDG_CACHE_HOME", str(pathlib.Path.home() / ".cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["XDG_CACHE_HOME"] + "/jaxeff/xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest


def pytest_collection_modifyitems(items):
    """Skips what this machine cannot run, each with its reason."""
    data = os.environ.get("JAXEFF_DATA")
    reasons = {}
    if not data or not pathlib.Path(data).is_dir():
        reasons["data"] = "JAXEFF_DATA does not name a folder with the data files"
    if any(item.get_closest_marker("gpu") for item in items) and jax.default_backend() != "gpu":
        reasons["gpu"] = f"needs a GPU; the backend is {jax.default_backend()}"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
