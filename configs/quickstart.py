"""First-order, quadratic and dynamically pruned networks on 1,797 real handwritten digits, side by side.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

About a minute on two CPU cores, less on a GPU. Expected: test accuracy above 0.97, of the pruned network above 0.96.
That does half of the multiply-accumulates and, on maps this small, takes no less time: choosing costs what it saves.
"""

from ml_collections import ConfigDict

from configs.classification import base, gates, network


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` finishes in seconds."""
    config = base("digits")
    config.epochs = 2 if arg == "smoke" else 60
    config.batch_size = 64
    config.networks.first_order = network("cnn", widths=(16, 32, 64), pools=2)
    config.networks.quadratic = network("cnn", kind="quadralib", branch_norm="batch", widths=(8, 16, 32), pools=2)
    config.networks.pruned = network("cnn", widths=(16, 32, 64), pools=2)
    config.networks.pruned.gates = gates(0.5, group_size=4, increment=0.4 if arg == "smoke" else 0.05)
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule = ConfigDict({"name": "cosine", "base": 3e-3})
    config.optimizer.schedule.warmup = 5 if arg == "smoke" else 50
    config.augment.crop = 1
    return config
