"""The train step: clipped gradients, and steps that are not finite."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import make
import numpy as np
import optax
import pytest

import train
from models import codec
from optimizer import make_optimizer
from run import resume
from utils import train_metrics

TRAINING = make.config(name="digits").training


def made(scale=1.0, **options):
    """A state of a network of two numbers, and the function of its step."""

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
    return state, jax.jit(lambda s: train.train_step(recipe, jax.random.key(1), s, batch))


def one_step(scale=1.0, **options):
    """The state before a step and after it."""
    state, step = made(scale, **options)
    return state, step(state)


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


def test_the_rate_is_that_of_the_steps_of_the_run():
    """Not of optax's own count, which steps that are left out and fresh moments leave behind."""
    state, step = made(warmup_steps=100, warmup_init=0.0)
    after = step(state._replace(step=jnp.int32(40)))
    counts = dict(optax.tree.get_all_with_path(after.opt_state, "count"))
    assert sorted(map(int, counts.values())) == [1, 41]  # of Adam, and of the schedule
    rate = 0.4 * make.config(name="digits").training.learning_rate
    # Adam's first step moves each of two weights by the rate.
    assert float(after.sums["update_norm"]) == pytest.approx(rate * 2**0.5, rel=1e-3)


def test_a_gradient_whose_square_is_not_finite_counts_as_not_finite():
    """Its second moment would be infinite, and the weight would never move again."""
    rows = {"error": jnp.ones(4), "v_loss": jnp.ones(4)}

    def loss(net, params, x, given, draws, held):
        return 2e19 * (params["a"] - 1), rows

    method = types.SimpleNamespace(loss=loss, rows=tuple(rows))
    recipe = train.Recipe(None, method, None, make_optimizer(TRAINING, 10)[0], (0.9,))
    recipe = dataclasses.replace(recipe, net=lambda *a, key: None, skip_nonfinite=True)
    state, times = train.fresh_state(recipe, {"a": jnp.float32(1)}), jnp.ones(4)
    draws = types.SimpleNamespace(t=times, r=times)
    after = train.update(recipe, state, jnp.ones((4, 1)), {}, draws, jax.random.key(0))
    assert after.sums["skipped"] == 1 and float(after.params["a"]) == 1
    resume.check_moments(after.opt_state)


def test_moments_that_are_not_finite_are_said(caplog):
    _, after = one_step()
    resume.check_moments(after.opt_state)
    assert caplog.text == ""
    broken = optax.tree.set(after.opt_state, nu={"a": jnp.float32(np.inf), "b": jnp.float32(1)})
    resume.check_moments(broken)
    assert "1 moments of the optimizer are not finite" in caplog.text
