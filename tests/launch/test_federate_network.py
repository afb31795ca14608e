"""A federation of real processes on this machine: a server, its clients, and what happens when they are killed."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

from jaxeff import training
from jaxeff.training.workdir import plain_config

pytest.importorskip("flwr", reason='needs flwr: pip install "jaxeff[flower]"')

from configs.federated import digits
from launch import federate, federate_client, federate_server

CONFIG = "configs/federated/digits.py:smoke"
SIZES = ["--config.train_split=train[:160]", "--config.test_split=test[:40]", "--config.clients=2"]
SHARED = [
    *SIZES,
    "--config.partitions.two_classes.options.classes_per_client=5",
    "--config.rounds=3",
    "--config.checkpoint_every=1",
    "--config.methods.fed2.groups.mode=subset",
    "--method=fed2",
]
SECONDS = 280


class Machines:
    """Jobs in process groups of their own, all of which are gone in the end."""

    def __init__(self, start_job, folder: pathlib.Path):
        self.start_job, self.folder = start_job, folder
        self.jobs: list[subprocess.Popen] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def server(self, *flags):
        flags = (f"--port={self.port}", "--round_timeout=25", "--patience=200", *flags)
        return self._start("federate_server", "server", *SHARED, *flags)

    def client(self, number, *flags):
        flags = (f"--superlink=127.0.0.1:{self.port}", f"--partition_id={number}", "--max_wait=100", *flags)
        return self._start("federate_client", f"client{number}", *SHARED, *flags)

    def _start(self, job, name, *flags):
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"{name}.out").open("a") as out:
            pipes = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
            process = self.start_job(job, CONFIG, self.folder / name, *flags, **pipes)
        self.jobs.append(process)
        return process

    def finished(self) -> int:
        """Rounds that the server has finished."""
        path = self.folder / "server" / "metrics.jsonl"
        return len(training.read_metrics(path)) if path.is_file() else 0

    def wait(self, ready):
        end = time.monotonic() + SECONDS
        while not ready():
            assert time.monotonic() < end, self.said()
            time.sleep(0.2)

    def said(self) -> str:
        logs = sorted([*self.folder.glob("*.out"), *self.folder.glob("*/flower/*.log")])
        return "\n".join(f"==== {path}\n{path.read_text()[-2000:]}" for path in logs)

    def left(self) -> list[str]:
        """Processes that were started here, by the work directory in their environment."""
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if str(self.folder).encode() in path.read_bytes():
                    found.append(path.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def end(self):
        for process in self.jobs:
            process.send_signal(signal.SIGTERM)
        for process in self.jobs:
            process.wait(60)
        self.wait(lambda: not self.left())


@pytest.fixture
def machines(start_job, tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    started = Machines(start_job, tmp_path / "machines")
    try:
        yield started
    finally:
        for process in started.jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_the_rounds_go_on_when_a_client_is_killed(machines, tmp_path):
    server = machines.server("--insecure")
    _, lost = (machines.client(number, "--insecure") for number in (0, 1))
    machines.wait(lambda: machines.finished() >= 1 or server.poll() is not None)
    os.killpg(lost.pid, signal.SIGKILL)
    machines.wait(lambda: server.poll() is not None)
    assert server.returncode == 0, machines.said()
    folder = machines.folder / "server"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == 3 and np.isfinite(summary["accuracy"]), machines.said()
    assert summary["counted"][0] == 2 and summary["missing"][0] == 0 and not any(summary["rejected"])
    assert 1 in summary["missing"] and summary["counted"][-1] == 1
    assert [row["step"] for row in training.read_metrics(folder)] == [1, 2, 3]
    for figure in ("partition", "rounds", "classes"):
        assert (folder / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    machines.end()
    # Started again it knows that it has finished.
    again = machines.server("--insecure")
    assert again.wait(SECONDS) == 0 and machines.finished() == 3
    assert not (tmp_path / "home").exists()


def certificates(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A key and a certificate that signs itself, for 127.0.0.1."""
    key, certificate = folder / "server.key", folder / "server.crt"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return key, certificate


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_rounds_with_tls_and_a_restart_of_the_server_are_those_of_the_simulator_bit_for_bit(machines, tmp_path):
    key, certificate = certificates(tmp_path)
    flags = (f"--ssl_certfile={certificate}", f"--ssl_keyfile={key}", f"--ssl_ca_certfile={certificate}")
    server = machines.server(*flags)
    for number in (0, 1):
        machines.client(number, f"--root_certificates={certificate}")
    machines.wait(lambda: machines.finished() >= 1 or server.poll() is not None)
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 128 + signal.SIGTERM, machines.said()
    assert machines.finished() < 3
    assert machines.server(*flags).wait(SECONDS) == 0, machines.said()
    folder = machines.folder / "server"
    assert json.loads((folder / "summary.json").read_text())["counted"] == [2, 2, 2], machines.said()
    machines.end()

    settings = json.loads((folder / "flower" / "settings.json").read_text())
    made = federate_client.experiment(settings)
    key = ("two_classes", "fed2", 0)
    classes = federate.classifier.standardisation(made.train)
    parts = {("two_classes", 0): made.dealt}
    federation, *_ = federate.federation_of(made.config, key, {"fed2": made.prepared}, parts, classes, made.train)
    state = federation.init(made.key, made.variables, made.clients)
    for _ in range(3):
        state, _ = federation.round(state, made.clients)
    with training.Checkpoints(folder / "checkpoints") as checkpoints:
        like = jax.eval_shape(lambda: {"variables": made.variables, "opt_state": ()})
        saved = checkpoints.restore(like, 3)[0]["variables"]
    jax.tree.map(np.testing.assert_array_equal, saved, dict(state.server))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods.fed2.algorithm": "scaffold"}, "it must be one of fed_avg, fed_prox, fed_opt, got 'scaffold'"),
        ({"participation.dropout": 0.5}, "late or lost by themselves; only fraction is used"),
        ({"methods.fed2.privacy.kind": "central"}, "privacy: kind is for launch.federate alone"),
        ({"clients": 2}, "would be owned by nobody"),
    ],
)
def test_experiments_that_a_network_cannot_run(change, message):
    config = digits.get_config("smoke")
    config.update_from_flattened_dict(change)
    settings = {"config": plain_config(config), "method": "fed2", "partition": "two_classes", "seed": 0}
    with pytest.raises(ValueError, match=message):
        federate_client.experiment(settings)


def test_certificates_are_looked_for_before_anything_starts(tmp_path):
    names = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certfile")
    with pytest.raises(ValueError, match="TLS needs --ssl_keyfile, --ssl_ca_certfile"):
        federate_server.transport(False, {**dict.fromkeys(names), "ssl_certfile": "a"})
    with pytest.raises(ValueError, match="--insecure is without TLS"):
        federate_server.transport(True, dict.fromkeys(names, "a"))
    with pytest.raises(FileNotFoundError, match="--ssl_certfile: .*a is not a file"):
        federate_server.transport(False, dict.fromkeys(names, str(tmp_path / "a")))
    assert federate_server.transport(True, dict.fromkeys(names)) == (["--insecure"], ["insecure = true"])
