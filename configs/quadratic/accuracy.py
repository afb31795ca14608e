"""First order against quadratic at equal parameters and at equal MACs, on Fashion-MNIST or CIFAR-10, three seeds.

    JAXEFF_DATA=DIR python -m launch.train --config=configs/quadratic/accuracy.py:fashion_mnist --workdir=runs/accuracy
    JAXEFF_DATA=DIR python -m launch.train --config=configs/quadratic/accuracy.py:cifar10 --workdir=runs/accuracy10

With ":resnet" and ":mobilenet" in the place of the data set: QResNet-14 and QMobileNet on CIFAR-10 against their
first-order peers, at widths that a CPU can train, where parameters and MACs are equal at once to 4 %. QMobileNet's
sixteen quadratic layers in a row do not train unless they are restrained: without, in a trial with one seed, the norm
of the gradient passed 20 in a hundred steps (300 from Kaiming's start), was clipped, and the loss stayed at that of
guessing; with gamma=0.01 its loss after 300 steps was 1.7, the first-order network's 1.6. Expected of MobileNets: first
order 56.7 %, quadratic 51.7 %; of ResNets 64.8 and 61.6 %.

Five convolutions of QuadraLib's seven-layer plan at an eighth of its width. With three maps in each neuron, widths
divided by the square root of three have as many parameters and MACs; the stem and rounding decide which of the two is
met exactly. The recipe, two epochs, was chosen on the last 5,000 training images of Fashion-MNIST with one seed: a rate
of 0.3 for the first-order network (0.1, 0.3 and 1: 88.5, 89.9 and 89.5 %) is better than 1 for the quadratic one too
(89.6 and 88.9 %), which starts as its first-order twin (from Kaiming's start 88.7 %). All networks keep everything for
their backward pass (save="all").

A quarter of an hour for Fashion-MNIST and half an hour for CIFAR-10, whose recipe is the same, on two CPU cores that
were not idle; not timed on a GPU yet. Expected on Fashion-MNIST: first order 89.7 %, quadratic 89.3 % at equal MACs and
89.2 % at equal parameters; on CIFAR-10: 68.2, 66.5 and 67.6 %.
"""

from ml_collections import ConfigDict

from configs.classification import base, network, sgd

M = "M"
FIRST_ORDER = (16, M, 32, 32, M, 64, 64, M)
PLANS = {
    # 70,330 parameters and 5.53 M MACs, against 70,163 and, below, 5.46 M.
    "fashion_mnist": {"parameters": (10, M, 18, 18, M, 37, 37, M), "macs": (9, M, 18, 18, M, 37, 37, M)},
    # 70,618 parameters and 7.52 M MACs, against 70,477 and, below, 7.47 M.
    "cifar10": {"parameters": (10, M, 19, 19, M, 36, 36, M), "macs": (9, M, 18, 18, M, 36, 36, M)},
}


# On CIFAR-10: model, options, width of the first-order and of the quadratic network, pace of the quadratic parameters.
FAMILIES = {
    # 44,370 parameters and 6.78 M MACs, against 42,714 and 6.88 M.
    "resnet": ("resnet", {"depth": 14, "shortcut": "projection"}, 0.5, 0.2813, 1.0),
    # 74,586 parameters and 1.94 M MACs, against 75,677 and 1.91 M.
    "mobilenet": ("mobilenet", {}, 0.25, 0.14, 0.01),
}
QUADRATIC = {"kind": "quadralib", "branch_norm": "batch", "initialization": "relinear"}


def get_config(arg: str = "fashion_mnist") -> ConfigDict:
    """The data set or a family, or `smoke` for two steps on 64 images of digits."""
    smoke = arg == "smoke"
    if arg not in (known := (*PLANS, *FAMILIES, "smoke")):
        raise ValueError(f"accuracy.py:{arg} is none of {', '.join(known)}")
    config = base("digits" if smoke else "cifar10" if arg in FAMILIES else arg)
    config.batch_size = 32 if smoke else 128
    config.epochs = 2
    config.seeds = (0, 1, 2)
    if smoke:
        config.train_split, config.test_split, config.steps, config.seeds = "train[:64]", "test[:64]", 2, (0,)
    if arg in FAMILIES:
        model, options, width, narrow, config.restrain.gamma = FAMILIES[arg]
        config.networks.first_order = network(model, width=width, **options)
        config.networks.quadratic = network(model, width=narrow, **options, **QUADRATIC)
    else:
        config.networks.first_order = network("vgg", plan=FIRST_ORDER)
        for cost, plan in PLANS["fashion_mnist" if smoke else arg].items():
            config.networks[f"quadratic_equal_{cost}"] = network("vgg", plan=plan, **QUADRATIC)
    config.optimizer = sgd(0.3, warmup=1 if smoke else 100)
    config.augment.update({"crop": 2, "flip": True})
    config.log_every = 50
    return config
