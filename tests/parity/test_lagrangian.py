"""Numbers of Lagrangian self-distillation: losses, errors, targets, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import Cases, tree

from methods import lagrangian, objective, path
from models import network

pytestmark = pytest.mark.parity
CASES = Cases("lsd")


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


def make(case, num_equal, batch_size):
    """The objective that a case of the json describes."""
    guidance = case["guidance"]
    names = ("omega", "kappa", "t_start", "t_end")
    plain = dict(omega=1.0, kappa=0.0, t_start=0.0, t_end=1.0)
    return lagrangian.Lagrangian(
        num_classes=CASES.classes, noise_dist="uniform", P_mean=0.0, P_std=1.0,
        data_proportion=(num_equal + 0.25) / batch_size if num_equal else 0.0,
        class_dropout_prob=0.1, guidance_eq=guidance["kind"], norm_p=case["norm_p"],
        norm_eps=case["norm_eps"], norm_eps_per_pixel=0.0,
        target_params=case.get("target_params", "params"),
        **(plain | {name: guidance[name] for name in names if name in guidance}),
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES.info["cases"])
def test_objective(arrays, params, name):
    def of(case, num_equal, a, order):
        draws = objective.Draws(*(a[name][order] for name in ("t", "r", "noise", "drop")))
        return make(case, num_equal, len(order)), draws

    CASES.check(arrays, params, name, of)


def test_forward(arrays, params):
    inputs = (arrays["batch/x"], *(arrays[f"forward/{key}"] for key in ("t", "h", "y")))
    out, expected = CASES.predict(params, *inputs), arrays["forward/out"]
    assert np.abs(out - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_flow_of_a_gaussian_has_no_error():
    """Data N(mu, s^2): the exact average velocity. At a single point du/dh would be 0."""
    mu, s, shape = 0.3, 0.7, (8, 4, 4, 1)
    case = {"guidance": {"kind": "none"}, "norm_p": 0.0, "norm_eps": 1.0}
    method = make(case, 0, shape[0])

    def net(params, *batches, jvp=None, through=False):
        return tuple(network.Velocity(exact(z, c["t"], c["h"])) for z, c in batches)

    def exact(z, t, h):
        t, h = (path.by_row(a, z) for a in (t, h))
        at_t, at_r = ((1 - a) ** 2 * s**2 + a**2 for a in (t, t - h))
        end = (1 - t + h) * mu + jnp.sqrt(at_r / at_t) * (z - (1 - t) * mu)
        # the limit at h = 0: the velocity of the same flow
        v = -mu + (t - (1 - t) * s**2) / at_t * (z - (1 - t) * mu)
        return jnp.where(h == 0, v, (z - end) / jnp.where(h == 0, 1, h))

    draws = method.draw(jax.random.key(0), shape, 0)
    x = jax.random.normal(jax.random.key(1), shape)
    y = jnp.zeros(len(x), jnp.int32)
    _, rows = method.loss(net, {}, x, {"y": y}, draws, {})
    assert np.all(draws.r < draws.t)
    np.testing.assert_allclose(rows["error"], 0, atol=1e-6)
