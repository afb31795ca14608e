"""The README's Python runs as it is printed."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.slow
def test_the_ten_lines_of_the_readme_run(capsys):
    block = re.search(r"```python\n(.*?)```", README, re.S)
    assert block is not None
    exec(compile(block[1], "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "costs, paper convention" in printed and "QuadraticConv_0" in printed


@pytest.mark.slow
def test_the_federation_of_the_readme_runs():
    block = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "federated.federate(" in code)
    names = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    assert names["report"].metrics["counted"] == 10


@pytest.mark.slow
def test_the_tables_of_the_readme_are_looked_up(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    block = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "sdm.Tiers(" in code)
    names = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    assert names["pooled"].shape[1] == 32
    assert 0.5 < float(capsys.readouterr().out.split()[0]) < 1


def test_the_readme_shows_files_that_exist():
    root = pathlib.Path(__file__).parents[2]
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links and [link for link in links if not (root / link).exists()] == []
