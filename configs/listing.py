"""The configs there are, by name and in a line each. Needs nothing but Python."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def described(folder=FOLDER):
    """{name: the first line of its YAML file, a comment} of all configs."""
    found = {}
    for path in sorted(folder.glob("*.yml")):
        with path.open(encoding="utf-8") as file:
            found[path.stem] = file.readline().removeprefix("#").strip()
    return found


def table():
    """What `main.py --list` prints."""
    found = described()
    width = max(map(len, found))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in found.items())
