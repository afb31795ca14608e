"""How good recommendations are with tables in quantised rows: MovieLens, three seeds."""

import tempfile
from collections.abc import Iterator
from typing import Any

from configs.recommend import movielens
from launch import recommend
from launch.bench import results


def accuracy(pairs: int) -> Iterator[dict[str, Any]]:
    """AUC of films that users like, with rows of float32, and what int8 and int4 take from it."""
    config = movielens.get_config()
    config.device, config.serving.measured = "nand", 10
    with tempfile.TemporaryDirectory(prefix="jaxeff-accuracy-") as folder:
        summary = recommend.run(config, folder)
    found = {row["kind"]: row["auc"] for row in summary["served"]}
    seeds = len(config.seeds)
    said = f"MovieLens in time order, rating >= 4, mean of {seeds} seeds"
    yield results.case("accuracy.float32", "AUC", found["float32"], better="higher", n=seeds, against=said)
    for kind, target in (("int8", 0.001), ("int4", None)):
        loss = abs(found["float32"] - found[kind])
        yield results.case(
            f"accuracy.{kind}", "difference of AUC to float32", loss, better="lower", target=target, n=seeds,
            against=said,
        )  # fmt: skip


CASES = {"accuracy": accuracy}
