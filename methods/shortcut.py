"""Shortcut models (arXiv 2410.12557): a step of length h learns two steps of length h/2.

On a grid of M steps, M a power of two. Most rows learn the velocity as the average over h = 1/M;
the others ("bootstrap") that over h = 2/M, 4/M, ... 1: methods/split.py's formula with alpha = 1/2,
averaged weights in both passes, and clipping.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from methods import objective, path
from methods.path import by_row, merge_rows


class ShortcutDraws(NamedTuple):
    """`objective.Draws`, and which rows are guided."""

    t: jax.Array
    r: jax.Array
    noise: jax.Array
    drop: jax.Array
    guided: jax.Array  # (B,) bool


@dataclasses.dataclass(frozen=True)
class Shortcut(objective.Objective):
    """The objective with its options.

    A share `data_proportion` of the rows (7/8) learns the velocity, with 3 F; bootstrap rows take
    5 F, and 7 F with guidance: `omega` guides those with the smallest h, and the longer steps
    inherit it. Which rows these are is not known to the program, so it asks for all of them.
    """

    num_classes: int
    data_proportion: float
    class_dropout_prob: float
    omega: float
    grid_steps: int
    target_clip: float
    norm_p: float
    norm_eps: float

    rows = ("error", "v_loss")

    def __post_init__(self):
        objective.check_options(self)
        steps = self.grid_steps
        power = steps >= 2 and steps & (steps - 1) == 0
        objective.check(power, "grid_steps", f"must be a power of two from 2 on, got {steps}")
        objective.check(self.target_clip >= 0, "target_clip", "must not be negative")

    @property
    def guided(self):
        return self.omega != 1 and self.num_classes > 0

    def passes(self, batch_size):
        flow = self.equal_count(batch_size)
        return (3 * flow + (7 if self.guided else 5) * (batch_size - flow)) / batch_size

    def draw(self, key, shape, step):
        """See `Objective`. Bootstrap rows keep their labels."""
        batch_size, num_flow = shape[0], self.equal_count(shape[0])
        levels = self.grid_steps.bit_length() - 1
        each = (batch_size - num_flow) // levels
        h = np.full(batch_size - num_flow, 1.0, np.float32)
        h[: each * levels] = np.repeat(0.5 ** np.arange(levels - 1, -1, -1), each)
        guided = np.arange(len(h)) < each  # those with h = 2/M
        flow = np.full(num_flow, 1 / self.grid_steps, np.float32)
        h, is_flow = merge_rows(h, flow), merge_rows(h < 0, flow > 0)

        key_t, key_noise, key_drop = jax.random.split(key, 3)
        count = jnp.int32(1 / h)
        t = 1 - jax.random.randint(key_t, (batch_size,), 0, count) * h
        drop = jax.random.uniform(key_drop, (batch_size,)) < self.class_dropout_prob
        noise = jax.random.normal(key_noise, shape)
        return ShortcutDraws(t, t - h, noise, drop & is_flow, merge_rows(guided, flow < 0))

    def loss(self, net, params, x, given, draws, held):
        """See `Objective`; `error` and `v_loss` as in `methods.meanflow`."""
        t, r, noise, drop, guided = draws
        v, z, h = noise - x, path.z_t(x, noise, t), t - r
        batch = (z, {"t": t, "h": h, **self.dropped(given, drop)}), guided, v
        ((long, guided, _), (flow, _, v_flow)) = path.split_tree(batch, self.equal_count(len(x)))
        u_long, u_flow = (velocity.u for velocity in net(params, long, flow))
        target = self.target(net, held["ema_params"], *long, guided)

        u, u_tgt = merge_rows(u_long, u_flow), merge_rows(target, v_flow)
        error = path.squared_error(u, stop_gradient(u_tgt))
        weight = path.adaptive_weight(error, self.norm_p, self.norm_eps)
        v_loss = path.squared_error(stop_gradient(u), v)
        return jnp.mean(weight * error), {"error": stop_gradient(error), "v_loss": v_loss}

    def target(self, net, params, z, c, guided):
        """Averages two steps of half the length, the second from where the first one ends."""
        half = c["h"] / 2

        def average(z, t):
            c_half = c | {"t": t, "h": half}
            if not self.guided:
                return net(params, (z, c_half))[0].u
            batches = (z, c_half), (z, self.unconditional(c_half))
            u, u_null = (velocity.u for velocity in net(params, *batches))
            return jnp.where(by_row(guided, z), u_null + self.omega * (u - u_null), u)

        a = average(z, c["t"])
        b = average(self.clipped(z - by_row(half, z) * a), c["t"] - half)
        return self.clipped((a + b) / 2)

    def clipped(self, a):
        return jnp.clip(a, -self.target_clip, self.target_clip) if self.target_clip else a
