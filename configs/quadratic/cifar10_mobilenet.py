"""QMobileNet and its first-order peers on CIFAR-10 with QuadraLib's recipe.

    JAXEFF_DATA=DIR python -m launch.train --config=configs/quadratic/cifar10_mobilenet.py --workdir=runs/qmobilenet

QuadraLib's plan of eight depthwise-separable blocks; the quadratic network at 0.57 of its width has as many parameters
as the first-order one. Batch 256, 250 epochs, SGD, cosine from 0.1 to 1e-5, clipping at 0.5
(github.com/zarekxu/QuadraLib). Meant for a GPU, where it was not timed yet; nor was an epoch on CPU.
"""

from ml_collections import ConfigDict

from configs.classification import base, network, sgd


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` takes two steps of narrow networks on 64 images."""
    config = base("cifar10")
    config.batch_size = 256
    config.epochs = 250
    width = 1.0
    if arg == "smoke":
        config.train_split, config.test_split = "train[:64]", "test[:64]"
        config.batch_size, config.steps, width = 32, 2, 0.125
    layers = {"kind": "quadralib", "branch_norm": "batch", "save": "x"}
    config.networks.mobilenet = network("mobilenet", width=width)
    config.networks.qmobilenet = network("mobilenet", **layers, width=width)
    config.networks.qmobilenet_equal_parameters = network("mobilenet", **layers, width=0.57 * width)
    config.optimizer = sgd(0.1, end=1e-5)
    config.augment.update({"crop": 4, "flip": True})
    config.log_every = 50
    return config
