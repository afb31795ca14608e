"""A job for the tests on a mesh: two rows to a device, batch norm over all of them, a few steps."""

from ml_collections import ConfigDict

from configs import quickstart
from configs.classification import network, sgd


def get_config() -> ConfigDict:
    config = quickstart.get_config("smoke")
    config.train_split, config.test_split = "train[:64]", "test[:40]"
    config.batch_size, config.eval_batch_size, config.latency_batch, config.steps = 16, 16, 4, 8
    config.log_every = 2
    config.networks = ConfigDict({"convolution": network("cnn", widths=(2, 3), pools=1)})
    # Adam would turn the rounding of a gradient that is nearly zero into a step of full size.
    config.optimizer = sgd(0.1, warmup=2)
    return config
