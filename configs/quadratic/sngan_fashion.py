"""SNGAN on Fashion-MNIST: first order, and quadratic at equal MACs of the generator.

    JAXEFF_DATA=DIR python -m launch.generate --config=configs/quadratic/sngan_fashion.py --workdir=runs/sngan

Four minutes on two CPU cores for the first-order networks and five for quadratic ones; not timed on a GPU yet. Expected
after 2000 steps, one run with seed 0: Frechet distance 2.39 for first order, 2.37 for a quadratic generator with the
first-order discriminator, 7.86 for both quadratic, 0.02 for training images. The distances are on the features of a
classifier trained in the same job, so they do not compare with published FIDs.

In these runs a quadratic generator does as well as a first-order one and a quadratic discriminator is worse: with it
the distance is ahead at step 400 (8.05 against 9.42), best at step 800 (6.82) and then rises, while the discriminator's
loss stays at half that of the first-order one. A spectral norm on every projection does not bound the slope of their
product; the distance of `quadratic_rms`, whose discriminator has bounded projections, falls steadily but slowly (16.8
at step 400, 11.7 at 1200) to 7.87, where it is falling still. The learning rate and the number of discriminator steps
were chosen on the first-order networks.
"""

from ml_collections import ConfigDict

from configs.generation import adam, base, gan


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` takes about a minute on 512 images, nearly all of it imports and compilation."""
    config = base("fashion_mnist")
    # Three projections at half the channels: 1.0x the generator's MACs, 0.77x the discriminator's.
    config.networks.first_order = gan((32, 32, 16), (32, 64, 128))
    half = {"generator": (32, 16, 8), "generator_kind": "quadralib"}
    config.networks.quadratic_generator = gan(**half, discriminator=(32, 64, 128))
    quadratic = {**half, "discriminator": (16, 32, 64), "discriminator_kind": "quadralib"}
    config.networks.quadratic = gan(**quadratic)
    config.networks.quadratic_rms = gan(**quadratic, discriminator_norm="rms")
    # Ours: in trials of 700 steps the images had clearer shapes, to the eye, than at the paper's 2e-4.
    config.generator_optimizer = adam(5e-4)
    config.discriminator_optimizer = adam(5e-4)
    if arg == "smoke":
        config.train_split, config.test_split = "train[:512]", "test[:512]"
        config.steps, config.batch_size, config.samples, config.evaluations = 8, 16, 512, 2
        config.classifier.epochs, config.classifier.optimizer.schedule.warmup = 1, 1
        config.log_every = 4
    return config
