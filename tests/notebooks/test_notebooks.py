"""Every notebook runs to its asserts, and says what its paired .py says."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))


def names(paths):
    return [path.stem for path in paths]


def test_every_notebook_has_its_source():
    assert names(SOURCES) == names(sorted((ROOT / "notebooks").glob("*.ipynb"))) != []


@pytest.mark.parametrize("source", SOURCES, ids=names(SOURCES))
def test_the_notebook_holds_the_cells_of_its_source(source):
    jupytext = pytest.importorskip("jupytext")
    here = [cell.source for cell in jupytext.read(source).cells]
    there = [cell.source for cell in jupytext.read(source.with_suffix(".ipynb")).cells]
    assert there == here, "run `make notebooks`"


@pytest.mark.notebooks
@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=names(SOURCES))
def test_the_notebook_runs(source, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("JAXEFF_NB_FAST", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # so that figures land in the notebook
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def test_the_public_address_stands_in_one_place():
    """`launch.address` makes every badge and install line from pyproject.toml, and finds nothing left to change."""
    result = subprocess.run(
        [sys.executable, "-m", "launch.address", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
