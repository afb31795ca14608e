"""FedAvg and Fed2 on Fashion-MNIST: ten clients of two and of three classes, Dirichlet 0.5, and alike.

    JAXEFF_DATA=... python -m launch.federate --config=configs/federated/fashion_mnist.py --workdir=runs/fed_fashion

Three seeds, 6,000 training images, networks of one width and as many epochs. About 25 minutes on two CPU cores; not
timed on a GPU yet. Results are in the README.
"""

from ml_collections import ConfigDict

from configs.federation import base, method, partition


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` does two rounds of one partition and seed."""
    config = base("fashion_mnist")
    config.train_split = "train[:6000]"
    config.seeds = (0, 1, 2)
    # Larger rates make some seeds of every method diverge.
    config.rounds, config.epochs, config.batch_size, config.learning_rate = 16, 3, 32, 0.03
    config.partitions.two_classes = partition("by_classes", classes_per_client=2)
    config.partitions.three_classes = partition("by_classes", classes_per_client=3)
    config.partitions.dirichlet = partition("dirichlet", alpha=0.5)
    config.partitions.iid = partition("iid")
    # Without norms: those of narrow groups forget how strong a feature is, which the softmax compares between groups.
    network = {"widths": (16, 32, 60), "pools": 3, "hidden": (100,), "norm": None}
    config.methods.fed_avg = method("cnn", **network)
    config.methods.fed2 = method("cnn", groups=10, first="dense1", entry="all", **network)
    config.methods.fed2_pairs = method("cnn", groups=5, first="dense1", entry="all", **network)
    if arg == "smoke":
        config.rounds, config.seeds, config.train_split, config.test_split = 2, (0,), "train[:300]", "test[:200]"
        del config.partitions.three_classes, config.partitions.dirichlet, config.partitions.iid
    return config
