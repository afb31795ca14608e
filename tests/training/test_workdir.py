import json
import shutil
import subprocess

import jax
import numpy as np
import pytest

from jaxeff import parallel
from jaxeff.training import ForeignWorkdir, prepare_workdir
from jaxeff.training.workdir import config_differences, plain_config

CONFIG = {"seed": 0, "optimizer": {"name": "sgd", "rate": 0.1}, "widths": (8, 16)}


def test_the_config_file_says_what_ran_where(tmp_path):
    path, plain = prepare_workdir(tmp_path / "new" / "run", CONFIG)
    written = json.loads((path / "config.json").read_text())
    assert written["config"] == plain == {**CONFIG, "widths": [8, 16]}
    assert written["jax"] == jax.__version__
    assert "cpu" in written["device"]
    assert "git_revision" in written


def test_the_git_revision_is_that_of_the_current_repository(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.chdir(tmp_path)
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    path, _ = prepare_workdir(tmp_path / "run")
    assert json.loads((path / "config.json").read_text())["git_revision"] == head


def test_the_same_config_may_come_back_and_leaves_the_file_alone(tmp_path):
    prepare_workdir(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_text()
    prepare_workdir(tmp_path, json.loads(json.dumps(CONFIG)))
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"seed": False}, "seed: 0 there, False here"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.rate: 0.1 there, not set here"),
        ({"extra": None}, "extra: not set there, None here"),
        ({"widths": (8, 32)}, r"widths: \[8, 16\] there, \[8, 32\] here"),
    ],
)
def test_another_config_is_refused_and_the_fields_listed(tmp_path, change, message):
    prepare_workdir(tmp_path, CONFIG)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ForeignWorkdir, match=message):
        prepare_workdir(tmp_path, {**CONFIG, **change})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_overwriting_clears_what_runs_write_and_nothing_else(tmp_path):
    prepare_workdir(tmp_path, CONFIG)
    for name in (
        "metrics.jsonl",
        "summary.json",
        "checkpoints/10/data",
        "tensorboard/events",
        "notes.md",
        "data/x.npz",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    prepare_workdir(tmp_path, {"seed": 5}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "data", "notes.md"]


def job_of(path, *runs):
    """A job's work directory in which every run has results of an earlier time, and somebody a file of their own."""
    prepare_workdir(path, CONFIG, runs=runs)
    for run in runs:
        prepare_workdir(path / run, {**CONFIG, "run": run})
        (path / run / "checkpoints" / "8").mkdir(parents=True)
        (path / run / "metrics.jsonl").write_text("{}")
    (path / "figures").mkdir()
    (path / "figures" / "curves.png").write_text("old")
    (path / "notes.md").write_text("mine")


def test_overwriting_a_job_clears_its_runs_and_those_of_the_job_that_was_here(tmp_path):
    job_of(tmp_path, "a/seed0", "a/seed1", "b/seed0")
    (tmp_path / "a" / "seed1" / "notes.md").write_text("mine")
    prepare_workdir(tmp_path / "c", {"another": "job"})
    prepare_workdir(tmp_path, {"seed": 5}, overwrite=True, runs=["a/seed0", "d/seed0"])
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["a/seed1/notes.md", "c/config.json", "config.json", "notes.md"]
    assert not (tmp_path / "b").exists()


def test_an_overwrite_that_was_cut_short_is_completed_by_the_next_start(tmp_path, monkeypatch):
    job_of(tmp_path, "a/seed0", "b/seed0")

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        prepare_workdir(tmp_path, CONFIG, overwrite=True, runs=["a/seed0", "c/seed0"])
    assert (tmp_path / "b" / "seed0" / "config.json").exists()
    prepare_workdir(tmp_path, CONFIG, runs=["a/seed0", "c/seed0"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.md"]
    prepare_workdir(tmp_path / "a" / "seed0", CONFIG)
    prepare_workdir(tmp_path, CONFIG, runs=["a/seed0", "c/seed0"])
    assert (tmp_path / "a" / "seed0" / "config.json").exists()


@pytest.mark.parametrize("run", ["../other", "a/../../b", "/tmp/run", ""])
def test_runs_outside_the_work_directory_are_refused(tmp_path, run):
    with pytest.raises(ValueError, match="is not a folder below the workdir"):
        prepare_workdir(tmp_path / "job", CONFIG, overwrite=True, runs=[run])
    assert list(tmp_path.iterdir()) == []


def test_a_config_file_that_names_folders_elsewhere_clears_nothing_there(tmp_path):
    prepare_workdir(tmp_path / "other", CONFIG)
    path, _ = prepare_workdir(tmp_path / "job", CONFIG)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, "runs": ["../other", str(tmp_path / "other")]}))
    prepare_workdir(path, CONFIG, overwrite=True)
    assert (tmp_path / "other" / "config.json").exists()


def test_a_run_without_its_config_file_is_not_taken_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ForeignWorkdir, match="holds a run whose config.json is missing"):
        prepare_workdir(tmp_path, CONFIG)


def test_a_config_file_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ForeignWorkdir, match="is not a config written by a run"):
        prepare_workdir(tmp_path, CONFIG)


def test_hosts_that_do_not_share_the_directory_are_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "gather", lambda said: [said, False if said is True else said])
    with pytest.raises(FileNotFoundError, match=r"written by process 0 but process 1 does not see it.*share"):
        prepare_workdir(tmp_path, CONFIG)


def test_hosts_with_different_configs_are_told_so_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "gather", lambda said: [said, {**said, "seed": 1}])
    with pytest.raises(ValueError, match="process 0 and process 1 were started with different ones: seed: 0 there, 1 "):
        prepare_workdir(tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ForeignWorkdir, match="is a file, expected a directory"):
        prepare_workdir(tmp_path / "run", CONFIG, overwrite=True)
    assert (tmp_path / "run").read_text() == "mine"


def test_configs_of_any_kind_become_plain_values():
    ml_collections = pytest.importorskip("ml_collections")
    expected = {"rate": 0.5, "sizes": [1, 2], "dtype": "float32", "inner": {"1": True}}
    values = {"rate": np.float64(0.5), "sizes": (1, np.int64(2)), "dtype": np.dtype("float32"), "inner": {1: True}}
    assert plain_config(values) == expected
    frozen = ml_collections.FrozenConfigDict({"rate": 0.5, "inner": {"a": (1, 2)}})
    assert plain_config(frozen) == {"rate": 0.5, "inner": {"a": [1, 2]}}
    assert plain_config(None) == {}


def test_not_a_number_does_not_differ_from_itself():
    assert config_differences({"x": float("nan")}, {"x": float("nan")}) == []
