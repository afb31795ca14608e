r"""One client of a federation between machines: a Flower SuperNode that trains on its own part of the data.

    python -m launch.federate_client --config=configs/federated/digits.py --workdir=runs/client0 \
        --method=fed2 --superlink=server.example.org:8000 --partition_id=0 --root_certificates=ca.crt

It takes the same config, --method, --partition, --seed and --config.field=value as `launch.federate_server`, where the
commands of a whole federation are. It waits for work, trains whenever it is asked, and ends when the server has gone
for --max_wait seconds, or with Ctrl-C. Its examples stay where they are; updates and the number of its examples of each
class leave it. What a SuperNode runs is sent by the server: connect it to servers that you trust.

Writes flower/ to the work directory: settings, Flower's own files, and the log supernode.log.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxeff import data, federated
from jaxeff.federated import fed2, flower
from jaxeff.federated.records import need_flwr
from jaxeff.training.workdir import plain_config, write_json
from launch import classifier, federate, job

ROOT = pathlib.Path(__file__).parents[1]
FOLDER, SETTINGS, LOG = "flower", "JAXEFF_FEDERATION", "supernode.log"
"""Where Flower's files are in a work directory; the variable that names the settings to its apps; the client's log."""
ALGORITHMS = ("fed_avg", "fed_prox", "fed_opt")


class Experiment(NamedTuple):
    """A method under a partition and seed, as servers and clients see it."""

    config: Mapping[str, Any]
    method: str
    train: data.Dataset
    test: data.Dataset
    dealt: federated.Partition
    prepared: federate.Prepared
    task: federated.Task
    algorithm: federated.Algorithm
    server_optimizer: optax.GradientTransformation | None
    clients: federated.Clients
    variables: Any
    key: jax.Array
    layout: flower.Layout
    traffic: federated.Traffic
    fingerprint: str


def define_flags() -> None:
    """Flags of server and clients; those of what is run must be the same on all of them."""
    from absl import flags

    flags.DEFINE_string("method", None, "Method of the config; may be left out where it has one.")
    flags.DEFINE_string("partition", None, "Partition of the config; may be left out where it has one.")
    flags.DEFINE_integer("seed", None, "Seed; the first one of the config where it is left out.")
    flags.DEFINE_bool("insecure", False, "Without TLS: for tests on one machine.")


def settings_of(config: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What defines an experiment, from a config and the flags, as JSON can hold it.

    Raises:
      ValueError: for methods and partitions that the config does not have.
    """
    from absl import flags

    chosen = {"config": plain_config(config), "seed": flags.FLAGS.seed, **more}
    for name in ("method", "partition"):
        found, given = list(config[f"{name}s"]), flags.FLAGS[name].value
        if given is None and len(found) != 1:
            raise ValueError(f"--{name}: choose one of {', '.join(found)}")
        if given is not None and given not in found:
            raise ValueError(f"--{name} must be one of {', '.join(found)}, got {given!r}")
        chosen[name] = given or found[0]
    if chosen["seed"] is None:
        chosen["seed"] = config["seeds"][0]
    return chosen


def experiment(settings: Mapping[str, Any]) -> Experiment:
    """Makes what the settings describe.

    Raises:
      ValueError: for algorithms whose clients remember something, absences that are simulated, updates that are not
        sent as they are, and all that `launch.federate` refuses.
    """
    config, method, seed = _tuples(settings["config"]), settings["method"], settings["seed"]
    section = config["methods"][method]
    if section["algorithm"] not in ALGORITHMS:
        raise ValueError(
            f"algorithm: clients of a network remember nothing, it must be one of {', '.join(ALGORITHMS)}, got "
            f"{section['algorithm']!r}"
        )
    for part, field in (("robust", "rule"), ("compression", "bits"), ("compression", "share"), ("privacy", "kind")):
        if section.get(part, {}).get(field):
            raise ValueError(f"{part}: {field} is for launch.federate alone, updates of a network are sent as they are")
    how = federated.Participation(**config["participation"])
    if how.available != 1 or how.dropout or how.stragglers:
        raise ValueError("participation: clients of a network are late or lost by themselves; only fraction is used")
    train = data.load(config["dataset"], config["train_split"])
    test = data.load(config["dataset"], config["test_split"])
    classifier.check_task(train)
    key = (settings["partition"], method, seed)
    prepared = {method: federate.prepare(section, train)}
    dealt = federate.part(config["partitions"][settings["partition"]], train, config["clients"], seed)
    preprocess = classifier.standardisation(train)
    _, task, clients, init, traffic = federate.federation_of(
        config, key, prepared, {(settings["partition"], seed): dealt}, preprocess, train
    )
    server_optimizer, local = None, section
    if section["algorithm"] == "fed_opt":
        options = section["options"]
        kind, rate = options.get("kind", "adam"), options.get("server_learning_rate", 0.01)
        server_optimizer, local = federated.adaptive(kind, rate), {**section, "algorithm": "fed_avg", "options": {}}
    # Drawn as the simulator does, so that both begin with the same numbers.
    own, rest = jax.random.split(jax.random.key(seed))
    variables = jax.tree.map(np.asarray, dict(init(own)))
    grouped, groups = prepared[method].grouped, dict[str, Any]()
    if grouped is not None:
        groups = {"group_axes": fed2.group_axes(variables), "class_to_group": grouped.class_to_group}
        groups["mode"] = section["groups"]["mode"]
    said = {name: settings[name] for name in ("config", "method", "partition", "seed")}
    return Experiment(
        config,
        method,
        train,
        test,
        dealt,
        prepared[method],
        task,
        federate.algorithm_of(config, local, task),
        server_optimizer,
        clients,
        variables,
        rest,
        flower.Layout(variables, train.info.num_classes, **groups),
        traffic,
        hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16],
    )


def client_of(made: Experiment, number: int) -> flower.Client:
    """One of the clients of an experiment, with its examples alone.

    Raises:
      ValueError: for a number out of range.
    """
    if not 0 <= number < made.clients.number:
        raise ValueError(f"--partition_id must be in 0..{made.clients.number - 1}, got {number}")
    rows = np.asarray(made.clients.rows[number][: int(made.clients.sizes[number])])
    return flower.Client(
        made.task,
        made.algorithm,
        made.layout,
        {name: np.asarray(array)[rows] for name, array in made.clients.arrays.items()},
        number,
        made.clients.number,
        made.config["batch_size"],
        made.config["epochs"],
        made.key,
        made.fingerprint,
    )


def client_app() -> Any:
    """The ClientApp that a SuperNode loads."""
    made = experiment(json.loads(pathlib.Path(os.environ[SETTINGS]).read_text()))
    return flower.client_app(lambda context: client_of(made, int(context.node_config[flower.PARTITION])))


def flower_folder(workdir: str | os.PathLike[str], settings: Mapping[str, Any]) -> tuple[pathlib.Path, dict[str, str]]:
    """The folder of Flower's files with the settings in it, and the environment of Flower's processes.

    They tell nobody of their use and look for no newer version, unless the user's own environment says so.
    """
    folder = pathlib.Path(workdir).absolute() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", settings)
    before = lambda first, name: os.pathsep.join([str(first), *filter(None, [os.environ.get(name)])])
    return folder, {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **os.environ,
        "FLWR_HOME": str(folder),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": before(pathlib.Path(sys.executable).parent, "PATH"),
        "PYTHONPATH": before(ROOT, "PYTHONPATH"),
        SETTINGS: str(folder / "settings.json"),
    }


@contextlib.contextmanager
def running(command: list[str], environment: Mapping[str, str], log: pathlib.Path) -> Iterator[subprocess.Popen]:
    """A process while the block runs; ended with it, also when this process is told to end."""
    found = shutil.which(command[0], path=environment["PATH"])
    if found is None:
        raise FileNotFoundError(f'{command[0]} is not on the PATH: pip install "jaxeff[flower]"')

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    with log.open("a") as out:
        process = subprocess.Popen([found, *command[1:]], env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            signal.signal(signal.SIGTERM, before)


def listens(address: str) -> bool:
    """Whether somebody listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), 2):
            return True
    except OSError:
        return False


def run(config: Mapping[str, Any], workdir: str, *, overwrite: bool = False) -> None:
    """Runs a SuperNode until the server has gone."""
    from absl import flags

    need_flwr()
    given = flags.FLAGS
    settings = settings_of(config)
    client = client_of(experiment(settings), given.partition_id)
    if given.max_wait <= 0 or not given.superlink.rpartition(":")[2].isdecimal():
        raise ValueError(
            f"--superlink must be host:port and --max_wait positive, got {given.superlink!r} and {given.max_wait}"
        )
    security = ["--insecure"]
    if not given.insecure:
        security = []
        if given.root_certificates is not None:
            if not pathlib.Path(given.root_certificates).is_file():
                raise FileNotFoundError(f"--root_certificates: {given.root_certificates} is not a file")
            security = ["--root-certificates", str(pathlib.Path(given.root_certificates).absolute())]
    folder, environment = flower_folder(workdir, settings)
    said = ["flower-supernode", "--superlink", given.superlink, *security, "--host", "127.0.0.1"]
    said += ["--node-config", f"{flower.PARTITION}={client.number} num-partitions={client.clients}"]
    print(f"client {client.number} of {client.clients}, {len(client.arrays['label'])} examples; log: {folder / LOG}")
    seen = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        while time.monotonic() - seen < given.max_wait:
            seen = _connected([*said, "--port", str(_free_port())], environment, folder / LOG, seen)
        print(f"{given.superlink} has gone")


def _connected(command: list[str], environment: Mapping[str, str], log: pathlib.Path, seen: float) -> float:
    """A SuperNode until it ends or the server has gone; returns when the server was last seen."""
    from absl import flags

    given = flags.FLAGS
    # Left to itself a SuperNode tries for ever where a server has gone, and ends where one was started anew.
    with running(command, environment, log) as process:
        while process.poll() is None and time.monotonic() - seen < given.max_wait:
            time.sleep(min(2.0, given.max_wait / 4))
            if listens(given.superlink):
                seen = time.monotonic()
        if process.returncode:
            raise RuntimeError(f"the SuperNode has ended with status {process.returncode}: see {log}")
    return seen


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _tuples(value: Any) -> Any:
    """JSON as configs are: sequences are tuples there."""
    if isinstance(value, dict):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    from absl import flags

    define_flags()
    flags.DEFINE_string("superlink", "127.0.0.1:8000", "Address of the server, host:port.")
    flags.DEFINE_integer("partition_id", None, "Which client this is, 0 .. clients - 1.", required=True)
    flags.DEFINE_string("root_certificates", None, "CA certificate of the server; None for those of the system.")
    flags.DEFINE_float("max_wait", 120.0, "Seconds without the server after which the client ends.")
    job.main(run, __doc__)
