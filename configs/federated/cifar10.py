"""FedAvg and Fed2 on CIFAR-10 (JPEG): ten clients of two and of three classes, and Dirichlet 0.5.

    JAXEFF_DATA=... python -m launch.federate --config=configs/federated/cifar10.py --workdir=runs/fed_cifar10

Three seeds, 6,000 training images, networks of one width and as many epochs. About 20 minutes on two CPU cores; not
timed on a GPU yet. Results are in the README.

`:vgg9` is the heterogeneous setting of FedMA and Fed2: all images, sixteen clients, Dirichlet, VGG-9; it wants a GPU.
"""

from ml_collections import ConfigDict

from configs.federation import base, method, partition


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` does two rounds of one partition; `:vgg9` see above."""
    config = base("cifar10")
    config.train_split, config.test_split = "train[:6000]", "test[:4000]"
    config.seeds = (0, 1, 2)
    config.rounds, config.epochs, config.batch_size, config.learning_rate = 16, 3, 32, 0.02
    config.partitions.two_classes = partition("by_classes", classes_per_client=2)
    config.partitions.three_classes = partition("by_classes", classes_per_client=3)
    config.partitions.dirichlet = partition("dirichlet", alpha=0.5)
    network = {"widths": (16, 32, 60), "pools": 3, "hidden": (100,), "norm": None}
    config.methods.fed_avg = method("cnn", **network)
    config.methods.fed2 = method("cnn", groups=10, first="dense1", entry="all", **network)
    if arg == "smoke":
        config.rounds, config.seeds, config.train_split, config.test_split = 2, (0,), "train[:300]", "test[:200]"
        del config.partitions.three_classes, config.partitions.dirichlet
    if arg == "vgg9":
        config.train_split, config.test_split, config.clients, config.seeds = "train", "test", 16, (0,)
        config.rounds, config.epochs, config.batch_size, config.learning_rate = 60, 20, 64, 0.01
        config.momentum, config.backend = 0.9, "auto"
        config.augment.update({"crop": 4, "flip": True})
        del config.partitions.two_classes, config.partitions.three_classes
        config.methods.fed_avg = method("vgg9")
        config.methods.fed2 = method("vgg9", groups=10, first="conv5", entry="split")
    return config
