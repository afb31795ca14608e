"""The training job on eight devices; `test_multidevice.py` runs this in a process that has them."""

import os
import pathlib
import runpy
import signal

import jax
import numpy as np
import pytest

from jaxeff import data, training
from launch import train

tiny = runpy.run_path(str(pathlib.Path(__file__).with_name("mesh_config.py")))["get_config"]
RUN = pathlib.Path("convolution", "seed0")


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("eight")
    return workdir, train.run(tiny().lock(), str(workdir))


def test_the_job_on_eight_devices_finds_what_it_finds_on_one(on_eight, tmp_path, monkeypatch, final_params):
    workdir, summary = on_eight
    assert jax.device_count() == 8
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    alone = train.run(tiny().lock(), str(tmp_path))
    found, expected = ({**row["networks"][0], "latency_ms": 0, "train_seconds": 0} for row in (summary, alone))
    assert found == expected
    one, other = final_params(workdir / RUN), final_params(tmp_path / RUN)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)
    rows = zip(training.read_metrics(workdir / RUN), training.read_metrics(tmp_path / RUN), strict=True)
    for found, expected in rows:
        for key in ("step", "train/loss", "train/grad_norm", "eval/loss"):
            assert found.get(key, 0) == pytest.approx(expected.get(key, 0), rel=1e-4)


def test_a_job_on_eight_devices_that_is_stopped_and_started_again_ends_in_the_same_parameters(
    on_eight, tmp_path, monkeypatch, final_params
):
    prefetch = data.prefetch

    def stopped(batches, **options):
        for number, batch in enumerate(prefetch(batches, **options), 1):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch, pytest.raises(training.Interrupted, match="saved after step 3 of 8"):
        patch.setattr(data, "prefetch", stopped)
        train.run(tiny().lock(), str(tmp_path))
    train.run(tiny().lock(), str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / RUN), final_params(on_eight[0] / RUN))


def test_a_batch_that_does_not_divide_by_the_devices_is_refused_before_anything_is_written(tmp_path):
    config = tiny()
    config.batch_size = 20
    with pytest.raises(ValueError, match="batch_size=20 does not divide by the 8 devices; take a multiple of 8"):
        train.run(config.lock(), str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
