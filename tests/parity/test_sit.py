"""SiT's weights give the official outputs, turned to our direction of time by parameters alone."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from formats import published, sit, start
from methods import flow, objective
from methods.sampler import integrate, sample_times
from models import dit, network

pytestmark = pytest.mark.parity

GOLDEN = pathlib.Path(os.environ.get("MEANFLOW_GOLDEN") or pathlib.Path(__file__).parent / "golden")
if not (GOLDEN / "family.json").is_file():
    GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
SIT = json.loads((GOLDEN / "family.json").read_text())["sit"]
SHAPE = (SIT["input_size"], SIT["input_size"], SIT["in_channels"])
NET = dit.DiT(
    **{name: SIT[name] for name in ("depth", "hidden_size", "num_heads", "patch_size")},
    num_classes=SIT["num_classes"],
)


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDEN / "family.npz") as file:
        return {k.removeprefix("sit/"): file[k] for k in file.files if k.startswith("sit/")}


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def begin(file, weights="ema", convention="sit", module=NET):
    fresh = jax.device_get(network.init_params(module, jax.random.key(1), SHAPE))
    found = sit.load(GOLDEN / file, weights, convention)
    return start.merge(fresh, found, "y_embedder/embedding", file)


@jax.jit
def predict(params, x, t, h, y):
    return network.function(NET)(params, (x, {"t": t, "h": h, "y": y}))[0].u


def close(found, expected):
    return np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.fixture(scope="module")
def params():
    return begin("sit_tiny.pt")[0]


@pytest.mark.parametrize("h", [0.0, 0.3])
def test_outputs_are_the_official_ones(arrays, params, h):
    """At any h: an h that nothing has learnt yet makes no difference."""
    u = predict(params, *(arrays[k] for k in ("x", "t")), np.full_like(arrays["t"], h), arrays["y"])
    assert close(u, arrays["u"]) and close(-u, arrays["out"])
    np.testing.assert_allclose(arrays["t"], 1 - arrays["t_sit"], atol=1e-7)


@pytest.mark.parametrize("theirs, ours", [("ema", "ema"), ("model", "params")])
def test_a_training_run_has_two_networks(arrays, theirs, ours):
    params, line = begin(SIT["train_file"], ours)
    zero = np.zeros_like(arrays["t"])
    u = predict(params, arrays["x"], arrays["t"], zero, arrays["y"])
    assert close(-u, arrays[f"train_{theirs}/out"])
    assert ("sigma" in line) == SIT["train_learn_sigma"]


def test_turned_parameters(arrays, params):
    flat = traverse_util.flatten_dict(published.to_published(params, "params"), sep="/")
    turned = [name for name in arrays if name.startswith("mapped/")]
    assert turned
    for name in turned:
        assert close(flat[name.removeprefix("mapped/")], arrays[name]), name


def test_guided_sampling(arrays, params):
    """SiT's own guidance, of its first channels, at a time and along four Euler steps."""
    options = {field.name: 0.0 for field in dataclasses.fields(flow.Flow)}
    options |= dict(num_classes=SIT["num_classes"], noise_dist="uniform", guidance_eq="none")
    method = flow.Flow(**options | {"norm_eps": 1.0})
    scale, channels = jnp.float32(SIT["cfg_scale"]), jnp.int32(SIT["cfg_channels"])
    guidance = objective.Guidance(scale, jnp.float32(0), jnp.float32(1), channels)
    given, net = {"y": arrays["cfg/y"]}, network.function(NET)
    t = 1 - arrays["t_sit"]
    here = method.guidance_at(guidance, t)
    u = jax.jit(lambda z: method.velocity(net, params, z, t, t, given, here))(arrays["x"])
    assert close(-u, arrays["cfg/out"])
    steps = next(int(k.split("_")[-1]) for k in arrays if k.startswith("cfg/euler_"))
    x = jax.jit(
        lambda z: integrate(
            method, net, params, z, given, sample_times(steps),
            guidance=guidance, sampler="euler",
        )
    )(arrays["x"])  # fmt: skip
    assert close(x, arrays[f"cfg/euler_{steps}"])


def test_another_number_of_classes(params):
    module = NET.clone(num_classes=SIT["num_classes"] + 3)
    other, line = begin("sit_tiny.pt", module=module)
    table, old = (p["y_embedder"]["embedding"] for p in (other, params))
    np.testing.assert_array_equal(table[-1], old[-1])
    assert len(table) == len(old) + 3 and not np.isin(table[:-1], old).any()
    assert f"of {SIT['num_classes'] + 3} classes" in line and "pos_embed" in line


def test_dit_only_initialises(params):
    other, line = begin("sit_tiny.pt", convention="dit")
    same = jax.tree.map(np.array_equal, other, params)
    assert all(jax.tree.leaves([same["blocks"], same["x_embedder"], same["y_embedder"]]))
    assert not other["final_layer"]["linear"]["kernel"].any()
    assert not same["t_embedder"]["fc1"]["kernel"] and "only initialises" in line


def test_refusals():
    with pytest.raises(ValueError, match="x_embedder/kernel .* instead of"):
        begin("sit_tiny.pt", module=NET.clone(patch_size=2 * SIT["patch_size"]))
    with pytest.raises(ValueError, match="left over: t_embedder"):
        begin("sit_tiny.pt", module=NET.clone(time_cond=("h",)))
    with pytest.raises(ValueError, match="init_format.*sit | repa | dit"):
        begin("sit_tiny.pt", convention="")
