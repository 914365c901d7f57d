"""Mean Flows for One-step Generative Modeling (arXiv 2505.13447): draws, loss and sampler.

Convention: t = 1 is noise and t = 0 is data. Along z_t = (1 - t) x + t e the velocity is
v = e - x. The network u(z_t, t, h, y) with h = t - r is the *average* velocity over [r, t]; with
h = 0 it is the instantaneous one. It is handed in as a function `net(params, z_t, t, h, y)`, so
this module knows no architecture. Images are (B, H, W, C), times float32 (B,), labels int32 (B,).

Rows of two kinds. Most rows of a batch have r = t. There the JVP is multiplied by zero, and the
conditional prediction that the guidance asks for is the very pass that the loss differentiates.
So the two kinds are computed apart (4.5 instead of 6 forward passes per step), and which rows are
of which kind is fixed by the shape of the batch alone: see `split_rows`.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient


@dataclasses.dataclass(frozen=True)
class MeanFlow:
    """The options of the objective; `configs/default.py` (`method`) says what each one means."""

    noise_dist: str = "logit_normal"
    P_mean: float = -0.4
    P_std: float = 1.0
    P_mean_r: float | None = None
    P_std_r: float | None = None
    data_proportion: float = 0.75
    class_dropout_prob: float = 0.1
    guidance_eq: str = "cfg"
    omega: float = 1.0
    kappa: float = 0.5
    t_start: float = 0.0
    t_end: float = 1.0
    tangent: tuple[float, float] = (0.0, 1.0)
    norm_p: float = 1.0
    norm_eps: float = 0.01

    def __post_init__(self):
        if self.noise_dist not in ("logit_normal", "uniform"):
            raise ValueError(
                f"method.noise_dist: {self.noise_dist!r} is not logit_normal | uniform"
            )
        if self.guidance_eq not in ("none", "cfg"):
            raise ValueError(f"method.guidance_eq: {self.guidance_eq!r} is not none | cfg")
        if not 0 <= self.data_proportion <= 1:
            raise ValueError(f"method.data_proportion: {self.data_proportion} is not in [0, 1]")
        if len(self.tangent) != 2:
            raise ValueError(f"method.tangent: {self.tangent} is not a pair (dr, dt)")


class Draws(NamedTuple):
    """What is random in one step. `equal_count(batch)` rows, placed by `split_rows`, have r = t."""

    t: jax.Array  # (B,) in [0, 1]
    r: jax.Array  # (B,) in [0, t]
    noise: jax.Array  # (B, H, W, C), standard normal
    drop: jax.Array  # (B,) bool: the row trains without its label


# Rows -----------------------------------------------------------------------------------------


def equal_count(batch_size, data_proportion):
    """How many rows of a batch have r = t."""
    return int(batch_size * data_proportion)


def split_rows(a, num_equal):
    """Splits an array (B, ...) into its rows with r != t and its `num_equal` rows with r = t.

    The two kinds alternate in as many equal groups as possible, [r != t | r = t] in each. So a
    batch that is sharded over devices is split without moving a row from one to another, wherever
    the number of devices divides that of the groups (64 for a batch of 256 and a share of 0.75).
    """
    batch_size, rest = a.shape[0], a.shape[1:]
    num_groups = math.gcd(batch_size, num_equal)
    a = a.reshape(num_groups, batch_size // num_groups, *rest)
    first = (batch_size - num_equal) // num_groups
    return a[:, :first].reshape(-1, *rest), a[:, first:].reshape(-1, *rest)


def merge_rows(a, b):
    """The inverse of `split_rows`: also joins any two batches without moving rows far."""
    num_groups = math.gcd(a.shape[0], b.shape[0])
    rest = a.shape[1:]
    parts = [x.reshape(num_groups, x.shape[0] // num_groups, *rest) for x in (a, b)]
    return jnp.concatenate(parts, axis=1).reshape(-1, *rest)


def by_row(s):
    """(B,) -> (B, 1, 1, 1), to multiply images."""
    return s[:, None, None, None]


# Draws ----------------------------------------------------------------------------------------


def draw_time(key, batch_size, noise_dist, P_mean, P_std):
    """Times in [0, 1], float32 (batch_size,): logit-normal (paper, section 4.3) or uniform."""
    if noise_dist == "uniform":
        return jax.random.uniform(key, (batch_size,))
    return jax.nn.sigmoid(P_mean + P_std * jax.random.normal(key, (batch_size,)))


def draw(key, shape, method):
    """Draws t, r, noise and dropped labels for a batch of images of `shape` (B, H, W, C).

    t and r are two independent times in order. The number of dropped labels is binomial; they are
    taken from the rows with r = t first, as in the published code.
    """
    batch_size = shape[0]
    num_equal = equal_count(batch_size, method.data_proportion)
    num_differ = batch_size - num_equal
    key_t, key_r, key_noise, key_drop = jax.random.split(key, 4)

    first = draw_time(key_t, batch_size, method.noise_dist, method.P_mean, method.P_std)
    P_mean_r = method.P_mean if method.P_mean_r is None else method.P_mean_r
    P_std_r = method.P_std if method.P_std_r is None else method.P_std_r
    second = draw_time(key_r, batch_size, method.noise_dist, P_mean_r, P_std_r)
    t, r = jnp.maximum(first, second), jnp.minimum(first, second)
    r_differ, _ = split_rows(r, num_equal)
    _, t_equal = split_rows(t, num_equal)
    r = merge_rows(r_differ, t_equal)

    num_dropped = jnp.sum(jax.random.uniform(key_drop, (batch_size,)) < method.class_dropout_prob)
    order = merge_rows(num_equal + jnp.arange(num_differ), jnp.arange(num_equal))
    return Draws(t, r, jax.random.normal(key_noise, shape), drop=order < num_dropped)


# Loss -----------------------------------------------------------------------------------------


def guided_velocity(v, v_u, v_c, t, drop, method):
    """v_g = omega v + (1 - omega - kappa) v_u + kappa v_c (paper, section 4.2, appendix B.1).

    Outside [t_start, t_end] omega = 1 and kappa = 0, and rows without a label keep v_g = v.
    `v_c` may be None where kappa = 0.
    """
    inside = (method.t_start <= t) & (t <= method.t_end)
    omega = by_row(jnp.where(inside, method.omega, 1.0))
    kappa = by_row(jnp.where(inside, method.kappa, 0.0))
    v_g = omega * v + (1 - omega - kappa) * v_u
    if v_c is not None:
        v_g = v_g + kappa * v_c
    return jnp.where(by_row(drop), v, v_g)


def loss(net, params, x, y, draws, method, *, null_label, num_equal, net_pair=None):
    """The MeanFlow loss of a batch (paper, eq. 9 and 10, algorithm 1), deterministic in `draws`.

    Args:
      net: function (params, z, t, h, y) -> u, all of B rows.
      params: its parameters; the only argument through which a gradient flows.
      x: data, float32 (B, H, W, C).
      y: labels, int32 (B,).
      draws: `Draws` of the same batch, laid out by `split_rows(_, num_equal)`.
      method: `MeanFlow`.
      null_label: the label that stands for none.
      num_equal: number of rows with r = t (static).
      net_pair: `net` for two batches at once, (params, (z, t, h, y), (z, t, h, y)) -> (u, u), of
        which the first needs a JVP. None: two calls of `net`.

    Returns:
      The loss, a float32 scalar, and a dict of float32 (B,) in the order of the batch: `error`,
      the squared error of u summed over H, W, C before the adaptive weight; `v_loss`, that of u
      against v = e - x.
    """
    t, r, noise, drop = draws
    v = noise - x
    z = (1 - by_row(t)) * x + by_row(t) * noise  # z_t
    y_null = jnp.full_like(y, null_label)
    y_kept = jnp.where(drop, null_label, y)

    # 0: rows with r != t; 1: rows with r = t, where h = 0
    split = [split_rows(a, num_equal) for a in (z, t, r, v, drop, y, y_kept)]
    (z0, z1), (t0, t1), (r0, _), (v0, v1), (drop0, drop1), (y0, _), (y_kept0, y_kept1) = split
    h0 = t0 - r0

    guided = method.guidance_eq == "cfg" and (method.omega, method.kappa) != (1.0, 0.0)
    v_g0, v_g1 = v0, v1
    if guided:
        # By the current parameters, and one batch for all that is not differentiated: v_u of all
        # rows, v_c of the rows with r != t.
        v_c0, z_g, t_g, y_g = None, z, t, y_null
        if method.kappa != 0:
            z_g, t_g, y_g = merge_rows(z0, z), merge_rows(t0, t), merge_rows(y0, y_null)
        v_u = stop_gradient(net(stop_gradient(params), z_g, t_g, jnp.zeros_like(t_g), y_g))
        if method.kappa != 0:
            v_c0, v_u = split_rows(v_u, x.shape[0])
        v_u0, v_u1 = split_rows(v_u, num_equal)
        v_g0 = guided_velocity(v0, v_u0, v_c0, t0, drop0, method)

    # du/dt along the trajectory: d/dt u(z, t, h) with dz = v, dh = dt - dr (paper, eq. 8)
    dr, dt = method.tangent
    tangents = (v_g0, jnp.full_like(t0, dt), jnp.full_like(t0, dt - dr))

    def u_of(z, t, h):
        batches = (z, t, h, y_kept0), (z1, t1, jnp.zeros_like(t1), y_kept1)
        return net_pair(params, *batches) if net_pair else [net(params, *b) for b in batches]

    (u0, u1), (du_dt, _) = jax.jvp(u_of, (z0, t0, h0), tangents)
    u_tgt0 = v_g0 - by_row(jnp.clip(h0, 0, 1)) * du_dt  # the MeanFlow identity, eq. 6
    if guided:  # in the rows with r = t, v_c is u1
        v_g1 = guided_velocity(v1, v_u1, stop_gradient(u1), t1, drop1, method)

    u = merge_rows(u0, u1)
    u_tgt = stop_gradient(merge_rows(u_tgt0, v_g1))
    error = jnp.sum((u - u_tgt) ** 2, axis=(1, 2, 3))  # (B,)
    weight = stop_gradient((error + method.norm_eps) ** -method.norm_p)  # appendix B.2
    v_loss = jnp.sum((stop_gradient(u) - v) ** 2, axis=(1, 2, 3))
    return jnp.mean(weight * error), {"error": stop_gradient(error), "v_loss": v_loss}


# Sampler --------------------------------------------------------------------------------------


def sample_times(num_steps, timesteps=()):
    """Times 1 = t_0 > ... > t_N = 0 of the sampler, float32 (N + 1,): `timesteps` or equal steps.

    Raises:
      ValueError: `timesteps` do not fall from 1 to 0, or there is no step.
    """
    if not timesteps:
        if num_steps < 1:
            raise ValueError(f"sampling.num_steps: {num_steps} is not a positive number of steps")
        return jnp.linspace(1.0, 0.0, num_steps + 1)
    falls = all(a > b for a, b in itertools.pairwise(timesteps))
    if len(timesteps) < 2 or timesteps[0] != 1 or timesteps[-1] != 0 or not falls:
        raise ValueError(f"sampling.sampling_timesteps: {timesteps} do not fall from 1 to 0")
    return jnp.array(timesteps, jnp.float32)


def sample(net, params, noise, y, times):
    """Images from noise (paper, eq. 12): z_r = z_t - (t - r) u(z_t, t, t - r, y) over `times`.

    Args:
      noise: z_1, float32 (B, H, W, C).
      y: labels, int32 (B,).
      times: float32 (N + 1,) from `sample_times`; N = 1 is one evaluation of the network.

    Returns:
      x = z_0, float32 (B, H, W, C).
    """

    def step(z, t_r):
        t, r = jnp.broadcast_to(t_r[:, None], (2, z.shape[0]))
        return z - by_row(t - r) * net(params, z, t, t - r, y), None

    x, _ = jax.lax.scan(step, noise, jnp.stack([times[:-1], times[1:]], axis=1))
    return x
