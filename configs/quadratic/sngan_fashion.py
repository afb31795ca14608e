"""SNGAN on Fashion-MNIST: first order, and quadratic at equal MACs of the generator.

    JAXEFF_DATA=DIR python -m launch.generate --config=configs/quadratic/sngan_fashion.py --workdir=runs/sngan

About eight minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from configs.generation import adam, base, gan


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` finishes in seconds on 512 images."""
    config = base("fashion_mnist")
    # Three projections cost three times as much, so half the channels cost three quarters.
    config.networks.first_order = gan((32, 32, 16), (32, 64, 128))
    config.networks.quadratic = gan((32, 16, 8), (16, 32, 64), kind="quadralib")
    # Two and a half times the rate of the paper: its 2e-4 is for runs a hundred times as long.
    config.generator_optimizer = adam(5e-4)
    config.discriminator_optimizer = adam(5e-4)
    if arg == "smoke":
        config.train_split, config.test_split = "train[:512]", "test[:512]"
        config.steps, config.batch_size, config.samples, config.evaluations = 8, 16, 512, 2
        config.classifier.epochs, config.classifier.optimizer.schedule.warmup = 1, 1
        config.log_every = 4
    return config
