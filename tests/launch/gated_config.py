"""The job for the tests on a mesh, with gates whose ratios stand after a tenth of the steps."""

from ml_collections import ConfigDict

from configs.classification import gates, network
from tests.launch import mesh_config


def get_config() -> ConfigDict:
    config = mesh_config.get_config()
    config.networks = ConfigDict({"convolution": network("cnn", widths=(4, 6), pools=1)})
    config.networks.convolution.gates = gates(0.5, increment=0.4, climb=0.1)
    return config
