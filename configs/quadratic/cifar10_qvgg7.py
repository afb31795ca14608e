"""QuadraLib's QVGG-7 and its first-order peers, VGG-7 and VGG-16, on CIFAR-10 with QuadraLib's recipe.

    JAXEFF_DATA=DIR python -m launch.train --config=configs/quadratic/cifar10_qvgg7.py --workdir=runs/qvgg7

Batch 256, 200 epochs, SGD, cosine from 0.1, clipping at 0.5 (github.com/zarekxu/QuadraLib). Meant for a GPU, where it
was not timed yet; one epoch of the three networks takes about half an hour on two CPU cores. Expected: on lossless
CIFAR-10, QuadraLib reports 94.13 % for QVGG-7 and 93.61 % for the 13-convolution VGG; on the JPEG file of JAXEFF_DATA
accuracies are 2-3 points lower.
"""

from ml_collections import ConfigDict

from configs.classification import network, quadralib_cifar10


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` takes two steps of narrow networks on 64 images."""
    config = quadralib_cifar10(arg, epochs=200, end=1e-4)
    width = 0.125 if arg == "smoke" else 1.0
    config.networks.vgg16 = network("vgg16", width=width)
    config.networks.vgg7 = network("vgg7", width=width)
    config.networks.qvgg7 = network("vgg7", kind="quadralib", branch_norm="batch", save="x", width=width)
    return config
