"""The shape of the project: imports go one way, files stay short, every option is read."""

import ast
import re
from pathlib import Path

import pytest

from configs import default, load_config
from run import layout

ROOT = Path(__file__).resolve().parent.parent
# The rooms from the ground up: each may import from those below it, and from its own.
FLOORS = (
    ("utils", "configs"),
    ("formats",),
    ("methods", "models", "metrics"),
    ("parts", "run", "optimizer"),
    ("views",),
    ("train", "sample", "evaluate", "observe", "grids"),
    ("generator",),
    ("main", "scripts", "benchmarks"),
)
# Rooms on one floor that know nothing of each other.
APART = [("methods", "models"), ("metrics", "models"), ("metrics", "methods"), ("utils", "configs")]
FOLDERS = (
    "utils", "configs", "formats", "methods", "models", "metrics", "run", "scripts", "benchmarks"
)  # fmt: skip
FILES = sorted(
    path.relative_to(ROOT)
    for path in [*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))]
)
MODULES = {
    ".".join(path.with_suffix("").parts): path for path in FILES if path.name != "__init__.py"
}


def room(module):
    return module.split(".")[0]


def floor(module):
    return next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


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
        assert floor(imported) <= floor(module), f"{module} imports {imported} from above"
        assert imported != "main" and (
            room(imported) not in ("scripts", "benchmarks") or room(module) == room(imported)
        ), f"{module} imports {imported}, which is for people to start"
        rooms = {room(module), room(imported)}
        assert not any(rooms == set(pair) for pair in APART), f"{module} imports {imported}"


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES} - {Path()}))
def test_a_folder_is_a_package(folder):
    """A namespace package would lose to any module of its name elsewhere in Python's path."""
    assert (ROOT / folder / "__init__.py").exists()


def test_no_import_goes_round():
    graph = {module: set(project_imports(parse(path))) for module, path in MODULES.items()}

    def visit(module, above):
        assert module not in above, " -> ".join([*above, module])
        for imported in graph[module]:
            visit(imported, [*above, module])

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) != "models"])
def test_nobody_asks_which_network_it_is(module):
    """Outside models/ no `isinstance` names a class of models/, apart from the base of all."""
    networks = {
        node.name
        for name, path in MODULES.items()
        if room(name) == "models" and name != "models.network"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef)
    }
    assert "DiT" in networks
    for node in ast.walk(parse(MODULES[module])):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked = {
                part.split(".")[-1] for part in re.findall(r"[\w.]+", ast.unparse(node.args[1]))
            }
            assert not asked & networks, ast.unparse(node)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_heavy_framework_and_no_star(module):
    for name in imported_names(parse(MODULES[module])):
        assert name.split(".")[0] not in ("torch", "torchvision", "tensorflow"), name
        assert not name.endswith("*"), name


# They handle the folder of a run: only through utils/files.py, by the names of run/layout.py.
OF_A_RUN = ("main", "train", "observe", "grids", "sample", "evaluate", "run")
NAMES = [value for value in vars(layout).values() if isinstance(value, str)]
OF_FILES = ("pathlib", "shutil", "fcntl", "tempfile", "glob", "io", "etils")
OF_NO_FILE = "environ getpid path.basename kill _exit cpu_count"  # of the module os


def touches(tree):
    """What a syntax tree has to do with files beside utils/files.py, and names below a WORKDIR."""
    for name in imported_names(tree):
        if name != "shutil.get_terminal_size" and name.split(".")[0] in OF_FILES:
            yield name
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Call)) else ""
        if isinstance(node, ast.Call) and text.startswith("open("):
            yield text
        known = [f"os.{name}" for name in OF_NO_FILE.split()] + ["os.path"]
        if text.startswith("os.") and isinstance(node, ast.Attribute):
            if not any(text == name or text.startswith(f"{name}.") for name in known):
                yield text
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            if isinstance(node.right, ast.Constant) and node.right.value in NAMES:
                yield ast.unparse(node)


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in OF_A_RUN])
def test_one_module_touches_the_files_of_a_run(module):
    found = [] if module == "run.layout" else list(touches(parse(MODULES[module])))
    assert found == []


def test_the_search_for_touched_files_finds_some():
    code = "import os, pathlib\nopen('a')\nos.rename(a, b)\nworkdir / 'samples'\nos.environ['A']"
    assert list(touches(ast.parse(code))) == [
        "pathlib", "open('a')", "workdir / 'samples'", "os.rename"
    ]  # fmt: skip


def test_files_stay_short():
    shells = [*ROOT.glob("*.sh"), *ROOT.glob("scripts/**/*.sh"), *ROOT.glob("benchmarks/*.sh")]
    limits = {ROOT / path: 350 for path in FILES} | dict.fromkeys(shells, 350)
    limits |= dict.fromkeys((ROOT / "tests").rglob("*.py"), 400)
    lengths = {path: len(path.read_text().splitlines()) for path in limits}
    assert {p: n for p, n in lengths.items() if n > limits[p]} == {}


@pytest.mark.parametrize("module", MODULES)
def test_functions_stay_short(module):
    for node in ast.walk(parse(MODULES[module])):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, (node.name, length)


# How code calls a section that it is given, beside its own name. `model` and `method` become the
# arguments and fields of networks and objectives.
ALIASES = {
    "sampling": ["options"],
    "fid": ["options"],
    "dataset": ["data"],
    "model": ["self", "(argument)"],
    "method": ["self"],
}


def reads(tree):
    """(holder, option) pairs that the code reads: (training, seed) for config.training.seed, and
    for values["training.seed"]."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield re.split(r"\W", ast.unparse(node.value))[-1], node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            section, _, option = str(getattr(node.slice, "value", "")).rpartition(".")
            yield section, option
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


MOST_WITH_CONFIG = 18  # may only fall


def test_few_functions_are_handed_the_whole_config():
    """Main, the jobs, what makes the parts and what settles a config; the rest takes its section.

    Of models/, where a config is that of an autoencoder's file, none is a run's.
    """
    handed = [
        f"{module}.{node.name}"
        for module, path in MODULES.items()
        if room(module) not in ("models", "scripts", "benchmarks")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef)
        and "config" in [a.arg for a in [*node.args.args, *node.args.kwonlyargs]]
    ]
    assert "main.run_job" in handed and "parts.make" in handed
    assert len(handed) <= MOST_WITH_CONFIG, handed


@pytest.mark.parametrize("module", MODULES)
def test_nobody_writes_into_a_config(module):
    """`run.config.settle` makes another one; what it returns is locked."""
    assert ".unlock" not in (ROOT / MODULES[module]).read_text(encoding="utf-8")


def test_scripts_ask_for_no_rights():
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("*/*.sh"), ROOT / ".ci" / "run"]:
        text = path.read_text()
        assert not re.search(r"\bsudo\b|chmod\s+(-R\s+)?777", text), path
