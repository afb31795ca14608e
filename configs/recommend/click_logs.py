"""Will this advertisement be clicked? The heads of the Criteo and Avazu logs, or a log of your own in their layouts.

    python -m launch.recommend --config=configs/recommend/click_logs.py:criteo --workdir=runs/recommend_criteo
    python -m launch.recommend --config=configs/recommend/click_logs.py:avazu --workdir=runs/recommend_avazu
    python -m launch.recommend --config=configs/recommend/click_logs.py:file --workdir=runs/recommend_file \
        --config.file.train=day_0.gz --config.file.test=day_23.gz --config.file.rows=1000000

The first two need `criteo_8k.npz` and `avazu_9k.npz` in $JAXEFF_DATA: so few examples that the AUC says little.
"""

from ml_collections import ConfigDict

from configs.recommendation import base


def get_config(arg: str = "criteo") -> ConfigDict:
    """`:criteo`, `:avazu` or `:file`; with `,smoke` behind it, a run of seconds."""
    dataset, _, smoke = arg.partition(",")
    config = base(dataset)
    config.serving.examples = 16
    config.training.epochs = 1 if smoke else 3
    # Tables of a log have a long tail of rows that are read once.
    config.memory.update({"cache_share": 0.4, "split_rows": True})
    if smoke:
        config.serving.measured, config.device, config.store.kinds = 5, "nand", ("int8",)
    return config
