"""One network for four ratios against a network for each of them, on Fashion-MNIST.

    JAXEFF_DATA=DIR python -m launch.train --config=configs/dynamic/one_for_all.py --workdir=runs/one_for_all

The one learns by the sandwich rule, between no gates and three quarters of the channels dropped, and has its norms
renewed for every ratio; each of the others learns for its own ratio alone. All take as many steps and cost as much to
train, so of every ratio the one has seen a quarter as many images. Steps are what it needs: with a quarter of them, and
every image at four ratios in each, it was four to six points worse.

Half an hour on two CPU cores; not timed on a GPU yet. Expected at a quarter, a half, 0.625 and three quarters of the
channels dropped: the one 90.0, 89.3, 88.8 and 86.8 %, the others 91.6, 90.5, 90.1 and 87.8 %; after three epochs these
have 88.5, 86.9, 85.9 and 83.9 %.
"""

from ml_collections import ConfigDict

from configs.classification import base, gates, network, sgd

M = "M"
PLAN = (16, M, 32, 32, M, 64, 64, M)
RATIOS = (0.25, 0.5, 0.625, 0.75)


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` finishes in seconds on 64 images."""
    smoke = arg == "smoke"
    config = base("fashion_mnist")
    config.batch_size, config.epochs, config.seeds = 128, 12, (0,)
    pace, batches = {"group_size": 4}, 40
    if smoke:
        config.train_split, config.test_split = "train[:64]", "test[:64]"
        config.batch_size, config.steps, config.latency_batch = 16, 4, 4
        pace, batches = {"increment": 0.5}, 2
    config.networks.one_for_all = network("vgg", plan=PLAN)
    config.networks.one_for_all.gates = gates(max(RATIOS), rule="sandwich", **pace)
    for ratio in RATIOS:
        percent = f"{100 * ratio:g}".replace(".", "_")
        for name in ("one", "own"):
            config.networks[f"{name}_at_{percent}"] = network("vgg", plan=PLAN)
        one = gates(ratio, rule="none", source="one_for_all", calibrate=batches, **pace)
        config.networks[f"one_at_{percent}"].gates = one
        config.networks[f"own_at_{percent}"].gates = gates(ratio, **pace)
    config.optimizer = sgd(0.1, warmup=1 if smoke else 100)
    config.augment.update({"crop": 2, "flip": True})
    config.log_every = 50
    return config
