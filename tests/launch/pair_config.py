"""A job for the tests that start it several times: two networks and nothing that takes long to compile."""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config("smoke")
    del config.networks.pruned
    for section in config.networks.values():
        section.options.widths = (2, 3, 4)
    config.log_every, config.steps = 5, 150
    return config
