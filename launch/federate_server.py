r"""The server of a federation between machines: `launch.federate`'s rounds over a network, with Flower.

For a try on one machine, without TLS, in three terminals:

    python -m launch.federate_server --config=configs/federated/digits.py --workdir=runs/server --method=fed2 \
        --config.clients=2 --config.partitions.two_classes.options.classes_per_client=5 --insecure
    python -m launch.federate_client --config=configs/federated/digits.py --workdir=runs/client0 --method=fed2 \
        --config.clients=2 --config.partitions.two_classes.options.classes_per_client=5 --insecure --partition_id=0
    python -m launch.federate_client (the same with) --workdir=runs/client1 --partition_id=1

Between machines, with TLS: a certificate authority of your own and a certificate for the server's names, of which
127.0.0.1 must be one, since Flower's processes on the server talk to each other;

    openssl req -x509 -newkey rsa:4096 -nodes -days 365 -subj "/CN=federation CA" \
        -addext "keyUsage=critical,keyCertSign" -keyout ca.key -out ca.crt
    openssl req -newkey rsa:4096 -nodes -subj "/CN=server.example.org" -keyout server.key -out server.csr
    printf "%s\n" "subjectAltName=DNS:server.example.org,DNS:localhost,IP:127.0.0.1" \
        "authorityKeyIdentifier=keyid" "subjectKeyIdentifier=hash" > names.cnf
    openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -extfile names.cnf \
        -out server.crt

then, on the server, and on every client with ca.crt alone:

    python -m launch.federate_server --config=configs/federated/digits.py --workdir=runs/server --method=fed2 \
        --host=0.0.0.0 --port=8000 --ssl_certfile=server.crt --ssl_keyfile=server.key --ssl_ca_certfile=ca.crt
    python -m launch.federate_client --config=configs/federated/digits.py --workdir=runs/client0 --method=fed2 \
        --superlink=server.example.org:8000 --root_certificates=ca.crt --partition_id=0

Whoever reaches the port may join and start runs: keep it within a network of your own. Server and clients take the same
config, --method, --partition and --seed. The first round waits for --min_clients; in later ones whoever does not answer
within --round_timeout seconds is left out, and so is, by name, what does not fit.

Writes config.json, metrics.jsonl, summary.json, figures/, checkpoints/ and flower/ (Flower's files and log) to the work
directory. Started again with the same work directory it goes on where it stopped.
"""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxeff import federated, training
from jaxeff.federated import figures, flower
from jaxeff.federated.records import FINGERPRINT, need_flwr
from jaxeff.training.metrics import FILE_NAME as METRICS
from jaxeff.training.workdir import CHECKPOINTS, FIGURES, SUMMARY
from launch import job
from launch.federate_client import (
    SETTINGS,
    Experiment,
    define_flags,
    experiment,
    flower_folder,
    listens,
    running,
    settings_of,
)

LINK_LOG, RUN_LOG = "superlink.log", "run.log"
LINK = "jaxeff"
APP = """\
[project]
name = "federation"
version = "1.0.0"
description = "Apps of launch.federate_server; every machine runs its own installation of jaxeff."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "jaxeff"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
"""


def run(config: Mapping[str, Any], workdir: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Starts a SuperLink, runs all rounds and returns what is in summary.json."""
    from absl import flags

    need_flwr()
    given = flags.FLAGS
    # ---- everything that can be wrong is found before anything is written --------------------------------------------
    names = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certfile")
    security, link = transport(given.insecure, {name: given[name].value for name in names})
    settings = settings_of(config)
    made = experiment(settings)
    wanted = given.min_clients if given.min_clients is not None else made.clients.number
    if not 1 <= wanted <= made.clients.number:
        raise ValueError(f"--min_clients must be in 1..{made.clients.number}, the clients there are, got {wanted}")
    if given.round_timeout <= 0 or given.patience <= 0:
        raise ValueError(
            f"--round_timeout and --patience must be positive, got {given.round_timeout}, {given.patience}"
        )
    chosen = {name: settings[name] for name in ("method", "partition", "seed")}
    directory, _ = training.prepare_workdir(workdir, {**settings["config"], **chosen}, overwrite)
    if (directory / SUMMARY).is_file():
        summary = json.loads((directory / SUMMARY).read_text())
        job.show(table(summary))
        return summary

    # A host of 0.0.0.0 is reached as this one.
    address = f"{'127.0.0.1' if given.host == '0.0.0.0' else given.host}:{given.port}"
    if listens(address):
        raise ValueError(f"--port: somebody listens on {address} already; end it, or choose another port")

    # ---- Flower ------------------------------------------------------------------------------------------------------
    rest = {"workdir": str(directory), "min_clients": wanted, "timeout": given.round_timeout}
    folder, environment = flower_folder(directory, {**settings, **rest, "patience": given.patience})
    app = folder / "app"
    shutil.rmtree(app, ignore_errors=True)
    app.mkdir()
    (app / "pyproject.toml").write_text(APP)
    for side in ("server", "client"):
        (app / f"{side}_app.py").write_text(f"from launch.federate_{side} import {side}_app\n\napp = {side}_app()\n")
    lines = [f"[superlink.{LINK}]", f'address = "{address}"', *link]
    (folder / "config.toml").write_text("\n".join(lines) + "\n")
    command = ["flower-superlink", "--host", given.host, "--port", str(given.port), *security]
    with running([*command, "--disable-runtime-dependency-installation"], environment, folder / LINK_LOG) as superlink:
        connected(superlink, address, folder / LINK_LOG)
        print(f"{address}: waiting for {wanted} of {made.clients.number} clients; logs: {folder}/*.log", flush=True)
        command = ["flwr", "run", str(app), LINK, "--stream"]
        with running(command, environment, folder / RUN_LOG) as process:
            follow(process, superlink, directory, config["rounds"])
    if not (directory / SUMMARY).is_file():
        raise RuntimeError(f"the run has not come to its end: see {folder / RUN_LOG}; start it again to go on")
    summary = json.loads((directory / SUMMARY).read_text())
    job.show(table(summary))
    print(f"figures: {directory / FIGURES}")
    return summary


def transport(insecure: bool, files: Mapping[str, str | None]) -> tuple[list[str], list[str]]:
    """Flags of the SuperLink, and lines of Flower's config, for TLS or without.

    Args:
      insecure: without.
      files: "ssl_certfile", "ssl_keyfile" and "ssl_ca_certfile".

    Raises:
      ValueError: for certificates that are missing, or given with --insecure.
      FileNotFoundError: for files that are not there.
    """
    if insecure:
        if any(files.values()):
            raise ValueError("--insecure is without TLS: give it, or the --ssl_... files, not both")
        return ["--insecure"], ["insecure = true"]
    if absent := [f"--{name}" for name, path in files.items() if not path]:
        raise ValueError(f"TLS needs {', '.join(absent)} (see --help for how to make them), or choose --insecure")
    paths = {name: pathlib.Path(str(path)).absolute() for name, path in files.items()}
    for name, path in paths.items():
        if not path.is_file():
            raise FileNotFoundError(f"--{name}: {path} is not a file")
    security = itertools.chain.from_iterable((f"--{n.replace('_', '-')}", str(p)) for n, p in paths.items())
    return list(security), [f"root-certificates = {json.dumps(str(paths['ssl_ca_certfile']))}"]


def connected(process: subprocess.Popen, address: str, log: pathlib.Path, seconds: float = 120.0) -> None:
    """Waits until a server listens.

    Raises:
      RuntimeError: if it ends, or does not listen in time.
    """
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if listens(address):
            return
        time.sleep(0.2)
    raise RuntimeError(f"the SuperLink does not listen on {address}: see {log}")


def follow(process: subprocess.Popen, superlink: subprocess.Popen, directory: pathlib.Path, rounds: int) -> None:
    """Prints every round when it is finished, until the run has ended."""
    told = 0
    while True:
        ended = process.poll() is not None or superlink.poll() is not None
        path = directory / METRICS
        rows = training.read_metrics(path) if path.is_file() else []
        for row in rows[told:]:
            counts = ", ".join(f"{int(row[f'train/{name}'])} {name}" for name in ("counted", "missing", "rejected"))
            print(f"round {row['step']} of {rounds}: {counts}, accuracy {100 * row['eval/accuracy']:.2f} %", flush=True)
        told = len(rows)
        if ended:
            return
        time.sleep(0.5)


def server_app() -> Any:
    """The ServerApp that Flower loads."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        settings = json.loads(pathlib.Path(os.environ[SETTINGS]).read_text())
        serve(grid, experiment(settings), settings)

    return app


def serve(grid: Any, made: Experiment, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All rounds that are left, on the grid of Flower; writes metrics, checkpoints and the summary.

    Args:
      grid: of Flower.
      made: the experiment.
      settings: its settings, with "workdir", "min_clients", "timeout" and "patience".
    """
    from flwr.app import ConfigRecord, MetricRecord

    config, directory = made.config, pathlib.Path(settings["workdir"])
    rounds = config["rounds"]
    every = config["checkpoint_every"] or max(1, rounds // 4)
    by = config["methods"][made.method]["groups"]["by"]
    with training.Checkpoints(directory / CHECKPOINTS, config["keep"]) as checkpoints:
        done, start, opt_state = checkpoints.latest() or 0, made.variables, None
        if done:
            optimizer = made.server_optimizer
            like = jax.eval_shape(lambda v: _state(v, optimizer and optimizer.init(v["params"])), made.variables)
            saved = checkpoints.restore(like)[0]
            start, opt_state = saved["variables"], saved["opt_state"]
        strategy = flower.Fed2Strategy(
            start,
            made.layout,
            by=by,
            server_optimizer=made.server_optimizer,
            fraction_train=config["participation"]["fraction"],
            min_available_nodes=settings["min_clients"],
            patience=settings["patience"],
            rounds_before=done,
            seed=settings["seed"],
        )
        if opt_state is not None and made.server_optimizer is not None:
            strategy.opt_state = opt_state
        with training.MetricsWriter(directory, resume_from=done) as writer:

            def after(number: int, arrays: Any) -> MetricRecord | None:
                if not number:
                    return None
                finished = done + number
                row = {f"train/{name}": value for name, value in strategy.report.items()}
                found = flower.evaluate(made.task, strategy.variables, made.test.arrays, config["eval_batch_size"])
                tested = {name: float(found[name]) for name in ("loss", "accuracy")}
                writer.write(finished, {**row, **{f"eval/{name}": value for name, value in tested.items()}})
                if finished % every == 0 or finished == rounds:
                    checkpoints.save(finished, _state(strategy.variables, strategy.opt_state))
                return MetricRecord(tested)

            strategy.start(
                grid,
                strategy.record(),
                num_rounds=rounds - done,
                timeout=settings["timeout"],
                train_config=ConfigRecord({FINGERPRINT: made.fingerprint}),
                evaluate_fn=after,
            )
    return summarised(directory, made, settings, strategy.variables)


def summarised(directory: pathlib.Path, made: Experiment, settings: Mapping[str, Any], variables: Any) -> dict:
    """Writes summary.json and the figures."""
    config, method = made.config, made.method
    history = [row for row in training.read_metrics(directory) if "eval/accuracy" in row]
    found = flower.evaluate(made.task, variables, made.test.arrays, config["eval_batch_size"])
    by_class = found["correct"] / np.maximum(found["examples"], 1e-12)
    curve = [(row["step"], row["eval/accuracy"]) for row in history]
    told = {name: [int(row[f"train/{name}"]) for row in history] for name in ("counted", "missing", "rejected")}
    summary = {
        "dataset": {"name": made.train.name, "train": len(made.train), "test": len(made.test)},
        "method": method,
        "partition": settings["partition"],
        "seed": settings["seed"],
        "clients": made.clients.number,
        "rounds": len(curve),
        "accuracy": float(found["accuracy"]),
        "loss": float(found["loss"]),
        "curve": curve,
        "by_class": by_class.tolist(),
        **told,
        "params": made.prepared.report.total.params,
    }
    names = made.train.info.class_names or None
    traffic = federated.expected_bytes(made.traffic, federated.Participation(**config["participation"]))
    figures.draw_partition(made.dealt, directory / FIGURES / "partition.png", names)
    runs = {method: [{"accuracy": curve, "bytes_per_round": traffic}]}
    figures.draw_rounds(runs, config["epochs"], directory / FIGURES / "rounds.png")
    figures.draw_classes({method: by_class}, directory / FIGURES / "classes.png", names)
    training.write_summary(directory, summary)
    return summary


def table(summary: Mapping[str, Any]) -> Any:
    """The run as a table."""
    from rich.table import Table

    title = f"{summary['dataset']['name']}, {summary['method']}, {summary['clients']} clients over a network"
    shown = Table(title=title)
    for column in ("rounds", "test accuracy", "updates counted", "missing", "rejected"):
        shown.add_column(column, justify="right")
    counts = (sum(summary[name]) for name in ("counted", "missing", "rejected"))
    shown.add_row(str(summary["rounds"]), f"{100 * summary['accuracy']:.2f} %", *map(str, counts))
    return shown


def _state(variables: Any, opt_state: Any) -> dict[str, Any]:
    return {"variables": variables, "opt_state": () if opt_state is None else opt_state}


if __name__ == "__main__":
    from absl import flags

    define_flags()
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all of this machine's.")
    flags.DEFINE_integer("port", 8000, "Port to listen on.")
    flags.DEFINE_string("ssl_certfile", None, "Certificate of the server.")
    flags.DEFINE_string("ssl_keyfile", None, "Its private key.")
    flags.DEFINE_string("ssl_ca_certfile", None, "Certificate of the authority that signed it.")
    flags.DEFINE_integer("min_clients", None, "Clients for which the first round waits; all where it is left out.")
    flags.DEFINE_float("round_timeout", 600.0, "Seconds that a round waits for answers.")
    flags.DEFINE_float("patience", 3600.0, "Seconds that the server waits for clients to connect.")
    job.main(run, __doc__)
