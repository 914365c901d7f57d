"""Lists the configs there are, by name and in a line each. Needs nothing but Python."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def described(folder=FOLDER):
    """Reads {name: the first line of its YAML file, a comment} of all configs."""
    lines = {}
    for path in sorted(folder.glob("*.yml")):
        with path.open(encoding="utf-8") as file:
            lines[path.stem] = file.readline().removeprefix("#").strip()
    return lines


def table():
    """Writes what `main.py --list` prints."""
    lines = described()
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())
