"""The fields that every recommendation experiment has, with their defaults; experiments change what they need."""

from ml_collections import ConfigDict


def base(dataset: str) -> ConfigDict:
    """All fields of `launch.recommend`.

    Args:
      dataset: "movielens", "criteo" or "avazu"; "file" for a click log of your own, described under `file`; or "trace"
        for look-ups that are generated, described under `trace`, without training.
    """
    config = ConfigDict()
    config.dataset = dataset
    config.seeds = (0,)
    # Of dlrm.PRESETS, fitted to the features.
    config.model = ConfigDict({"preset": "small", "dim": 16})
    # Of a click log: its format ("criteo" or "avazu"), and the rows that ids of each table are hashed to.
    config.file = ConfigDict({"train": "", "test": "", "layout": "criteo", "rows": 100_000})
    # Of MovieLens: "time" holds the latest ratings out, "random" any.
    config.split = "time"
    config.training = ConfigDict(
        {"epochs": 2, "batch_size": 128, "optimizer": {"name": "adam", "schedule": 1e-3}, "table_rate": 0.05}
    )
    config.store = ConfigDict({"kinds": ("float32", "int8", "int4"), "block": 4096, "packing": "dense"})
    # Memory is a share of the bytes of all tables: that of tables and rows that are in memory, and of the cache, which
    # has `cache_share` of it. `split_rows` keeps the most used rows of each table in memory, otherwise whole tables.
    config.memory = ConfigDict({"share": 0.1, "cache_share": 0.5, "split_rows": False, "pooled_share": 0.0})
    # Queries have so many examples; the last `measured` of them are served one by one, for their latency.
    config.serving = ConfigDict(
        {"examples": 64, "depth": 2, "lookahead": 0, "reader": "auto", "queue_depth": 128, "measured": 100}
    )
    # "measured", or a name of sdm.PRESETS, of whose profile queries per second are predicted.
    config.device = "measured"
    config.trace = trace()
    config.eval_batch_size = 1024
    config.log_every = 50
    return config


def trace(
    user_tables: int = 8,
    item_tables: int = 4,
    user_rows: int = 20_000,
    item_rows: int = 2_000,
    user_pooling: float = 15.0,
    item_pooling: float = 3.0,
    queries: int = 1500,
    popularity: str = "2022_t788_bs131072_0",
    session_queries: float = 1.0,
) -> ConfigDict:
    """Look-ups with the reuse of one of `dlrm.PUBLISHED`: user tables have one bag a query."""
    return ConfigDict(
        {
            "user_tables": user_tables,
            "item_tables": item_tables,
            "user_rows": user_rows,
            "item_rows": item_rows,
            "user_pooling": user_pooling,
            "item_pooling": item_pooling,
            "queries": queries,
            "popularity": popularity,
            "session_queries": session_queries,
        }
    )
