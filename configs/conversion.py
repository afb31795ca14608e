"""The fields that every conversion experiment has, with their defaults; experiments change what they need."""

from ml_collections import ConfigDict, config_dict

from configs.classification import network, sgd


def base(dataset: str) -> ConfigDict:
    """All fields of `launch.convert`.

    `source` is a work directory of `launch.train` and `source_network` the name of one of its networks; without it
    `network` is trained first. Layers are scored on `score_split`, never on the test images. In `budget` a float is a
    fraction of what the source has and an integer is a number. `save` is the memory policy of the quadratic networks,
    see `jaxeff.quadratic.backward`; the source is counted as it is trained, with "all". In the stage `continued` it is
    trained on under that policy too: a comparison at equal epochs.
    """
    config = ConfigDict()
    config.dataset = dataset
    config.train_split = "train[2000:]"
    config.score_split = "train[:2000]"
    config.test_split = "test"
    config.seeds = (0,)
    config.batch_size = 128
    config.eval_batch_size = 250
    config.source = config_dict.placeholder(str)
    config.source_network = "first_order"
    config.network = network("vgg")
    config.kind = "quadralib"
    config.branch_norm = config_dict.placeholder(str)
    config.save = "x"
    config.score = ConfigDict({"ratio": 0.5, "masks": 4, "batch_size": 50})
    config.budget = ConfigDict({"params": 0.85, "macs": 1.0, "residual_bytes": 1.0})
    config.actions = ("remove",)
    config.training = ConfigDict({"source": stage(5, 0.1), "continued": stage(6, 0.05)})
    config.training.update({"quadratic": stage(1, 0.02), "reduced": stage(5, 0.05)})
    config.label_smoothing = 0.0
    config.ema_decay = config_dict.placeholder(float)
    config.augment = ConfigDict({"crop": 0, "flip": False, "cutout": 0, "mixup": 0.0})
    config.log_every = 50
    return config


def stage(epochs: float, rate: float, *, warmup: int = 50) -> ConfigDict:
    """One training: epochs, which may be a fraction and 0 for none, and SGD's highest learning rate."""
    return ConfigDict({"epochs": float(epochs), "optimizer": sgd(rate, warmup=warmup)})
