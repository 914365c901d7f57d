"""The shape of the project: imports go one way, files stay short, every option is read."""

import ast
import re
from pathlib import Path

import pytest

from configs import default, load_config

ROOT = Path(__file__).resolve().parent.parent
LOWEST = ("models", "utils", "configs")
PARTS = (".", "scripts", *LOWEST)
FILES = sorted(path.relative_to(ROOT) for part in PARTS for path in (ROOT / part).glob("*.py"))
MODULES = {".".join(path.with_suffix("").parts): path for path in FILES}


def layer(module):
    """2: started by people; 1: jobs; 0: models, utils, configs."""
    if module == "main" or module.startswith("scripts."):
        return 2
    return 0 if module.split(".")[0] in LOWEST else 1


def imported_names(tree):
    """Dotted names that a syntax tree imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def project_imports(tree):
    """The project's own modules among what a syntax tree imports."""
    for name in imported_names(tree):
        for known in MODULES:
            if name == known or name.startswith(f"{known}."):
                yield known


def parse(path):
    return ast.parse((ROOT / path).read_text(), filename=str(path))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    tree = parse(MODULES[module])
    for imported in project_imports(tree):
        assert layer(imported) <= layer(module), f"{module} imports {imported} from above"
        assert imported != "main" and (layer(imported) < 2 or module.startswith("scripts.")), (
            f"{module} imports {imported}, which is for people to start"
        )
        if layer(module) == 0:
            said = ast.get_docstring(tree) or ""
            path = "/".join(imported.split("."))
            assert imported in said or path in said, (
                f"{module} builds on {imported}, and its docstring does not say so"
            )
            assert not (module.startswith("utils.") and imported.startswith("models.")), (
                f"{module}: nothing in utils knows a model"
            )


def test_no_import_goes_round():
    graph = {module: set(project_imports(parse(path))) for module, path in MODULES.items()}

    def visit(module, above):
        assert module not in above, " -> ".join([*above, module])
        for imported in graph[module]:
            visit(imported, [*above, module])

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize(
    "module, other",
    [("models.meanflow", "models.dit"), ("utils.fid", "models.inception")],
)
def test_these_know_nothing_of_each_other(module, other):
    assert other not in set(project_imports(parse(MODULES[module])))


@pytest.mark.parametrize("module", MODULES)
def test_no_heavy_framework_and_no_star(module):
    for name in imported_names(parse(MODULES[module])):
        assert name.split(".")[0] not in ("torch", "torchvision", "tensorflow"), name
        assert not name.endswith("*"), name


def test_files_stay_short():
    shells = [*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh")]
    paths = [*(ROOT / path for path in FILES), *shells, *(ROOT / "tests").glob("*.py")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in paths}
    too_long = {path: length for path, length in lengths.items() if length > 400}
    assert too_long == {}


# How code calls a section that it is given, beside its own name. `model` becomes the arguments of
# models/dit.py and the fields of its modules.
ALIASES = {"sampling": ["options"], "fid": ["options"], "model": ["self", "(argument)"]}


def reads(tree):
    """(holder, option) pairs that the code reads: (training, seed) for config.training.seed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield re.split(r"\W", ast.unparse(node.value))[-1], node.attr
        elif isinstance(node, ast.FunctionDef):
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                yield "(argument)", argument.arg


def unread(options, trees):
    """The options that no code reads."""
    pairs = {pair for tree in trees for pair in reads(tree)}
    for path in options:
        section, _, option = path.rpartition(".")
        holders = [section or "config", *ALIASES.get(section, [])]
        if not any((holder, option) in pairs for holder in holders):
            yield path


def test_every_option_is_read():
    # The checks of configs/checks.py do not count: they would pass an option that does nothing.
    sources = [
        path for path in FILES if str(path) not in ("configs/default.py", "configs/checks.py")
    ]
    trees = [parse(path) for path in sources]
    missing = list(unread(load_config.options(default.get_config()), trees))
    assert missing == []


def test_the_search_for_unread_options_finds_one():
    trees = [ast.parse("def f(config, training):\n    config.a.b + training.c\n    x.d = 1")]
    assert list(unread(["a.b", "training.c", "training.b", "x.d", "e"], trees)) == [
        "training.b",
        "x.d",
        "e",
    ]


def test_scripts_ask_for_no_rights():
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"]:
        text = path.read_text()
        assert not re.search(r"\bsudo\b|chmod\s+(-R\s+)?777", text), path
