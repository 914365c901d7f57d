"""What is said and written before a run begins: the summary, config.yml, versions, help."""

import importlib
import logging
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import make
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import main
import parts
from configs import listing, load_config, strict_yaml
from run import cadence, report
from utils import environment

ROOT = Path(__file__).resolve().parent.parent
TINY = "model.depth=1 model.hidden_size=32 model.num_heads=2".split()


# config.yml -----------------------------------------------------------------------------------


def loaded(path, *words):
    return load_config.from_command_line([f"--config={path}", *words])[0]


def same(config, folder):
    """Asserts that a config as text loads as the very same values."""
    path = folder / "config.yml"
    path.write_text(load_config.text(config), encoding="utf-8")
    before, after = (load_config.options(c) for c in (config, loaded(path)))
    assert after == before
    assert {k: type(x) for k, x in after.items()} == {k: type(x) for k, x in before.items()}


@pytest.mark.parametrize("name", ["default", "run_b4", "cifar10_unet", "digits_imf"])
def test_a_config_loads_again_as_it_was(tmp_path, monkeypatch, name):
    monkeypatch.setenv("DATA_ROOT", "/records")
    words = "training.wandb=null", "training.learning_rate=1e-5", "sampling.omega=2,1.5"
    same(make.config(*words, "load_from=1.5e3", name=name), tmp_path)
    same(make.config(name=name), tmp_path)


NAMES = some.text(some.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12)
LOOKS = some.sampled_from(
    "null ~ yes 010 0x1f 1_0 1.5e3 .5 1:30 2001-01-01 - [a] {a} #a 'a \"a a:  !a &a *a % @ = .nan"
    .split(" ")
)  # fmt: skip
PLAIN = some.none() | some.booleans() | some.integers(-(2**32), 2**32) | NAMES | LOOKS
PLAIN |= some.floats(-3e38, 3e38)


@given(some.lists(PLAIN, max_size=3), PLAIN)
@settings(max_examples=200, deadline=None)
def test_any_value_comes_back(values, value):
    written = {"section": {"list": tuple(values), "one": value}, "other": value}
    found = strict_yaml.parse(strict_yaml.dump(written))
    assert found == {"section": {"list": values, "one": value}, "other": value}
    assert list(map(type, found["section"]["list"])) == list(map(type, values))
    assert type(found["other"]) is type(value)


def test_a_file_anywhere_is_a_config(tmp_path, monkeypatch):
    path = tmp_path / "config.yml"
    path.write_text("dataset: {root: r}\nfid: {on_training: false}\ntraining: {seed: 3}")
    argv = [f"--config={path}", "--config.training.num_steps=7", "--workdir=w"]
    config, rest = load_config.from_command_line(argv)
    assert (config.training.seed, config.training.num_steps, rest) == (3, 7, ["--workdir=w"])
    assert load_config.source(argv) == str(path)
    places = load_config.given(argv)
    assert places["training.seed"] == str(path)
    assert places["training.num_steps"] == "command line"
    # The last one counts, as behind launch.sh, which names one of configs/.
    assert loaded("configs/load_config.py:digits", f"--config={path}").model.cls == "DiT_B_4"
    path.write_text("training: {sead: 3}")
    with pytest.raises(ValueError, match=r"/config.yml: unknown option training.sead; did you"):
        loaded(path)
    for name, line in (
        (f"{path}.gone.yml", "gone.yml: cannot be read: .*No such file"),
        (tmp_path, r"expected --config=configs/load_config.py:NAME or --config=FILE.yml"),
        ("configs/load_config.py:digits.yml", "no config 'digits.yml'; did you mean digits"),
    ):
        with pytest.raises(ValueError, match=line):
            loaded(name)


def test_the_folder_of_a_run_tells_what_it_is_made_with(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    report.note(tmp_path, load_config.text(make.config("training.seed=1")))
    config = make.config("training.seed=2", "sampling.omega=1,2")
    report.note(tmp_path, load_config.text(config))
    assert loaded(tmp_path / "config.yml") == config
    lines = (tmp_path / "requirements.lock").read_text().splitlines()
    assert lines[0] == f"# Python {sys.version.split()[0]}"
    found = dict(line.split("==") for line in lines[1:])
    for name in ("jax", "jaxlib", "flax", "numpy", "pillow", "array-record", "etils"):
        assert importlib.metadata.version(name) == found[name]
    assert not {"pytest", "ruff"}.intersection(found)
    assert caplog.text == ""
    now = environment.installed()
    monkeypatch.setattr(environment, "installed", lambda: now | {"jax": "0.0.1", "new": "1"})
    report.note(tmp_path, load_config.text(config))
    assert f"versions changed: jax {now['jax']} -> 0.0.1\n" in caplog.text


# The summary ----------------------------------------------------------------------------------


RECORDS = SimpleNamespace(key="image", shape=(8, 8, 1), num_records=900, root="r")


def when_of(config, steps_per_epoch):
    records = steps_per_epoch * config.training.batch_size
    return cadence.of_run(config.training, config.fid.on_training, records)


def test_the_summary_of_a_run():
    words = ["training.num_epochs=10", "training.num_steps=0"]
    config = make.config(*TINY, *words, name="digits")
    model = parts.make(config)
    before = len(jax.live_arrays())
    when = when_of(config, 7)
    rows = dict(report.training("DiT", model, RECORDS, config.training, when))
    assert len(jax.live_arrays()) == before
    N = report.number_of(model.param_shapes())
    assert rows["network"] == f"DiT, {report.count(N)} parameters"
    assert rows["records"] == "900 images 8x8x1, 10 classes: r"
    assert rows["length"] == report.length(config.training, 7, 70)
    assert rows["cadence"] == report.cadences(when)


def test_parameters_that_only_train_are_counted_apart():
    config = make.config("model.cls=DiT_B_4", "method.name=improved", *TINY, name="digits_imf")
    model = parts.make(config)
    only = sum(report.number_of(model.param_shapes()[n]) for n in model.module.only_for_training
               if n in model.param_shapes())  # fmt: skip
    [(_, text)] = report.network("imfDiT", model)
    assert only > 0 and text.endswith(f" parameters, {report.count(only)} of them only train")


@pytest.mark.parametrize(
    "words, lengths, length, each",
    [
        (
            "training.num_steps=0 training.num_epochs=10", (7, 70),
            "70 steps = 10 epochs of 7, 128 images a step (training.num_epochs)",
            "metrics every 50 steps, checkpoint at the end, grid every 7",
        ),
        (
            "training.num_steps=5004 training.sample_on_training=false "
            "training.checkpoint_per_step=1250", (1251, 5004),
            "5,004 steps = 4 epochs of 1,251, 128 images a step (training.num_steps)",
            "metrics every 50 steps, checkpoint every 1,250",
        ),
    ],
)  # fmt: skip
def test_the_length_of_a_run_is_named(words, lengths, length, each):
    config = make.config("training.sample_per_epoch=1", *words.split(), name="digits")
    assert report.length(config.training, *lengths) == length
    when = when_of(config, lengths[0])
    assert when[:2] == lengths and report.cadences(when) == each


def test_what_any_job_says(tmp_path):
    argv = ["--config=configs/load_config.py:digits", "--config.training.seed=7",
            "--config.eval_only", "--config.sampling.num_steps=1,2"]  # fmt: skip
    config, _ = load_config.from_command_line(argv)
    source, given = load_config.source(argv), load_config.given(argv)
    rows = dict(report.job(load_config.options(config), source, given, tmp_path))
    assert rows["config"] == "configs/digits.yml" and rows["folder"] == str(tmp_path)
    assert rows["devices"].startswith("1 x cpu") and f"jax {jax.__version__}" in rows["devices"]
    assert rows["  method"] == "kappa 0.3" and rows["  sampling"] == "num_steps 1,2"
    assert "seed 7" in rows["  training"] and "hidden_size 128" in rows["  model"]
    assert rows["  job"] == "eval_only true"
    assert rows["  set by"] == (
        "the command line: training.seed, eval_only, sampling.num_steps"
    )  # fmt: skip
    origin = report.origin(1200, tmp_path)
    rows = dict(report.evaluating(origin, config.fid, config.dataset.root, 2, tmp_path))
    assert rows["images"].startswith("2,000 images for each of 2 settings, beside the training")
    assert rows["weights"] == f"step 1,200 of {tmp_path}: ema"
    rows = dict(report.sampling(origin, config.sampling, tmp_path))
    assert rows["images"] == f"64 by ode, steps 1: {tmp_path / 'samples'}"


def test_numbers_in_short():
    assert [report.count(n) for n in (0, 999, 1000, 1_316_732)] == ["0", "999", "1 k", "1.32 M"]


def test_long_rows_are_wrapped():
    lines = report.wrapped("name", "word " * 60)
    assert len(lines) > 2 and max(map(len, lines)) <= 100
    assert lines[0].startswith("  name        word") and lines[1].startswith(" " * 14 + "word")


# Help -----------------------------------------------------------------------------------------


def test_every_config_is_described_in_its_first_line(capsys):
    assert main.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = sorted(path.stem for path in load_config.FOLDER.glob("*.yml"))
    assert [line.split()[0] for line in lines] == names
    for name, line in zip(names, lines, strict=True):
        first, second, *_ = (load_config.FOLDER / f"{name}.yml").read_text().splitlines()
        assert first.startswith("# ") and first.endswith("."), name
        assert line.split(maxsplit=1)[1] == first.removeprefix("# ")
        assert len(first) < 110 and second.startswith("#"), name


PROGRAMS = [f"scripts.{path.stem}" for path in ROOT.glob("scripts/[!_]*.py")]
PROGRAMS += ["scripts.compare", "benchmarks"]


@pytest.mark.parametrize("name", sorted(PROGRAMS))
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_every_program_explains_itself(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(name, run_name="__main__", alter_sys=False)
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "") and f"usage: python -m {name} " in out
    module = (
        name if name.startswith("scripts.") and name != "scripts.compare" else f"{name}.__main__"
    )
    assert importlib.import_module(module).__doc__.splitlines()[0] in out


def test_main_explains_itself(capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["--help"])
    assert end.value.code == 0
    assert "--config=FILE.yml" in (out := capsys.readouterr().out) and "--list" in out


@pytest.mark.parametrize("script", [*ROOT.glob("*.sh"), *ROOT.glob("[!t]*/*.sh")], ids=str)
def test_every_script_explains_itself(script):
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stderr == ""
    assert f"bash {script.relative_to(ROOT)}" in done.stdout and "set -e" not in done.stdout


def test_launch_lists_the_configs(tmp_path):
    command = ["bash", ROOT / "scripts" / "launch.sh", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == listing.table() + "\n"


@pytest.mark.parametrize("name, option", [("train", "[CONFIG], "), ("sample", "sample_only=True"),
                                          ("evaluate", "eval_only=True")])  # fmt: skip
def test_a_job_alone_says_how_it_is_run(name, option, capsys):
    with pytest.raises(SystemExit) as end:
        runpy.run_path(ROOT / f"{name}.py", run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith(f"{name}.py is no command") and option in err and err.count("\n") == 1
