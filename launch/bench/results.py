"""Results of record: the JSON file of a room, those of experiments, and the README tables made from them.

    python -m launch.bench.results                                writes the tables between the markers in README.md
    python -m launch.bench.results --record runs/quickstart NAME  first keeps a finished run as NAME

A file holds {"device", "versions", "date", "command", "cases"}; a case holds {"case", "metric", "value", "better",
"target", "spread", "n", "against"}. Ratios and rates are plain numbers, percentages are fractions. A time ratio also
holds "cpu_ratio", the same ratio of process CPU time, and "seconds" and "cpu_seconds": the medians of both sides.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxeff.training import comparison_markdown
from launch.bench.timing import Times

FOLDER = pathlib.Path(__file__).parent / "results"
README = pathlib.Path(__file__).parents[2] / "README.md"
EXPERIMENTS = FOLDER / "experiments"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
TIME_RATIO = "time ratio"
KEYS = ("case", "metric", "value", "better", "target", "spread", "n", "against")
CPU_KEYS = ("cpu_ratio", "seconds", "cpu_seconds")
NUMBERS = {"value": 1, "spread": 2, "cpu_ratio": 1, "seconds": 2, "cpu_seconds": 2}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")


def case(
    name: str,
    metric: str,
    value: float,
    *,
    better: str,
    target: float | None = None,
    spread: tuple[float, float] | None = None,
    n: int = 1,
    against: str = "",
    cpu: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One measured case in the form of the results file.

    Args:
      name: as in the room's table; several settings of one case are "name.setting".
      metric: what `value` is, for example "time ratio".
      value: the measurement.
      better: "lower" or "higher".
      target: what was aimed at, or None for a number that is only reported.
      spread: quartiles of the measurement.
      n: number of measurements.
      against: what it was compared with.
      cpu: what a time ratio has beside these; `time_ratio` fills it in.

    Raises:
      ValueError: as `check`.
    """
    low, high = spread or (value, value)
    item = {
        "case": name,
        "metric": metric,
        "value": _rounded(value),
        "better": better,
        "target": target,
        "spread": [_rounded(low), _rounded(high)],
        "n": n,
        "against": against,
        **(cpu or {}),
    }
    check(item)
    return item


def time_ratio(
    name: str,
    times: Times,
    ours: str,
    theirs: str,
    *,
    against: str,
    target: float | None = None,
    better: str = "lower",
) -> dict[str, Any]:
    """The case of one contestant's time beside another's: the median of the pairwise ratios, by wall and by CPU time.

    Args:
      name: as in `case`.
      times: of a contest in which both took part.
      ours: the contestant above the line of the ratio.
      theirs: the one below.
      against: what `theirs` is, in words.
      target: of the wall ratio.
      better: "lower" or "higher".
    """
    wall = times.ratio(ours, theirs)
    cpu = {
        "cpu_ratio": _rounded(times.cpu_ratio(ours, theirs).value),
        "seconds": [_rounded(times.seconds(side)) for side in (ours, theirs)],
        "cpu_seconds": [_rounded(times.cpu_seconds(side)) for side in (ours, theirs)],
    }
    return case(
        name, TIME_RATIO, wall.value, better=better, target=target, spread=(wall.low, wall.high), n=wall.n,
        against=against, cpu=cpu,
    )  # fmt: skip


def check(item: Mapping[str, Any]) -> None:
    """Finds what a case lacks of the form that every results file has.

    Raises:
      ValueError: naming the case, and what is missing or out of range.
    """
    name = item.get("case")
    needed = KEYS + (CPU_KEYS if item.get("metric") == TIME_RATIO else ())
    if missing := [key for key in needed if key not in item]:
        hint = "; make a time ratio by time_ratio(), which adds the CPU time" if set(missing) & set(CPU_KEYS) else ""
        raise ValueError(f"case {name!r} lacks {', '.join(missing)}{hint}")
    if item["better"] not in ("lower", "higher"):
        raise ValueError(f"case {name!r}: better must be 'lower' or 'higher', got {item['better']!r}")
    if item["n"] < 1:
        raise ValueError(f"case {name!r}: n must be at least 1, got {item['n']}")
    for key, length in NUMBERS.items():
        if key not in item:
            continue
        numbers = [item[key]] if length == 1 else item[key]
        if len(numbers) != length or not all(map(math.isfinite, numbers)):
            raise ValueError(f"case {name!r}: {key} must be {length} finite number(s), got {item[key]}")
        if key in CPU_KEYS and min(numbers) <= 0:
            raise ValueError(f"case {name!r}: {key} must be above 0, got {item[key]}")


def device() -> str:
    """The device in words, without naming a machine."""
    first = jax.devices()[0]
    if first.platform == "cpu":
        return f"CPU, {os.cpu_count()} cores, {_processor()}"
    return f"{len(jax.devices())} x {first.device_kind}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(path: str | os.PathLike[str], cases: Iterable[Mapping[str, Any]], command: str) -> None:
    """Writes a results file; cases that were not measured this time are kept if the device is the same.

    Raises:
      ValueError: as `check`, for a new case; the file stays as it was.
    """
    path = pathlib.Path(path)
    new: dict[str, dict[str, Any]] = {}
    for item in cases:
        check(item)
        new[item["case"]] = dict(item)
    kept: list[dict[str, Any]] = []
    if path.exists():
        old = json.loads(path.read_text())
        if old["device"] == device():
            kept = old["cases"]
    merged = [new.pop(item["case"], item) for item in kept] + list(new.values())
    record = {
        "device": device(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": command,
        "cases": merged,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Pairs of numbers stay on one line.
    text = re.sub(r"\[\s+([-+.\de]+),\s+([-+.\de]+)\s+\]", r"[\1, \2]", json.dumps(record, indent=2))
    path.write_text(text + "\n")


def met(item: Mapping[str, Any]) -> bool | None:
    """Whether a case reached its target; None without one."""
    if item["target"] is None:
        return None
    return item["value"] <= item["target"] if item["better"] == "lower" else item["value"] >= item["target"]


def table(folder: pathlib.Path = FOLDER) -> str:
    """The Markdown table of all results of record."""
    blocks = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        # Only where it was measured: files from before the CPU time was kept have none.
        with_cpu = any("cpu_ratio" in item for item in record["cases"])
        lines = [
            f"**{path.stem}** on {record['device']}, {record['date']}, jax {record['versions']['jax']} "
            f"(`{record['command']}`)",
            "",
            f"| case | measured | quartiles |{' by CPU time |' if with_cpu else ''} target | against |",
            f"| --- | ---: | ---: |{' ---: |' if with_cpu else ''} ---: | --- |",
        ]
        for item in record["cases"]:
            sign = "≤" if item["better"] == "lower" else "≥"
            target = "reported" if item["target"] is None else f"{sign} {item['target']:g}"
            value = f"{item['value']:.4g}" + (" (missed)" if met(item) is False else "")
            low, high = item["spread"]
            spread = f"{low:.3g} to {high:.3g}" if item["n"] > 1 else "-"
            cells = [f"`{item['case']}`: {item['metric']}", value, spread, target, item["against"]]
            if with_cpu:
                cells.insert(3, f"{item['cpu_ratio']:.4g}" if "cpu_ratio" in item else "-")
            lines.append(f"| {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def record(workdir: str | os.PathLike[str], name: str, folder: pathlib.Path = EXPERIMENTS) -> None:
    """Keeps the summary and the figure of a finished run of a job.

    The figure is the curve of its cascade where there is one, the hit rates of its tables, or the comparison of its
    networks.

    Raises:
      FileNotFoundError: if the run has no summary yet.
    """
    run = pathlib.Path(workdir)
    summary = json.loads((run / "summary.json").read_text())
    config = json.loads((run / "config.json").read_text())["config"]
    entry = {"device": device(), "versions": versions(), "date": datetime.date.today().isoformat(), **summary}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**entry, "config": config}, indent=2) + "\n")
    figure = "cascade.png" if "cascade" in summary else "hit_rates.png" if "served" in summary else "comparison.png"
    shutil.copyfile(run / "figures" / figure, folder / f"{name}.png")


def experiment_table(path: pathlib.Path) -> str:
    """The Markdown table of a recorded experiment, with what it ran on."""
    entry = json.loads(path.read_text())
    data, seeds = entry["dataset"], entry["seeds"]
    if "clients" in entry:
        return _federation_table(entry)
    if "served" in entry:
        return _serving_table(entry)
    rows = comparison_markdown(entry["networks"])
    if "cascade" in entry:
        rows += f"\n\n{_cascade_table(entry['cascade'])}"
    # A conversion has several trainings, and its networks are not timed.
    lengths = sorted({row.get("steps", entry["steps"]) for row in entry["networks"]} - {0}) if "steps" in entry else []
    steps = f"{' and '.join(f'{length:,}' for length in lengths)} steps, " if lengths else ""
    latency = f"latency of {entry['latency_batch']} images " if "latency_batch" in entry else ""
    return (
        f"{rows}\n\n{data['name']}: {data['train']:,} training and {data['test']:,} test images, {steps}"
        f"{'seed' if len(seeds) == 1 else 'mean over seeds'} {', '.join(map(str, seeds))}; {latency}"
        f"on {entry['device']}, {entry['date']}."
    )


def _federation_table(entry: Mapping[str, Any]) -> str:
    first = entry["baseline"].replace("_", " ")
    lines = [
        f"| partition | method | last | best | rounds to {first}'s best | parameters | MACs | MB a round |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in entry["results"]:
        low, high = row["accuracy_range"]
        spread = f" ({100 * low:.2f} to {100 * high:.2f})" if low < high else ""
        reached = "never in all seeds" if row["rounds_to"] is None else f"{row['rounds_to']:.3g}"
        cells = [row["partition"].replace("_", " "), row["method"].replace("_", " ")]
        cells += [f"{100 * row['accuracy']:.2f} %{spread}", f"{100 * row['best']:.2f} %", reached]
        cells += [f"{row['params']:,}", f"{row['macs']:,}", f"{row['bytes_per_round'] / 1e6:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    data, seeds = entry["dataset"], ", ".join(map(str, entry["seeds"]))
    rows = "\n".join(lines)
    return (
        f"{rows}\n\n{data['name']}: {entry['clients']} clients, {data['train']:,} training and {data['test']:,} test "
        f"images, {entry['rounds']} rounds of {entry['epochs']} epochs, seeds {seeds}; {entry['device']}, "
        f"{entry['date']}."
    )


def _serving_table(entry: Mapping[str, Any]) -> str:
    scored = "auc" in entry["served"][0]
    columns = [
        "tables",
        "in memory",
        "queries/s",
        "beside memory",
        "p50",
        "p99",
        "hit rate",
        "reads a query",
        "foretold",
    ]
    columns += ["AUC", "log-loss"] if scored else []
    lines = [f"| rows | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for row in entry["served"]:
        cells = [row["kind"], f"{row['table_bytes'] / 1e6:.2f} MB", f"{row['fast_bytes'] / 1e6:.3f} MB"]
        cells += [f"{row['qps']:.0f}", f"{row['qps'] / row['qps_in_memory']:.2f}"]
        cells += [f"{1e3 * row['p50']:.2f} ms", f"{1e3 * row['p99']:.2f} ms", f"{100 * row['hit_rate']:.1f} %"]
        cells += [f"{row['reads']:.1f}", f"{row['reads_foretold']:.1f}"]
        cells += [f"{row['auc']:.4f}", f"{row['log_loss']:.4f}"] if scored else []
        lines.append(f"| {' | '.join(cells)} |")
    data, seeds = entry["dataset"], ", ".join(map(str, entry["seeds"]))
    learned = f"{data['train']:,} training and {data['test']:,} test examples, " if "train" in data else ""
    size = f"queries of {entry['config']['serving']['examples']} examples"
    rows = "\n".join(lines)
    return f"{rows}\n\n{data['name']}: {learned}{size}, seeds {seeds}; {entry['device']}, {entry['date']}."


def _cascade_table(found: Mapping[str, Any]) -> str:
    steps = [name.replace("_", " ") for name in found["steps"]]
    lines = [f"| cascade | accuracy | per image | {' | '.join(f'left {step}' for step in steps)} |"]
    lines.append(f"| --- |{' ---: |' * (2 + len(steps))}")
    for point in found["points"]:
        left = [f"{100 * share:.0f} %" for share in point["left"]] if len(point["left"]) > 1 else ["-"] * len(steps)
        cells = [point["name"], f"{100 * point['accuracy']:.2f} %", f"{point['milliseconds']:.3f} ms", *left]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def update_readme(readme: pathlib.Path = README, folder: pathlib.Path = FOLDER) -> None:
    """Replaces what stands between the markers of the README by the tables; experiments only where it has markers.

    Raises:
      ValueError: if the markers of the results table are missing.
    """
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme.name} needs the lines {BEGIN} and {END}; the table goes between them")
    text = _between(text, BEGIN, END, table(folder))
    for path in sorted((folder / EXPERIMENTS.name).glob("*.json")):
        begin, end = f"<!-- {path.stem}: begin -->", f"<!-- {path.stem}: end -->"
        if begin in text and end in text:
            text = _between(text, begin, end, experiment_table(path))
    readme.write_text(text)


def _between(text: str, begin: str, end: str, content: str) -> str:
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m launch.bench.results", description="Writes the README's tables.")
    parser.add_argument("--record", nargs=2, metavar=("WORKDIR", "NAME"), help="first keep this run as NAME")
    options = parser.parse_args()
    if options.record:
        record(*options.record)
    update_readme()
