"""A cascade of two resolutions with early exits on Fashion-MNIST: only what is in doubt is looked at closely.

    JAXEFF_DATA=DIR python -m launch.train --config=configs/dynamic/cascade.py --workdir=runs/cascade

One network sees 14x14 pixels, the other all 28x28. `figures/cascade.png` then has the accuracy of the cascade on the
test images by the time it takes, for thresholds of the highest probability from 0.5 to 0.99, beside those of each
network alone.

Seven minutes on two CPU cores; not timed on a GPU yet. Expected: 86.2 % in 0.10 ms an image alone at 14x14, 90.6 % in
0.39 ms at 28x28; together at the threshold 0.9 90.6 % in 0.30 ms, at 0.7 89.8 % in 0.22 ms.
"""

from ml_collections import ConfigDict

from configs.classification import base, network, sgd

M = "M"
# The cheap one begins with the pooling that makes its resolution.
PLANS = {"at_14x14": (M, 32, 48, M, 64, 96), "at_28x28": (32, 32, M, 64, 64, M, 128, 128)}


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` finishes in seconds on 64 images."""
    smoke = arg == "smoke"
    config = base("fashion_mnist")
    config.batch_size, config.epochs = 128, 3
    if smoke:
        config.train_split, config.test_split = "train[:64]", "test[:64]"
        config.batch_size, config.steps, config.latency_batch = 16, 4, 16
    for name, plan in PLANS.items():
        config.networks[name] = network("vgg", plan=(M, M, 4) if smoke else plan)
    config.cascade = tuple(PLANS)
    config.optimizer = sgd(0.1, warmup=1 if smoke else 100)
    config.augment.update({"crop": 2, "flip": True})
    config.log_every = 50
    return config
