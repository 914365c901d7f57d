"""Numbers equal to the published pixel MeanFlow: network, draws, objective, sampler, optimizer."""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import default
from formats import published_pmf
from methods import objective, path, pixel
from methods.sampler import integrate, sample_times
from models import network, pmf_dit
from optimizer import make_optimizer
from run import weights
from utils import averages, trees

pytestmark = pytest.mark.parity
GOLDEN = pathlib.Path(
    os.environ.get("MEANFLOW_GOLDEN") or pathlib.Path(__file__).parents[1] / "golden"
)
INFO = json.loads((GOLDEN / "pmf.json").read_text())
MODEL = INFO["model"]
NET = pmf_dit.build(
    "pmfDiT", image_shape=(MODEL["input_size"], MODEL["input_size"], 3), dtype=jnp.float32,
    num_classes=MODEL["num_classes"], unroll=1, remat=False, fused_attention=False,
    half_residual=False,
    **{name: MODEL[name] for name in ("depth", "hidden_size", "num_heads", "patch_size")},
    aux_head_depth=MODEL["aux_head_depth"],
)  # fmt: skip


class Golden:
    def __init__(self):
        with np.load(GOLDEN / "pmf.npz") as file:
            self.arrays = dict(file)

    def below(self, prefix):
        """What stands below `prefix/`, by the rest of the name."""
        prefix += "/"
        return {k[len(prefix) :]: a for k, a in self.arrays.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def golden():
    return Golden()


@pytest.fixture(scope="module")
def params(golden):
    return published_pmf.from_published(trees.unflatten(golden.below("params")), "params")


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
    return trees.flatten(published_pmf.to_published(jax.device_get(tree), "tree"))


def make(case=None, num_equal=0, batch_size=1, **options):
    """The objective of a case of the json."""
    draws, case = INFO["draws"], case or {}
    return pixel.Pixel(**dict(
        num_classes=MODEL["num_classes"], noise_dist="logit_normal", P_mean=draws["P_mean"],
        P_std=draws["P_std"], data_proportion=(num_equal + 0.25) / batch_size if num_equal else 0.0,
        class_dropout_prob=0.1, cfg_beta=1.0, omega_max=1 + draws["cfg_max"],
        norm_p=case.get("norm_p", 1.0), norm_eps=case.get("norm_eps", 0.01),
        noise_scale=case.get("noise_scale", 1.0), tr_uniform=False,
        lpips_weight=case["lpips_lambda"] if case.get("lpips") else 0.0,
        convnext_weight=case["convnext_lambda"] if case.get("convnext") else 0.0,
        perceptual_max_t=case.get("perceptual_max_t", 1.0),
    ) | options)  # fmt: skip


def test_names_go_both_ways(golden, params):
    theirs = golden.below("params")
    assert sum(a.size for a in theirs.values()) == INFO["num_params"]
    found = flat(params)
    assert found.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    shapes = network.param_shapes(NET, (MODEL["input_size"], MODEL["input_size"], 3))
    trees.check_tree(shapes, params, "params")


def test_forward(golden, params):
    a = golden.below("forward")
    c = {name: a[name] for name in ("t", "h", "t_min", "t_max", "y")} | {"omega": a["w"]}
    net = jax.jit(network.function(NET))
    (found,) = net(params, (a["x"], c))
    close(found.u, a["u"])
    close(found.v, a["v"])
    less = {name: p for name, p in params.items() if not name.startswith("v_")}
    (found,) = net(less, (a["x"], c))
    assert found.v is None
    close(found.u, a["u"])


def test_draws(golden):
    """Times and scales, from given numbers in the place of random ones."""
    a = golden.below("draws")
    equal = a["flow_matching"]
    order = np.asarray(path.merge_rows(np.flatnonzero(~equal), np.flatnonzero(equal)))
    method = make()
    first, second = (
        jax.nn.sigmoid(method.P_mean + method.P_std * a[f"normal_{name}"][order]) for name in "tr"
    )
    t, r = pixel.order_times(first, second, int(equal.sum()))
    np.testing.assert_allclose(t, a["t"][order], rtol=1e-5)
    np.testing.assert_allclose(r, a["r"][order], rtol=1e-5)
    for name, expected in a.items():
        if name.startswith("w_beta_"):
            beta = float(name.removeprefix("w_beta_"))
            found = pixel.improved.omega_of(a["uniform_w"], beta, method.omega_max)
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def stand_in_lpips(a, b):
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


def stand_in_convnext(a, b):
    return jnp.sum((a.mean((1, 2)) - b.mean((1, 2))) ** 2, axis=-1)


def batch(a):
    """x, labels, draws, the number of rows with r = t, and the permutation into our order."""
    equal = a["flow_matching"]
    dropped = np.arange(len(equal)) < np.sum(a["uniform_drop"] < 0.1)
    order = np.asarray(path.merge_rows(np.flatnonzero(~equal), np.flatnonzero(equal)))
    names = ("t", "r", "noise", "w", "t_min", "t_max")
    t, r, noise, w, t_min, t_max = (a[name][order] for name in names)
    draws = pixel.Draws(t, r, noise, dropped[order], w, t_min, t_max)
    return a["x"][order], a["labels"][order], draws, int(equal.sum()), order


@pytest.mark.parametrize("name", INFO["cases"])
def test_objective(golden, params, name):
    case, a = INFO["cases"][name], golden.below(f"objective/{name}")
    x, y, draws, num_equal, order = batch(golden.below("objective"))
    method, net = make(case, num_equal, len(x)), network.function(NET)
    held = {"lpips": stand_in_lpips, "convnext": stand_in_convnext}

    def loss(params):
        return method.loss(net, params, x, {"y": y}, draws, held)

    (value, rows), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(value, a["loss"], rtol=1e-5)
    names = {"loss_u": "loss_u", "loss_v": "loss_v"}
    names |= {f"loss_{kind}": f"aux_loss_{kind}" for kind in ("lpips", "convnext")}
    for ours, theirs in names.items():
        np.testing.assert_allclose(rows[ours].mean(), case[theirs], rtol=1e-5, err_msg=ours)

    fields = jax.jit(functools.partial(method.fields, net))(params, x, {"y": y}, draws)
    # Where r = t and the label is dropped, v_c is without the label, and nothing depends on it.
    same = (draws.t != draws.r) | ~draws.drop
    _, v_t = method.point(x, draws.noise, draws.t)
    guided = np.where(draws.drop[:, None, None, None], v_t, a["v_g_before_drop"][order])
    for found, expected in zip(fields.v_g, guided, strict=True):
        close(found, expected, 5e-5)
    for found, expected in zip(fields.v_c[same], a["v_c"][order][same], strict=True):
        close(found, expected)
    check_gradients(flat(grads), a, case["grad_norm"])


def check_gradients(found, a, whole):
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in found.values()))
    np.testing.assert_allclose(norm, whole, rtol=1e-4)
    norms = {k.removeprefix("grad_norm/"): v for k, v in a.items() if k.startswith("grad_norm/")}
    assert norms.keys() == found.keys()
    for name, expected in norms.items():
        rounding = 1e-7 * whole
        own = np.linalg.norm(found[name])
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=rounding, err_msg=name)
        if (gradient := a.get(f"grad/{name}")) is not None:
            error = np.linalg.norm(found[name] - gradient)
            assert error <= 1e-4 * expected + rounding, name


def test_sampler(golden, params):
    info, a = INFO["sampler"], golden.below("sampler")
    method, net = make({"noise_scale": info["noise_scale"]}), network.function(NET)
    guidance = objective.Guidance(info["omega"], info["t_min"], info["t_max"], 0)
    steps = [name.removesuffix("/samples") for name in a if name.endswith("/samples")]
    for name in steps:
        times = sample_times(0, tuple(a[f"{name}/timesteps"].tolist()))
        found = jax.jit(
            lambda params, times=times: integrate(
                method, net, params, a["noise"], {"y": a["labels"]}, times, guidance=guidance
            )
        )(params)
        close(found, a[f"{name}/samples"])


def test_the_draws_of_a_step():
    """Crops lie within the image and have the area and the shape asked for; times are in order."""
    shape = (512, 32, 48, 3)
    options = dict(lpips_weight=0.4, tr_uniform=True, data_proportion=0.5)
    draws = jax.jit(lambda key: make(**options).draw(key, shape, 0))(jax.random.key(0))
    assert np.sum(draws.t == draws.r) == 256 and np.all(draws.r <= draws.t)
    start, size = draws.crop
    assert np.all(start >= 0) and np.all(start + size <= np.array(shape[1:3]))
    share = size.prod(axis=1) / (32 * 48)
    assert share.min() < 0.12 and share.max() > 0.85
    images = jax.random.normal(jax.random.key(1), shape)[:4]
    whole = pixel.Crop(jnp.zeros((4, 2)), jnp.full((4, 2), 32.0))
    found = pixel.cropped(images[:, :, :32], whole)
    expected = jax.image.resize(images[:, :, :32], (4, 224, 224, 3), "cubic", antialias=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_muon(golden):
    """Steps of Muon for matrices, and of NAdam for everything else."""
    info, a = INFO["muon"], golden.below("muon")
    training = default.get_config().training
    training.update({"optimizer": "muon", **{k: info[k] for k in ("learning_rate", "adam_b2")}})
    params = {name: jnp.array(v) for name, v in golden.below("muon/initial").items()}
    matrix, other = network.Axes((), (0,), (1,)), network.Axes((), (), ())
    axes = {name: matrix if p.ndim == 2 else other for name, p in params.items()}
    change, _ = make_optimizer(training, info["steps"], axes=lambda: axes)
    state = change.init(params)
    for i in range(info["steps"]):
        grads = {name: a[f"grad_{i}/{name}"] for name in params}
        updates, state = change.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name, found in params.items():
            np.testing.assert_allclose(found, a[f"params_{i}/{name}"], atol=1e-6, err_msg=name)


def test_half_lives(golden):
    a = golden.below("ema")
    halves = [name.removeprefix("beta_") for name in a if name.startswith("beta_")]
    assert halves
    for half in halves:
        found = 1 - averages.half_life_weight(jnp.float32(a["step"]), float(half), 1024)
        np.testing.assert_allclose(found, a[f"beta_{half}"], atol=1e-6)


def test_averages_by_half_life_in_a_step():
    state = {"ema_0.5": jnp.ones(3), "ema_half2": jnp.ones(3)}
    found = averages.after_step(state, jnp.zeros(3), 100, (0.5,), 1, (), (2.0,), images=50)
    # 50 images a step, half forgotten in 250 of the 5,000 seen: 2 ** -0.2 stays
    np.testing.assert_allclose(found["ema_half2"], 2**-0.2, rtol=1e-5)
    np.testing.assert_allclose(found["ema_0.5"], 0.5)


def test_a_published_checkpoint_is_read(golden, params, tmp_path):
    """Written as the published code writes it: an average for each half-life."""
    tree = trees.unflatten(golden.below("params"))
    state = {"step": 7, "params": tree, "ema_params": {}}
    for half in ("500", "2000", "1000"):
        state["ema_params"][half] = jax.tree.map(lambda a, h=half: a * np.float32(h), tree)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint_7", state)
    found = weights.read(tmp_path)
    assert (found.step, found.ema, found.opt_state) == (7, "ema_half2000", None)
    assert list(found.ema_params) == ["ema_half500", "ema_half1000", "ema_half2000"]
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    for name, average in found.ema_params.items():
        expected = trees.flatten(params)
        for key, array in trees.flatten(average).items():
            factor = np.float32(name.removeprefix("ema_half"))
            np.testing.assert_array_equal(array, factor * expected[key])
    assert "pmf_b16" in found.configs
