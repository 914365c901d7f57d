"""What a run shows of itself, as TensorBoard's own reader and as scripts find it."""

import io
import json
import sys
import types

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata

import observe
import parts
import sample
import train
from configs import load_config
from optimizer import make_optimizer
from run import cadence, spent
from run.metric_writer import MetricWriter
from utils import chips, dataset, processes, train_metrics

RECORDS, BATCH, TOTAL, LOG = 24, 8, 7, 2  # 3 steps per epoch; the last line has one step

OPTIONS = f"""
    dataset.image_size=4 dataset.num_classes=3 dataset.num_workers=1
    model.depth=1 model.hidden_size=32 model.num_heads=2
    training.batch_size={BATCH} training.num_steps={TOTAL} training.log_per_step={LOG}
    training.warmup_steps=4 training.lr_schedule=cosine training.learning_rate=0.01
    training.ema_val=0.9,0.0 training.sample_per_epoch=1 training.fid_per_epoch=1
    training.profile_steps=5,6
    fid.weights=ema,ema_0.0,params fid.num_samples=24 fid.device_batch_size=16
""".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run: its config, its folder, and the labels of its grids."""
    folder = tmp_path_factory.mktemp("run")
    root = folder / "records"
    root.mkdir()
    images = np.random.RandomState(0).randint(0, 256, (RECORDS, 4, 4, 1)).astype(np.uint8)
    examples = [{"image": image, "label": i % 3} for i, image in enumerate(images)]
    dataset.write_shard(dataset.shard_path(root, "train", 0, 1), examples)
    dataset.write_metadata(root, "image", (4, 4, 1), np.uint8, 3, {"train": [RECORDS]})
    words = [f"--config.{word}" for word in [*OPTIONS, f"dataset.root={root}"]]
    config, _ = load_config.from_command_line(["--config=configs/load_config.py:digits", *words])
    (folder / "workdir").mkdir()
    labels, grid = [], sample.grid
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chips.CHIPS, "cpu", chips.Chip("made up", 1e9, 0))
        patch.setattr(sample, "grid", lambda *a: labels.append(a[2].tolist()) or grid(*a))
        train.train_job(config, folder / "workdir")
    return config, folder / "workdir", labels


@pytest.fixture(scope="module")
def events(run):
    found = EventAccumulator(str(run[1]), {"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def column(workdir, name):
    return {line["step"]: line[name] for line in lines(workdir) if name in line}


def test_what_tensorboard_shows(run, events):
    scalars = {
        "loss", "v_loss", "raw_loss/all", "raw_loss/r=t", "raw_loss/r<t", "grad_norm",
        "update_norm", "param_norm", "learning_rate", "images_per_second", "mfu", "epoch",
        "goodput",
        "fid@24/ema_1step", "fid@24/ema_0.0_1step", "fid@24/params_1step",
    }  # fmt: skip
    buckets = {f"raw_loss/t={i / 4:g}-{(i + 1) / 4:g}" for i in range(4)}
    shown = set(events.Tags()["scalars"])
    buckets |= {spent.PREFIX + kind for kind in spent.KINDS}
    assert scalars <= shown and shown - scalars <= buckets and shown & buckets
    for name in shown:
        points = {event.step: event.value for event in events.Scalars(name)}
        assert points == pytest.approx(column(run[1], name))
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 7]
    assert [event.step for event in events.Scalars("fid@24/ema_1step")] == [3, 6, 7]


def test_the_numbers_belong_to_their_steps(run):
    config, workdir, _ = run
    _, schedule = make_optimizer(config.training, TOTAL)
    rates = column(workdir, "learning_rate")
    assert rates == pytest.approx({step: float(schedule(step - 1)) for step in (2, 4, 6, 7)})
    assert rates[2] == pytest.approx(0.01 / 4) and rates[7] < rates[6]
    assert column(workdir, "epoch") == pytest.approx({s: s / 3 for s in (2, 4, 6, 7)})
    rates = column(workdir, "images_per_second")
    assert list(rates) == [2, 4, 6, 7] and all(rate > 0 for rate in rates.values())


def test_mfu(run, monkeypatch):
    config, workdir, _ = run
    # 4 tokens of 2 x 2 pixels, width 32, one block, 8 rows of which 6 have r = t, guided.
    block = 4 * 12 * 32 * 32 + 2 * 4 * 4 * 32 + 6 * 32 * 32
    rest = 2 * (256 * 32 + 32 * 32) + 2 * 4 * 4 * 32 + 2 * 32 * 32
    needed = 4.5 * 2 * (block + rest)
    rates, shares = column(workdir, "images_per_second"), column(workdir, "mfu")
    assert shares == pytest.approx({step: rate * needed / 1e9 for step, rate in rates.items()})
    # B/4: 5.6 G multiply-adds for a forward pass (paper).
    model = parts.make(make.config())
    slice_of = types.SimpleNamespace(
        devices=np.array([types.SimpleNamespace(device_kind="TPU v5 lite")] * 4), size=4
    )
    peak = observe.peak_rate(model._replace(mesh=slice_of), 256)
    assert peak == pytest.approx(4 * 197e12 / (4.5 * 2 * 5.6e9), rel=0.02)
    slice_of.devices[0].device_kind = "a CPU"
    assert observe.peak_rate(model._replace(mesh=slice_of), 256) is None


def test_each_average_is_evaluated_by_itself(run):
    _, workdir, _ = run
    ema, last, params = (column(workdir, f"fid@24/{n}_1step") for n in ("ema", "ema_0.0", "params"))
    assert last == params  # an average that forgets everything is the weights
    assert all(ema[step] != params[step] for step in (3, 6, 7))
    results = json.loads((workdir / "results.json").read_text())
    assert [r["fid"] for r in results if r["weights"] == "ema"] == list(ema.values())


def test_grids_have_fixed_noise_and_labels(run, events):
    _, workdir, labels = run
    assert labels == [[0] * 10 + [1] * 10 + [2] * 10] * 3
    shown = {
        event.step: np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))
        for event in events.Images("samples")
    }
    assert list(shown) == [3, 6, 7]
    for step, picture in shown.items():
        file = Image.open(workdir / "samples" / f"grid_{step:08d}.png").convert("L")
        np.testing.assert_array_equal(np.asarray(file), picture)
    names = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert names == {"samples": [3, 6, 7], "samples_by_steps": [3, 6, 7], "real": [0]}
    # Little changes in one step: the same noise as before.
    change = np.abs(shown[7].astype(int) - shown[6]).mean()
    rows = np.abs(shown[7].astype(int) - np.roll(shown[7], shown[7].shape[1] // 10, axis=1)).mean()
    assert change < rows / 3


def test_the_real_images_are_those_of_the_classes(run):
    config, workdir, _ = run
    read = dataset.open_records(config.dataset.root).read(np.arange(RECORDS))
    picture = np.asarray(Image.open(workdir / "samples" / "real.png").convert("L"))
    factor = 32 // 4
    cells = picture.reshape(3, 36, 10, 36).swapaxes(1, 2)[..., 2:34:factor, 2:34:factor]
    for label in range(3):
        of_class = read["image"][read["label"] == label][..., 0]  # 8 of each class
        np.testing.assert_array_equal(cells[label, :8], of_class)
    assert not cells[:, 8:].any()


def test_the_folder_tells_its_options(run):
    config, workdir, _ = run
    again, _ = load_config.from_command_line([f"--config={workdir / 'config.yml'}"])
    assert load_config.options(again) == load_config.options(config)
    assert f"jax=={jax.__version__}\n" in (workdir / "requirements.lock").read_text()


def test_the_config_as_text_and_in_the_table_of_runs(run, events):
    config, _, _ = run
    (text,) = events.Tensors("config/text_summary")
    text = text.tensor_proto.string_val[0].decode()
    options = load_config.options(config)
    assert [line.strip() for line in text.splitlines()] == [
        f"{name}: {value}".strip() for name, value in options.items()
    ]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = hparams_metadata.parse_session_start_info_plugin_data(content).hparams
    assert hparams["training.learning_rate"].number_value == 0.01
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = hparams_metadata.parse_experiment_plugin_data(content)
    metrics = [info.name.tag for info in experiment.metric_infos]
    assert metrics == ["raw_loss/all", "fid@24/ema_1step"]
    assert set(metrics) <= set(events.Tags()["scalars"])


def test_a_profile_for_tensorboard_and_perfetto(run):
    (folder,) = (run[1] / "profile" / "plugins" / "profile").iterdir()
    names = [path.name for path in folder.iterdir()]
    assert "perfetto_trace.json.gz" in names
    assert any(name.endswith(".xplane.pb") for name in names)


# Without a run ---------------------------------------------------------------------------------


ROWS = ("error", "v_loss")
SCALARS = dict.fromkeys(("loss", *train_metrics.NORMS), 3.0)


def test_raw_loss_by_kind_of_row_and_by_time():
    t = jnp.array([0.1, 0.3, 0.3, 0.9, 1.0])
    r = jnp.array([0.1, 0.3, 0.1, 0.9, 0.0])
    error = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0])
    sums = train_metrics.zero_sums(ROWS)
    for step in range(2):
        rows = {"error": error * (1 + step), "v_loss": jnp.full(5, 3.0)}
        sums = train_metrics.add(sums, step, SCALARS, rows, t, r, True, False)
    means = train_metrics.means(jax.device_get(sums), ROWS)
    want = {
        **SCALARS,
        "v_loss": 3.0,
        "raw_loss/all": 1.5 * 31 / 5,
        "raw_loss/r=t": 1.5 * 11 / 3,
        "raw_loss/r<t": 1.5 * 10,
        "raw_loss/t=0-0.25": 1.5,
        "raw_loss/t=0.25-0.5": 1.5 * 3,
        "raw_loss/t=0.75-1": 1.5 * 12,
    }
    assert means == pytest.approx(want)


def test_a_step_that_is_not_finite_is_named():
    t = jnp.array([0.5])
    sums = train_metrics.zero_sums(ROWS)
    rows = {"error": t, "v_loss": t}
    sums = train_metrics.add(sums, 6, SCALARS, rows, t, t, True, False)
    train_metrics.check_finite(jax.device_get(sums))
    scalars = SCALARS | {"grad_norm": float("nan")}
    bad = train_metrics.add(sums, 7, scalars, rows, t, t, False, False)
    with pytest.raises(FloatingPointError, match="step 8: grad_norm not finite"):
        train_metrics.check_finite(jax.device_get(bad))
    skipped = train_metrics.add(sums, 7, scalars, rows, t, t, False, True)
    means = train_metrics.means(jax.device_get(skipped), ROWS)
    assert means["grad_norm"] == 3 and means["skipped_steps"] == 1


def test_memory_where_the_backend_tells(monkeypatch):
    def devices(*stats):
        made = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
        monkeypatch.setattr(observe.jax, "local_devices", lambda: made)

    devices(None)
    assert observe.device_memory() == {}
    full = {"bytes_in_use": 3e9, "peak_bytes_in_use": 4e9}
    devices(full | {"peak_bytes_in_use": 5e9}, full)
    assert observe.device_memory() == {"memory_gb/in_use": 3.0, "memory_gb/peak": 5.0}
    devices({"bytes_in_use": 2e9})
    assert observe.device_memory() == {"memory_gb/in_use": 2.0}


def test_the_log_comes_before_what_is_looked_at(monkeypatch):
    """Weights & Biases leaves out what steps back."""
    observer, calls = observe.Observer.__new__(observe.Observer), []
    observer.flush = lambda: calls.append("flush")
    observer._draw_grid = lambda *_: calls.append("grid")
    observer._clock, observer.average = None, "ema_0.9"
    observer._look(
        5, types.SimpleNamespace(ema_params={"ema_0.9": None}), grid=True, evaluation=False
    )
    assert calls == ["flush", "grid"]


@pytest.mark.parametrize("writer", [True, False])
def test_one_process_takes_the_profile(monkeypatch, writer):
    """Several would write into one folder, and jax refuses one with two traces."""
    observer, calls = observe.Observer.__new__(observe.Observer), []
    training = make.config("training.profile_steps=2,3", "training.num_steps=9").training
    observer.training = training
    observer.when = cadence.of_run(training, False, 9 * training.batch_size)
    observer._pending, observer._clock = [], (0, 0.0)
    observer._profile = lambda *_: calls.append("profile")
    monkeypatch.setattr(processes, "is_writer", lambda: writer)
    observer.log(1, None)
    assert calls == ["profile"] * writer


# Weights & Biases ------------------------------------------------------------------------------


class StubWandb(types.ModuleType):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **arguments):
        self.calls.append(("init", arguments["project"], arguments["id"], arguments["resume"]))
        return types.SimpleNamespace(
            id=arguments["id"] or "made-up",
            log=lambda metrics, step: self.calls.append(("log", metrics, step)),
            finish=lambda: self.calls.append(("finish",)),
            config=types.SimpleNamespace(
                update=lambda options, **_: self.calls.append(("config", options))
            ),
        )

    def Image(self, image):
        return image.shape


def test_wandb_gets_the_same(tmp_path, monkeypatch):
    wandb = StubWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for known in (None, "made-up"):
        writer = MetricWriter(tmp_path, wandb_project="mine")
        writer.hparams({"a.b": 3})
        writer.scalars(5, {"loss": 0.5})
        writer.image(5, "samples", np.zeros((2, 2, 1), np.uint8))
        writer.close()
        assert wandb.calls == [
            ("init", "mine", known, "allow"),
            ("config", {"a.b": 3}),
            ("log", {"loss": 0.5}, 5),
            ("log", {"samples": (2, 2, 3)}, 5),
            ("finish",),
        ]
        wandb.calls.clear()
    MetricWriter(tmp_path, wandb_project="mine", enabled=False).close()
    MetricWriter(tmp_path).close()
    assert wandb.calls == []


def test_wandb_that_is_not_installed_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python marks a module that is not there
    with pytest.raises(ValueError, match="training.wandb: .* pip install wandb"):
        MetricWriter(tmp_path, wandb_project="mine")
    MetricWriter(tmp_path).close()
