"""What jobs leave behind, read back."""

import json
import pathlib

import jax
import pytest

from jaxeff import data, training
from launch import classifier


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
