"""Nothing that people exchange runs code: weights, latents, statistics, checkpoints, configs."""

import ast
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from configs import load_config, strict_yaml
from formats import published
from metrics import inception_weights, reference
from run import weights as weights_of
from scripts import prepare_dataset

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py")]
    if path.relative_to(ROOT).parts[0] != "tests"
]


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, trace):
        self.command = f"touch {trace}"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def trace(tmp_path):
    """A file that appears when something evil ran."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "the file was run"


def evil_torch(path, trace):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Evil(trace)}, protocol=2))
        archive.writestr("archive/version", "3\n")


def evil_pickle(path, trace):
    path.write_bytes(pickle.dumps(Evil(trace)))


def evil_arrays(path, trace):
    content = io.BytesIO()
    arrays = {name: np.array([Evil(trace)], object) for name in ("mu", "sigma")}
    np.savez(content, **arrays)
    path.write_bytes(content.getvalue())


def test_the_evil_is_evil(tmp_path):
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()
    evil_arrays(tmp_path / "x.npz", tmp_path / "second")
    with np.load(tmp_path / "x.npz", allow_pickle=True) as file:
        file["mu"]
    assert (tmp_path / "second").exists()


@pytest.mark.parametrize("write", [evil_torch, evil_pickle])
@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.pkl"])
def test_evil_weights_are_refused_by_name(tmp_path, trace, write, name):
    write(tmp_path / name, trace)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        inception_weights.load(tmp_path / name)
    assert "Traceback" not in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("write", [evil_torch, evil_pickle])
def test_evil_latents_are_refused_by_name(tmp_path, trace, write, capfd):
    folder = tmp_path / "latents" / "train"
    folder.mkdir(parents=True)
    write(folder / "evil.pt", trace)
    arguments = ["pt", f"--input={tmp_path / 'latents'}", f"--output={tmp_path / 'out'}"]
    assert prepare_dataset.main(arguments) != 0
    text = capfd.readouterr().err
    assert "evil.pt" in text and "Traceback" not in text


@pytest.mark.parametrize("write", [evil_torch, evil_pickle, evil_arrays])
def test_evil_statistics_are_refused_by_name(tmp_path, trace, write):
    write(tmp_path / "evil.npz", trace)
    with pytest.raises(ValueError, match=r"evil\.npz"):
        reference.load_reference(tmp_path / "evil.npz")


@pytest.mark.parametrize("write", [evil_torch, evil_pickle])
def test_evil_checkpoints_are_refused_by_name(tmp_path, trace, write):
    write(tmp_path / "checkpoint_7", trace)
    with pytest.raises(ValueError, match="checkpoint_7"):
        published.load(tmp_path / "checkpoint_7")
    for item in ("params", "ema_params", "config", "data", "checksums"):
        folder = tmp_path / "run" / "checkpoints" / "7" / item
        folder.mkdir(parents=True)
        for name in ("metadata", "_METADATA", "manifest.ocdbt", "checkpoint"):
            write(folder / name, trace)
    with pytest.raises(ValueError, match="checkpoints/7"):
        weights_of.of_run(tmp_path / "run")


def test_an_evil_config_is_refused_by_name(tmp_path, trace, monkeypatch):
    digits = "--config=configs/load_config.py:digits"
    evil = f"!!python/object/apply:os.system ['touch {trace}']"
    with pytest.raises(ValueError, match="training.seed"):
        load_config.from_command_line([digits, f"--config.training.seed={evil}"])
    monkeypatch.setattr(load_config, "FOLDER", tmp_path)
    for tag in ("apply:os.system", "new:subprocess.Popen"):
        (tmp_path / "evil.yml").write_text(f"training: !!python/object/{tag} ['touch {trace}']\n")
        with pytest.raises(ValueError, match=r"evil\.yml"):
            load_config.from_command_line(["--config=configs/load_config.py:evil"])


# What runs code, or unpickles without a restriction. `pickles` restricts its own.
FORBIDDEN = {
    "pickle.load", "pickle.loads", "cPickle.load", "dill.load", "joblib.load", "torch.load",
    "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "marshal.load", "shelve.open",
    "pandas.read_pickle", "eval", "exec", "os.system",
}  # fmt: skip


def dangers(source):
    """Lines of source text that could run what a file says."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, words = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        allowed = words.get("allow_pickle")
        if (
            name in FORBIDDEN
            or (allowed is not None and ast.unparse(allowed) != "False")
            or (name == "yaml.load" and "Loader" not in ast.unparse(node.args[-1]))
            or (name == "pickle.Unpickler")
        ):
            yield node.lineno, ast.unparse(node)


def test_the_project_loads_nothing_that_runs():
    assert len(SOURCES) > 30
    found = {path.name: list(dangers(path.read_text())) for path in SOURCES}
    assert {name: lines for name, lines in found.items() if lines} == {}
    # The one loader of YAML and the one unpickler are restricted.
    assert issubclass(strict_yaml.Loader, strict_yaml.yaml.SafeLoader)
    bases = [
        (path.name, ast.unparse(base))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if "Unpickler" in ast.unparse(base) or "Loader" in ast.unparse(base)
    ]
    assert sorted(bases) == [
        ("pickles.py", "pickle.Unpickler"),
        ("strict_yaml.py", "yaml.SafeLoader"),
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle; pickle.load(f)",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)",
        "yaml.load(text)",
        "yaml.load(text, Loader)",
        "pickle.Unpickler(f).load()",
        "eval(x)",
    ],
)
def test_the_search_finds_what_would_run(source):
    expected = source != "yaml.load(text, Loader)"
    assert bool(list(dangers(source))) == expected
    assert not list(dangers("np.load(p, allow_pickle=False); np.load(p); yaml.safe_load(t)"))
