"""Executes the notebooks and keeps what they show, so that a reader on the web sees it without running them.

    python -m launch.notebooks [NAME]...      all of them, without a name

Each notebooks/NAME.ipynb is made anew from the cells of its paired NAME.py: what is edited is the .py.
"""

import pathlib
import sys
import tempfile
from typing import Any

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
KEPT_METADATA = ("jupytext", "kernelspec")
CELL_SECONDS = 300


def main(names: list[str]) -> None:
    """Writes the notebooks of these names, or all of them."""
    known = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"no notebook is called {', '.join(unknown)}; there are: {', '.join(known)}")
    for name in names or known:
        text = executed(known[name])
        known[name].with_suffix(".ipynb").write_text(text, encoding="utf-8")
        print(f"{name}.ipynb: {len(text) / 1000:.0f} kB")


def executed(source: pathlib.Path) -> str:
    """The notebook of a paired .py with its outputs, as text that is the same whenever the outputs are the same.

    Raises:
      ImportError: if jupytext or nbclient is missing.
      nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    try:
        import jupytext
        from nbclient import NotebookClient
    except ImportError as error:
        raise ImportError('notebooks are executed by jupytext and nbclient: pip install "jaxeff[test]"') from error

    notebook = jupytext.read(source)
    with tempfile.TemporaryDirectory() as folder:
        # Without the times of execution, which would change in every run.
        client = NotebookClient(
            notebook, timeout=CELL_SECONDS, record_timing=False, resources={"metadata": {"path": folder}}
        )
        client.execute()
    return jupytext.writes(cleaned(notebook), fmt="ipynb")


def cleaned(notebook: Any) -> Any:
    """Takes from an executed notebook, in place, what is not its content; returns it.

    Cell names that are random, metadata of the machine, its Python and the .py file, and what programs say on stderr.
    """
    notebook.metadata = {key: notebook.metadata[key] for key in KEPT_METADATA if key in notebook.metadata}
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
        cell.metadata = {key: cell.metadata[key] for key in cell.metadata if key == "tags"}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    main(sys.argv[1:])
