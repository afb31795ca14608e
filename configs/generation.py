"""The fields that every generation experiment has, with their defaults; experiments change what they need."""

from collections.abc import Sequence

from ml_collections import ConfigDict, config_dict

from configs.classification import network, sgd


def base(dataset: str) -> ConfigDict:
    """All fields of `launch.generate`.

    `batch_size` is that of one update; a step takes `discriminator_steps` times as many real images. `samples` images
    of each network are compared with the test images, at `evaluations` evenly spaced steps.
    """
    config = ConfigDict()
    config.dataset = dataset
    config.train_split = "train"
    config.test_split = "test"
    config.seed = 0
    config.batch_size = 64
    config.steps = 2000
    config.networks = ConfigDict()
    config.latent = 64
    config.discriminator_steps = 1
    config.ema_decay = 0.995
    config.generator_optimizer = adam(2e-4)
    config.discriminator_optimizer = adam(2e-4)
    config.classifier = ConfigDict(
        {
            "network": network("vgg", plan=(16, "M", 32, "M", 64, "M")),
            "epochs": 2,
            "batch_size": 128,
            "optimizer": sgd(0.1, warmup=100),
            "label_smoothing": 0.0,
            "ema_decay": config_dict.placeholder(float),
            "augment": ConfigDict({"crop": 0, "flip": False, "cutout": 0, "mixup": 0.0}),
        }
    )
    config.samples = 10_000
    config.evaluations = 5
    config.sheet = (8, 8)
    config.log_every = 20
    return config


def gan(
    generator: Sequence[int],
    discriminator: Sequence[int],
    *,
    generator_kind: str = "first_order",
    discriminator_kind: str = "first_order",
    discriminator_norm: str | None = None,
) -> ConfigDict:
    """One GAN of an experiment: the widths of `sngan_generator` and `sngan_discriminator`, and the kinds of neurons.

    `discriminator_norm` is the branch norm of a quadratic discriminator. A spectral norm on every projection does not
    bound the slope of their product; "rms" bounds the projections themselves.
    """
    section = ConfigDict({"generator": tuple(generator), "discriminator": tuple(discriminator)})
    section.update({"generator_kind": generator_kind, "discriminator_kind": discriminator_kind})
    section.discriminator_norm = config_dict.placeholder(str)
    section.discriminator_norm = discriminator_norm
    return section


def adam(rate: float) -> ConfigDict:
    """Adam with b1 = 0 and b2 = 0.9, as SNGAN is trained (Miyato et al. 2018, arXiv 1802.05957)."""
    return ConfigDict({"name": "adam", "schedule": rate, "b1": 0.0, "b2": 0.9})
