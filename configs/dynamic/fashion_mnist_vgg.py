"""AntiDote's way on Fashion-MNIST: train, measure how much every block can drop, choose, train under it, use it.

    JAXEFF_DATA=DIR python -m launch.train --config=configs/dynamic/fashion_mnist_vgg.py --workdir=runs/antidote

The ratios of channels are chosen so that half of the multiply-accumulates are left at the least loss of accuracy, on
2,000 images that are not trained on. `figures/` then has the sensitivity of every block and the real beside the counted
speed-up of every layer. A minute and a half on two CPU cores; not timed on a GPU yet. Expected: dense 88.5 %, pruned
86.1 % with 0.47 of the multiply-accumulates, in three quarters of the time. With
--config.networks.pruned.gates.macs=0.3 less is left.
"""

from ml_collections import ConfigDict

from configs.classification import base, gates, network, sgd

M = "M"
PLAN = (16, M, 32, 32, M, 64, 64, M)


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` finishes in seconds on 256 images."""
    smoke = arg == "smoke"
    config = base("fashion_mnist")
    config.train_split, held_out = "train[2000:]", "train[:2000]"
    config.batch_size, config.epochs = 128, 2
    plan, pace = PLAN, {"group_size": 4}
    if smoke:
        config.train_split, held_out, config.test_split = "train[64:256]", "train[:64]", "test[:64]"
        config.batch_size, config.steps, config.latency_batch = 32, 6, 8
        plan, pace = (4, M, 8, 8), {"increment": 0.4}
    config.networks.dense = network("vgg", plan=plan)
    config.networks.pruned = network("vgg", plan=plan)
    config.networks.pruned.gates = gates(None, source="dense", macs=0.5, sensitivity_split=held_out, **pace)
    config.optimizer = sgd(0.1, warmup=1 if smoke else 100)
    config.augment.update({"crop": 2, "flip": True})
    config.log_every = 50
    return config
