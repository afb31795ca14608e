"""A recommendation model with its user tables in files, and look-ups with the reuse of production; no data needed.

    python -m launch.recommend --config=configs/recommend/trace.py --workdir=runs/recommend_trace

Half a minute on two CPU cores; not timed on a GPU yet. About two thirds of the queries per second of tables in memory,
with a tenth of their bytes in memory and a hit rate of 82 to 84 %.
"""

from ml_collections import ConfigDict

from configs.recommendation import base, trace


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` serves few queries of small tables."""
    config = base("trace")
    config.model.update({"preset": "kaggle", "dim": 32})
    if arg == "smoke":
        config.model.preset = "small"
        config.trace = trace(3, 2, 2000, 300, queries=40)
        config.serving.update({"examples": 8, "measured": 10})
        config.store.kinds = ("float32", "int8")
        config.device = "nand"
    return config
