"""Gates that learn beside gates of attention, on Fashion-MNIST: what each counts, takes and loses.

    JAXEFF_DATA=DIR python -m launch.train --config=configs/dynamic/learned.py --workdir=runs/learned

Five networks of one architecture: dense; by attention, half of the channels that every layer reads dropped; boosted
(FBS), half of those that it gives closed; both; and channel-gated, each output finished only where a quarter of the
channels says so. Counted are multiply-accumulates, timed are the forms in use: no engine leaves out single outputs, so
channel gating saves nothing on the clock.

A quarter of an hour on two CPU cores; not timed on a GPU yet. Expected: dense 91.3 %, attention 89.6 %, boosted 90.0 %,
both 89.9 %, channel-gated 90.4 %, at 5.5, 2.8, 2.8, 1.4 and 3.3 million multiply-accumulates.
"""

from ml_collections import ConfigDict

from configs.classification import base, gates, learned, network, sgd

M = "M"
PLAN = (16, M, 32, 32, M, 64, 64, M)


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` finishes in seconds on 64 images of digits."""
    smoke = arg == "smoke"
    config = base("digits" if smoke else "fashion_mnist")
    config.batch_size, config.epochs = 128, 6
    pace = {"group_size": 4}
    if smoke:
        config.train_split, config.test_split = "train[:64]", "test[:64]"
        config.batch_size, config.steps, config.latency_batch = 16, 4, 4
        pace["increment"] = 0.5
    for name in ("dense", "attention", "boosted", "boosted_and_attention", "channel_gated"):
        config.networks[name] = network("vgg", plan=PLAN)
    for name in ("attention", "boosted_and_attention"):
        config.networks[name].gates = gates(0.5, **pace)
    for name in ("boosted", "boosted_and_attention"):
        config.networks[name].learned = learned("boosted", channels=0.5, group_size=4)
    config.networks.channel_gated.learned = learned("channel_gated", base=0.25, target=1.0)
    config.optimizer = sgd(0.1, warmup=1 if smoke else 100)
    config.augment.update({"crop": 2, "flip": True})
    config.log_every = 50
    return config
