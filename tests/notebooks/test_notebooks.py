"""Every notebook runs to its asserts, and says what its paired .py says."""

import pathlib
import re
import subprocess
import sys

import pytest

from launch.notebooks import executed, main

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


@pytest.mark.parametrize("source", SOURCES, ids=names(SOURCES))
def test_the_notebook_shows_its_results_and_nothing_of_the_machine(source):
    nbformat = pytest.importorskip("nbformat")
    text = source.with_suffix(".ipynb").read_text()
    notebook = nbformat.reads(text, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run `make notebooks`"
    outputs = [output for cell in cells for output in cell.outputs]
    assert {"stream", "display_data"} <= {output.output_type for output in outputs}
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert set(notebook.metadata) == {"jupytext", "kernelspec"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    printed = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|usr|opt|work)/", printed)
    assert len(text) < 300_000


def test_an_unknown_notebook_is_an_error_that_lists_the_known():
    known = ", ".join(names(SOURCES))
    with pytest.raises(SystemExit, match=f"no notebook is called nothing; there are: {known}$"):
        main(["nothing"])


@pytest.mark.slow
def test_an_executed_notebook_is_written_without_what_differs_each_time(tmp_path):
    pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    source = tmp_path / "tiny.py"
    source.write_text("# # Title\n\n# +\nimport sys\n\nprint(6 * 7)\nprint('noise', file=sys.stderr)\n")
    first = executed(source)
    assert executed(source) == first
    assert '"42\\n"' in first and '"noise\\n"' not in first and "timestamp" not in first


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
