"""generator.py beside other people's code: settings, meshes, processes, transformations, names."""

import socket
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest
import test_layout
from jax.test_util import check_grads

import generator
import parts
import sample
from models import vae

ROOT = Path(__file__).resolve().parent.parent
# What a later cell, or another library, may set.
SETTINGS = {
    "jax_enable_x64": True,
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 7,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_transfer_guard": "disallow",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> folder of a run with each network."""
    folders = {name: tmp_path_factory.mktemp(name) for name in make.NETWORKS}
    for name, folder in folders.items():
        make.run(folder, *make.NETWORKS[name])
    return folders


@pytest.fixture(scope="module")
def models(runs):
    return {name: generator.load(folder) for name, folder in runs.items()}


@pytest.fixture
def settings():
    """Other settings of jax while the test runs."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    yield SETTINGS
    for name, value in before.items():
        jax.config.update(name, value)


def explicit_mesh():
    return jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))


# Settings, meshes and processes -----------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(models):
    """What the DiT draws and computes under the settings of this project."""
    return drawn(models["DiT"])


def drawn(model):
    noise = model.noise(2, seed=3)
    images = model.sample([0, 1], num_steps=2, seed=3, output="float", sampler="consistency")
    return noise, images, model.u(noise, 1.0, 0.5, [0, 1]), model.decode(noise)


def test_settings_of_others_change_nothing_and_stay(runs, models, expected, settings):
    for model in (models["DiT"], generator.load(runs["DiT"])):
        jax.tree.map(np.testing.assert_array_equal, drawn(model), expected)
    assert {name: getattr(jax.config, name) for name in settings} == settings


MESH = """
import sys
import jax, numpy as np
import generator

folder, expected = sys.argv[1:]
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
before = generator.load(folder)
jax.set_mesh(mesh)  # as a cell of a notebook does
for model in (before, generator.load(folder)):
    z = model.noise(2, seed=3)
    images = model.sample([0, 1], num_steps=2, seed=3, output="float", sampler="consistency")
    drawn = z, images, model.u(z, 1.0, 0.5, [0, 1]), model.decode(z)
    for name, array in zip(("noise", "images", "u", "decoded"), drawn):
        np.testing.assert_array_equal(array, np.load(f"{expected}/{name}.npy"))
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
params, z = jax.device_put((model.params, z), everywhere)
images = jax.jit(model.function())(params, z, np.array([0, 1]))
drawn = model.sample([0, 1], np.asarray(z), output="float")
np.testing.assert_allclose(images, drawn, atol=1e-5)
assert jax.sharding.get_abstract_mesh().axis_names == ("x",)
"""


def test_a_mesh_of_others_does_not_matter(runs, expected, run_python, tmp_path):
    for name, array in zip(("noise", "images", "u", "decoded"), expected, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    run_python(["-c", MESH, str(runs["DiT"]), str(tmp_path)], devices=2)


PROCESS = """
import sys
import jax
import numpy as np
folder, port, number, output = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(number))
import generator
from jax.experimental import multihost_utils
if number == "1":
    np.save(output, generator.load(folder).sample([0, 1], output="float"))
multihost_utils.sync_global_devices("end")
"""


@pytest.mark.slow
def test_the_second_process_of_a_job_draws_alone(runs, models, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    words = [sys.executable, "-c", PROCESS, str(runs["DiT"]), port]
    output = tmp_path / "images.npy"
    jobs = [subprocess.Popen([*words, str(i), str(output)], cwd=ROOT) for i in (0, 1)]
    try:
        assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    finally:
        for job in jobs:
            job.kill()
    images = models["DiT"].sample([0, 1], output="float")
    np.testing.assert_allclose(np.load(output), images, atol=1e-6)


# The pure function ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DiT", "imfDiT", "UNet", "flow"])
def test_the_function_gives_what_sample_draws(models, name):
    model = models[name]
    z, labels = model.noise(2), np.array([2, 0])
    images = jax.jit(model.function(num_steps=2))
    drawn = model.sample(labels, z, 2, output="float")
    np.testing.assert_allclose(images(model.params, z, labels), drawn, atol=1e-6)
    rows = jax.vmap(images, in_axes=(None, 0, 0))(model.params, z[:, None], labels[:, None])
    np.testing.assert_allclose(rows[:, 0], drawn, atol=1e-5)
    with jax.enable_x64(True):
        found = jax.jit(model.function(num_steps=2))(model.params, np.float64(z), labels)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, drawn, atol=1e-5)
    with jax.set_mesh(explicit_mesh()):
        found = jax.jit(model.function(num_steps=2))(model.params, z, labels)
    np.testing.assert_allclose(found, drawn, atol=1e-5)


@pytest.mark.parametrize("name", ["DiT", "imfDiT", "UNet"])
def test_the_function_is_differentiable(models, name):
    model = models[name]
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.1, 1, (2, 3)).astype(np.float32)
    pattern = rng.standard_normal((2, *model.image_shape), np.float32)

    @jax.jit
    def loss(*arguments):
        return jnp.mean(pattern * model.function(num_steps=2)(*arguments))

    arguments = model.params, model.noise(2), weights
    slopes = jax.grad(loss, argnums=(0, 1, 2))(*arguments)
    assert all(max(np.abs(a).max() for a in jax.tree.leaves(tree)) > 1e-6 for tree in slopes)
    check_grads(loss, arguments, order=1, modes=["rev"], eps=1e-2, rtol=0.02)


def test_the_function_takes_fresh_noise(models):
    model = models["DiT"]
    images = model.function(num_steps=3, sampler="consistency")
    z, index = model.noise(2, seed=5), np.arange(2)
    fresh = jnp.stack([sample.draw_fresh(5, index, model.image_shape, k) for k in (1, 2)])
    drawn = model.sample([0, 1], num_steps=3, seed=5, output="float", sampler="consistency")
    np.testing.assert_allclose(images(model.params, z, [0, 1], fresh=fresh), drawn, atol=1e-6)
    with pytest.raises(ValueError, match=r"fresh: \(\) instead of \(2, 2, 4, 4, 1\)"):
        images(model.params, z, [0, 1])


def test_the_function_of_latents_asks_for_the_autoencoder(tmp_path, monkeypatch):
    words = ["dataset.image_channels=4", f"dataset.vae={tmp_path}", *make.NETWORKS["DiT"]]
    make.run(tmp_path / "run", *words)
    model = generator.load(tmp_path / "run")
    twice = vae.Autoencoder({"a": np.float32(2)}, None, lambda params, x: params["a"] * x, 1)
    monkeypatch.setattr(parts, "load_autoencoder", lambda *_: twice)
    x = model.sample([0], output="latents")
    arguments = model.params, model.noise(1), [0]
    np.testing.assert_allclose(model.function(output="latents")(*arguments), x, atol=1e-6)
    images = model.function()(*arguments, vae_params=model.vae_params)
    np.testing.assert_allclose(images, 2 * x, atol=1e-6)
    with pytest.raises(ValueError, match="vae_params: images need those of the generator"):
        model.function()(*arguments)


def test_a_traced_call_names_the_function(models):
    model, z = models["DiT"], models["DiT"].noise(1)
    calls = [
        lambda z: model.sample([0], z),
        lambda z: model.u(z, 1, 1, [0]),
        lambda z: model.decode(z),
        lambda z: model.u(model.noise(1), z.max(), 1, [0]),
    ]
    for call in calls:
        for traced in (jax.jit(call), partial(jax.linearize, call)):
            with pytest.raises(ValueError, match="use model.function()"):
                traced(z)
    with pytest.raises(ValueError, match="use model.function()"):
        jax.jit(lambda: model.sample([0]))()


# Names ------------------------------------------------------------------------------------------


def test_a_name_that_is_taken_is_told_with_its_file(tmp_path, monkeypatch):
    generator.check_names()
    with monkeypatch.context() as patch:
        other = types.ModuleType("utils")
        other.__file__ = str(tmp_path / "utils.py")
        patch.setitem(sys.modules, "utils", other)
        with pytest.raises(ImportError) as error:
            generator.check_names()
        line = str(error.value)
        assert f"its own utils: {tmp_path}/utils.py was imported before" in line
        assert "\n" not in line
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "models")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="models/__init__.py comes first in sys.path"):
        generator.check_names()


def test_the_names_are_all_that_it_imports():
    graph = {
        module: set(test_layout.project_imports(test_layout.parse(path)))
        for module, path in test_layout.MODULES.items()
    }
    reached, waiting = set(), ["generator"]
    while waiting:
        waiting += graph[module := waiting.pop()] - reached
        reached |= graph[module]
    assert {test_layout.room(module) for module in reached} == set(generator.NAMES)
