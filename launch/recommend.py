"""Trains a recommendation model, writes its tables to files, and serves queries with a tenth of them in memory.

    python -m launch.recommend --config=configs/recommend/movielens.py --workdir=runs/movielens [--overwrite]

For every seed the model learns (or, for a generated trace, does not) and its tables are written in every format of
`store.kinds`. Those of the first seed are placed under the budget of memory and serve the queries, beside the same
model with all tables in memory: queries per second, slow queries, hit rates, bytes read, and what was foretold.

Writes config.json, summary.json and figures/ to the work directory, and for every seed a folder with metrics.jsonl,
checkpoints/ and the stores. Started again with the same work directory it goes on where it stopped.
"""

import statistics
from collections.abc import Mapping
from typing import Any

from jaxeff import sdm, training
from jaxeff.drawing import short
from jaxeff.sdm import figures, placement, power
from jaxeff.training.workdir import FIGURES, plain_config
from launch import job, recommender


def run(config: Mapping[str, Any], workdir: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Trains, converts, plans and serves; returns what it writes to summary.json."""
    # ---- data: everything that can be wrong is found before anything is written --------------------------------------
    recommender.check(config)
    problems = {seed: recommender.problem(config, seed) for seed in config["seeds"]}
    folders = {seed: f"seed{seed}" for seed in problems}
    directory, _ = training.prepare_workdir(workdir, plain_config(config), overwrite, folders.values())

    # ---- training, and the accuracy of every format ------------------------------------------------------------------
    scores: dict[str, list[Any]] = {kind: [] for kind in config["store"]["kinds"]}
    models, histories = {}, {}
    for seed, found in problems.items():
        if found.train is not None:
            print(f"seed {seed}: {found.steps} steps of {config['training']['batch_size']} on {found.notes['train']:,}")
        params, tables, histories[seed] = recommender.trained(config, found, seed, directory / folders[seed])
        named = dict(zip(found.names, (tables[name] for name in found.architecture.table_names), strict=True))
        models[seed] = params
        for kind in scores:
            folder = directory / folders[seed] / "stores" / kind
            sdm.write_tables(
                folder, named, kind, block=config["store"]["block"], packing=config["store"]["packing"], keep=1
            )
            if found.labels is not None:
                scores[kind].append(recommender.accuracy(found, params, folder, config["serving"]["examples"]))

    # ---- serving -----------------------------------------------------------------------------------------------------
    seed, found = next(iter(problems.items()))
    used = recommender.use_of(found)
    rows, plans, timelines, curves = [], {}, {}, {}
    for kind in scores:
        with sdm.open_store(directory / folders[seed] / "stores" / kind) as store:
            row, shown = recommender.compared(config, found, models[seed], store, used)
            for name in ("auc", "log_loss") if scores[kind] else ():
                row[name] = statistics.mean(getattr(one, name) for one in scores[kind])
            rows.append(row)
            plans[kind], timelines[kind], curves[kind] = shown.plan, shown.spans, shown.curve

    # ---- figures and summary -----------------------------------------------------------------------------------------
    folder = directory / FIGURES
    total = max(row["table_bytes"] for row in rows)
    bound = {"rows that were read before": used.repeated}
    figures.draw_hit_rates(curves, folder / "hit_rates.png", bounds=bound, total_bytes=total)
    figures.draw_timeline(timelines, folder / "timeline.png")
    if all(isinstance(plan, placement.Placement) for plan in plans.values()):
        figures.draw_placement(plans, folder / "placement.png")
    figures.draw_devices([shown.device, sdm.PRESETS["nand"], sdm.PRESETS["optane"]], folder / "devices.png")
    figures.draw_savings([power.compare(scenario) for scenario in power.PUBLISHED], folder / "power.png")
    summary = {"dataset": found.notes, "storage": shown.device.origin, "served": rows, "seeds": list(problems)}
    training.write_summary(directory, summary)
    job.show(table(summary, title=f"{found.notes['name']}: {len(found.queries)} queries of "
                                  f"{config['serving']['examples']} examples"))  # fmt: skip
    print(f"figures: {folder}")
    return summary


def table(summary: Mapping[str, Any], title: str) -> Any:
    """What serving took, as a table."""
    from rich.table import Table

    shown = Table(title=title)
    scored = "auc" in summary["served"][0]
    columns = ["rows", "tables", "in memory", "queries/s", "beside memory", "p50", "p99", "hit rate", "reads a query",
               "foretold", "read a query"]  # fmt: skip
    for column in [*columns, *(["AUC", "log-loss"] if scored else [])]:
        shown.add_column(column, justify="left" if column == "rows" else "right")
    for row in summary["served"]:
        shown.add_row(
            row["kind"],
            f"{short(row['table_bytes'])}B",
            f"{short(row['fast_bytes'])}B",
            f"{row['qps']:.0f}",
            f"{row['qps'] / row['qps_in_memory']:.2f}",
            f"{1e3 * row['p50']:.2f} ms",
            f"{1e3 * row['p99']:.2f} ms",
            f"{100 * row['hit_rate']:.1f} %",
            f"{row['reads']:.1f}",
            f"{row['reads_foretold']:.1f}",
            f"{short(row['bytes'])}B",
            *((f"{row['auc']:.4f}", f"{row['log_loss']:.4f}") if scored else ()),
        )
    return shown


if __name__ == "__main__":
    job.main(run, __doc__)
