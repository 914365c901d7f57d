"""The options reference, made from the comments of configs/default.py.

python -m scripts.list_options > docs/options.md
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path

from configs import default, load_config
from utils import signals

INTRODUCTION = """\
# Options

Made by `python -m scripts.list_options` from the comments of `configs/default.py`; a test keeps it
true. Set an option in a YAML file of `configs/`, or behind any command as
`--config.section.option=value`. Lists are written `1,2`; `null` stands for nothing given.
"""


def comments(source):
    """The source of default.py -> [(title, {option: comment})], in its order.

    A title is a comment that ends in dashes; an option's comment stands behind its value.
    """
    sections = []
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.removeprefix("#").strip()
        before = lines[token.start[0] - 1][: token.start[1]].strip()
        if not before and text.endswith("--"):
            sections.append((text.rstrip("- "), {}))
        elif before and text != "fmt: skip":
            target = ast.unparse(ast.parse(before).body[0].targets[0])
            sections[-1][1][target.removeprefix("config.")] = text
    return sections


def table(title, options, defaults):
    """The options of a section as a Markdown table."""
    lines = [f"\n## {title}\n", "| option | default | meaning |", "|---|---|---|"]
    for path, comment in options.items():
        value = load_config.written(defaults[path])
        shown = f"`{value}`" if value else "empty"
        text = comment.replace("|", "\\|")
        lines.append(f"| `{path}` | {shown} | {text} |")
    return "\n".join(lines) + "\n"


def reference():
    """The whole of docs/options.md.

    Raises:
      ValueError: an option has no comment.
    """
    defaults = load_config.options(default.get_config())
    sections = comments(Path(default.__file__).read_text(encoding="utf-8"))
    missing = defaults.keys() - {path for _, options in sections for path in options}
    if missing:
        raise ValueError(f"configs/default.py: no comment behind {', '.join(sorted(missing))}")
    return INTRODUCTION + "".join(table(title, found, defaults) for title, found in sections)


if __name__ == "__main__":
    signals.outlive_readers()
    argparse.ArgumentParser(
        prog="python -m scripts.list_options",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    print(reference(), end="")
