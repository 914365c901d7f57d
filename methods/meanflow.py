"""Mean Flows for One-step Generative Modeling (arXiv 2505.13447): draws and loss.

Where r = t the JVP is multiplied by zero, and the conditional prediction that the guidance asks for
is the very pass that the loss differentiates: with the rows of both kinds computed apart a step
takes 4.5 instead of 6 forward passes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from methods import objective, path
from methods.path import by_row, merge_rows, split_rows


@dataclasses.dataclass(frozen=True)
class MeanFlow(objective.Objective):
    """The objective with its options; `configs/default.py` (`method`) says what each one means."""

    num_classes: int  # labels are 0..num_classes-1, and num_classes stands for none
    noise_dist: str
    P_mean: float
    P_std: float
    P_mean_r: float | None
    P_std_r: float | None
    tr_sampler: str
    data_proportion: float
    equal_rows: str
    class_dropout_prob: float
    guidance_eq: str
    omega: float
    kappa: float
    t_start: float
    t_end: float
    tangent: tuple[float, float]
    norm_p: float
    norm_eps: float

    rows = ("error", "v_loss")

    def __post_init__(self):
        objective.check_options(self)
        for name, kinds in (("tr_sampler", ("v0", "v1")), ("equal_rows", ("fixed", "drawn"))):
            rule = f"is one of {' | '.join(kinds)}, not {getattr(self, name)!r}"
            objective.check(getattr(self, name) in kinds, name, rule)
        objective.check(len(self.tangent) == 2, "tangent", "has two numbers: (dr, dt)")

    def passes(self, batch_size):
        """Counts 4.5 for the published recipe, where a step with all rows alike takes 6."""
        equal = self.equal_count(batch_size)
        differ = batch_size - equal
        guidance = batch_size + (differ if self.kappa else 0) if path.is_guided(self) else 0
        return (guidance + 3 * equal + 4 * differ) / batch_size

    def equal_count(self, batch_size):
        """Counts the rows that are computed apart, as r = t in them whatever is drawn."""
        return 0 if self.equal_rows == "drawn" else super().equal_count(batch_size)

    def times(self, first, second):
        """Makes t and r of two times: in order (v0), or t the first and r at most that (v1)."""
        t = first if self.tr_sampler == "v1" else jnp.maximum(first, second)
        return t, jnp.minimum(first, second)

    def draw(self, key, shape, step=0):
        """See `Objective`.

        t and r come from two independent times. With `equal_rows: fixed`, `equal_count(B)` rows,
        placed by `split_rows`, have r = t; those lose their labels first. With `drawn` each row
        has, with the probability `data_proportion`.
        """
        batch_size = shape[0]
        num_equal = self.equal_count(batch_size)
        key_t, key_r, key_noise, key_drop = jax.random.split(key, 4)

        first = path.draw_time(key_t, batch_size, self.noise_dist, self.P_mean, self.P_std)
        P_mean_r = self.P_mean if self.P_mean_r is None else self.P_mean_r
        P_std_r = self.P_std if self.P_std_r is None else self.P_std_r
        second = path.draw_time(key_r, batch_size, self.noise_dist, P_mean_r, P_std_r)
        t, r = self.times(first, second)
        if self.equal_rows == "drawn":
            uniform = jax.random.uniform(jax.random.fold_in(key_r, 1), (batch_size,))
            r = jnp.where(uniform < self.data_proportion, t, r)
        r = path.equal_in(t, r, num_equal)

        drop = path.draw_dropped(key_drop, batch_size, num_equal, self.class_dropout_prob)
        return objective.Draws(t, r, jax.random.normal(key_noise, shape), drop)

    def loss(self, net, params, x, given, draws, held=None):
        """See `Objective`; eq. 9 and 10, algorithm 1.

        `error` is the squared error of u, a sum before the adaptive weight, `v_loss` that of u
        against v = e - x.
        """
        t, r, noise, drop = draws
        num_equal = self.equal_count(len(x))
        v = noise - x
        z = path.z_t(x, noise, t)
        dropped, unconditional = self.dropped(given, drop), self.unconditional(given)

        # 0: rows with r != t; 1: rows with r = t, where h = 0
        split = [path.split_tree(a, num_equal) for a in (z, t, r, v, drop, given, dropped)]
        (z0, z1), (t0, t1), (r0, _), (v0, v1), (drop0, drop1), (given0, _), (c0, c1) = split
        h0 = t0 - r0

        v_g0, v_g1 = v0, v1
        if path.is_guided(self):
            # By the current parameters, and one batch for all that is not differentiated: v_u of
            # all rows, v_c of the rows with r != t.
            v_c0, z_g, t_g, c_g = None, z, t, unconditional
            if self.kappa != 0:
                z_g, t_g = merge_rows(z0, z), merge_rows(t0, t)
                c_g = jax.tree.map(merge_rows, given0, unconditional)
            c_g = {"t": t_g, "h": jnp.zeros_like(t_g), **c_g}
            v_u = stop_gradient(net(stop_gradient(params), (z_g, c_g))[0].u)
            if self.kappa != 0:
                v_c0, v_u = split_rows(v_u, x.shape[0])
            v_u0, v_u1 = split_rows(v_u, num_equal)
            v_g0 = path.guided_velocity(v0, v_u0, v_c0, *path.scales(self, t0), drop0)

        # du/dt along the trajectory: d/dt u(z, t, h) with dz = v, dh = dt - dr (eq. 8)
        dr, dt = self.tangent
        tangents = (v_g0, jnp.full_like(t0, dt), jnp.full_like(t0, dt - dr))
        c1 = {"t": t1, "h": jnp.zeros_like(t1), **c1}

        def u_of(z, t, h):
            differ, equal = net(params, (z, {"t": t, "h": h, **c0}), (z1, c1), jvp=0)
            return differ.u, equal.u

        (u0, u1), (du_dt, _) = jax.jvp(u_of, (z0, t0, h0), tangents)
        u_tgt0 = v_g0 - by_row(jnp.clip(h0, 0, 1), z0) * du_dt  # the MeanFlow identity, eq. 6
        if path.is_guided(self):  # in the rows with r = t, v_c is u1
            v_g1 = path.guided_velocity(v1, v_u1, stop_gradient(u1), *path.scales(self, t1), drop1)

        u = merge_rows(u0, u1)
        u_tgt = stop_gradient(merge_rows(u_tgt0, v_g1))
        error = path.squared_error(u, u_tgt)
        weight = path.adaptive_weight(error, self.norm_p, self.norm_eps)
        v_loss = path.squared_error(stop_gradient(u), v)
        return jnp.mean(weight * error), {"error": stop_gradient(error), "v_loss": v_loss}
