"""Trained networks from Python: generator.py, from runs and published checkpoints."""

import json

import jax
import make
import numpy as np
import pytest

import generator
import parts
import sample
from formats import published
from methods import objective
from methods.sampler import sample_times
from models import network, vae
from utils import trees


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> (folder, config, params) of a run with each network."""
    found = {}
    for name, words in make.NETWORKS.items():
        folder = tmp_path_factory.mktemp(name)
        steps = (10, 20) if name == "DiT" else (20,)
        found[name] = folder, *make.run(folder, *words, steps=steps)
    return found


@pytest.fixture(scope="module")
def model(runs):
    return generator.load(runs["DiT"][0])


def refused(call, kind=ValueError):
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_images_are_those_of_the_sampling_job(runs, model):
    _, config, params = runs["DiT"]
    made = parts.make(config)
    renderer = sample.Renderer(
        made, parts.load_autoencoder(config.dataset, "float32"), config.sampling.seed, 2
    )
    setting = sample.settings(config.sampling)[0].replace(times=sample_times(2))
    (images,) = renderer(params, [2, 0], setting)
    first, last = renderer(params, [2, 0, 1], setting)  # the last batch is filled up
    np.testing.assert_array_equal(first, images)
    assert last.shape == (1, 4, 4, 1) and renderer._images._cache_size() == 1
    ours = model.sample([2, 0], num_steps=2)
    np.testing.assert_array_equal(ours, images)
    assert ours.dtype == np.uint8 and ours.shape == (2, 4, 4, 1) and ours.std() > 0
    np.testing.assert_array_equal(model.sample([2, 0], num_steps=[1, 0.5, 0]), images)
    np.testing.assert_array_equal(model.sample([2, 0], model.noise(2), 2), images)
    assert (model.sample([2, 0], num_steps=2, seed=1) != images).any()


def test_one_step_follows_the_average_velocity(model):
    z = model.noise(2)
    x = model.sample([2, 0], output="latents")
    np.testing.assert_allclose(z - model.u(z, 1, 1, [2, 0]), x, atol=1e-6)
    by_row = model.u(z, np.array([1.0, 0.5]), np.array([1.0, 0.0]), [2, 0])
    np.testing.assert_allclose(by_row[0], model.u(z, 1, 1, [2, 1])[0], atol=1e-6)
    np.testing.assert_allclose(by_row[1], model.u(z, 0.5, 0, [2, 0])[1], atol=1e-6)
    assert np.abs(by_row[1] - model.u(z, 0.5, 0.5, [2, 0])[1]).max() > 1e-4


@pytest.mark.parametrize("name", ["DiT", "imfDiT", "UNet"])
def test_labels_are_mixed_by_their_embeddings(runs, name):
    """One-hot weights change nothing; a mixture is the label whose row is the mixture of rows."""
    folder, config, params = runs[name]
    module = parts.make(config).module
    net = network.function(module)
    z = np.random.default_rng(1).standard_normal((2, 4, 4, 1), np.float32)
    c = {"t": np.full(2, 0.9, np.float32), "h": np.full(2, 0.5, np.float32)}

    @jax.jit
    def u(params, y):
        return net(params, (z, c | {"y": y}))[0].u

    rows = np.eye(4, dtype=np.float32)
    np.testing.assert_array_equal(u(params, np.array([1, 3])), u(params, rows[[1, 3]]))
    mixed = np.array([[0.25, 0.75, 0, 0], [0, 0, 0.5, 0.5]], np.float32)
    flat = trees.flatten(params)
    table = flat[module.label_table]
    other = trees.unflatten(flat | {module.label_table: np.concatenate([mixed @ table, table[2:]])})
    expected = u(other, np.array([0, 1]))
    np.testing.assert_allclose(u(params, mixed), expected, atol=1e-5)
    assert np.abs(u(params, np.array([0, 2])) - expected).max() > 1e-3


def test_weights_over_classes_may_leave_out_the_last_row(model):
    images = model.sample([2, 0], output="latents")
    np.testing.assert_array_equal(model.sample(np.eye(3)[[2, 0]], output="latents"), images)
    none = model.sample([3, 3], output="latents")
    np.testing.assert_array_equal(model.sample(np.eye(4)[[3, 3]], output="latents"), none)


def test_guidance_comes_with_the_weights_or_the_call(runs):
    guided = generator.load(runs["imfDiT"][0])
    assert guided.config.sampling.t_min == (0.3,)
    own, weak, strong = (guided.sample([1, 0], omega=w, output="latents") for w in (None, 1, 2))
    assert np.abs(weak - strong).max() > 1e-4
    np.testing.assert_array_equal(own, strong)
    assert "omega must be a number above 0" in refused(lambda: guided.sample([1], omega=0))


def test_guidance_of_mixed_labels_begins_from_no_label():
    table = np.array([1.0, 2.0, 4.0, 8.0], np.float32)  # the last one stands for no label

    def by_label(params, z, t, h, y):
        found = table[y] if y.ndim == 1 else y @ table
        return found[:, None, None, None] * np.ones_like(z)

    guidance = objective.Guidance(*map(np.float32, (3, 0, 1)), np.int32(0))
    method, z, t = make.method("flow"), np.zeros((2, 1, 1, 1), np.float32), np.ones(2, np.float32)
    guidance = method.guidance_at(guidance, t)
    for y in (np.array([1, 0]), np.eye(4, dtype=np.float32)[[1, 0]]):
        v = method.velocity(make.as_net(by_label), {}, z, t, t, {"y": y}, guidance)
        np.testing.assert_array_equal(v.ravel(), [8 + 3 * (2 - 8), 8 + 3 * (1 - 8)])


def test_a_checkpoint_of_a_run_and_its_weights_are_chosen(runs, model):
    folder, _, params = runs["DiT"]
    assert model.step == 20
    older = generator.load(folder, step=10, average="params")
    assert older.step == 10
    ours = jax.tree.leaves(jax.tree.map(np.asarray, older.params))
    np.testing.assert_allclose(ours[0], jax.tree.leaves(params)[0] + 0.01, atol=1e-6)
    assert "checkpoint 7" in refused(lambda: generator.load(folder, step=7), FileNotFoundError)
    assert "average: 'ema_0.5'" in refused(lambda: generator.load(folder, average="ema_0.5"))


def test_what_does_not_fit_is_one_line(runs, model, tmp_path):
    z = model.noise(1)
    for call, named in (
        (lambda: model.sample([4]), "labels: classes 0..3 (3: none)"),
        (lambda: model.sample([0.5]), "labels: "),
        (lambda: model.sample([[0.5, 0.5]]), "labels: "),
        (lambda: model.sample([[np.nan, 1, 0]]), "labels: "),
        (lambda: model.sample([]), "labels: one for each image, as in [0], not an empty list"),
        (lambda: model.sample(3), "labels: one for each image, as in [0], not a single number"),
        (lambda: model.u(z, 2.0, 0.5, [0]), "u: times with 0 <= h <= t <= 1, not t = [2.]"),
        (lambda: model.u(z, 0.5, 0.7, [0]), "u: times with 0 <= h <= t <= 1"),
        (lambda: model.sample([0, 1], z), "noise: (1, 4, 4, 1) instead of (2, 4, 4, 1)"),
        (lambda: model.sample([0], num_steps=0), "num_steps must be"),
        (lambda: model.sample([0], num_steps=[1, 0.5]), "must fall from 1 to 0"),
        (lambda: model.sample([0], omega=2), "omega: the guidance of method.name meanflow is"),
        (lambda: model.sample([0], output="png"), "output: 'png'"),
        (lambda: model.sample([0], sampler="rk4"), "sampler: 'rk4'"),
        (lambda: model.sample([0], seed=2**31), "seed: a whole number from 0"),
        (lambda: generator.load(runs["DiT"][0], "model.depth=2"), "model.depth 1, not 2"),
        (lambda: generator.load(runs["DiT"][0], "modell.depth=2"), "unknown option modell.depth"),
    ):
        assert named in refused(call)
    refused(lambda: generator.load(tmp_path), FileNotFoundError)


def test_latents_without_an_autoencoder(tmp_path, monkeypatch):
    words = [
        "dataset.image_channels=4",
        f"dataset.vae={tmp_path / 'absent'}",
        *make.NETWORKS["DiT"],
    ]
    make.run(tmp_path / "run", *words)
    model = generator.load(tmp_path / "run")
    x = model.sample([0], output="latents")
    assert x.shape == (1, 4, 4, 4)
    line = refused(lambda: model.sample([0]), FileNotFoundError)
    assert "absent" in line and "output='latents' needs none" in line
    twice = vae.Autoencoder({"a": np.float32(2)}, None, lambda params, x: params["a"] * x, 1)
    monkeypatch.setattr(parts, "load_autoencoder", lambda data, dtype: twice)
    np.testing.assert_allclose(model.sample([0], output="float"), 2 * x, atol=1e-6)
    expected = np.round(np.clip(127.5 * 2 * x + 128, 0, 255) - 0.5)
    assert np.abs(model.decode(x) - expected).max() <= 1


@pytest.mark.parity
def test_a_published_checkpoint_finds_its_config(golden):
    source = golden / "released_checkpoint" / "msgpack"
    of = json.loads((golden / "meanflow.json").read_text())["model"]
    assert "none of run_b4, run_b2, " in refused(lambda: generator.load(source))
    found = published.load(source)["ema_params"]
    names = ("depth", "hidden_size", "num_heads", "patch_size")
    words = [f"model.{name}={of[name]}" for name in names]
    names = {"image_size": "input_size", "image_channels": "in_channels"}
    words += [f"dataset.{ours}={of[theirs]}" for ours, theirs in names.items()]
    words += [f"dataset.num_classes={of['num_classes']}", "dataset.vae=none"]
    model = generator.load(source, "model.cls=DiT", *words)
    assert model.image_shape == (of["input_size"], of["input_size"], of["in_channels"])
    for ours, theirs in zip(*map(jax.tree.leaves, (model.params, found)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_program_serves_all_numbers_of_images_up_to_a_power_of_two(model):
    four = model.sample([2, 0, 1, 0], num_steps=3)
    count = model._sample._cache_size()
    np.testing.assert_array_equal(model.sample([2, 0, 1], num_steps=3), four[:3])
    assert model._sample._cache_size() == count
