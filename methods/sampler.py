"""The sampler: images from noise over given times, one loop for all objectives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from methods import path

SAMPLERS = ("ode", "euler", "heun", "consistency")


def check_times(timesteps):
    """Raises ValueError where explicit times do not fall from 1 to 0."""
    falls = all(a > b for a, b in itertools.pairwise(timesteps))
    if len(timesteps) < 2 or timesteps[0] != 1 or timesteps[-1] != 0 or not falls:
        raise ValueError(
            f"sampling.sampling_timesteps must fall from 1 to 0, got {list(timesteps)}"
        )


def sample_times(num_steps, timesteps=()):
    """Makes times 1 = t_0 > ... > t_N = 0, float32 (N + 1,): `timesteps`, or of like steps."""
    if timesteps:
        return np.array(timesteps, np.float32)
    passed = np.arange(num_steps, dtype=np.float32) * np.float32(1 / num_steps)  # as jnp.linspace
    return np.append(1 - passed, np.float32(0))


def times_of(num_steps):
    """Makes times as `sample_times` does, numpy, of a number of steps or of the times themselves.

    Raises ValueError for what is neither.
    """
    if not np.ndim(num_steps):
        if num_steps != int(num_steps) or num_steps < 1:
            raise ValueError(f"num_steps must be a whole number of 1 or more, got {num_steps}")
        return sample_times(int(num_steps))
    check_times(times := tuple(map(float, num_steps)))
    return sample_times(0, times)


def integrate(
    method, net, params, noise, given, times, *, guidance=None, sampler="ode", fresh=None
):
    """Draws images from noise over `times`: the one loop of all objectives.

    Args:
      method: `Objective`.
      noise: standard normal, float32 (B, ..., C); z_1 is this times `method.noise_scale`.
      given: {"y": int32 (B,), ...}, see `Objective.loss`.
      times: float32 (N + 1,) from `sample_times`.
      guidance: `Guidance`, or None.
      sampler: `ode`: z_r = z_t - (t - r) u(z_t, t, r) (arXiv 2505.13447, eq. 12), N evaluations,
        N = 1 is one-step generation; `euler`: the same with the instantaneous velocity, r = t;
        `heun`: the mean of the instantaneous velocities at both ends (the last step: at its
        beginning), 2 N - 1 evaluations; `consistency`: x = z_t - t u(z_t, t, 0), then back to
        z_r = (1 - r) x + r n with fresh noise n (arXiv 2303.01469, algorithm 1), N evaluations.
      fresh: k -> the noise n before step k, int32 () in 1..N-1, like `noise`; for `consistency`.

    Returns:
      x = z_0, float32 (B, ..., C).
    """

    def velocity(z, t, r, start):
        at_start = method.guidance_at(guidance, start)
        return method.velocity(net, params, z, t, r, given, at_start)

    def step(z, t_r):
        t, r = jnp.broadcast_to(t_r[:, None], (2, z.shape[0]))
        u = velocity(z, t, t if sampler in ("euler", "heun") else r, start=t)
        return z - path.by_row(t - r, z) * u, None

    def heun_step(z, t_r):
        t, r = jnp.broadcast_to(t_r[:, None], (2, z.shape[0]))
        first = velocity(z, t, t, start=t)
        second = velocity(z - path.by_row(t - r, z) * first, r, r, start=t)
        return z - path.by_row(t - r, z) * (first + second) / 2, None

    def consistency_step(z, k_t_r):
        k, t_r = k_t_r
        t, r = jnp.broadcast_to(t_r[:, None], (2, z.shape[0]))
        x = z - path.by_row(t, z) * velocity(z, t, jnp.zeros_like(t), start=t)
        return path.z_t(x, method.noise_scale * fresh(k), r), None

    noise = noise if method.noise_scale == 1 else method.noise_scale * noise
    steps = jnp.stack([times[:-1], times[1:]], axis=1)  # (N, 2)
    if sampler == "consistency":
        numbered = (jnp.arange(1, len(steps)), steps[:-1])
        noise, _ = jax.lax.scan(consistency_step, noise, numbered)
        steps = steps[-1:]
    if sampler == "heun":
        noise, _ = jax.lax.scan(heun_step, noise, steps[:-1])
        steps = steps[-1:]
    x, _ = jax.lax.scan(step, noise, steps)
    return x
