"""Psi-Net beside FedAvg on handwritten digits: a group of features for each class, from the second layer on.

    python -m launch.federate --config=configs/federated/psi_net.py --workdir=runs/psi_net

Half a minute on two CPU cores; not timed on a GPU yet. Psi-Net ends behind, with a ninth of the parameters: at 62.5 to
93.3 % with two classes a client, at 90.8 to 98.1 % with clients alike.
"""

from ml_collections import ConfigDict

from configs.federation import base, method, partition


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` does two rounds."""
    config = base("digits")
    config.rounds, config.epochs, config.batch_size, config.learning_rate = 30, 2, 16, 0.03
    config.partitions.two_classes = partition("by_classes", classes_per_client=2)
    config.partitions.iid = partition("iid")
    network = {"widths": (20, 40), "hidden": (80,), "norm": None, "pools": 2}
    config.methods.fed_avg = method("cnn", **network)
    config.methods.psi_net = method("cnn", psi_net=True, **network)
    if arg == "smoke":
        config.rounds = 2
    return config
