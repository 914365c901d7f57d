"""The paper's experiments: what docs/experiments.md and configs/*.yml say is what comes out."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest
import tensorflow_datasets as tfds

import evaluate
import parts
import sample
import train
from configs import load_config
from models import dit, network
from optimizer import make_optimizer
from scripts import prepare_dataset

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = (ROOT / "docs" / "experiments.md").read_text()


def load(name, *words):
    words = [f"--config=configs/load_config.py:{name}", "--config.fid.cache_ref=ref.npz", *words]
    return load_config.from_command_line(words)[0]


@pytest.fixture(autouse=True)
def data_root(monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/records")


def table_rows(start):
    """Cells of the first Markdown table whose header begins `start`, without its header."""
    lines = iter(EXPERIMENTS.splitlines())
    next(line for line in lines if line.startswith(start))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def overrides(cell):
    return [] if cell == "none" else cell.strip("`").split()


# Main results ----------------------------------------------------------------------------------

SIZES = {  # name: depth, width, heads, patch, million parameters
    "run_b4": (12, 768, 12, 4, 131),
    "run_b2": (12, 768, 12, 2, 131),
    "run_m2": (16, 1024, 16, 2, 308),
    "run_l2": (24, 1024, 16, 2, 459),
    "run_xl2": (28, 1152, 16, 2, 676),
    "run_xl2_plus": (28, 1152, 16, 2, 676),
}
RESULTS = [  # name, epochs, omega, kappa, t_start, t_end, steps, FID
    ("run_b4", 240, 1, 0.5, 0, 1, 1, "11.35"),
    ("run_b2", 240, 1, 0.5, 0, 1, 1, "6.17"),
    ("run_m2", 240, 1, 0.5, 0, 1, 1, "5.01"),
    ("run_l2", 240, 0.2, 0.92, 0, 0.8, 1, "3.84"),
    ("run_xl2", 240, 0.2, 0.92, 0, 0.75, 1, "3.43"),
    ("run_xl2", 240, 0.2, 0.92, 0, 0.75, 2, "2.93"),
    ("run_xl2_plus", 1000, 1, 0.5, 0.3, 0.8, 2, "2.20"),
]


@pytest.mark.parametrize("name, epochs, omega, kappa, start, end, steps, fid", RESULTS)
def test_main_results(name, epochs, omega, kappa, start, end, steps, fid):
    config = load(name)
    m = config.method
    assert (m.guidance_eq, m.omega, m.kappa, m.t_start, m.t_end) == (
        "cfg", omega, kappa, start, end,
    )  # fmt: skip
    assert config.training.num_epochs == epochs and steps in config.sampling.num_steps
    net = parts.make(config).module
    assert (net.depth, net.hidden_size, net.num_heads, net.patch_size) == SIZES[name][:4]
    shapes = network.param_shapes(net, (32, 32, 4))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert abs(count / 1e6 - SIZES[name][4]) < 1
    cells = [f"`{name}`", str(epochs), f"({omega}, {kappa}), [{start}, {end}]", str(steps)]
    rows = [row for row in table_rows("| config |") if [row[0], *row[2:5]] == cells]
    (row,) = rows
    assert row[5].startswith(f"{fid} (") and row[6].strip(" |") == "no"


def test_everything_else_is_the_published_recipe():
    differing = {"training.num_epochs", "training.half_precision", "sampling.num_steps"}
    differing |= {"model.cls", "method.omega", "method.kappa", "method.t_start", "method.t_end"}
    base = load_config.options(load("default", "--config.dataset.root=/records"))
    for name in SIZES:
        options = load_config.options(load(name))
        assert {path for path in base if base[path] != options[path]} <= differing
        assert options["training.half_precision"] is True


FAMILY = "soflow_b4 soflow_xl2 alphaflow_b2 alphaflow_b2_cfg alphaflow_xl2 shortcut_b2".split()
FAMILY += ["fm_b2", "lsd_b2"]


UNETS = ("cifar10_unet", "cifar10_unet_v0")


@pytest.mark.parametrize("name", [*SIZES, *FAMILY, "ablation_b4", "cifar10", *UNETS])
def test_headers(name):
    header = (ROOT / "configs" / f"{name}.yml").read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    header = " ".join(header.replace("#", " ").split())
    assert re.search(rf"bash scripts/launch.sh JOB_NAME {name}\b", header)
    assert "Hardware: " in header and "Expected FID" in header and "Measured here: no" in header
    for result in RESULTS:
        if result[0] == name:
            assert result[-1] in header


# Ablations -------------------------------------------------------------------------------------

ABLATIONS = {  # what differs from the base: (fields of the objective, fields of the network), FID
    "no row with r != t": ({"data_proportion": 1}, {}, "328.91"),
    "25 %": ({}, {}, "61.06"),
    "50 %": ({"data_proportion": 0.5}, {}, "63.14"),
    "100 %": ({"data_proportion": 0}, {}, "67.32"),
    "tangent (dz, dr, dt) = (v, 0, 1)": ({}, {}, "61.06"),
    "(v, 0, 0)": ({"tangent": (0, 0)}, {}, "268.06"),
    "(v, 1, 0)": ({"tangent": (1, 0)}, {}, "329.22"),
    "(v, 1, 1)": ({"tangent": (1, 1)}, {}, "137.96"),
    "embedded times (t, r)": ({}, {"time_cond": ("t", "r")}, "61.75"),
    "(t, t - r)": ({}, {}, "61.06"),
    "(t, r, t - r)": ({}, {"time_cond": ("t", "r", "h")}, "63.98"),
    "t - r only": ({}, {"time_cond": ("h",)}, "63.13"),
    "uniform(0, 1)": ({"noise_dist": "uniform"}, {}, "65.90"),
    "lognorm(-0.2, 1.0)": ({"P_mean": -0.2}, {}, "63.83"),
    "lognorm(-0.2, 1.2)": ({"P_mean": -0.2, "P_std": 1.2}, {}, "64.72"),
    "lognorm(-0.4, 1.0)": ({}, {}, "61.06"),
    "lognorm(-0.4, 1.2)": ({"P_std": 1.2}, {}, "61.79"),
    "p = 0": ({"norm_p": 0}, {}, "79.75"),
    "p = 0.5": ({"norm_p": 0.5}, {}, "63.98"),
    "p = 1": ({}, {}, "61.06"),
    "p = 1.5": ({"norm_p": 1.5}, {}, "66.57"),
    "p = 2": ({"norm_p": 2}, {}, "69.19"),
    "omega = 2": ({"guidance_eq": "cfg", "kappa": 0, "omega": 2}, {}, "20.15"),
}


def changed_fields(config, base):
    """What differs in the objective and in the network."""
    methods = [vars(parts.make(c).method) for c in (config, base)]
    nets = [vars(parts.make(c).module) for c in (config, base)]
    return [
        {name: new[name] for name in old if not name.startswith("_") and new[name] != old[name]}
        for new, old in (methods, nets)
    ]


def test_the_base_of_the_ablations():
    config = load("ablation_b4")
    assert config.training.num_epochs == 80
    assert changed_fields(config, load("run_b4")) == [{"guidance_eq": "none"}, {}]


@pytest.mark.parametrize("varied", ABLATIONS)
def test_table_1(varied):
    method, net, fid = ABLATIONS[varied]
    (row,) = (row for row in table_rows("| Table 1 |") if row[1] == varied)
    config = load("ablation_b4", *overrides(row[2]))
    assert changed_fields(config, load("ablation_b4")) == [method, net]
    assert row[3:] == [fid, "no"]


def test_table_1_is_complete():
    assert [row[1] for row in table_rows("| Table 1 |")] == list(ABLATIONS)


def test_table_5_keeps_the_effective_scale():
    rows = table_rows("| kappa |")
    assert [float(row[0]) for row in rows] == [0, 0.5, 0.8, 0.9, 0.95]
    for row in rows:
        method = parts.make(load("ablation_b4", *overrides(row[1]))).method
        assert method.guidance_eq == "cfg" and method.kappa == float(row[0])
        assert method.omega / (1 - method.kappa) == pytest.approx(2)


def test_b4_with_other_guidance():
    none, omega, kappa = (
        parts.make(load("run_b4", *overrides(row[0]))).method
        for row in table_rows("| override of `run_b4` |")
    )
    assert none.guidance_eq == "none"
    assert (omega.guidance_eq, omega.omega, omega.kappa) == ("cfg", 2, 0)
    assert (kappa.guidance_eq, kappa.omega, kappa.kappa) == ("cfg", 1, 0.5)


def test_every_training_knob_of_the_page_parses():
    base = load_config.options(load("run_b4"))
    for row in table_rows("| what |"):
        words = overrides(row[1])
        options = load_config.options(load("run_b4", *words))
        named = {word.split("=")[0].removeprefix("--config.") for word in words}
        assert {path for path in base if base[path] != options[path]} == named


# The time embeddings ---------------------------------------------------------------------------

TINY = dict(num_classes=3, depth=1, hidden_size=16, num_heads=2, patch_size=2)


@functools.cache
def tiny_net(time_cond):
    """A network, its compiled forward pass, and random parameters."""
    net = dit.DiT(time_cond=tuple(time_cond.split(",")), **TINY)
    shapes = network.param_shapes(net, (4, 4, 1))
    rng = np.random.RandomState(0)
    params = jax.tree.map(lambda s: 0.3 * rng.randn(*s.shape).astype(np.float32), shapes)
    return jax.jit(network.function(net)), params


@pytest.mark.parametrize("time_cond", ["t,r", "t,h", "t,r,h", "h"])
def test_which_times_are_embedded(time_cond):
    """With all embedders but one silenced, the network sees that one time and nothing else."""
    x = np.random.RandomState(1).randn(3, 4, 4, 1).astype(np.float32)
    t, r = np.array([[0.9, 0.5, 0.7], [0.2, 0.5, 0.1]], np.float32)
    times, y = {"t": t, "r": r, "h": t - r}, np.arange(3)
    net, params = tiny_net(time_cond)
    only_h, _ = tiny_net("h")
    embedders = {f"{name}_embedder" for name in time_cond.split(",")}
    assert {name for name in params if name[0] in "trh"} == embedders
    for name in embedders:
        silent = {other: jax.tree.map(np.zeros_like, params[other]) for other in embedders - {name}}
        rest = {key: value for key, value in params.items() if key not in embedders}
        u = net(params | silent, (x, {"t": t, "h": t - r, "y": y}))[0].u
        c = {"t": t, "h": times[name[0]], "y": y}
        want = only_h(rest | {"h_embedder": params[name]}, (x, c))[0].u
        np.testing.assert_allclose(u, want, rtol=1e-4, atol=1e-5)


# The optimizer ---------------------------------------------------------------------------------


def optimizer(total_steps=100, **options):
    training = load("default").copy_and_resolve_references().training.unlock()
    training.update(options)
    return make_optimizer(training, total_steps)


def test_learning_rates():
    _, schedule = optimizer(learning_rate=0.5)
    assert [float(schedule(step)) for step in (0, 1, 10**6)] == [0.5] * 3
    _, schedule = optimizer(learning_rate=0.5, warmup_steps=10)
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 99)], [0, 0.25, 0.5, 0.5])
    _, schedule = optimizer(learning_rate=0.5, warmup_steps=10, lr_schedule="cosine")
    middle = 0.5 * (1 + np.cos(np.pi * 45 / 90)) / 2
    np.testing.assert_allclose(
        [schedule(s) for s in (5, 10, 55, 100)], [0.25, 0.5, middle, 0], atol=1e-7
    )


def test_clipping_weight_decay_and_the_rate_of_an_update():
    params, grads = {"w": jnp.array([3.0, -1.0])}, {"w": jnp.array([6.0, 8.0])}

    def first_update(**options):
        adamw, _ = optimizer(learning_rate=0.1, **options)
        updates, state = adamw.update(grads, adamw.init(params), params)
        mean = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,))
        return np.asarray(updates["w"]), np.asarray(mean) / 0.1  # 1 - adam_b1 = 0.1

    updates, mean = first_update()
    np.testing.assert_allclose(updates, [-0.1, -0.1], rtol=1e-5)  # Adam's first step: the sign
    np.testing.assert_allclose(mean, [6, 8], rtol=1e-5)
    np.testing.assert_allclose(first_update(grad_clip=1.0)[1], [0.6, 0.8], rtol=1e-5)
    np.testing.assert_allclose(first_update(grad_clip=11.0)[1], [6, 8], rtol=1e-5)
    decayed, _ = first_update(weight_decay=0.5)
    np.testing.assert_allclose(decayed, updates - 0.1 * 0.5 * params["w"], rtol=1e-5)
    np.testing.assert_allclose(first_update(warmup_steps=5)[0], 0)


# CIFAR-10, with and without classes ------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """A few records as `prepare_dataset tfds --name cifar10` writes them, of made-up images."""
    folder = tmp_path_factory.mktemp("cifar10")
    with tfds.testing.mock_data(num_examples=16, data_dir=folder / "tfds"):
        argv = ["tfds", "--name=cifar10", f"--output={folder / 'cifar10'}", "--splits=train"]
        argv.append("--preview=0")  # the stand-in hides how records are read, too
        assert prepare_dataset.main([*argv, f"--data_dir={folder / 'tfds'}"]) == 0
    return folder


SMALL = """
    model.cls=DiT model.depth=1 model.hidden_size=32 model.num_heads=2 model.patch_size=8
    training.batch_size=8 training.num_steps=2 training.warmup_steps=0 training.log_per_step=1
    training.sample_steps= dataset.num_workers=1 fid.device_batch_size=50 fid.on_training=false
"""


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="none"),
        pytest.param(
            [
                "dataset.num_classes=10",
                "method.guidance_eq=cfg",
                "training.sample_on_training=false",
            ],
            id="classes",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_cifar10_trains(cifar10, monkeypatch, tmp_path, words):
    monkeypatch.setenv("DATA_ROOT", str(cifar10))
    words = [f"--config.{word}" for word in [*SMALL.split(), *words]]
    config = load("cifar10", *words)
    assert config.dataset.root == str(cifar10 / "cifar10")
    state = train.train_job(config, tmp_path)
    rows = config.dataset.num_classes + 1
    assert state.params["y_embedder"]["embedding"].shape[0] == rows
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["raw_loss/all"]) for line in lines if "raw_loss/all" in line)
    sampled = (tmp_path / "samples" / "grid_00000002.png").exists()
    assert sampled == config.training.sample_on_training


@pytest.mark.parametrize("num_classes", [0, 9])
def test_without_classes_the_network_is_given_the_null_label(num_classes):
    def net(params, z, t, h, y):
        return params["w"] * (z + y[:, None, None, None])

    words = [f"--config.dataset.num_classes={num_classes}"]
    config = load("cifar10", "--config.dataset.image_size=4", "--config.model.patch_size=2", *words)
    recipe, _ = train.make_recipe(config.training, parts.make(config), 10)
    recipe = dataclasses.replace(recipe, net=make.as_net(net), gather=train.Recipe.gather)
    state = train.fresh_state(recipe, {"w": jnp.ones(())})
    image = np.random.RandomState(0).randint(0, 256, (8, 4, 4, 3)).astype(np.uint8)
    step = jax.jit(lambda batch: train.train_step(recipe, jax.random.key(1), state, batch).sums)
    first = step({"image": image, "label": np.arange(8, dtype=np.int32)})
    second = step({"image": image, "label": np.zeros(8, np.int32)})
    assert (first["loss"] == second["loss"]) == (num_classes == 0)


def test_samples_without_classes_have_the_null_label():
    index = np.arange(20)
    for kind in ("random", "balanced"):
        assert not np.any(sample.draw_labels(0, index, 0, kind))
        assert set(np.asarray(sample.draw_labels(0, index, 3, kind))) == {0, 1, 2}
    assert sample.grid_labels(0).tolist() == [0] * 100
    assert sample.grid_labels(3).tolist() == [0] * 10 + [1] * 10 + [2] * 10


def test_labels_as_the_records_have_them():
    index, counts = np.arange(4000), np.array([190, 0, 10])
    draw = functools.partial(sample.draw_labels, 0, num_classes=3, kind="data", counts=counts)
    labels = np.asarray(draw(index))
    found = np.bincount(labels, minlength=3)
    assert found[1] == 0 and abs(found[2] - 200) < 4 * np.sqrt(200)
    np.testing.assert_array_equal(draw(index[77:99]), labels[77:99])  # by the number alone
    assert not np.any(sample.draw_labels(0, index, 0, "data", np.zeros(0)))


@pytest.mark.parametrize(
    "ends, said", [((0, 100, 200), None), ((0, 95, 200), "95 to 105"), ((0, 190, 200), "10 to 190")]
)
def test_unbalanced_classes_are_told_and_counted(caplog, ends, said):
    labels = np.repeat([0, 1], np.diff(ends)).astype(np.int32)
    records = SimpleNamespace(
        root="set", shape=(2, 2, 1), dtype=np.dtype(np.uint8), has_flipped=False,
        num_records=len(labels), read=lambda rows, flipped: {"label": labels[rows]},
    )  # fmt: skip
    assert evaluate.label_counts("data", records, 2).tolist() == np.diff(ends).tolist()
    assert caplog.text == ""
    for kind in ("random", "balanced"):
        assert evaluate.label_counts(kind, records, 2) is None
    assert caplog.text.count("fid.labels=data") == (2 if said else 0)
    assert said is None or said in caplog.text.replace("from ", "")
    caplog.clear()
    records.num_records = evaluate.COUNTED  # such a set is not read for a line
    assert evaluate.label_counts("random", records, 2) is None and caplog.text == ""


def test_guidance_without_classes_is_refused():
    with pytest.raises(ValueError, match="method.guidance_eq must be none"):
        parts.check(load("cifar10", "--config.method.guidance_eq=cfg"))
