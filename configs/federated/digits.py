"""FedAvg and Fed2 on handwritten digits, ten clients of two classes each; no data to download.

    python -m launch.federate --config=configs/federated/digits.py --workdir=runs/federated_digits

Half a minute on two CPU cores; not timed on a GPU yet. Fed2 ends at 96.7 %, FedAvg at 91.7 %, and Fed2 is as good as
FedAvg at its best after 13 of the 30 rounds.
"""

from ml_collections import ConfigDict

from configs.federation import base, method, partition


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` does two rounds."""
    config = base("digits")
    config.rounds, config.epochs, config.batch_size, config.learning_rate = 30, 2, 16, 0.03
    config.partitions.two_classes = partition("by_classes", classes_per_client=2)
    network = {"widths": (16, 32), "hidden": (80,), "norm": None, "pools": 2}
    config.methods.fed_avg = method("cnn", **network)
    config.methods.fed2 = method("cnn", groups=10, first="dense1", entry="all", **network)
    if arg == "smoke":
        config.rounds = 2
    return config
