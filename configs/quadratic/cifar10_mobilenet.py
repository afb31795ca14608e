"""QMobileNet and its first-order peers on CIFAR-10 with QuadraLib's recipe.

    JAXEFF_DATA=DIR python -m launch.train --config=configs/quadratic/cifar10_mobilenet.py --workdir=runs/qmobilenet

QuadraLib's plan of eight depthwise-separable blocks; the quadratic network at 0.57 of its width has as many parameters
as the first-order one. Batch 256, 250 epochs, SGD, cosine from 0.1 to 1e-5, clipping at 0.5
(github.com/zarekxu/QuadraLib). Meant for a GPU, where it was not timed yet; nor was an epoch on CPU. If the loss stays
at 2.3, as it does at narrow widths with a rate of 0.3 (`accuracy.py:mobilenet`), start quadratic networks as their
first-order twins and restrain them: initialization="relinear" in their sections and --config.restrain.gamma=0.01.
"""

from ml_collections import ConfigDict

from configs.classification import network, quadralib_cifar10


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` takes two steps of narrow networks of two blocks on 64 images."""
    config = quadralib_cifar10(arg, epochs=250, end=1e-5)
    options = {"width": 0.125, "blocks": ((64, 1), (128, 2))} if arg == "smoke" else {"width": 1.0}
    layers = {"kind": "quadralib", "branch_norm": "batch", "save": "x"}
    config.networks.mobilenet = network("mobilenet", **options)
    config.networks.qmobilenet = network("mobilenet", **layers, **options)
    config.networks.qmobilenet_equal_parameters = network(
        "mobilenet", **layers, **{**options, "width": 0.57 * options["width"]}
    )
    return config
