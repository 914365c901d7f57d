"""Lagrangian self-distillation of flow maps (arXiv 2505.18825): the end of an interval moves.

The flow map is f(z_t, t, r) = z_t - h u(z_t, t, h) with h = t - r. Moved along the exact flow, its
end changes by the velocity there, which is the prediction

    w = d/dh [h u(z_t, t, h)] = u + h du/dh,    compared with V = u(f, r, 0).

All knowledge of the velocity comes from the rows with r = t, which are flow matching. The gradient
flows through u and through du/dh, so the network has to be differentiable forward and then backward
(`Network.together`, `through`); f and V have none.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from methods import objective, path
from methods.path import by_row, merge_rows

TARGETS = ("params", "ema")


@dataclasses.dataclass(frozen=True)
class Lagrangian(objective.Objective):
    """The objective with its options; `configs/default.py` (`method`) says what each one means."""

    num_classes: int
    noise_dist: str
    P_mean: float
    P_std: float
    data_proportion: float
    class_dropout_prob: float
    guidance_eq: str
    omega: float
    kappa: float
    t_start: float
    t_end: float
    norm_p: float
    norm_eps: float
    norm_eps_per_pixel: float
    target_params: str

    rows = ("error", "v_loss")
    needs_through = True

    def __post_init__(self):
        objective.check_options(self)
        rule = f"is one of {' | '.join(TARGETS)}, not {self.target_params!r}"
        objective.check(self.target_params in TARGETS, "target_params", rule)

    def passes(self, batch_size):
        """Counts 4.75 at a share of 3/4 with guidance, 4 without: 7 for rows with r < t."""
        equal = self.equal_count(batch_size)
        return (equal * (4 if path.is_guided(self) else 3) + 7 * (batch_size - equal)) / batch_size

    def draw(self, key, shape, step):
        """See `Objective`: one time where r = t, else the larger and the smaller of two."""
        batch_size, num_equal = shape[0], self.equal_count(shape[0])
        *keys, key_noise, key_drop = jax.random.split(key, 5)
        equal, first, second = (
            path.draw_time(k, batch_size, self.noise_dist, self.P_mean, self.P_std) for k in keys
        )
        t, r = jnp.maximum(first, second), jnp.minimum(first, second)
        t, r = (path.equal_in(equal, a, num_equal) for a in (t, r))
        drop = jax.random.uniform(key_drop, (batch_size,)) < self.class_dropout_prob
        return objective.Draws(t, r, jax.random.normal(key_noise, shape), drop)

    def loss(self, net, params, x, given, draws, held):
        """See `Objective`; `error` is the squared error of w, `v_loss` that of u against v = e - x.

        Only rows with r = t are guided: u(., ., 0) is then the guided velocity, and V has it too.
        """
        t, r, noise, drop = draws
        num_equal, v, z = self.equal_count(len(x)), noise - x, path.z_t(x, noise, t)
        c, unconditional = self.dropped(given, drop), self.unconditional(given)

        # 0: rows with r < t; 1: rows with r = t, where h = 0
        split = [path.split_tree(a, num_equal) for a in (z, t, r, v, drop, c, unconditional)]
        (z0, z1), (t0, t1), (r0, _), (_, v1), (_, drop1), (c0, c1), (_, unconditional1) = split
        h0, zero0, zero1 = t0 - r0, jnp.zeros_like(t0), jnp.zeros_like(t1)

        def u_of(h):
            batches = (z0, {"t": t0, "h": h, **c0}), (z1, {"t": t1, "h": zero1, **c1})
            differ, equal = net(params, *batches, jvp=0, through=True)
            return differ.u, equal.u

        (u0, u1), (du_dh, _) = jax.jvp(u_of, (h0,), (jnp.ones_like(h0),))
        f = stop_gradient(z0 - by_row(h0, u0) * u0)

        # Without a gradient: V, and v_u of the rows with r = t.
        end = f, {"t": r0, "h": zero0, **c0}
        guide = z1, {"t": t1, "h": zero1, **unconditional1}
        current = stop_gradient(params)
        v_g = v1
        if self.target_params == "ema":
            V = net(held["ema_params"], end)[0].u
            v_u = net(current, guide)[0].u if path.is_guided(self) else None
        elif path.is_guided(self):
            V, v_u = (velocity.u for velocity in net(current, end, guide))
        else:
            V = net(current, end)[0].u
        if path.is_guided(self):
            scales = path.scales(self, t1)
            v_g = stop_gradient(path.guided_velocity(v1, v_u, u1, *scales, drop1))

        w = merge_rows(u0 + by_row(h0, u0) * du_dh, u1)
        error = path.squared_error(w, merge_rows(stop_gradient(V), v_g))
        weight = path.adaptive_weight(error, self.norm_p, path.norm_eps(self, x.shape))
        v_loss = path.squared_error(stop_gradient(merge_rows(u0, u1)), v)
        return jnp.mean(weight * error), {"error": stop_gradient(error), "v_loss": v_loss}
