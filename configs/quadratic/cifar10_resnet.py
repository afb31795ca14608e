"""QuadraLib's QResNet-14 and its first-order peers, ResNet-14 and ResNet-32, on CIFAR-10 with QuadraLib's recipe.

    JAXEFF_DATA=DIR python -m launch.train --config=configs/quadratic/cifar10_resnet.py --workdir=runs/qresnet

Batch 256, 200 epochs, SGD, cosine from 0.1, clipping at 0.5 (github.com/zarekxu/QuadraLib). Meant for a GPU, where it
was not timed yet; one epoch of the three networks takes about a quarter of an hour on two CPU cores. Expected: on
lossless CIFAR-10, QuadraLib reports 93.23 % for QResNet-14 and 92.83 % for ResNet-32; on the JPEG file of JAXEFF_DATA
accuracies are 2-3 points lower.
"""

from ml_collections import ConfigDict

from configs.classification import network, quadralib_cifar10


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` takes two steps of narrow and less deep networks on 64 images."""
    config = quadralib_cifar10(arg, epochs=200, end=1e-4)
    depths, width = ((14, 8), 0.25) if arg == "smoke" else ((32, 14), 1.0)
    deep, shallow = ({"depth": depth, "shortcut": "projection", "width": width} for depth in depths)
    config.networks.resnet32 = network("resnet", **deep)
    config.networks.resnet14 = network("resnet", **shallow)
    config.networks.qresnet14 = network("resnet", kind="quadralib", branch_norm="batch", save="x", **shallow)
    return config
