"""A small VGG on Fashion-MNIST: first order, and QuadraLib's neuron at three quarters of the parameters.

    JAXEFF_DATA=DIR python -m launch.train --config=configs/quadratic/fashion_mnist_vgg.py --workdir=runs/fashion

About eight minutes on two CPU cores; not timed on a GPU yet. Expected after 5 epochs, seed 0: 89.3 % for the
first-order network with 94,186 parameters, 90.1 % for the quadratic one with 71,098.
"""

from ml_collections import ConfigDict

from configs.classification import base, network, sgd

# Three poolings take 28x28 to 3x3; one convolution follows each.
FIRST_ORDER = (32, "M", 64, "M", 128, "M")
QUADRATIC = (16, "M", 32, "M", 64, "M")


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` finishes in seconds on 512 images."""
    config = base("fashion_mnist")
    config.batch_size = 128
    config.epochs = 5
    if arg == "smoke":
        config.train_split, config.test_split, config.epochs = "train[:512]", "test[:512]", 1
    config.networks.first_order = network("vgg", plan=FIRST_ORDER)
    config.networks.quadratic = network("vgg", kind="quadralib", branch_norm="batch", plan=QUADRATIC)
    config.optimizer = sgd(0.1, warmup=1 if arg == "smoke" else 100)
    config.augment.update({"crop": 2, "flip": True})
    config.log_every = 50
    return config
