"""Writes the options reference from configs/default.py.

python -m scripts.list_options > docs/options.md
"""

import ast
from pathlib import Path

from configs import default, load_config
from configs.default import OPTIONS
from utils import commands, signals

INTRODUCTION = """\
# Options

Made by `python -m scripts.list_options` from `configs/default.py`; a test keeps it true. Set an
option in a YAML file of `configs/`, or behind any command as `--config.section.option=value`. Lists
are written `1,2`; `null` stands for nothing given; in paths $VARIABLES and ~ are expanded. A run
goes on with other values of the options that may change (yes); with other values of the rest it
would be another run.
"""


def comments(source):
    """Reads the source of default.py: [(title, {option: comment})], in its order.

    A title is the docstring of a class; an option's comment stands behind its value.
    """
    sections, lines = [], source.splitlines()
    for section in ast.parse(source).body:
        if not isinstance(section, ast.ClassDef):
            continue
        prefix = "" if section.name == "Config" else f"{section.name.lower()}."
        texts = {}
        for line in section.body:
            if isinstance(line, ast.AnnAssign) and line.value:
                behind = lines[line.end_lineno - 1][line.end_col_offset :]
                texts[f"{prefix}{line.target.id}"] = behind.strip().removeprefix("# ")
        sections.append((ast.get_docstring(section).rstrip("."), texts))
    return sections


def table(title, comments):
    """Writes the options of a section as a Markdown table."""
    lines = [f"\n## {title}\n", "| option | default | values | may change | meaning |"]
    lines.append("|---|---|---|---|---|")
    for path, comment in comments.items():
        option = OPTIONS[path]
        value = load_config.written(option.default)
        words = [f"`{path}`", f"`{value}`" if value else "empty", option.range()]
        words += ["yes" if option.may_change else "", comment]
        lines.append(f"| {' | '.join(word.replace('|', chr(92) + '|') for word in words)} |")
    return "\n".join(lines) + "\n"


def reference():
    """Writes the whole of docs/options.md.

    Raises:
      ValueError: an option has no comment.
    """
    sections = comments(Path(default.__file__).read_text(encoding="utf-8"))
    explained = {path for _, part in sections for path, comment in part.items() if comment}
    if missing := OPTIONS.keys() - explained:
        raise ValueError(f"configs/default.py: no comment behind {', '.join(sorted(missing))}")
    return INTRODUCTION + "".join(table(*section) for section in sections)


if __name__ == "__main__":
    signals.outlive_readers()
    commands.parser("scripts.list_options", __doc__).parse_args()
    print(reference(), end="")
