"""The training job on two hosts, which are two processes with four forced devices each, started as a user starts it."""

import json
import os
import pathlib
import runpy
import signal
import socket
import time

import jax
import numpy as np
import pytest

from jaxeff import data, dynamic, training
from jaxeff.dynamic import convolution
from jaxeff.ops import autotune
from launch import pruning, train

CONFIG = pathlib.Path(__file__).with_name("mesh_config.py")
STEPS = 50
RUNS = [pathlib.Path("convolution", f"seed{seed}") for seed in (0, 1)]


@pytest.fixture(scope="module")
def start(start_job):
    """Starts both processes of a job in a work directory; ends what is left of them after the tests."""
    started = []

    def processes(workdir, config=CONFIG, environments=({}, {})):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = {"steps": STEPS, "seeds": (0, 1)}
        flags |= {"distributed.coordinator_address": address, "distributed.num_processes": 2}
        four = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()
        devices = {"XLA_FLAGS": four, "JAX_PLATFORMS": "cpu"}
        pair = []
        for index, own in enumerate(environments):
            changes = {**flags, "distributed.process_id": index}
            changes = [f"--config.{name}={value}" for name, value in changes.items()]
            pair.append(start_job("train", config, workdir, *changes, env={**os.environ, **devices, **own}))
        started.extend(pair)
        return pair

    yield processes
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def ends(processes):
    """Exit status, standard output and standard error of each."""
    results = [process.communicate(timeout=240) for process in processes]
    if any("implemented" in errors for _, errors in results):
        pytest.skip("this CPU backend has no collectives across processes")
    return [(process.returncode, *result) for process, result in zip(processes, results, strict=True)]


def wait_for(path, processes):
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    for status, _, errors in ends(start(workdir)):
        assert status == 0, errors
    return workdir


@pytest.mark.slow
@pytest.mark.multidevice
def test_the_job_on_two_hosts_finds_what_it_finds_on_one_device(whole, tmp_path, final_params):
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.steps, config.seeds = STEPS, (0, 1)
    alone = train.run(config.lock(), str(tmp_path))
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["networks"][0]["accuracy"] == pytest.approx(alone["networks"][0]["accuracy"], abs=0.05)
    assert (whole / "figures" / "comparison.png").exists()
    assert json.loads((whole / "config.json").read_text())["device"].startswith("8 x ")
    for run in RUNS:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            final_params(whole / run),
            final_params(tmp_path / run),
        )
        found, expected = training.read_metrics(whole / run), training.read_metrics(tmp_path / run)
        assert [row["step"] for row in found] == [row["step"] for row in expected]


@pytest.mark.slow
@pytest.mark.multidevice
def test_a_signal_to_one_host_makes_both_save_and_stop_and_they_go_on_to_the_same_end(
    whole, start, tmp_path, final_params
):
    processes = start(tmp_path)
    wait_for(tmp_path / RUNS[0] / "metrics.jsonl", processes)
    processes[1].send_signal(signal.SIGTERM)
    results = ends(processes)
    saved = training.Checkpoints(tmp_path / RUNS[0] / "checkpoints").latest()
    assert saved is not None and saved < STEPS
    for status, _, errors in results:
        assert status == 128 + signal.SIGTERM, errors
        assert f"SIGTERM: saved after step {saved} of {STEPS}; run the same command again, without overwrite" in errors
    for status, _, errors in ends(start(tmp_path)):
        assert status == 0, errors
    for run in RUNS:
        jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / run), final_params(whole / run))


@pytest.mark.slow
@pytest.mark.multidevice
def test_hosts_whose_tables_of_engines_differ_run_one_program(start, tmp_path, monkeypatch):
    config, folders = CONFIG.with_name("gated_config.py"), [tmp_path / "first", tmp_path / "second"]
    wanted = runpy.run_path(str(config))["get_config"]()
    dataset = data.load(wanted.dataset, wanted.train_split)
    module = pruning.network(wanted.networks.convolution.to_dict(), dataset)
    (call,) = dynamic.gated_calls(module, jax.ShapeDtypeStruct((wanted.batch_size, 8, 8, 1), np.float32))
    name = convolution.signature(call.settings, call.x, call.kernel, call.window)
    monkeypatch.setenv("JAXEFF_CACHE_DIR", str(folders[0]))
    autotune.remember({name: "channels"})
    environments = [{"JAXEFF_CACHE_DIR": str(folder)} for folder in folders]
    for status, _, errors in ends(start(tmp_path / "run", config, environments)):
        assert status == 0, errors
    rows = training.read_metrics(tmp_path / "run" / RUNS[0])
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) > 2 and np.isfinite(losses).all()
