"""Writes badges and install lines into the notebooks from the address that pyproject.toml alone knows.

    python -m launch.address [--check]      --check changes nothing and fails if something would change

Without an address in `project.urls` the notebooks have no badge and ask for an installation from a clone.
"""

import pathlib
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
BADGE, INSTALL = "<!-- colab -->", "  # install line"


def main(check: bool) -> int:
    """Rewrites the notebooks' sources; with `check`, returns how many of them would change."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    repository = project.get("urls", {}).get("Repository", "").removeprefix("https://github.com/").strip("/")
    changed = []
    for path in sorted((ROOT / "notebooks").glob("*.py")):
        old = path.read_text()
        new = "\n".join(_line(line, repository, path.stem) for line in old.split("\n"))
        if new != old:
            changed.append(path.name)
            if not check:
                path.write_text(new)
    if check and changed:
        print(f"not made from pyproject.toml's address: {', '.join(changed)}; run python -m launch.address")
    return len(changed) if check else 0


def _line(line: str, repository: str, notebook: str) -> str:
    if BADGE in line:
        colab = "https://colab.research.google.com"
        page = f"{colab}/github/{repository}/blob/main/notebooks/{notebook}.ipynb"
        badge = f" [![Open in Colab]({colab}/assets/colab-badge.svg)]({page})" if repository else ""
        return f"# {BADGE}{badge}"
    if line.endswith(INSTALL):
        # Without -U, so that Colab's jax keeps matching its accelerator.
        pip = f"get_ipython().run_line_magic('pip', 'install -q \"jaxeff[all] @ git+https://github.com/{repository}\"')"
        clone = "raise ImportError(\"install jaxeff first: pip install -e '.[all]' in a clone\")"
        return f"    {pip if repository else clone}{INSTALL}"
    return line


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
