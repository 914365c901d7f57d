"""Flow matching (Lipman et al., arXiv 2210.02747; SiT, arXiv 2401.08740): the velocity alone.

The network is asked at h = 0 only, so it is the instantaneous velocity, which takes many steps to
sample with (`sampling.method: euler | heun`) and can be guided then.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from methods import objective, path
from methods.path import by_row


@dataclasses.dataclass(frozen=True)
class Flow(objective.Objective):
    """The objective with its options; norm_p 0 and uniform times are SiT's."""

    num_classes: int
    noise_dist: str
    P_mean: float
    P_std: float
    class_dropout_prob: float
    guidance_eq: str
    omega: float
    kappa: float
    t_start: float
    t_end: float
    norm_p: float
    norm_eps: float

    rows = ("error", "v_loss")
    guided_at_sampling = True
    instantaneous = True

    def __post_init__(self):
        objective.check_options(self)

    def equal_count(self, batch_size):
        return batch_size

    def passes(self, batch_size):
        return 4.0 if path.is_guided(self) else 3.0

    def draw(self, key, shape, step):
        key_t, key_noise, key_drop = jax.random.split(key, 3)
        t = path.draw_time(key_t, shape[0], self.noise_dist, self.P_mean, self.P_std)
        drop = jax.random.uniform(key_drop, (shape[0],)) < self.class_dropout_prob
        return objective.Draws(t, t, jax.random.normal(key_noise, shape), drop)

    def loss(self, net, params, x, given, draws, held):
        """See `Objective`; with `guidance_eq: cfg` towards the guided velocity."""
        t, _, noise, drop = draws
        v, z = noise - x, path.z_t(x, noise, t)
        u = self.velocity(net, params, z, t, t, self.dropped(given, drop))
        v_g = v
        if path.is_guided(self):
            v_u = self.velocity(net, params, z, t, t, self.unconditional(given))
            scales = path.scales(self, t)
            v_g = path.guided_velocity(v, stop_gradient(v_u), stop_gradient(u), *scales, drop)
        error = path.squared_error(u, v_g)
        weight = path.adaptive_weight(error, self.norm_p, self.norm_eps)
        v_loss = path.squared_error(stop_gradient(u), v)
        return jnp.mean(weight * error), {"error": stop_gradient(error), "v_loss": v_loss}

    def guidance_at(self, guidance, t):
        if guidance is None:
            return None
        inside = (guidance.t_min <= t) & (t <= guidance.t_max)
        return guidance._replace(omega=jnp.where(inside, guidance.omega, 1.0))

    def velocity(self, net, params, z, t, r, given, guidance=None):
        """Computes v_u + omega (v_c - v_u) in the guided channels, where there is a `guidance`."""
        c = {"t": t, "h": jnp.zeros_like(t), **given}
        if guidance is None:
            return net(params, (z, c))[0].u
        v_c, v_u = (velocity.u for velocity in net(params, (z, c), (z, self.unconditional(c))))
        channels = jnp.where(guidance.channels == 0, z.shape[-1], guidance.channels)
        guided = v_u + by_row(guidance.omega, z) * (v_c - v_u)
        return jnp.where(jnp.arange(z.shape[-1]) < channels, guided, v_c)
