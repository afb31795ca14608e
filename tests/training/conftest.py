"""The tiny run of this room as a fixture, in this process or in one of its own."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("tiny_run.py")


def _load():
    spec = importlib.util.spec_from_file_location("tiny_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny():
    return _load()


@pytest.fixture(scope="session")
def uninterrupted(tiny, tmp_path_factory):
    """The result of the tiny run when nothing happens to it."""
    return tiny.fit(tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="module")
def start_process():
    """Starts the tiny run in a process of its own; ends it after the tests if it is still there."""
    started = []

    def start(workdir, *arguments):
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(workdir), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
