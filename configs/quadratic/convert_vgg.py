"""From a VGG of nine convolutions on Fashion-MNIST to a smaller quadratic network.

    JAXEFF_DATA=DIR python -m launch.convert --config=configs/quadratic/convert_vgg.py --workdir=runs/convert

About ten minutes a seed on two CPU cores that were not idle; not timed on a GPU. Expected, mean of three seeds: the
source 89.3 % with 41,122 parameters, 3.22 M MACs and 0.19 MiB of residuals an image; the reduced network, two of seven
convolutions quadratic, 89.8 % with 25,082, 2.88 M and 0.06 MiB. It has had 8.5 epochs in all by then, the source 4; the
residuals are those of save="x" against the source's "all". The source trained on to 8.5 epochs under "x": 90.7 % and
0.07 MiB.

With --config.source=runs/NAME a network trained by `launch.train` on the same images is converted instead.
"""

from ml_collections import ConfigDict

from configs.classification import network
from configs.conversion import base, stage

# Several convolutions in every stage but the first, whose maps are large, so that there is depth to take away.
PLAN = (8, "M", 16, 16, 16, 16, "M", 32, 32, 32, 32)


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` finishes in seconds on 256 images."""
    config = base("fashion_mnist")
    config.network = network("vgg", plan=PLAN)
    config.actions = ("revert", "remove")
    config.seeds = (0, 1, 2)
    config.training.source = stage(4, 0.1)
    config.training.continued = stage(4.5, 0.05)
    config.training.quadratic = stage(0.5, 0.02)
    config.training.reduced = stage(4, 0.05)
    config.augment.update({"crop": 2, "flip": True})
    if arg == "smoke":
        config.train_split, config.score_split, config.test_split = "train[:256]", "train[256:320]", "test[:256]"
        config.network.options.plan = (4, 4, "M", 8, 8)
        config.batch_size, config.score.masks, config.seeds = 64, 2, (0,)
        for name in config.training:
            config.training[name] = stage(1, 0.05, warmup=1)
    return config
