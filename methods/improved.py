"""Improved Mean Flows (arXiv 2512.02012): guidance as an input, and a loss on the velocity.

The network is given the guidance scale omega and its interval [t_min, t_max], drawn at random here
and chosen at sampling, and predicts two fields: the average velocity u and, by a head of its own,
the instantaneous velocity v. By the MeanFlow identity V = u + (t - r) du/dt is a velocity; it is
compared with the guided velocity v_g, and du/dt is taken along the network's own v.

Rows with r = t have h = 0 and the interval [0, 1], so that the pass which the loss differentiates
is the conditional prediction that the guidance asks for, and (t - r) du/dt is zero: at a share of
1/2 a step takes 5 instead of 7 forward passes.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from methods import objective, path
from methods.path import by_row, merge_rows, split_rows


class Draws(NamedTuple):
    """What is random in one step."""

    t: jax.Array  # (B,) in [0, 1]
    r: jax.Array  # (B,) in [0, t]
    noise: jax.Array  # (B, ..., C), standard normal
    drop: jax.Array  # (B,) bool: the row trains without its label
    omega: jax.Array  # (B,) in [1, omega_max]
    t_min: jax.Array  # (B,) in [0, 1/2]; 0 where r = t
    t_max: jax.Array  # (B,) in [1/2, 1]; 1 where r = t


class Fields(NamedTuple):
    """What the loss of a batch is made of, each (B, ..., C)."""

    u: jax.Array
    v: jax.Array
    du_dt: jax.Array  # 0 where r = t, where nothing depends on it
    v_g: jax.Array  # the guided velocity, the target
    v_c: jax.Array  # by which it is guided; without the label where r = t and the label is dropped


def omega_of(uniform, beta, omega_max):
    """Maps [0, 1) to scales of [1, omega_max) with a density proportional to omega^-beta."""
    if beta == 1:
        return jnp.exp(uniform * math.log(omega_max))
    power = 1 - beta
    return (1 + uniform * (omega_max**power - 1)) ** (1 / power)


@dataclasses.dataclass(frozen=True)
class Improved(objective.Objective):
    """The objective with its options; `configs/default.py` (`method`) says what each one means."""

    num_classes: int
    noise_dist: str
    P_mean: float
    P_std: float
    data_proportion: float
    class_dropout_prob: float
    cfg_beta: float
    omega_max: float
    norm_p: float
    norm_eps: float

    rows = ("error_u", "error_v", "loss_u", "loss_v")
    conditions = ("omega", "t_min", "t_max")
    needs_v = True
    guided_at_sampling = True

    def __post_init__(self):
        objective.check_options(self)
        objective.check(
            self.omega_max >= 1, "omega_max", f"must not be below 1, got {self.omega_max}"
        )

    def check_unguided(self):
        rule = "must be 1 where dataset.num_classes is 0: without classes there is no guidance"
        objective.check(self.omega_max == 1, "omega_max", rule)

    def passes(self, batch_size):
        """Counts 5 at a share of 1/2, where a step with all rows alike takes 7."""
        return 6 - 2 * self.equal_count(batch_size) / batch_size

    def passes_of_both(self, batch_size):
        """Counts the pass that the loss differentiates, and its backward pass."""
        return 3.0

    def draw(self, key, shape, step):
        """See `Objective`; t, r and the dropped labels as `MeanFlow` draws them."""
        batch_size = shape[0]
        num_equal = self.equal_count(batch_size)
        keys = jax.random.split(key, 7)
        times = [
            path.draw_time(k, batch_size, self.noise_dist, self.P_mean, self.P_std)
            for k in keys[:2]
        ]
        t, r = path.order_times(*times, num_equal)
        omega, low, high = (jax.random.uniform(k, (batch_size,)) for k in keys[2:5])
        low, _ = split_rows(low / 2, num_equal)
        high, _ = split_rows(0.5 + high / 2, num_equal)
        return Draws(
            t,
            r,
            jax.random.normal(keys[5], shape),
            path.draw_dropped(keys[6], batch_size, num_equal, self.class_dropout_prob),
            omega_of(omega, self.cfg_beta, self.omega_max),
            merge_rows(low, jnp.zeros(num_equal)),
            merge_rows(high, jnp.ones(num_equal)),
        )

    def loss(self, net, params, x, given, draws, held):
        """See `Objective`; algorithm 1 with the auxiliary head of v.

        `error_u` and `error_v` are the squared errors of V and v, sums before the adaptive weight,
        `loss_u` and `loss_v` the same as means.
        """
        return self.of_fields(self.fields(net, params, x, given, draws), x, draws)

    def of_fields(self, fields, x, draws):
        """Computes the loss and the rows of `loss` from the `Fields` of a batch."""
        u, v, du_dt, v_g, _ = fields
        V = u + by_row(draws.t - draws.r, u) * du_dt
        error_u, error_v = path.squared_error(V, v_g), path.squared_error(v, v_g)
        weighted = [
            error * path.adaptive_weight(error, self.norm_p, self.norm_eps)
            for error in (error_u, error_v)
        ]
        rows = {"error_u": error_u, "error_v": error_v}
        rows |= {"loss_u": error_u / x[0].size, "loss_v": error_v / x[0].size}
        return jnp.mean(sum(weighted)), stop_gradient(rows)

    def point(self, x, noise, t):
        """Computes z_t and the velocity there, each (B, ..., C)."""
        return path.z_t(x, noise, t), noise - x

    def fields(self, net, params, x, given, draws):
        """Computes the `Fields` of a batch; a gradient flows through u and v alone."""
        t, r, noise, drop, omega, t_min, t_max = draws[:7]
        num_equal = self.equal_count(len(x))
        z, v_t = self.point(x, noise, t)
        scale = jnp.where((t_min <= t) & (t <= t_max), omega, 1.0)

        # 0: rows with r != t; 1: rows with r = t, where h = 0
        c = {"t": t, "h": t - r, "omega": omega, "t_min": t_min, "t_max": t_max}
        c |= self.dropped(given, drop)
        (z0, z1), (c0, c1) = (path.split_tree(a, num_equal) for a in (z, c))
        (given0, _), (scale0, _) = (path.split_tree(a, num_equal) for a in (given, scale))

        # By the current parameters, and one batch for all that is not differentiated: v_c of the
        # rows with r != t, v_u of all rows.
        c_g = (
            instant(c0["t"], scale0, given0),
            instant(t, jnp.ones_like(t), self.unconditional(given)),
        )
        guides = merge_rows(z0, z), jax.tree.map(merge_rows, *c_g)
        v_c0, v_u = split_rows(stop_gradient(net(stop_gradient(params), guides)[0].v), len(x))

        def predict(z, t, h):
            differ, equal = net(params, (z, c0 | {"t": t, "h": h}), (z1, c1), jvp=0)
            return differ.u, (differ.v, equal)

        # du/dt along the trajectory of the network's own v: dz = v_c, dt = 1, dr = 0
        t0, h0 = c0["t"], c0["h"]
        tangents = (v_c0, jnp.ones_like(t0), jnp.ones_like(h0))
        u0, du_dt, (v0, equal) = jax.jvp(predict, (z0, t0, h0), tangents, has_aux=True)

        v_c = merge_rows(v_c0, stop_gradient(equal.v))
        v_g = v_t + by_row(1 - 1 / scale, x) * (v_c - v_u)
        return Fields(
            u=merge_rows(u0, equal.u),
            v=merge_rows(v0, equal.v),
            du_dt=merge_rows(stop_gradient(du_dt), jnp.zeros_like(equal.u)),
            v_g=jnp.where(by_row(drop, x), v_t, v_g),
            v_c=v_c,
        )

    def velocity(self, net, params, z, t, r, given, guidance=None):
        """Computes u(z_t, t - r, omega, t_min, t_max, y), with one guidance at all times, or none.

        The interval is an input of the network and nothing else, also where t lies outside.
        """
        c = instant(t, jnp.ones_like(t), given) | {"h": t - r}
        if guidance is not None:
            c |= {name: jnp.full_like(t, getattr(guidance, name)) for name in self.conditions}
        return net(params, (z, c))[0].u


def instant(t, omega, given):
    """Makes the conditions of the instantaneous velocity at t, with the scale omega (B,)."""
    zero = jnp.zeros_like(t)
    return {"t": t, "h": zero, "omega": omega, "t_min": zero, "t_max": zero + 1, **given}
