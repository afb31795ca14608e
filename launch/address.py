"""Writes the public address of the repository, known to pyproject.toml alone, into badges and install lines.

python -m launch.address [--check]      --check changes nothing and fails if something would change
"""

import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
# What stands before the owner and name of the repository, wherever they are written.
PLACES = re.compile(
    r"(?P<before>colab\.research\.google\.com/github/|git\+https://github\.com/)[\w.-]+/[\w.-]+?(?=[/\s\"`)])"
)


def main(check: bool) -> int:
    """Rewrites the README and the notebooks' sources; returns the number of files that changed or would."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    repository = urls.get("Repository", "").removeprefix("https://github.com/").strip("/")
    if not repository:
        return 0
    changed = []
    for path in [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.py"))]:
        old = path.read_text()
        new = PLACES.sub(lambda match: match["before"] + repository, old)
        if new != old:
            changed.append(path.name)
            if not check:
                path.write_text(new)
    if check and changed:
        print(f"another address than pyproject.toml's in: {', '.join(changed)}; run python -m launch.address")
    return len(changed) if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
