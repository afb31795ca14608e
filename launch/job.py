"""What every job shares: its flags, a readable end for every expected error, latencies and tables."""

import runpy
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxeff import training
from launch.bench.timing import contest

RATE = "train/examples_per_second"
EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError)


def main(run: Callable[..., Any], description: str) -> None:
    """Parses --config, --workdir, --overwrite and --config.field=value, then calls run(config, workdir, overwrite=).

    An error that a user can mend ends the job with its message alone; --traceback shows where it came from.
    """
    try:
        from absl import app, flags, logging
        from ml_collections import config_flags
    except ImportError as error:
        raise SystemExit(f'jobs need absl and ml_collections ({error}): pip install "jaxeff[train]"') from error

    config = config_flags.DEFINE_config_file("config", None, "Config file, with :argument if it takes one.")
    workdir = flags.DEFINE_string("workdir", None, "Folder for results; the job resumes from what it finds there.")
    overwrite = flags.DEFINE_bool("overwrite", False, "Delete the run in the work directory and start again.")
    traceback = flags.DEFINE_bool("traceback", False, "Show the whole traceback of an error.")
    flags.mark_flags_as_required(["config", "workdir"])

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except AttributeError as error:  # ml_collections, for a field that the config does not have
            raise SystemExit(f"{error}\n{_fields_of(argv)}") from error
        except flags.Error as error:
            raise SystemExit(f"{error}\n\n{description.strip()}") from error

    def start(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save at level INFO
        if len(argv) > 1:
            raise SystemExit(f"unexpected arguments {argv[1:]}; flags start with --")
        try:
            run(config.value.lock(), workdir.value, overwrite=overwrite.value)
        except EXPECTED as error:
            if traceback.value:
                raise
            raise SystemExit(f"{type(error).__name__}: {error}") from error

    app.run(start, flags_parser=parse)


def latencies(
    networks: Mapping[str, tuple[nn.Module, training.TrainState]], shape: tuple[int, ...], batch: int
) -> dict[str, float]:
    """Milliseconds of one inference call on `batch` images of `shape` on one device, all networks taking turns."""
    images = jax.random.normal(jax.random.key(0), (batch, *shape))

    def contestant(module, state):
        variables = {"params": state.evaluation_params, **state.model_state}
        variables = jax.device_put(jax.device_get(variables), jax.local_devices()[0])
        predict = jax.jit(lambda variables, images: module.apply(variables, images))
        return lambda: predict(variables, images)

    times = contest({name: contestant(*pair) for name, pair in networks.items()}, pairs=15, warmup=3, seconds=0.02)
    return {name: 1e3 * times.seconds(name) for name in networks}


def seconds(results: Iterable[training.FitResult], examples: int) -> float | None:
    """Mean time to train on so many examples, at the median throughput of each run; None if none was logged."""
    rates = [[row[RATE] for row in result.history if RATE in row] for result in results]
    totals = [examples / statistics.median(rate) for rate in rates if rate]
    return sum(totals) / len(totals) if totals else None


def show(table: Any) -> None:
    """Prints a rich table, wide enough for all its columns when the output is not a terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def _fields_of(argv: list[str]) -> str:
    """The fields of the config that the command line names, for the error about one that it does not have."""
    for index, argument in enumerate(argv):
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config":
            path, _, option = (value or argv[index + 1]).partition(":")
            config = runpy.run_path(path)["get_config"](*([option] if option else []))
            return "valid fields: " + ", ".join(sorted(_flat(config)))
    return ""


def _flat(config: Any, prefix: str = "") -> list[str]:
    names = []
    for name in config:
        path = f"{prefix}{name}"
        names += _flat(config[name], f"{path}.") if hasattr(config[name], "keys") else [path]
    return names
