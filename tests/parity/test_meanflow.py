"""Numbers equal to the published implementation: network, objective, sampler, training."""

import json
import os
import pathlib
from functools import partial

import jax
import numpy as np
import optax
import published
import pytest

import train
from benchmarks import plain
from methods.sampler import integrate, sample_times
from models import codec, network

pytestmark = pytest.mark.parity

# The cases are known when tests are collected, before fixtures are.
GOLDEN = pathlib.Path(
    os.environ.get("MEANFLOW_GOLDEN") or pathlib.Path(__file__).parents[1] / "golden"
)
CASES = list(json.loads((GOLDEN / "meanflow.json").read_text())["cases"])
with np.load(GOLDEN / "meanflow.npz") as file:
    STEPS = sorted({k.split("/")[1] for k in file.files if k.startswith("sampler/steps_")})


@pytest.fixture(scope="module")
def data():
    return published.load(GOLDEN)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def test_forward(data):
    a = data.arrays
    c = {name: a[f"forward/{name}"] for name in ("t", "h", "y")}
    out = jax.jit(network.function(data.net))(data.params, (a["forward/x"], c))[0].u
    assert np.abs(out - a["forward/out"]).max() <= 1e-5 * np.abs(a["forward/out"]).max()


@pytest.mark.parametrize("case", CASES)
def test_objective(data, case):
    x, y, draws, num_equal, order = data.batch("objective/batch/")
    method = data.method(data.info["cases"][case], num_equal, len(x))

    def loss(params):
        return method.loss(network.function(data.net), params, x, {"y": y}, draws, {})

    (value, rows), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(data.params)
    a = {k.removeprefix(f"objective/{case}/"): v for k, v in data.arrays.items()}
    np.testing.assert_allclose(value, a["loss"], rtol=1e-5)
    np.testing.assert_allclose(rows["v_loss"], a["v_loss"][order], rtol=1e-5)
    norm = jax.jit(optax.tree.norm)(grads)
    np.testing.assert_allclose(norm, data.info["cases"][case]["grad_norm"], rtol=1e-4)
    grads = published.flat(grads)
    compared = set()
    for name, expected in a.items():
        kind, _, name = name.partition("/")
        if kind == "grad_norm":
            # Parameters without a true gradient hold rounding noise: measured against the whole.
            found = np.linalg.norm(grads[name])
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7 * norm, err_msg=name)
            compared.add(name)
        elif kind == "grad":
            assert published.distance(grads[name], expected) <= 1e-4, name
    assert compared == set(grads)


def test_the_step_that_benchmarks_take_for_the_published_one(data):
    """Loss and gradients of `benchmarks.plain`, whose blocks are no loop."""
    cases = data.info["cases"].items()
    case = next(name for name, how in cases if how.get("kappa") and "t_start" in how)
    x, y, draws, num_equal, _ = data.batch("objective/batch/")
    method = data.method(data.info["cases"][case], num_equal, len(x))

    def loss(params):
        return plain.loss(partial(plain.velocity, data.net), params, x, y, draws, method)[0]

    params = plain.apart(data.params)
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, data.arrays[f"objective/{case}/loss"], rtol=1e-5)
    norm = jax.jit(optax.tree.norm)(grads)
    np.testing.assert_allclose(norm, data.info["cases"][case]["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("steps", STEPS)
def test_sampler(data, steps):
    a = data.arrays
    times = tuple(a[f"sampler/{steps}/timesteps"].tolist())
    method, net = data.method({}, 1, 2), network.function(data.net)
    x = jax.jit(lambda *args: integrate(method, net, *args))(
        data.params, a["sampler/noise"], {"y": a["sampler/labels"]}, sample_times(0, times)
    )
    expected = a[f"sampler/{steps}/samples"]
    assert np.abs(x - expected).max() <= 1e-5 * np.abs(expected).max()


def true_gradient(name, array):
    """Leaves out the bias of the key projection, whose true gradient is zero (see README)."""
    if name.endswith("attn/qkv/_flax_linear/bias"):
        query, _, value = np.split(array, 3)
        return np.concatenate([query, value])
    return array


def test_trajectory(data):
    info = data.info["trajectory"]
    batches = [data.batch(f"trajectory/batch_{i}/") for i in range(info["steps"])]
    num_equal, size = batches[0][3], len(batches[0][0])
    adam = optax.adamw(
        info["learning_rate"], b1=0.9, b2=info["adam_b2"], weight_decay=info["weight_decay"]
    )
    method = data.method(info, num_equal, size)
    net = network.function(data.net)
    recipe = train.Recipe(net, method, codec.Codec(), adam, (info["ema_val"],))
    state = train.fresh_state(recipe, data.params)
    key = jax.random.key(0)
    step = jax.jit(lambda state, x, y, draws: train.update(recipe, state, x, {"y": y}, draws, key))
    before = {"loss": 0.0, "v_loss": 0.0}
    for i, (x, y, draws, equal, _) in enumerate(batches):
        assert equal == num_equal
        state = step(state, x, y, draws)
        sums = {name: float(state.sums[name]) for name in before}
        for name, golden_name in (("loss", "loss"), ("v_loss", "v_loss_mean")):
            expected = data.arrays[f"trajectory/{golden_name}"][i]
            np.testing.assert_allclose(sums[name] - before[name], expected, rtol=1e-4)
        before = sums
    compared = 0
    for tree, name in (
        (state.params, "final_params"),
        (*state.ema_params.values(), "final_ema_params"),
    ):
        found = published.flat(tree)
        for key in (k for k in found if f"trajectory/{name}/{k}" in data.arrays):
            # How far training moved a parameter, not how large it is.
            start = true_gradient(key, data.arrays[f"params/{key}"])
            target = true_gradient(key, data.arrays[f"trajectory/{name}/{key}"]) - start
            error = np.linalg.norm(true_gradient(key, found[key]) - start - target)
            assert error <= 1e-3 * np.linalg.norm(target) + 1e-6, (name, key, error)
            compared += 1
    assert compared > len(found)  # of both; the label table may be left out for its size
