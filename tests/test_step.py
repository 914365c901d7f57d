"""The train step: clipped gradients, and steps that are not finite."""

import jax
import jax.numpy as jnp
import make
import numpy as np
import optax
import pytest

import train
from models import codec
from optimizer import make_optimizer
from utils import train_metrics


def one_step(scale=1.0, **options):
    """A step of a network of two numbers: (state before, state after)."""

    def net(params, z, t, h, y):
        return params["a"] * z + params["b"] * t[:, None, None, None]

    config = make.config(
        *[f"training.{name}={value}" for name, value in options.items()], name="digits"
    )
    optimizer, _ = make_optimizer(config.training, 10)
    skip = config.training.skip_nonfinite
    method = make.method(guidance_eq="none")
    recipe = train.Recipe(
        make.as_net(net), method, codec.Codec(), optimizer, (0.9,), skip_nonfinite=skip
    )
    params = {"a": jnp.float32(0.5 * scale), "b": jnp.float32(-0.2 * scale)}
    state = train.fresh_state(recipe, params)
    images = np.random.RandomState(0).randint(0, 256, (8, 4, 4, 1)).astype(np.uint8)
    batch = {"image": images, "label": np.arange(8, dtype=np.int32) % 3}
    return state, jax.jit(lambda s: train.train_step(recipe, jax.random.key(1), s, batch))(state)


def test_gradients_are_clipped_by_their_global_norm():
    _, free = one_step()
    _, clipped = one_step(grad_clip=0.01)
    norm = float(free.sums["grad_norm"])
    assert norm > 0.1
    assert np.isclose(clipped.sums["grad_norm"], norm)  # as it was before
    mu, mu_free = (optax.tree.get(s.opt_state, "mu") for s in (clipped, free))
    assert np.isclose(optax.tree.norm(mu), 0.1 * 0.01, rtol=1e-4)  # (1 - b1) times the gradient
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b * 0.01 / norm, atol=1e-9), mu, mu_free
    )
    _, loose = one_step(grad_clip=10 * norm)
    jax.tree.map(np.testing.assert_array_equal, loose.params, free.params)


def test_a_step_that_is_not_finite_is_left_out_only_where_asked():
    before, kept = one_step(scale=1e30, skip_nonfinite=True)
    for name in ("params", "ema_params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(kept, name), getattr(before, name))
    assert int(kept.step) == 1 and kept.sums["skipped"] == 1 and kept.sums["steps"] == 0
    train_metrics.check_finite(jax.device_get(kept.sums))
    _, spoilt = one_step(scale=1e30)
    with pytest.raises(FloatingPointError, match=r"^step 1: loss, .* not finite"):
        train_metrics.check_finite(jax.device_get(spoilt.sums))
    _, fine = one_step(skip_nonfinite=True)
    _, plain = one_step()
    jax.tree.map(np.testing.assert_array_equal, fine, plain)
