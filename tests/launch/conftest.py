"""Jobs in processes of their own, and what they leave behind, read back."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

from jaxeff import data, training
from launch import classifier

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def start_job():
    """Returns a starter of jobs: start("train", config, workdir, *flags, **options of Popen) -> process."""

    def start(job: str, config: str, workdir: pathlib.Path, *flags: str, **options) -> subprocess.Popen:
        command = [sys.executable, "-m", f"launch.{job}", f"--config={config}", f"--workdir={workdir}", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, **{**pipes, **options})

    return start


@pytest.fixture(scope="session")
def finished_job(start_job):
    """Returns a runner of jobs to their end: run(as above) -> exit status, stdout and stderr."""

    def run(*args, **options) -> subprocess.CompletedProcess:
        process = start_job(*args, **options)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def final_params():
    """Returns the newest saved parameters of a run, on one device, from the run's folder alone."""

    def read(run: pathlib.Path):
        config = json.loads((run / "config.json").read_text())["config"]
        train = data.load(config["dataset"], config["train_split"])
        module = classifier.network(config["networks"][config["network"]], train)
        batch = data.Batches(train.arrays, config["batch_size"], seed=0).batch(0)
        like = jax.eval_shape(classifier.method(module, config, train, 8).init, jax.random.key(0), batch)
        with training.Checkpoints(run / "checkpoints") as checkpoints:
            return checkpoints.restore(like)[0].params

    return read
