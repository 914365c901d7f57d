"""Lagrangian self-distillation: its gradient flows through a derivative, in half precision too."""

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest

import parts
from methods import lagrangian
from models import network

SHAPE = (4, 4, 1)


def gradients(name, dtype, through):
    """The gradient of the sum of (du/dh)^2 by the parameters, flat."""
    module = parts.make(make.config(*make.PIXELS, *make.NETWORKS[name])).module
    params = make.params(module, SHAPE, 0.2)
    net = network.function(module.clone(dtype=dtype))
    keys = jax.random.split(jax.random.key(1), 3)
    z, t = jax.random.normal(keys[0], (16, *SHAPE)), jax.random.uniform(keys[1], (16,))
    h = t * jax.random.uniform(keys[2], (16,))
    c = {"t": t, "y": jnp.arange(16) % 3}

    def loss(params):
        def u(h):
            return net(params, (z, c | {"h": h}), jvp=0, through=through)[0].u

        return jnp.sum(jax.jvp(u, (h,), (jnp.ones_like(h),))[1] ** 2)

    return np.concatenate([g.ravel() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params))])


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("name", ["DiT", "imfDiT", "UNet"])
def test_a_gradient_flows_through_the_tangent(name):
    exact = gradients(name, jnp.float32, through=True)
    rounded = gradients(name, jnp.bfloat16, through=True)
    assert cosine(rounded, exact) > 0.99
    assert abs(np.linalg.norm(rounded) / np.linalg.norm(exact) - 1) < 0.05
    if name != "UNet":  # the forms for half precision stop it, without an error
        assert cosine(gradients(name, jnp.bfloat16, through=False), exact) < 0.99


def test_draws_and_cost():
    config = make.config(
        *make.PIXELS, *make.NETWORKS["DiT"], "method.name=lagrangian", "method.noise_dist=uniform",
        "method.norm_eps_per_pixel=0.01",
    )  # fmt: skip
    method = parts.make(config).method
    assert isinstance(method, lagrangian.Lagrangian)
    draws = jax.jit(lambda key: method.draw(key, (4096, *SHAPE), 0))(jax.random.key(0))
    equal = np.asarray(draws.t == draws.r)
    assert equal.sum() == 3072 and np.all(draws.r <= draws.t)
    # One uniform time where r = t; the larger and the smaller of two elsewhere.
    np.testing.assert_allclose(draws.t[equal].mean(), 1 / 2, atol=0.02)
    np.testing.assert_allclose(draws.t[~equal].mean(), 2 / 3, atol=0.02)
    np.testing.assert_allclose(draws.r[~equal].mean(), 1 / 3, atol=0.02)
    assert method.passes(256) == 4.75
