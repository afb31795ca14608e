"""First-order and quadratic networks on 1,797 real handwritten digits, side by side.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

About a minute on two CPU cores, less on a GPU. Expected: both networks above 0.97 test accuracy.
"""

from ml_collections import ConfigDict

from configs.classification import base, network


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` finishes in seconds."""
    config = base("digits")
    config.epochs = 2 if arg == "smoke" else 60
    config.batch_size = 64
    config.networks.first_order = network("cnn", widths=(16, 32, 64), pools=2)
    config.networks.quadratic = network("cnn", kind="quadralib", branch_norm="batch", widths=(8, 16, 32), pools=2)
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule = ConfigDict({"name": "cosine", "base": 3e-3})
    config.optimizer.schedule.warmup = 5 if arg == "smoke" else 50
    config.augment.crop = 1
    return config
