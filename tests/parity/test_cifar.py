"""Numbers equal to the published PyTorch code of CIFAR-10: network, objective, data, recipe."""

import dataclasses
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train
from configs import default, load_config
from formats import published_cifar
from methods import meanflow, objective, path
from methods.sampler import integrate, sample_times
from models import augment, codec, network, unet
from optimizer import make_optimizer
from utils import averages, images, trees

pytestmark = pytest.mark.parity

# The cases are known when tests are collected, before fixtures are.
GOLDEN = pathlib.Path(
    os.environ.get("MEANFLOW_GOLDEN") or pathlib.Path(__file__).parents[1] / "golden"
)
INFO = json.loads((GOLDEN / "cifar.json").read_text())
with np.load(GOLDEN / "cifar.npz") as file:
    ARRAYS = dict(file)
STEPS = sorted({k.split("/")[1] for k in ARRAYS if k.startswith("sampler/steps_")})
# Of true gradient zero in its middle third: Adam makes steps of rounding noise there.
NO_GRADIENT = "qkv.bias"


def below(prefix):
    """The arrays under a prefix, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in ARRAYS.items() if k.startswith(prefix)}


def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def net():
    """The network of the file, as a function, and its parameters."""
    model = INFO["model"]
    shape = (model["img_resolution"], model["img_resolution"], model["in_channels"])
    options = {name: model[name] for name in unet.OPTIONS if name in model}
    module = unet.build(
        "UNet", image_shape=shape, num_classes=0, dtype=jnp.float32, remat=False, **options
    )
    params = published_cifar.from_published(below("params/"), "cifar.npz")
    trees.check_tree(network.param_shapes(module, shape), params, "cifar.npz")
    assert sum(a.size for a in jax.tree.leaves(params)) == INFO["num_params"]
    return network.function(module), params


@functools.cache
def compiled_loss(function, objective):
    """Loss and gradient; the laws of the times, which a loss does not know, are no part of it."""

    def loss(params, x, given, draws):
        return objective.loss(function, params, x, given, draws, {})

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def method(case, equal_rows="drawn"):
    """The objective of a case; the published `ratio` is the share of rows with r != t."""
    return meanflow.MeanFlow(
        num_classes=0, noise_dist="logit_normal", P_mean=case.get("P_mean_t"),
        P_std=case.get("P_std_t"), P_mean_r=case.get("P_mean_r"), P_std_r=case.get("P_std_r"),
        tr_sampler=case["tr_sampler"], data_proportion=1 - case.get("ratio", 0.75),
        equal_rows=equal_rows, class_dropout_prob=0.0, guidance_eq="none", omega=1.0, kappa=0.0,
        t_start=0.0, t_end=1.0, tangent=(0.0, 1.0), norm_p=case["norm_p"],
        norm_eps=case["norm_eps"],
    )  # fmt: skip


def batch(arrays, order=slice(None)):
    """x, given and draws of a batch, its rows in an order."""
    x, labels, noise, t, r = (arrays[k][order] for k in ("x", "augment", "noise", "t", "r"))
    given = {"y": np.zeros(len(x), np.int32), "augment": labels}
    return x, given, objective.Draws(t, r, noise, np.zeros(len(x), bool))


def test_time_embedding():
    width = INFO["model"]["model_channels"] * INFO["model"]["channel_mult_noise"]
    found = unet.time_embedding(ARRAYS["embedding/t"], width)
    np.testing.assert_allclose(found, ARRAYS["embedding/out"], atol=1e-6)


def test_forward(net):
    function, params = net
    a = below("forward/")
    c = {"t": a["t"], "h": a["h"]}
    both = (a["x"], c | {"augment": a["augment"]}), (a["x"], c)
    found = jax.jit(function)(params, *both)
    for velocity, name in zip(found, ("out", "out_no_augment"), strict=True):
        assert np.abs(velocity.u - a[name]).max() <= 1e-5 * np.abs(a[name]).max()


@pytest.mark.parametrize("name", INFO["cases"])
def test_times(name):
    case, a = INFO["cases"][name], below(f"objective/{name}/")
    first, second = (
        jax.nn.sigmoid(case[f"P_mean_{s}"] + case[f"P_std_{s}"] * a[f"normal_{s}"]) for s in "tr"
    )
    objective = method(case)
    t, r = objective.times(first, second)
    r = jnp.where(a["uniform_mask"] < objective.data_proportion, t, r)
    np.testing.assert_allclose(t, a["t"], atol=1e-6)
    np.testing.assert_allclose(r, a["r"], atol=1e-6)


@pytest.mark.parametrize("equal_rows", ("drawn", "fixed"))
@pytest.mark.parametrize("name", INFO["cases"])
def test_objective(net, name, equal_rows):
    """Both kinds of step: every row through the JVP as published, and a fixed count without."""
    function, params = net
    case = INFO["cases"][name]
    a = below(f"objective/{name}/") | below("objective/")
    objective = method(case, equal_rows)
    # The fixed count takes as many of the rows with r = t as it computes apart.
    equal = np.flatnonzero(a["t"] == a["r"])[: objective.equal_count(len(a["t"]))]
    rest = np.setdiff1d(np.arange(len(a["t"])), equal)
    order = np.asarray(path.merge_rows(rest, equal))
    x, given, draws = batch(a, order)
    objective = dataclasses.replace(
        objective, P_mean=0.0, P_std=1.0, P_mean_r=None, P_std_r=None, tr_sampler="v0"
    )
    found = compiled_loss(function, objective)(params, x, given, draws)
    (value, rows), grads = jax.device_get(found)
    np.testing.assert_allclose(value, a["loss"], rtol=1e-5)
    for key in ("error", "v_loss"):
        np.testing.assert_allclose(rows[key], a[key][order], rtol=1e-5, err_msg=key)
    norm = float(jax.jit(optax.tree.norm)(grads))
    np.testing.assert_allclose(norm, case["grad_norm"], rtol=1e-4)
    grads = published_cifar.to_published(grads)
    for key, found in grads.items():
        size = np.linalg.norm(found)
        np.testing.assert_allclose(
            size, a[f"grad_norm/{key}"], rtol=1e-4, atol=1e-7 * norm, err_msg=key
        )
        if f"grad/{key}" in a and not key.endswith(NO_GRADIENT):
            assert distance(found, a[f"grad/{key}"]) <= 1e-4, key
    assert {k for k in a if k.startswith("grad_norm/")} == {f"grad_norm/{k}" for k in grads}


def test_jvp(net):
    function, params = net

    @jax.jit
    def u_and_rate(x, given, draws):
        z = path.z_t(x, draws.noise, draws.t)

        def u(z, t, h):
            return function(params, (z, {"t": t, "h": h, **given}), jvp=0)[0].u

        ones = jnp.ones_like(draws.t)
        return jax.jvp(u, (z, draws.t, draws.t - draws.r), (draws.noise - x, ones, ones))

    for name in INFO["cases"]:
        a = below(f"objective/{name}/") | below("objective/")
        for found, key in zip(u_and_rate(*batch(a)), ("u", "dudt"), strict=True):
            assert np.abs(found - a[key]).max() <= 1e-5 * np.abs(a[key]).max(), (name, key)


@pytest.mark.parametrize("steps", STEPS)
def test_sampler(net, steps):
    function, params = net
    a = below(f"sampler/{steps}/")
    noise = ARRAYS["sampler/noise"]
    objective = method(next(iter(INFO["cases"].values())))
    times = sample_times(0, tuple(a["timesteps"].tolist()))
    given = {"y": jnp.zeros(len(noise), jnp.int32)}

    def sample(params):
        return integrate(objective, function, params, noise, given, times)

    x = jax.jit(sample)(params)
    assert np.abs(x - a["samples"]).max() <= 1e-5 * np.abs(a["samples"]).max()
    if "uint8" in a:
        rounding = load_config.get_config("cifar10_unet").fid.rounding
        np.testing.assert_array_equal(images.to_uint8(a["samples"], rounding), a["uint8"])


@pytest.fixture(scope="module")
def augmented():
    """Function (x, draws, p) -> images, labels, and the map of the plane: matrix and offset."""

    def call(x, draws, p):
        maps, warp = [], augment.warp
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(augment, "warp", lambda x, *map: maps.append(map) or warp(x, *map))
            return *augment.augment(x, draws, p), *maps[0]

    return jax.jit(call)


def padding_shows(matrix, offset, size):
    """Where the padding is seen of images (size, size) of a batch, (B, size, size).

    Here it is as wide as can be reflected, there as a batch needs: up to the farthest corner that
    is read, and twice the filter's reach. Beyond it their filter finds zeros.
    """
    reach, full, centre = augment.MARGIN, size - 1, (size - 1) / 2
    corners = np.array([[i, j] for i in (-centre, centre) for j in (-centre, centre)])
    read = np.einsum("bij,bcj->bci", matrix, corners - offset[:, None])
    places = np.floor(augment._places((2 * (size + 2 * full),) * 2, (size,) * 2, matrix, offset))
    seen = np.zeros(places.shape[:3], bool)
    for axis in (0, 1):
        for sign in (-1, 1):
            margin = np.ceil(max((sign * read[..., axis]).max() - centre + reach, 0))
            if margin < full:
                # Half pixels from the middle to their border, less what the filter reaches
                border = size + 2 * margin - reach
                seen |= sign * (places[..., axis] + (sign > 0) - (size + 2 * full) + 0.5) > border
    windows = np.lib.stride_tricks.sliding_window_view(seen, (2 * reach, 2 * reach), axis=(1, 2))
    return windows[:, 1::2, 1::2].any((-1, -2))  # as the filter reads that samples down again


@pytest.mark.parametrize("case", INFO["augment"])
def test_augmentation(augmented, case):
    a = below(f"augment/{case}/")
    draws = augment.Draws(**{name: a[name] for name in augment.Draws._fields})
    x = (ARRAYS["augment/images"] / 255 * 2 - 1).astype(np.float32)
    found, labels, *plane = map(np.asarray, augmented(x, draws, INFO["augment"][case]["p"]))
    np.testing.assert_allclose(labels, a["labels"], atol=1e-6)
    same = ~padding_shows(*plane, x.shape[1])
    np.testing.assert_allclose(found[same], a["out"][same], atol=2e-5)
    assert same.any((1, 2)).all()


def training_options(**options):
    training = default.get_config().training
    training.update(weight_decay=0.0, warmup_init=1e-8, **options)
    return training


def test_learning_rate():
    info = INFO["schedule"]
    training = training_options(learning_rate=info["lr"], warmup_steps=info["warmup_steps"])
    _, schedule = make_optimizer(training, 10**6)
    found = [float(schedule(step)) for step in ARRAYS["schedule/step"]]
    # in float32, so that the first rates, near 1e-8, are exact to a part in 10^7 of the last
    np.testing.assert_allclose(found, ARRAYS["schedule/lr"], rtol=1e-5, atol=1e-7 * info["lr"])


def test_averages():
    info = INFO["ema"]
    params, expected = ARRAYS["ema/params"], ARRAYS["ema/ema"]
    for decay, of_decay in zip(info["decays"], expected, strict=True):
        average = ARRAYS["ema/initial"]
        for step, (p, wanted) in enumerate(zip(params, of_decay, strict=True)):
            average = averages.by_decay(decay, info["period"], step + 1, average, p)
            np.testing.assert_allclose(average, wanted, atol=1e-6, rtol=1e-6)


def test_trajectory(net):
    """Adam, the warm-up and an average that changes every so many updates, over a short run."""
    function, params = net
    info = INFO["trajectory"]
    training = training_options(
        learning_rate=info["lr"], warmup_steps=info["warmup_steps"],
        adam_b1=info["betas"][0], adam_b2=info["betas"][1],
    )  # fmt: skip
    optimizer, _ = make_optimizer(training, info["steps"])
    recipe = train.Recipe(
        function, method(info), codec.Codec(), optimizer, (info["ema_decay"],),
        ema_period=info["ema_period"],
    )  # fmt: skip
    state = train.fresh_state(recipe, params)
    step = jax.jit(functools.partial(train.update, recipe), static_argnames="key")
    total = 0.0
    for i in range(info["steps"]):
        state = step(state, *batch(below(f"trajectory/batch_{i}/")), key=None)
        loss = float(state.sums["loss"]) - total
        total += loss
        np.testing.assert_allclose(loss, ARRAYS["trajectory/loss"][i], rtol=1e-4, err_msg=str(i))
    start, state = below("params/"), jax.device_get(state)
    for tree, kind in ((state.params, "final_params"), (*state.ema_params.values(), "final_ema")):
        found = published_cifar.to_published(tree)
        for key, wanted in below(f"trajectory/{kind}/").items():
            if not key.endswith(NO_GRADIENT):  # how far training moved it, not how large it is
                moved = np.linalg.norm(wanted - start[key])
                error = np.linalg.norm(found[key] - wanted)
                assert error <= 1e-3 * moved + 1e-6, (kind, key, error, moved)
