"""Numbers of the objective family: losses, gradients, targets, schedules, times, samplers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import Cases, tree

from configs import default
from methods import (
    alphaflow,
    consistency,
    flow,
    meanflow,
    objective,
    shortcut,
    soflow,
    split,
    splitmeanflow,
    tim,
)
from methods.sampler import integrate, sample_times
from models import network

pytestmark = pytest.mark.parity

CASES = Cases("family")
INFO, CLASSES, NET = CASES.info, CASES.classes, CASES.net
# Options that a case does not name.
OPTIONS = dict(
    num_classes=CLASSES, noise_dist="logit_normal", P_mean=-0.4, P_std=1.0, P_mean_r=None,
    P_std_r=None, P_mean_equal=None, P_std_equal=None, class_dropout_prob=0.1, omega=1.0,
    kappa=0.0, t_start=0.0, t_end=1.0, mix=1.0, fade_start=1.0, tangent=(0.0, 1.0),
    norm_eps_per_pixel=0.0, target_clip=0.0, alpha_begin=0, alpha_end=1, alpha_floor=False,
    alpha_schedule="constant", alpha_first=1.0, alpha_last=1.0, difference_step=0.005,
    difference_path="data", grid_steps=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def arrays():
    return CASES.arrays()


@pytest.fixture(scope="module")
def params(arrays):
    return tree(arrays, "params/")


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def build(kind, **options):
    """An objective of the options that it has."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in options.items() if name in names})


def make(case, num_equal, batch_size):
    """The objective that a case of the json describes."""
    guidance = case["guidance"]
    options = (
        default.get_config().method.to_dict()
        | OPTIONS
        | {
            "guidance_eq": guidance["kind"],
            "norm_p": case["norm_p"],
            "norm_eps_per_pixel": case["norm_eps"] / INFO["pixels"],
            "norm_eps": case["norm_eps"],
            "data_proportion": (num_equal + 0.25) / batch_size if num_equal else 0.0,
            "target_clip": case.get("clip", 0.0),
            "omega": guidance.get("omega", guidance.get("cfg", case.get("cfg_scale", 1.0))),
            "difference_step": case.get("epsilon", 1.0),
            "difference_path": case.get("path", "data"),
            "alpha_schedule": "grid" if case.get("target_params") == "ema" else "constant",
        }
    )
    names = {"kappa": "kappa", "t_start": "t_start", "t_end": "t_end", "mix": "mix"}
    names |= {"fade_start": "fade_start"}
    options |= {ours: guidance[name] for name, ours in names.items() if name in guidance}
    if case["objective"] == "split" and case.get("weight") == "alpha":
        kind = alphaflow.Trajectory if case["alpha"][0] == 1 else alphaflow.AlphaFlow
    elif case["objective"] == "split":
        kind = soflow.SoFlow if case.get("weight") == "soflow" else consistency.Consistency
    else:
        kind = {
            "flow": flow.Flow,
            "splitmeanflow": splitmeanflow.SplitMeanFlow,
            "shortcut": shortcut.Shortcut,
            "difference": tim.TiM if case.get("weight") == "tangent" else tim.Difference,
            "meanflow": alphaflow.End if "alpha" in case else meanflow.MeanFlow,
        }[case["objective"]]
    return build(kind, **options)


def draws_of(method, a, order):
    t, r, drop = (a[name][order] for name in ("t", "r", "drop"))
    noise = a["noise"][order]
    if isinstance(method, shortcut.Shortcut):
        return shortcut.ShortcutDraws(t, r, noise, drop, a["guided"][order])
    if isinstance(method, split.Split):
        alpha = a.get("alpha", np.ones(len(t)))[order].astype(np.float32)
        return split.SplitDraws(t, r, noise, drop, alpha)
    return objective.Draws(t, r, noise, drop)


@pytest.mark.parametrize("name", INFO["cases"])
def test_objective(arrays, params, name):
    def of(case, num_equal, a, order):
        method = make(case, num_equal, len(order))
        return method, draws_of(method, a, order)

    CASES.check(arrays, params, name, of)


@pytest.mark.parametrize("name", INFO["schedules"])
def test_schedule(name):
    info = INFO["schedules"][name]
    k = jnp.array(info["steps"])
    if info["kind"] == "sigmoid":
        alpha = alphaflow.alpha_at(k, info["begin"], info["end"], info["gamma"], info["clamp"])
        floor = jnp.maximum(alpha, info["clamp"])
        np.testing.assert_allclose(floor, info["alpha_floor"], rtol=1e-5)
    else:
        x = split.progress(k, 0, info["total"])
        alpha = split.schedule(info["kind"], x, info["first"], info["last"])
    np.testing.assert_allclose(alpha, info["alpha"], rtol=1e-5, atol=1e-7)


def test_soflow_alpha_of_short_rows(arrays):
    for name, case in INFO["cases"].items():
        if name.startswith("soflow"):
            a = {key: arrays[f"objective/{name}/{key}"] for key in ("t", "r", "alpha")}
            differ = a["t"] > a["r"]
            alpha = soflow.limited(jnp.float32(case["alpha_nominal"]), a["t"] - a["r"])
            np.testing.assert_allclose(alpha[differ], a["alpha"][differ], rtol=1e-5)


@pytest.mark.parametrize("start", INFO["fade"])
def test_fade(start):
    info = INFO["fade"][start]
    t = jnp.array(info["t"], jnp.float32)
    np.testing.assert_allclose(split.fade(t, float(start)), info["fade"], atol=1e-5)


LAWS = {
    "alphaflow": (alphaflow.Trajectory, (-0.4, 1.0), (None, None), (None, None)),
    "soflow": (soflow.SoFlow, (0.2, 0.8), (-1.0, 0.8), (-0.2, 1.0)),
    "soflow_cifar": (soflow.SoFlow, (-0.9, 1.6), (-4.0, 1.6), (None, None)),
}


@pytest.mark.parametrize("name", LAWS)
def test_times(arrays, name):
    """The laws that papers give: (P_mean, P_std) of t, of r, and of t in rows with r = t."""
    kind, first, second, equal = LAWS[name]
    names = (("P_mean", "P_std"), ("P_mean_r", "P_std_r"), ("P_mean_equal", "P_std_equal"))
    options = OPTIONS | {"guidance_eq": "none", "norm_p": 1.0, "norm_eps": 1.0}
    options |= {"data_proportion": 0.5}
    for pair, values in zip(names, (first, second, equal), strict=True):
        options |= dict(zip(pair, values, strict=True))
    t_equal, t, r = build(kind, **options).times(*jnp.float32(arrays["laws/normals"]))
    found = {f"laws/{name}_t_equal": t_equal, f"laws/{name}_t": t, f"laws/{name}_r": r}
    compared = [key for key in found if key in arrays]
    assert f"laws/{name}_t" in compared
    for key in compared:
        np.testing.assert_allclose(found[key], arrays[key], rtol=1e-5, atol=1e-7, err_msg=key)


def test_forward(arrays, params):
    inputs = (arrays["batch/x"], *(arrays[f"forward/{key}"] for key in ("t", "h", "y")))
    out, expected = CASES.predict(params, *inputs), arrays["forward/out"]
    assert np.abs(out - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", INFO["samplers"])
def test_sampler(arrays, params, name):
    info, noises = INFO["samplers"][name], jnp.array(arrays["sampler/noises"])
    guidance, calls, net = info.get("guidance"), [], network.function(NET)
    options = OPTIONS | {"guidance_eq": "none", "norm_p": 0.0, "norm_eps": 1.0}
    average = info["method"] in ("ode", "consistency")
    kind = alphaflow.Trajectory if average else flow.Flow
    method = build(kind, **options, data_proportion=1.0)
    if guidance:
        guidance = objective.Guidance(
            *jnp.float32([guidance[key] for key in ("scale", "t_start", "t_end")]),
            jnp.int32(guidance["channels"]),
        )

    def counted(params, *batches):
        jax.debug.callback(lambda: calls.append(len(batches)))
        return net(params, *batches)

    times = sample_times(0, tuple(info["times"]))
    x = jax.jit(
        lambda params, guidance: integrate(
            method, counted, params, noises[0], {"y": arrays["sampler/labels"]}, times,
            guidance=guidance, sampler=info["method"], fresh=lambda k: noises[k],
        )
    )(params, guidance)  # fmt: skip
    jax.effects_barrier()
    assert len(calls) == info.get("evaluations", len(calls))
    expected = arrays[f"sampler/{name}/samples"]
    assert np.abs(x - expected).max() <= 1e-5 * np.abs(expected).max()
