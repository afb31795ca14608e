import json
import os
import pathlib
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from jaxeff import parallel

HERE = pathlib.Path(__file__).resolve().parent
FIELDS = {"coordinator_address": "127.0.0.1:1234", "num_processes": 2, "process_id": 0}


@pytest.fixture
def calls(monkeypatch):
    """Records what would have been passed to JAX, so that this process stays a single-host one."""
    recorded = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **fields: recorded.append(fields))
    return recorded


@pytest.mark.parametrize(
    "config",
    [None, {}, {"learning_rate": 1.0}, dict.fromkeys(FIELDS), {**dict.fromkeys(FIELDS), "coordinator_address": ""}],
)
def test_nothing_starts_when_no_field_is_set(calls, config):
    assert parallel.initialize_distributed(config) is False
    assert calls == []


@pytest.mark.parametrize("config", [FIELDS, types.SimpleNamespace(**FIELDS, learning_rate=1.0)])
def test_fields_come_from_a_mapping_or_an_object(calls, config):
    assert parallel.initialize_distributed(config, timeout=7) is True
    assert calls == [{**FIELDS, "initialization_timeout": 7}]


def test_keywords_win_over_the_config(calls):
    parallel.initialize_distributed(FIELDS, process_id=1, local_device_ids=[0])
    assert calls[0]["process_id"] == 1 and calls[0]["local_device_ids"] == [0]


@pytest.mark.parametrize("missing", list(FIELDS))
def test_a_missing_field_is_named(calls, missing):
    config = {name: value for name, value in FIELDS.items() if name != missing}
    with pytest.raises(ValueError, match=rf"\['{missing}'\] not set"):
        parallel.initialize_distributed(config)
    assert calls == []


def test_device_ids_alone_do_not_make_a_multi_host_run(calls):
    with pytest.raises(ValueError, match="'coordinator_address', 'num_processes', 'process_id'"):
        parallel.initialize_distributed(local_device_ids=0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("coordinator_address", "localhost", "must be 'host:port', got 'localhost'"),
        ("coordinator_address", ":99", "must be 'host:port'"),
        ("num_processes", 0, "num_processes must be a positive integer, got 0"),
        ("num_processes", "2", "num_processes must be a positive integer, got '2'"),
        ("process_id", 2, r"process_id must be an integer in 0 \.\. 1, got 2"),
        ("process_id", -1, r"process_id must be an integer in 0 \.\. 1, got -1"),
    ],
)
def test_impossible_fields_are_refused_before_anything_waits(calls, field, value, message):
    with pytest.raises(ValueError, match=message):
        parallel.initialize_distributed({**FIELDS, field: value})
    assert calls == []


def test_process_slice_of_a_single_host_is_everything():
    assert parallel.process_slice(10) == slice(0, 10)


@pytest.mark.parametrize(("index", "expected"), [(0, slice(0, 4)), (2, slice(8, 12))])
def test_process_slice_cuts_equal_contiguous_blocks(monkeypatch, index, expected):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    assert parallel.process_slice(12) == expected


def test_process_slice_refuses_rows_that_do_not_divide(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match=r"batch of 10 does not divide by 3 processes: .*for example 9 or 12"):
        parallel.process_slice(10)


def test_global_batch_on_one_device_keeps_values():
    one = parallel.mesh(devices=jax.devices()[:1])
    batch = parallel.global_batch({"x": np.arange(4)}, one)
    np.testing.assert_array_equal(batch["x"], np.arange(4))


def test_a_single_host_agrees_with_itself_without_a_way_through_json():
    said = object()
    assert parallel.gather(said)[0] is said
    assert parallel.on_first(lambda: said) is said
    assert parallel.is_first()
    with pytest.raises(KeyError, match="mine"):
        parallel.on_first(lambda: {}["mine"])


@pytest.mark.multidevice
def test_two_processes_start_from_config_fields_and_train_as_one():
    results = run_two_hosts()
    assert [result["started"] for result in results] == [True, True]
    assert [result["started_again"] for result in results] == [False, False]
    assert [result["rows"] for result in results] == [[0, 8], [8, 16]]
    for process, result in enumerate(results):
        assert (result["processes"], result["devices"]) == (2, 4)
        assert result["global_shape"] == [16, 3]
        assert result["rows_when_copied"] == [0, 16] and result["copied_shape"] == [16, 3]
        assert (
            f"already running as process {process} of 2, asked to be process {process} of 3" in result["other_fields"]
        )
        rows = [[(0, 4), (8, 12)], [(4, 8), (12, 16)]][process]
        assert f"rows {rows}, which are not contiguous" in result["mixed"]
    if not all(result["collectives"] for result in results):
        pytest.skip("started and assembled batches; this CPU backend has no collectives across processes")
    for process, result in enumerate(results):
        assert result["gathered"] == [{"host": 0, "text": ""}, {"host": 1, "text": "x" * 300}]
        assert result["first"] == [process == 0, [0, "done"]]
        assert result["key"] == jax.random.key_data(jax.random.key(0)).tolist()
    assert results[0]["refused"] == ["FileNotFoundError", "no such file here"]
    message = "the first host stopped with FileNotFoundError: no such file here"
    assert results[1]["refused"] == ["RuntimeError", message]
    weights, loss = two_steps_by_hand()
    for result in results:
        for via in ("jit", "shard_map"):
            np.testing.assert_allclose(result[via]["w"], weights, atol=1e-6)
            np.testing.assert_allclose(result[via]["loss"], loss, rtol=1e-6)


def two_steps_by_hand():
    x, w = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32).astype(np.float64), np.ones(3)
    for _ in range(2):
        loss = np.mean((x @ w) ** 2)
        w = w - 0.1 * 2 * x.T @ (x @ w) / len(x)
    return w, loss


def run_two_hosts():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent.parent)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "two_hosts.py"), address, "2", str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, f"{out[-2000:]}\n{err[-6000:]}"
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in outputs]
