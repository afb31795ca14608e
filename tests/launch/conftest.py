"""Jobs in processes of their own, and what they leave behind, read back."""

import json
import pathlib

import jax
import pytest

from jaxeff import data, training
from launch import classifier


@pytest.fixture(scope="session", autouse=True)
def started_processes_use_the_compilation_cache():
    settings = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield


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
