import io
import sys

import pytest

from jaxeff.training import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, **options):
    with Progress(100, stream=stream, **options) as bar:
        bar.tick(1)
        bar.report(10, {"loss": 1.25})
        bar.tick(15)
        bar.report(20, {"loss": 0.5}, rate=1234.0, unit="examples/s")
        bar.note("a word")
    return stream.getvalue()


def test_away_from_a_terminal_there_is_one_line_per_report():
    first, second, note = run(io.StringIO()).splitlines()
    assert first == "step 10/100  loss 1.25"
    assert second.startswith("step 20/100  loss 0.5  1,234 examples/s  0:")
    assert second.endswith(" left")
    assert note == "a word"


def test_disabled_it_is_silent_but_for_notes():
    assert run(io.StringIO(), enabled=False) == "a word\n"
    assert run(Terminal(), enabled=False) == "a word\n"


def test_on_a_terminal_it_draws_a_bar_with_loss_rate_and_time_left():
    pytest.importorskip("rich")
    shown = run(Terminal())
    for part in ("15/100", "loss 0.5", "1,234 examples/s", "left", "a word"):
        assert part in shown


def test_on_a_terminal_without_rich_it_writes_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert "step 20/100  loss 0.5" in run(Terminal())


def test_the_time_left_follows_the_pace(monkeypatch):
    now = iter([100.0, 160.0])
    monkeypatch.setattr("jaxeff.training.progress.time.perf_counter", lambda: next(now))
    stream = io.StringIO()
    with Progress(150, stream=stream) as bar:
        bar.report(10, {})
        bar.report(20, {})  # ten steps in a minute, 130 to go
    assert stream.getvalue().splitlines()[1] == "step 20/150  13:00 left"
