"""The configuration: what loads, what is refused, and in which words."""

import logging

import pytest
from absl import flags
from ml_collections import config_flags

import parts
from configs import checks, default, load_config

FLAG = "--config=configs/load_config.py:exp"

PUBLISHED_RUN_B4 = """
dataset:
    root: YOUR_DATA_ROOT
model:
    cls: DiT_B_4
training:
    log_per_step: 100
    checkpoint_per_epoch: 10
    num_epochs: 240
    learning_rate: 0.0001
    batch_size: 256
    adam_b2: 0.95
    ema_type: 'const'
    sample_on_training: True
    sample_per_epoch: 10
    fid_per_epoch: 10
    seed: 42
fid:
    device_batch_size: 20
    num_samples: 50000
    cache_ref: YOUR_FID_CACHE_REF
sampling:
    num_steps: 1
load_from: null
eval_only: False
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Function that puts a text into exp.yml of an otherwise empty folder of configs."""
    monkeypatch.setattr(load_config, "FOLDER", tmp_path)
    monkeypatch.setenv("DATA_ROOT", "/records")

    def write(text, name="exp"):
        (tmp_path / f"{name}.yml").write_text(text)

    return write


def refusal(*words):
    """The line with which a command line is refused."""
    with pytest.raises(ValueError) as caught:
        parts.check(load_config.from_command_line([FLAG, *words])[0])
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_published_file_loads_as_it_is(write, caplog):
    write(PUBLISHED_RUN_B4)
    with caplog.at_level(logging.WARNING):
        config = load_config.get_config("exp")
    assert config.model.cls == "DiT_B_4"
    assert config.dataset.root == "/records"
    assert config.sampling.num_steps == (1,)
    assert config.fid.device_batch_size == 20
    assert config.load_from is None
    assert caplog.records == []
    # What it does not say is the default, and every value has the type of the default.
    plain = load_config.options(default.get_config())
    loaded = load_config.options(config)
    assert plain.keys() == loaded.keys()
    for path, value in plain.items():
        if value is not None:
            assert type(loaded[path]) is type(value), path


def test_placeholders_of_the_published_file_are_named(write, monkeypatch):
    write(PUBLISHED_RUN_B4)
    assert refusal().startswith("fid.cache_ref is still the placeholder")
    monkeypatch.delenv("DATA_ROOT")
    assert refusal("--config.fid.on_training=false").startswith(
        "dataset.root is still the placeholder"
    )
    load_config.from_command_line([FLAG, "--config.sample_only"])  # needs neither


def test_every_file_of_the_project_loads(monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/records")
    names = sorted(path.stem for path in load_config.FOLDER.glob("*.yml"))
    for name in ["default", *names]:
        config = load_config.get_config(name)
        config.fid.cache_ref = ""  # a file may leave it to its user
        checks.validate(config)
        parts.check(config)


def test_order_of_precedence(write):
    write("training: {batch_size: 64, num_epochs: 3}")
    config, rest = load_config.from_command_line(
        ["main.py", "--workdir=w", FLAG, "--config.training.batch_size=32", "--config.eval_only"]
    )
    assert rest == ["main.py", "--workdir=w"]
    assert (config.training.batch_size, config.training.num_epochs) == (32, 3)
    assert config.training.adam_b2 == 0.95
    assert config.eval_only is True
    with pytest.raises((KeyError, AttributeError)):
        config.training.new_option = 1


@pytest.mark.parametrize(
    "text, line",
    [
        (
            "training: {bath_size: 1}",
            "configs/exp.yml: unknown option training.bath_size; did you mean training.batch_size?",
        ),
        (
            "batch_size: 1",
            "configs/exp.yml: unknown option batch_size; did you mean training.batch_size?",
        ),
        (
            "fid: {num_steps: 1}",
            "configs/exp.yml: unknown option fid.num_steps; did you mean training.num_steps?",
        ),
        ("trainig: {seed: 1}", "configs/exp.yml: unknown section trainig; did you mean training?"),
        ("training: 3", "configs/exp.yml: training is a section of options, not an option"),
        (
            "training: {batch_size: 1.5}",
            "configs/exp.yml: training.batch_size expects a whole number, got 1.5",
        ),
        (
            "training: {batch_size: yes}",
            "configs/exp.yml: training.batch_size expects a whole number, got True",
        ),
        (
            "training: {learning_rate: fast}",
            "configs/exp.yml: training.learning_rate expects a number, got 'fast'",
        ),
        (
            "training: {learning_rate: yes}",
            "configs/exp.yml: training.learning_rate expects a number, got True",
        ),
        (
            "training: {learning_rate: .inf}",
            "configs/exp.yml: training.learning_rate expects a finite number, got inf",
        ),
        (
            "training: {half_precision: 1}",
            "configs/exp.yml: training.half_precision expects true or false, got 1",
        ),
        ("dataset: {vae: null}", "configs/exp.yml: dataset.vae expects text, got null"),
        ("load_from: 42", "configs/exp.yml: load_from expects text, got 42"),
        ("load_from: {a: 1}", "configs/exp.yml: load_from expects text, got {'a': 1}"),
        (
            "sampling: {num_steps: [1, two]}",
            "configs/exp.yml: sampling.num_steps[1] expects a whole number, got 'two'",
        ),
        (
            "sampling: {num_steps: null}",
            "configs/exp.yml: sampling.num_steps expects a list, got null",
        ),
        ("seed: 1\nseed: 2", "configs/exp.yml line 2: 'seed' stands twice"),
        ("a: [1", "configs/exp.yml line 1: expected ',' or ']', but got '<stream end>'"),
        ("? [a]\n: 1", "configs/exp.yml line 1: found unhashable key"),
        ("- 1", "configs/exp.yml: expected 'section:' and options below it"),
        ("1: 2", "configs/exp.yml: unknown option 1; the name of an option is text"),
        (
            "sampling: {schedule: cosine}",
            "configs/exp.yml: sampling.schedule can only be default, not 'cosine': "
            "only the default schedule exists",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(write, text, line):
    write(text)
    assert refusal() == line


def test_a_malicious_file_runs_nothing(write, tmp_path):
    write(f"training: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    assert refusal().startswith("configs/exp.yml line 1: could not determine a constructor")
    assert not (tmp_path / "made").exists()


def test_accepted_shorthands(write):
    write(
        "training: {learning_rate: 1e-4, weight_decay: 1, ema_val: 0.9}\n"
        "method: {P_mean_r: 1, P_std_r: null, tangent: [0, 1]}\n"
        "sampling: {num_steps: [1, 2], sampling_timesteps: null}\n"
        "fid: # all of it commented out\n"
    )
    config, _ = load_config.from_command_line([FLAG])
    assert config.training.learning_rate == 1e-4
    assert config.training.weight_decay == 1.0 and type(config.training.weight_decay) is float
    assert config.training.ema_val == (0.9,)
    assert config.method.P_mean_r == 1.0 and config.method.P_std_r is None
    assert config.method.tangent == (0.0, 1.0)
    assert config.sampling.num_steps == (1, 2)
    assert config.sampling.sampling_timesteps == ()


@pytest.mark.parametrize(
    "words, path, value",
    [
        (["--config.sampling.num_steps=2"], "sampling.num_steps", (2,)),
        (["--config.sampling.num_steps=1,2"], "sampling.num_steps", (1, 2)),
        (["--config.sampling.num_steps=(1,)"], "sampling.num_steps", (1,)),
        (["--config.sampling.num_steps", "[1, 2]"], "sampling.num_steps", (1, 2)),
        (["--config.sampling.labels="], "sampling.labels", ()),
        (["--config.sampling.labels=()"], "sampling.labels", ()),
        (
            ["--config.sampling.sampling_timesteps=1,.5,0"],
            "sampling.sampling_timesteps",
            (1, 0.5, 0),
        ),
        (["--config.fid.weights=('ema', 'params')"], "fid.weights", ("ema", "params")),
        (["--config.fid.weights=params"], "fid.weights", ("params",)),
        (["--config.training.learning_rate=1e-3"], "training.learning_rate", 1e-3),
        (["--config.training.learning_rate=1"], "training.learning_rate", 1.0),
        (["--config.method.P_mean", "-0.2"], "method.P_mean", -0.2),
        (["--config.method.P_mean_r=null"], "method.P_mean_r", None),
        (["--config.training.use_flip"], None, None),
        (["--config.dataset.use_flip"], "dataset.use_flip", True),
        (["--config.dataset.use_flip=False"], "dataset.use_flip", False),
        (["--config.dataset.use_flip", "--noconfig.dataset.use_flip"], "dataset.use_flip", False),
        (["--config.load_from=42"], "load_from", "42"),
        (["--config.load_from=a=b: c"], "load_from", "a=b: c"),
        (["--config.load_from=null"], "load_from", None),
        (["--config.dataset.vae=none"], "dataset.vae", "none"),
        (["--config.dataset.cache=True"], "dataset.root", "/records/imgnet_latent"),
    ],
)
def test_overrides_on_the_command_line(write, words, path, value):
    write("")
    if path is None:
        line = refusal(*words)
        assert line == (
            "command line: unknown option training.use_flip; did you mean dataset.use_flip?"
        )
        return
    config, rest = load_config.from_command_line(["main.py", FLAG, *words, "--workdir=w"])
    assert rest == ["main.py", "--workdir=w"]
    found = load_config.options(config)[path]
    assert found == value and type(found) is type(value)


def test_options_as_they_are_written_are_read_again(write):
    write("")
    expected = load_config.options(load_config.from_command_line([FLAG])[0])
    words = [f"--config.{path}={load_config.written(value)}" for path, value in expected.items()]
    found = load_config.options(load_config.from_command_line([FLAG, *words])[0])
    assert found == expected
    assert load_config.written((1, 0.5)) == "1,0.5" and load_config.written([True]) == "true"


@pytest.mark.parametrize(
    "word, line",
    [
        (
            "--config.training.batch_sizes=2",
            "command line: unknown option training.batch_sizes; did you mean training.batch_size?",
        ),
        (
            "--config.training.batch_size=2.5",
            "command line: training.batch_size expects a whole number, got 2.5",
        ),
        (
            "--config.training.batch_size",
            "command line: training.batch_size expects a whole number, got True",
        ),
        (
            "--config.eval_only=1",
            "command line: eval_only expects true or false, got 1",
        ),
        (
            "--config.sampling.num_steps=1,x",
            "command line: sampling.num_steps[1] expects a whole number, got 'x'",
        ),
        (
            "--config.trainin.seed=3",
            "command line: unknown option trainin.seed; did you mean training.seed?",
        ),
        ("--config.training=3", "command line: training is a section of options, not an option"),
        (
            "--config.training.seed.x=3",
            "command line: unknown option training.seed.x; did you mean training.seed?",
        ),
        (
            "--config.training.seed=[",
            "command line: training.seed: cannot read the value '['",
        ),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(write, word, line):
    write("")
    assert refusal(word) == line


def test_an_unknown_name_lists_those_there_are(write):
    write("", name="run_b4")
    write("", name="digits")
    there = "there are: default, digits, run_b4"
    with pytest.raises(ValueError) as caught:
        load_config.get_config("run_b44")
    assert str(caught.value) == f"no config 'run_b44'; did you mean run_b4? ({there})"
    for name in ("../configs/run_b4", "/etc/passwd"):
        with pytest.raises(ValueError, match=f"no config '{name}'.*{there}"):
            load_config.get_config(name)
    for argv in (["main.py"], ["main.py", "--config=configs/load_config.py"]):
        with pytest.raises(ValueError, match=f"name a config: .*NAME; {there}"):
            load_config.from_command_line(argv)
    with pytest.raises(ValueError, match="expected --config=configs/load_config.py:NAME"):
        load_config.from_command_line(["--config=configs/other.py:run_b4"])


def test_paths_are_expanded(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("STATS", "/stats")
    write("dataset: {name: digits}\nfid: {cache_ref: '${STATS}/in.npz'}\nload_from: ~/run")
    config = load_config.get_config("exp")
    assert config.dataset.root == "/records/digits"
    assert config.fid.cache_ref == "/stats/in.npz"
    assert config.load_from == "/home/me/run"
    monkeypatch.delenv("DATA_ROOT")
    assert load_config.get_config("exp").dataset.root == "data/digits"
    assert refusal("--config.dataset.root=$NOWHERE_/x") == (
        "dataset.root: the environment variable NOWHERE_ is not set"
    )


@pytest.mark.parametrize(
    "word, start",
    [
        ("training.batch_size=0", "training.batch_size must be above 0"),
        ("training.grad_accum_steps=3", "training.batch_size (256) must be a multiple"),
        ("training.seed=-1", "training.seed must not be negative"),
        ("training.adam_b2=1", "training.adam_b2 must be below 1"),
        ("training.num_epochs=0", "training.num_epochs and training.num_steps are both 0"),
        ("training.ema_val=1.1", "training.ema_val needs"),
        ("training.ema_val=.9,.9", "training.ema_val needs"),
        ("training.profile_steps=5", "training.profile_steps is (first, last)"),
        ("training.profile_steps=5,4", "training.profile_steps is (first, last)"),
        ("method.data_proportion=1.5", "method.data_proportion must lie in 0..1"),
        ("method.guidance_eq=cgf", "method.guidance_eq is one of cfg | none, not 'cgf'"),
        ("method.kappa=1", "method.kappa must be below 1"),
        ("method.t_end=0.5 method.t_start=0.6", "method.t_start must not be above"),
        ("method.tangent=1", "method.tangent has two numbers"),
        ("dataset.latent_mean=1,2", "dataset.latent_mean needs one number for each of the 4"),
        ("dataset.latent_mean=1,2,3,4", "dataset.latent_std goes together"),
        ("dataset.image_size=30", "dataset.image_size (30) must be a multiple of the patch"),
        ("model.hidden_size=10 model.num_heads=3", "model.hidden_size (10) must be a multiple"),
        ("sampling.num_steps=0", "sampling.num_steps needs"),
        ("sampling.num_steps=()", "sampling.num_steps needs"),
        ("sampling.sampling_timesteps=0,1", "sampling.sampling_timesteps must fall from 1 to 0"),
        ("sampling.sampling_timesteps=1,1,0", "sampling.sampling_timesteps must fall"),
        ("sampling.labels=1001", "sampling.labels must lie in 0..999"),
        ("fid.num_samples=1", "fid.num_samples"),
        ("fid.metrics=fad", "fid.metrics are of"),
        ("fid.weights=ema_0.5", "fid.weights are of ema | params | ema_0.9999, got ['ema_0.5']"),
        ("eval_only=true sample_only=true", "eval_only and sample_only: choose one"),
    ],
)
def test_ranges_and_combinations(write, word, start):
    write("")
    assert refusal(*(f"--config.{part}" for part in word.split())).startswith(start)


def test_config_flags_can_read_the_same_file(write, monkeypatch):
    write(PUBLISHED_RUN_B4)
    # ml_collections loads the file anew under a name of its own: give it this folder of configs.
    monkeypatch.setattr(config_flags.config_flags, "_load_source", lambda *_: load_config)
    argv = ["main.py", FLAG, "--config.training.batch_size=8"]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    assert values.config.training.batch_size == 8
    assert values.config.dataset.root == "/records"
