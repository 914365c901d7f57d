"""One device and eight give the same numbers, however the parameters are sharded."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import make
import numpy as np
import optax
import pytest

import parts
import sample
import train
from methods.sampler import sample_times
from models import codec, dit, hardware, network, vae
from utils import sharding

BATCH, SHAPE, CLASSES, STEPS = 32, (8, 8, 4), 10, 3


def small_net():
    return dit.DiT(depth=2, hidden_size=64, num_heads=2, patch_size=2, num_classes=CLASSES)


def numbers(fsdp, given=()):
    """Losses and gradients of a few steps, and samples, on all devices; `given`: conditions."""
    mesh = sharding.make_mesh(fsdp)
    net, records_codec = small_net().taking(given), codec.Codec(given=given)
    function, gather = network.function(net), sharding.gather(mesh)
    optimizer = optax.sgd(0.01, momentum=0.0)  # its state is the gradient
    method = make.method(num_classes=CLASSES)
    recipe = train.Recipe(function, method, records_codec, optimizer, (0.9,), gather=gather)
    state = jax.device_get(train.fresh_state(recipe, make.params(net, SHAPE)))
    shardings = sharding.by_parameter(mesh, state)
    state = sharding.place(state, shardings)
    rng = np.random.RandomState(0)
    batch = {
        "moments": rng.normal(size=(BATCH, *SHAPE[:2], 8)).astype(np.float32),
        "label": rng.randint(0, CLASSES, BATCH).astype(np.int32),
    }
    batch |= {one.name: rng.normal(size=(BATCH, *one.shape)).astype(np.float32) for one in given}
    batch = sharding.to_global(mesh, batch)
    step = jax.jit(
        lambda state, batch: train.train_step(recipe, jax.random.key(7), state, batch),
        in_shardings=(shardings, sharding.by_row(mesh)),
        out_shardings=shardings,
    )
    losses = []
    for _ in range(STEPS):
        state = step(state, batch)
        losses.append(float(state.sums["loss"]))
    kernel = state.params["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // fsdp
    model = parts.Parts(mesh, net, function, gather, method, records_codec, SHAPE, CLASSES)
    renderer = sample.Renderer(model, vae.load("none"), 3, 16 // mesh.size)
    setting = sample.Setting("ode", sample_times(2))
    drawn = {one.name: rng.normal(size=(20, *one.shape)).astype(np.float32) for one in given}

    def rows(index):
        return jax.device_get(records_codec.conditions_of({k: a[index] for k, a in drawn.items()}))

    images = np.concatenate(list(renderer(state.params, np.arange(20) % CLASSES, setting, rows)))
    return {"losses": losses, "grads": flatten(state.opt_state), "images": images}


def flatten(tree):
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


CODE = """
import sys
sys.path.insert(0, "tests")
import numpy as np, test_devices
np.savez(r"{path}", **test_devices.numbers(fsdp={fsdp}))
"""


@pytest.mark.parametrize(
    "shape, fsdp, axis",
    [
        ((12, 768, 4608), 16, 1),
        ((3, 3, 256, 512), 16, 2),
        ((1001, 768), 16, 1),  # 1001 rows cannot be divided
        ((12, 3072), 4, 1),  # biases of 12 blocks, not a kernel of 12 rows
        ((12, 768), 16, None),  # small
        ((12, 768, 4608), 1, None),
    ],
)
def test_kernels_are_split_by_rows(shape, fsdp, axis):
    mesh = jax.sharding.AbstractMesh((2, fsdp), ("data", "fsdp"))
    spec = sharding.by_parameter(mesh, jax.ShapeDtypeStruct(shape, jnp.float32)).spec
    assert [i for i, name in enumerate(spec) if name] == ([] if axis is None else [axis])


@pytest.fixture(scope="module")
def one_device():
    return numbers(fsdp=1)


@pytest.mark.parametrize("fsdp", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_eight_devices_equal_one(one_device, tmp_path, run_python, fsdp):
    run_python(CODE.format(path=tmp_path / "8.npz", fsdp=fsdp), devices=8)
    found = np.load(tmp_path / "8.npz")
    np.testing.assert_allclose(found["losses"], one_device["losses"], rtol=1e-5)
    error = np.linalg.norm(found["grads"] - one_device["grads"])
    assert error <= 1e-5 * np.linalg.norm(one_device["grads"])
    difference = np.abs(found["images"].astype(int) - one_device["images"])
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_gradient_accumulation_changes_nothing():
    """Four parts of a batch give the gradient of the whole."""
    net = small_net()
    function = network.function(net)
    x = jax.random.normal(jax.random.key(0), (BATCH, *SHAPE))
    y = jax.random.randint(jax.random.key(1), (BATCH,), 0, CLASSES)
    method = make.method(num_classes=CLASSES)
    draws = method.draw(jax.random.key(2), x.shape)
    params = make.params(net, SHAPE)

    def gradients(count):
        parts.check_parts_of_batch(method, BATCH, count)
        recipe = train.Recipe(function, method, codec.Codec(), None, (), grad_accum_steps=count)
        key = jax.random.key(3)
        return jax.jit(lambda p: train.gradients(recipe, p, x, {"y": y}, draws, {}, key))(params)

    (loss, rows), grads = gradients(1)
    (loss_4, rows_4), grads_4 = gradients(4)
    np.testing.assert_allclose(loss_4, loss, rtol=1e-6)
    np.testing.assert_allclose(rows_4["error"], rows["error"], rtol=1e-4)
    a, b = flatten(grads_4), flatten(grads)
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    with pytest.raises(ValueError, match="grad_accum_steps"):
        gradients(3)


@pytest.mark.parametrize(
    "platform, count, fsdp",
    [
        ("tpu", 16, 16),
        ("tpu", 256, 16),
        ("tpu", 12, 4),
        ("gpu", 8, 8),
        ("gpu", 1, 1),
        ("cpu", 8, 1),
    ],
)
def test_accelerators_split_the_parameters_over_their_neighbours(platform, count, fsdp):
    devices = [SimpleNamespace(platform=platform)] * count
    assert sharding.best_fsdp(devices) == fsdp


def test_xla_knows_the_options_of_a_card_and_of_a_cpu(monkeypatch):
    card_mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    options = hardware.compiler_options(card_mesh)
    assert options and not hardware.compiler_options(mesh := sharding.make_mesh(1))
    assert not hardware.compiler_options(mesh, small=True)  # conftest.py has flags of its own
    monkeypatch.setenv("XLA_FLAGS", "")
    quick = hardware.compiler_options(mesh, small=True)
    assert quick["xla_backend_optimization_level"] == 1
    for known in (options, quick):
        jax.jit(jnp.sin, compiler_options=known)(1.0)  # raises where one is unknown


def test_the_norm_of_a_small_network_is_one_sum_on_a_cpu(monkeypatch):
    rng = np.random.default_rng(0)
    tree = {"a": rng.standard_normal((3, 70)), "b": [rng.standard_normal(5), np.float64(2.0)]}
    tree = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
    expected = np.linalg.norm(np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)]))
    for count, small, sums in ((1, True, 1), (1, False, 3), (2, True, 3)):  # devices: not gathered
        monkeypatch.setattr(hardware, "count", lambda count=count: count)
        norm = partial(hardware.norm, small=small)
        np.testing.assert_allclose(norm(tree), expected, rtol=1e-6)
        assert str(jax.make_jaxpr(norm)(tree)).count("reduce_sum") == sums


def test_devices_that_do_not_fit_are_refused():
    assert sharding.make_mesh(0).shape == {"data": 1, "fsdp": 1}
    with pytest.raises(ValueError, match="mesh.fsdp"):
        sharding.make_mesh(2)
    mesh = sharding.make_mesh(1)
    with pytest.raises(ValueError, match="training.batch_size"):
        sharding.check_batch("training.batch_size", 0, mesh)
