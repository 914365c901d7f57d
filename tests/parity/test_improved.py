"""Numbers equal to the published improved MeanFlow: network, objective, sampler, training."""

import functools
import json
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from configs import default
from formats import published_imf
from methods import improved, objective, path
from methods.sampler import integrate, sample_times
from models import codec, conditions, dit, imf_blocks, imf_dit, network
from optimizer import make_optimizer
from utils import trees

pytestmark = pytest.mark.parity

# The cases are known when tests are collected, before fixtures are.
GOLDEN = pathlib.Path(
    os.environ.get("MEANFLOW_GOLDEN") or pathlib.Path(__file__).parent.parent / "golden"
)
INFO = json.loads((GOLDEN / "imf.json").read_text())


class Golden(NamedTuple):
    """imf.npz, and the network that it describes."""

    arrays: dict
    net: imf_dit.ImfDiT
    params: dict

    def below(self, prefix):
        """What stands below `prefix/`, by the rest of the name."""
        prefix += "/"
        return {k[len(prefix) :]: a for k, a in self.arrays.items() if k.startswith(prefix)}

    def tree(self, prefix):
        """The parameters `prefix/net/...` as our tree."""
        return published_imf.from_published(trees.unflatten(self.below(prefix)), prefix)

    def batch(self, batch, draws):
        """x, labels, `Draws`, the number of rows with r = t, and the permutation into our order."""
        order = our_order(draws["equal"])
        names = ("x", "y", "equal", *improved.Draws._fields)
        a = {name: (batch | draws)[name][order] for name in names}
        x, y, equal = (a.pop(name) for name in names[:3])
        return x, y, improved.Draws(**a), int(equal.sum()), order


def our_order(equal):
    """The permutation that brings rows of two kinds into the order of `path.split_rows`."""
    return np.asarray(path.merge_rows(np.flatnonzero(~equal), np.flatnonzero(equal)))


def build(**options):
    """The network of the json."""
    size = dict(INFO["model"])
    sizes = {name: size[name] for name in imf_dit.SIZE_OPTIONS}
    off = dict(unroll=1, remat=False, fused_attention=False, half_residual=False)
    shape = (size["input_size"], size["input_size"], size["in_channels"])
    return imf_dit.build(
        "imfDiT", image_shape=shape, num_classes=size["num_classes"], dtype=jnp.float32,
        **sizes | off | options,
    )  # fmt: skip


def make_objective(norm_p, norm_eps, num_equal, batch_size, cfg_beta=1.0):
    """The objective of a case."""
    draws = INFO["draws"]
    return improved.Improved(
        num_classes=INFO["model"]["num_classes"],
        noise_dist="logit_normal",
        P_mean=draws["P_mean"],
        P_std=draws["P_std"],
        data_proportion=min((num_equal + 0.5) / batch_size, 1.0),
        class_dropout_prob=0.1,
        cfg_beta=cfg_beta,
        omega_max=draws["omega_max"],
        norm_p=norm_p,
        norm_eps=norm_eps,
    )


@pytest.fixture(scope="module")
def data():
    with np.load(GOLDEN / "imf.npz") as file:
        golden = Golden(dict(file), build(), None)
    return golden._replace(params=golden.tree("params"))


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def close(found, expected, tolerance=1e-5):
    """Whether arrays agree, measured against the largest entry."""
    assert np.shape(found) == np.shape(expected)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def flat(tree):
    """Our tree -> {published name: array}."""
    return trees.flatten(published_imf.to_published(jax.device_get(tree), "tree"))


def test_forward(data):
    a = data.below("forward")
    c = {name: a[name] for name in ("t", "h", "omega", "t_min", "t_max", "y")}
    net = jax.jit(network.function(data.net))
    (found,) = net(data.params, (a["x"], c))
    close(found.u, a["u"])
    close(found.v, a["v"])
    # without the head of v, and with a t of any value: the same u
    less = {name: p for name, p in data.params.items() if not name.startswith("v_")}
    (found,) = net(less, (a["x"], c | {"t": 1 - a["t"]}))
    assert found.v is None
    close(found.u, a["u"])


def test_parts(data):
    a, forward = data.below("parts"), data.below("forward")
    time = dit.TimeEmbedder(dit.FREQUENCIES)
    eye = {"kernel": np.eye(dit.FREQUENCIES), "bias": np.zeros(dit.FREQUENCIES)}
    found = jax.jit(time.apply)({"params": {"fc1": eye, "fc2": eye}}, a["times"])
    close(found, jax.nn.silu(a["frequencies"]))
    close(imf_blocks.rotate(a["rope_in"]), a["rope_out"])
    patch = INFO["model"]["patch_size"]
    close(dit.unpatchify(a["tokens"], patch, a["unpatchified"].shape[1:]), a["unpatchified"])

    rows = len(a["sequence"])
    c = {name: forward[name][:rows] for name in ("h", "omega", "t_min", "t_max", "y")}
    net = data.net

    def first_block(params):
        embed = imf_blocks.Embedding(net.hidden_size, net.patch_size, net.num_classes, net.dtype)
        x = embed.apply(
            {"params": params["embedding"]}, forward["x"][:rows], c, conditions.Embedded()
        )
        block = {"params": jax.tree.map(lambda p: p[0], params["blocks"])}
        sizes = net.hidden_size, net.num_heads, net.dtype, False, None, False
        module = imf_blocks.Block(*sizes, grid=(), mlp_features=net.mlp_features)
        # `of`: one part on the normed input, as the goldens have it
        of = functools.partial(module.apply, block)
        attention = of(method=lambda b: b.attn(imf_blocks.rms_norm(x, b.norm1), False, True))
        (out,), _ = of((x,))
        after = x + block["params"]["attn_scale"] * attention
        mlp = of(method=lambda b: b.mlp(imf_blocks.rms_norm(after, b.norm2)))
        return x, attention, mlp, out

    names = ("sequence", "block0_attention", "block0_mlp", "block0_out")
    for name, found in zip(names, jax.jit(first_block)(data.params), strict=True):
        close(found, a[name])


def test_draws(data, monkeypatch):
    """The draws, from given numbers in the place of random ones."""
    a = data.below("draws")
    equal = a["t"] == a["r"]
    order = our_order(equal)
    for beta in INFO["draws"]["cfg_beta"]:
        noise = np.zeros((len(order), 1, 1, 1))
        normals = iter([a["normal_1"][order], a["normal_2"][order], noise])
        names = ("uniform_omega", "uniform_t_min", "uniform_t_max")
        uniforms = iter([*(a[name][order] for name in names), np.ones(len(order))])
        with monkeypatch.context() as patch:
            patch.setattr(jax.random, "normal", lambda key, shape, it=normals: next(it))
            patch.setattr(jax.random, "uniform", lambda key, shape, it=uniforms: next(it))
            method = make_objective(1.0, 0.01, equal.sum(), len(equal), beta)
            draws = method.draw(jax.random.key(0), noise.shape, 0)
        expected = {name: a[name] for name in ("t", "r")} | {"omega": a[f"omega_beta_{beta}"]}
        for name, array in expected.items():
            np.testing.assert_allclose(getattr(draws, name), array[order], rtol=1e-5)
        for name, end in (("t_min", 0.0), ("t_max", 1.0)):
            array = np.where(equal, end, a[name])[order]
            np.testing.assert_allclose(getattr(draws, name), array, rtol=1e-6)


@functools.cache
def value_and_grad(method):
    """Compiled once for all cases of the same options."""
    net = network.function(build())

    def loss(params, x, y, draws):
        return method.loss(net, params, x, {"y": y}, draws, {})

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("case", INFO["cases"])
def test_objective(data, case):
    a = data.below(f"objective/{case}")
    x, y, draws, num_equal, order = data.batch(data.below("objective/batch"), a)
    info = INFO["cases"][case]
    method = make_objective(info["norm_p"], info["norm_eps"], num_equal, len(x))
    (value, rows), grads = value_and_grad(method)(data.params, x, y, draws)
    np.testing.assert_allclose(value, a["loss"], rtol=1e-5)
    for name in ("error_u", "error_v"):
        np.testing.assert_allclose(rows[name], a[name][order], rtol=1e-5)
    for name in ("loss_u", "loss_v"):
        np.testing.assert_allclose(rows[name].mean(), a[name], rtol=1e-5)
    if parts := data.below(f"objective/{case}/parts"):
        fields = jax.jit(functools.partial(method.fields, network.function(data.net)))
        check_fields(fields(data.params, x, {"y": y}, draws), parts, draws, order)
    found = flat(grads)
    norms = {k.removeprefix("grad_norm/"): v for k, v in a.items() if k.startswith("grad_norm/")}
    assert norms.keys() == found.keys()
    whole = np.linalg.norm(list(norms.values()))
    for name, norm in norms.items():
        # Parameters without a true gradient hold rounding noise: measured against the whole.
        np.testing.assert_allclose(
            np.linalg.norm(found[name]), norm, rtol=1e-4, atol=1e-7 * whole, err_msg=name
        )
        if (expected := a.get(f"grad/{name}")) is not None:
            error = np.linalg.norm(found[name] - expected)
            assert error <= 1e-4 * norm + 1e-7 * whole, name


def check_fields(fields, expected, draws, order):
    """Holds `Fields` against the goldens in those rows in which both mean the same."""
    differ, drop = draws.t != draws.r, draws.drop
    rows = {"du_dt": differ, "v_c": differ | ~drop}
    for name, array in expected.items():
        where = rows.get(name, slice(None))
        close(getattr(fields, name)[where], array[order][where])


def test_sampler(data):
    noise, y = data.arrays["sampler/noise"], data.arrays["sampler/labels"]
    method = make_objective(1.0, 0.01, 0, len(y))
    net = network.function(data.net)

    @jax.jit  # guidance is traced: one compilation for all cases of as many steps
    def sample(times, guidance):
        return integrate(method, net, data.params, noise, {"y": y}, times, guidance=guidance)

    cases = INFO["sampler"]["cases"]
    for name, case in cases.items():
        guidance = objective.Guidance(case["omega"], case["t_min"], case["t_max"], 0)
        found = sample(sample_times(case["num_steps"]), guidance)
        close(found, data.arrays[f"sampler/{name}/samples"])
    assert sample._cache_size() == len({case["num_steps"] for case in cases.values()})


def test_latents(data, monkeypatch):
    a = data.below("latents")
    mean, std = published_imf.LATENT_MEAN, published_imf.LATENT_STD
    normalisation = codec.normalisation(mean, std, len(mean))
    batch = {"moments": a["moments"], "label": np.zeros(len(a["moments"]), np.int32)}
    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "normal", lambda key, shape, dtype: a["noise"])
        x, _ = codec.Codec(normalisation).encode(batch, jax.random.key(0))
    close(x, a["latents"])
    close(normalisation.undo(a["latents"]), a["unscaled"])


def test_trajectory(data):
    """Some steps of training: losses, learning rates, and where the weights and averages went."""
    info = INFO["trajectory"]
    batches = [data.batch(data.below(f"trajectory/batch_{i}"), data.below(f"trajectory/batch_{i}"))
               for i in range(info["steps"])]  # fmt: skip
    (x, _, _, num_equal, _) = batches[0]
    options = {name: info[name] for name in ("learning_rate", "warmup_steps", "weight_decay")}
    options |= {"adam_b1": info["adam_b1"], "adam_b2": info["adam_b2"]}
    training = default.get_config().training
    training.update(options)
    optimizer, schedule = make_optimizer(training, info["steps"])
    recipe = train.Recipe(
        net=network.function(data.net),
        method=make_objective(info["norm_p"], info["norm_eps"], num_equal, len(x)),
        codec=codec.Codec(),
        optimizer=optimizer,
        ema_vals=(info["ema_val"],),
        log_per_step=1,
    )
    state = train.fresh_state(recipe, data.params)
    step = jax.jit(functools.partial(train.update, recipe))
    for i, (x, y, draws, _, _) in enumerate(batches):
        np.testing.assert_allclose(schedule(i), data.arrays["trajectory/lr"][i], rtol=1e-6)
        state = step(state, x, {"y": y}, draws, jax.random.key(0))
        for name in ("loss", "loss_u", "loss_v"):
            expected = data.arrays[f"trajectory/{name}"][i]
            np.testing.assert_allclose(state.sums[name], expected, rtol=1e-5, err_msg=name)
    start = flat(data.params)
    for tree, name in (
        (state.params, "final_params"),
        (*state.ema_params.values(), "final_ema_params"),
    ):
        found, expected = flat(tree), data.below(f"trajectory/{name}")
        assert found.keys() == expected.keys()
        for key in found:
            moved = np.linalg.norm(expected[key] - start[key])
            error = np.linalg.norm(found[key] - expected[key])
            assert error <= 1e-3 * moved + 1e-7, (name, key)


def test_fresh_parameters(data):
    """Shape and spread of each parameter of a fresh network."""
    shape = (INFO["model"]["input_size"],) * 2 + (INFO["model"]["in_channels"],)
    init = jax.jit(lambda key: network.init_params(data.net, key, shape))
    draws = [flat(init(jax.random.key(i))) for i in range(4)]
    assert draws[0].keys() == INFO["init"].keys()
    assert sum(a.size for a in draws[0].values()) == INFO["parameters"]
    for name, expected in INFO["init"].items():
        arrays = np.stack([draw[name] for draw in draws])
        assert list(arrays.shape[1:]) == expected["shape"], name
        # both are estimates of the same spread from a finite number of draws
        tolerance = 5 * expected["std"] / np.sqrt(2 * draws[0][name].size)
        assert abs(arrays.std() - expected["std"]) <= tolerance + 1e-6, name
        assert abs(arrays.mean() - expected["mean"]) <= 2 * tolerance + 1e-6, name
