"""What all objectives share: the path z_t, rows of two kinds, draws, the weight, the sampler.

Convention: t = 1 is noise and t = 0 is data. Along z_t = (1 - t) x + t e the velocity is
v = e - x. A network gives the *average* velocity u(z_t, t, h, y) over [r, t], h = t - r; with
h = 0 it is the instantaneous one. Images are (B, H, W, C), times float32 (B,), labels int32 (B,).

Rows of two kinds. Rows with r = t need no JVP, and no second prediction to be guided by. So the two
kinds are computed apart, and which rows are of which kind is fixed by the shape of the batch alone:
see `split_rows`.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Draws(NamedTuple):
    """What is random in one step, where an objective needs no more."""

    t: jax.Array  # (B,) in [0, 1]
    r: jax.Array  # (B,) in [0, t]
    noise: jax.Array  # (B, H, W, C), standard normal
    drop: jax.Array  # (B,) bool: the row trains without its label


class Guidance(NamedTuple):
    """Guidance that is chosen at sampling time; float32 ()."""

    omega: jax.Array  # its scale; 1: none
    t_min: jax.Array  # it holds for t_min <= t <= t_max
    t_max: jax.Array
    channels: jax.Array  # int32 (), how many channels it concerns, the first ones; 0: all


class Objective:
    """Base of all objectives: a frozen dataclass of the options that it has.

    It is given the network as a function (`models.network.function`), so it knows no architecture.
    A subclass has `draw`, `loss` and, where the network is no average velocity, `velocity`.
    """

    rows = ("error",)  # what `loss` tells by row; `error...` are also shown by kind of row and time
    conditions = ()  # what its network has to take beside t, h and y
    needs_v = False  # whether its network has to predict the instantaneous velocity too
    instantaneous = False  # whether it asks at h = 0 only, so that its network has to take t
    guided_at_sampling = False  # whether `velocity` makes use of a `Guidance`

    def draw(self, key, shape, step):
        """What is random in step number `step`, int32 (), for images of `shape` (B, H, W, C).

        Returns:
          `Draws`, or a NamedTuple with more; every array has B rows.
        """
        raise NotImplementedError

    def loss(self, net, params, x, given, draws, held):
        """The loss of a batch, deterministic in `draws`.

        Args:
          net: from `models.network.function`.
          params: its parameters; the only argument through which a gradient flows.
          x: data, float32 (B, H, W, C).
          given: what comes with the data and goes on into the network: `y`, int32 (B,), and more.
          draws: from `draw`.
          held: what has no gradient: {"ema_params": the first average}.

        Returns:
          The loss, a float32 scalar, and {name: float32 (B,) for name in rows}, in the order of
          the batch.
        """
        raise NotImplementedError

    def velocity(self, net, params, z, t, r, given, guidance=None):
        """The velocity over [r, t] that the sampler follows, float32 (B, H, W, C).

        Here the average u(z_t, t, t - r, y); a guidance that is trained in needs no other.

        Args:
          guidance: `Guidance`, or None; traced, so that a sweep compiles once.
        """
        return net(params, (z, {"t": t, "h": t - r, **given}))[0].u

    def guidance_at(self, guidance, t):
        """The `Guidance` of a step that begins at the times t (B,), whatever its stages."""
        return guidance

    def at(self, step, total):
        """The objective that holds after `step` of `total` steps, both int.

        Where the program changes in a run (a JVP begins) it is another objective, hashable: whoever
        compiles a step compiles one for each that this gives.
        """
        return self

    def equal_count(self, batch_size):
        """How many rows of a batch have r = t."""
        return equal_count(batch_size, self.data_proportion)

    def groups(self, batch_size):
        """Between any two of so many equal groups a batch may be cut."""
        return equal_groups(batch_size, self.equal_count(batch_size))

    def passes(self, batch_size):
        """Forward passes that a step takes, by row of the batch; a backward pass counts as two."""
        raise NotImplementedError

    def passes_of_both(self, batch_size):
        """Those of them that predict both velocities; all others predict one."""
        return 0.0


def by_row(s):
    """(B,) -> (B, 1, 1, 1), to multiply images."""
    return s[:, None, None, None]


def z_t(x, noise, t):
    """The point of the path at time t."""
    return (1 - by_row(t)) * x + by_row(t) * noise


def adaptive_weight(error, p, eps):
    """1 / (error + eps)^p by row, without gradient (arXiv 2505.13447, appendix B.2)."""
    return jax.lax.stop_gradient((error + eps) ** -p)


def squared_error(a, b):
    """|a - b|^2 summed over H, W, C: float32 (B,)."""
    return jnp.sum((a - b) ** 2, axis=(1, 2, 3))


# Rows -----------------------------------------------------------------------------------------


def equal_count(batch_size, data_proportion):
    """How many rows of a batch have r = t."""
    return int(batch_size * data_proportion)


def equal_groups(batch_size, num_equal):
    """Of how many equal groups [r != t | r = t] a batch consists, see `split_rows`."""
    return math.gcd(batch_size, num_equal)


def split_rows(a, num_equal):
    """Splits an array (B, ...) into its rows with r != t and its `num_equal` rows with r = t.

    The two kinds alternate in as many equal groups as possible, [r != t | r = t] in each. So a
    batch that is sharded over devices is split without moving a row from one to another, wherever
    the number of devices divides that of the groups (64 for a batch of 256 and a share of 0.75).
    """
    batch_size, rest = a.shape[0], a.shape[1:]
    num_groups = equal_groups(batch_size, num_equal)
    a = a.reshape(num_groups, batch_size // num_groups, *rest)
    first = (batch_size - num_equal) // num_groups
    return a[:, :first].reshape(-1, *rest), a[:, first:].reshape(-1, *rest)


def merge_rows(a, b):
    """The inverse of `split_rows`: also joins any two batches without moving rows far."""
    num_groups = math.gcd(a.shape[0], b.shape[0])
    rest = a.shape[1:]
    parts = [x.reshape(num_groups, x.shape[0] // num_groups, *rest) for x in (a, b)]
    return jnp.concatenate(parts, axis=1).reshape(-1, *rest)


def split_tree(tree, num_equal):
    """`split_rows` of each array of a tree: two trees."""
    pairs = jax.tree.map(lambda a: split_rows(a, num_equal), tree)
    return jax.tree.transpose(jax.tree.structure(tree), jax.tree.structure((0, 0)), pairs)


# Guidance by which the target is trained ------------------------------------------------------


def is_guided(method):
    """Whether the target takes predictions of the network."""
    return method.guidance_eq == "cfg" and (method.omega, method.kappa) != (1.0, 0.0)


def scales(method, t):
    """omega and kappa at the times t (B,): the options within [t_start, t_end], else 1 and 0."""
    inside = (method.t_start <= t) & (t <= method.t_end)
    return jnp.where(inside, method.omega, 1.0), jnp.where(inside, method.kappa, 0.0)


def guided_velocity(v, v_u, v_c, omega, kappa, drop):
    """v_g = omega v + (1 - omega - kappa) v_u + kappa v_c (arXiv 2505.13447, 4.2, appendix B.1).

    omega, kappa and drop by row; rows without a label keep v_g = v. `v_c` may be None where
    kappa = 0.
    """
    omega, kappa = by_row(omega), by_row(kappa)
    v_g = omega * v + (1 - omega - kappa) * v_u
    if v_c is not None:
        v_g = v_g + kappa * v_c
    return jnp.where(by_row(drop), v, v_g)


# Draws ----------------------------------------------------------------------------------------


def draw_time(key, batch_size, noise_dist, P_mean, P_std):
    """Times in [0, 1], float32 (batch_size,); logit-normal: arXiv 2505.13447, section 4.3."""
    if noise_dist == "uniform":
        return jax.random.uniform(key, (batch_size,))
    return jax.nn.sigmoid(P_mean + P_std * jax.random.normal(key, (batch_size,)))


def order_times(first, second, num_equal):
    """Two times by row -> t, the larger, and r, the smaller or in `num_equal` rows t: each (B,)."""
    t, r = jnp.maximum(first, second), jnp.minimum(first, second)
    return t, equal_in(t, r, num_equal)


def equal_in(t, r, num_equal):
    """r (B,), set to t in the `num_equal` rows that `split_rows` keeps for it."""
    r_differ, _ = split_rows(r, num_equal)
    _, t_equal = split_rows(t, num_equal)
    return merge_rows(r_differ, t_equal)


def draw_dropped(key, batch_size, num_equal, probability):
    """Which rows lose their label, bool (B,).

    Their number is binomial; they are taken from the rows with r = t first, as in the published
    code of MeanFlow.
    """
    num_dropped = jnp.sum(jax.random.uniform(key, (batch_size,)) < probability)
    order = merge_rows(num_equal + jnp.arange(batch_size - num_equal), jnp.arange(num_equal))
    return order < num_dropped


# Options --------------------------------------------------------------------------------------


def check(condition, option, rule):
    """Raises ValueError in a line where the rule of an option of `method` is broken."""
    if not condition:
        raise ValueError(f"method.{option} {rule}")


def check_options(method):
    """The rules of those options of an objective that several have, by name."""
    options = vars(method)
    for name in options.keys() & {
        "data_proportion", "class_dropout_prob", "t_start", "t_end", "mix", "fade_start"
    }:  # fmt: skip
        check(0 <= options[name] <= 1, name, f"must lie in 0..1, got {options[name]}")
    for name in options.keys() & {"P_std", "P_std_r", "norm_p"}:
        value = options[name]
        check(value is None or value >= 0, name, f"must not be negative, got {value}")
    if "norm_eps" in options:
        check(method.norm_eps > 0, "norm_eps", f"must be above 0, got {method.norm_eps}")
    if "noise_dist" in options:
        kinds = ("logit_normal", "uniform")
        rule = f"is one of {' | '.join(kinds)}, not {method.noise_dist!r}"
        check(method.noise_dist in kinds, "noise_dist", rule)
    if "guidance_eq" in options:
        kinds = ("cfg", "mix", "none") if "mix" in options else ("cfg", "none")
        rule = f"is one of {' | '.join(kinds)}, not {method.guidance_eq!r}"
        check(method.guidance_eq in kinds, "guidance_eq", rule)
        possible = method.num_classes or method.guidance_eq == "none"
        rule = "must be none where dataset.num_classes is 0: without classes there is no guidance"
        check(possible, "guidance_eq", rule)
        check(method.kappa < 1, "kappa", "must be below 1: the scale is omega / (1 - kappa)")
        check(method.kappa >= 0, "kappa", f"must not be negative, got {method.kappa}")
        check(method.t_start <= method.t_end, "t_start", "must not be above method.t_end")


# Sampler --------------------------------------------------------------------------------------

SAMPLERS = ("ode", "euler", "heun", "consistency")


def check_times(timesteps):
    """Raises ValueError where explicit times do not fall from 1 to 0."""
    falls = all(a > b for a, b in itertools.pairwise(timesteps))
    if len(timesteps) < 2 or timesteps[0] != 1 or timesteps[-1] != 0 or not falls:
        raise ValueError(
            f"sampling.sampling_timesteps must fall from 1 to 0, got {list(timesteps)}"
        )


def sample_times(num_steps, timesteps=()):
    """Times 1 = t_0 > ... > t_N = 0, float32 (N + 1,): `timesteps`, or `num_steps` equal steps."""
    if timesteps:
        return jnp.array(timesteps, jnp.float32)
    return jnp.linspace(1.0, 0.0, num_steps + 1)


def sample(method, net, params, noise, given, times, *, guidance=None, sampler="ode", fresh=None):
    """Images from noise over `times`: the one loop of all objectives.

    Args:
      method: `Objective`.
      noise: z_1, float32 (B, H, W, C).
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
      x = z_0, float32 (B, H, W, C).
    """

    def velocity(z, t, r, start):
        at_start = method.guidance_at(guidance, start)
        return method.velocity(net, params, z, t, r, given, at_start)

    def step(z, t_r):
        t, r = jnp.broadcast_to(t_r[:, None], (2, z.shape[0]))
        u = velocity(z, t, t if sampler in ("euler", "heun") else r, start=t)
        return z - by_row(t - r) * u, None

    def heun_step(z, t_r):
        t, r = jnp.broadcast_to(t_r[:, None], (2, z.shape[0]))
        first = velocity(z, t, t, start=t)
        second = velocity(z - by_row(t - r) * first, r, r, start=t)
        return z - by_row(t - r) * (first + second) / 2, None

    def consistency_step(z, k_t_r):
        k, t_r = k_t_r
        t, r = jnp.broadcast_to(t_r[:, None], (2, z.shape[0]))
        x = z - by_row(t) * velocity(z, t, jnp.zeros_like(t), start=t)
        return z_t(x, fresh(k), r), None

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
