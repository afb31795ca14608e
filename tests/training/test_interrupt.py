import signal
import time

import jax
import numpy as np
import pytest

from jaxeff import parallel
from jaxeff.training import Checkpoints
from jaxeff.training.interrupt import StopRequest


@pytest.fixture(scope="module")
def stopped(start_process, tmp_path_factory):
    """Three processes that were stopped at once, by signal: (exit status, standard error, work directory)."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
    workdirs = {signum: tmp_path_factory.mktemp(signum.name) for signum in signals}
    processes = {
        signum: start_process(workdirs[signum], *(("--kill-at", 13) if signum == signal.SIGKILL else ("--wait-at", 8)))
        for signum in signals
    }
    for signum in (signal.SIGTERM, signal.SIGINT):
        assert processes[signum].stdout.readline() == "step 8\n"
        processes[signum].send_signal(signum)
        processes[signum].stdin.write("\n")
    results = {signum: (process.communicate(timeout=120)[1], process) for signum, process in processes.items()}
    return {signum: (process.returncode, errors, workdirs[signum]) for signum, (errors, process) in results.items()}


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_process_stopped_by_a_signal_ends_its_step_and_saves(stopped, signum):
    status, errors, workdir = stopped[signum]
    assert status == 128 + signum
    assert f"{signum.name}: saved after step 8 of 16; run the same command again, without overwrite, to go on" in errors
    assert Checkpoints(workdir / "checkpoints").latest() == 8


@pytest.mark.slow
def test_a_process_killed_without_warning_leaves_complete_checkpoints(stopped):
    status, _, workdir = stopped[signal.SIGKILL]
    assert status == -signal.SIGKILL
    # The save of step 12 was in progress; whether it was finished is a matter of luck.
    assert Checkpoints(workdir / "checkpoints").latest() in (6, 12)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_started_again_ends_as_if_nothing_had_happened(
    tiny, uninterrupted, stopped, start_process, signum
):
    _, _, workdir = stopped[signum]
    if signum == signal.SIGTERM:
        again = start_process(workdir)
        _, errors = again.communicate(timeout=120)
        assert again.returncode == 0, errors
        with np.load(workdir / "final.npz") as saved:
            found = [saved[name] for name in saved.files]
    else:  # this process will do for the others
        found = tiny.leaves(tiny.fit(workdir).state)
    for leaf, expected in zip(found, tiny.leaves(uninterrupted.state), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert "16" in names
    assert not any("tmp" in name for name in names)


def test_the_first_signal_asks_and_the_second_acts_at_once():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: received.append(signum))
    try:
        with StopRequest((signal.SIGUSR1,)) as stop:
            signal.raise_signal(signal.SIGUSR1)
            assert (stop.signal, received) == (signal.SIGUSR1, [])
            signal.raise_signal(signal.SIGUSR1)
            deadline = time.monotonic() + 5
            while not received and time.monotonic() < deadline:
                time.sleep(0.01)
            assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_hosts_ask_each_other_as_often_as_the_first_one_says(monkeypatch):
    asked, answers = [], []

    def gather(value):
        asked.append(len(answers))
        return [[None, 3], [signal.SIGTERM if len(asked) == 3 else None, 99]]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(parallel, "gather", gather)
    with StopRequest((signal.SIGUSR1,)) as stop:
        for _ in range(8):
            answers.append(stop.agreed())
        assert asked == [0, 3, 6]
        assert answers == [None] * 6 + [signal.SIGTERM] * 2
        assert stop.agreed(now=True) == signal.SIGTERM
        assert asked == [0, 3, 6, 8]


def test_a_request_that_nobody_honoured_is_handed_on():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: received.append(signum))
    try:
        with pytest.raises(ValueError), StopRequest((signal.SIGUSR1,)):
            signal.raise_signal(signal.SIGUSR1)
            raise ValueError
        assert received == []
        with StopRequest((signal.SIGUSR1,)):
            signal.raise_signal(signal.SIGUSR1)
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_second_ctrl_c_is_a_keyboard_interrupt(request):
    # A background shell starts its programs with SIGINT ignored, and then there is no default to fall back to.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), StopRequest():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        time.sleep(5)
