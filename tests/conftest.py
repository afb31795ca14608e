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

import jax
import pytest

CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "jaxeff" / "xla"

jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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
