"""The command line that every benchmark room shares."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from launch.bench import results

Cases = Mapping[str, Callable[[int], Iterator[dict[str, Any]]]]


def main(room: str, description: str, cases: Cases, gpu: Sequence[str], argv: Sequence[str] | None = None) -> None:
    """Runs the chosen cases of a room and writes what they measured.

    Args:
      room: name of the module in launch.bench.
      description: its first line is shown by --help.
      cases: functions of the number of pairs that yield finished cases, by name.
      gpu: names of the cases that run with --device gpu; those of them whose name starts with "gpu" or is "ceilings"
        run nowhere else.
      argv: the command line; None for that of the process.

    Raises:
      SystemExit: for the wrong device, or after all cases ran if some of them failed.
    """
    parser = argparse.ArgumentParser(prog=f"python -m launch.bench.{room}", description=description.split("\n")[0])
    parser.add_argument("--case", action="append", choices=sorted(cases), help="run only this case (repeatable)")
    parser.add_argument("--pairs", type=int, default=9, help="interleaved rounds that count (default 9)")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="which cases to run (default cpu)")
    parser.add_argument("--json", help="write the results file")
    options = parser.parse_args(argv)
    if jax.default_backend() != options.device:
        raise SystemExit(f"--device {options.device}, but the backend of JAX is {jax.default_backend()}")
    on_cpu = [name for name in cases if name != "ceilings" and not name.startswith("gpu")]
    wanted = options.case or (on_cpu if options.device == "cpu" else list(gpu))
    command = "make gpu" if options.device == "gpu" else "make bench"
    failed = []
    for name in wanted:
        try:
            for item in cases[name](options.pairs):
                print(json.dumps({**item, "device": results.device()}), flush=True)
                if options.json:  # at once, so that a case that fails later loses nothing
                    results.write(options.json, [item], command)
        except ImportError as error:
            print(f"skipped {name}: {error}", file=sys.stderr)
        except Exception as error:
            failed.append(name)
            print(f"failed {name}: {type(error).__name__}: {error}", file=sys.stderr)
    if failed:
        raise SystemExit(f"failed cases: {', '.join(failed)}")
