"""Will this user like this film? MovieLens in time order, tables in float32, int8 and int4 with a tenth in memory.

    python -m launch.recommend --config=configs/recommend/movielens.py --workdir=runs/recommend_movielens

Half a minute on two CPU cores; not timed on a GPU yet. AUC 0.691 with float32 rows, the same with int8 ones, and 0.0002
less with int4 ones (the latest tenth of the ratings is held out, whose users and films are partly new). Needs
`movielens_latest_small.npz` in $JAXEFF_DATA.
"""

from ml_collections import ConfigDict

from configs.recommendation import base


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` trains for few steps."""
    config = base("movielens")
    config.seeds = (0, 1, 2)
    config.memory.update({"cache_share": 0.6, "split_rows": True})
    if arg == "smoke":
        config.seeds, config.training.epochs, config.training.batch_size = (0,), 1, 2048
        config.serving.measured, config.device = 10, "nand"
    return config
