"""Objectives without a JVP: an interval is split in two, and the network learns to add the parts.

Over [r, t] with h = t - r and s = t - alpha h, 0 < alpha <= 1, the average velocity is

    u(z_t, t, h) = alpha a + (1 - alpha) u(z_s, s, s - r),    z_s = z_t - alpha h a,

with a the average over [s, t]. Taking for it the (guided) velocity v_g, with an error of order
alpha, gives the target of trajectory flow matching (alpha = 1), alpha-Flow (arXiv 2510.20771),
SoFlow (arXiv 2512.15657) and discrete consistency training (r = 0); SplitMeanFlow
(arXiv 2507.16884) takes the network's own average. As alpha -> 0, (u - target) / alpha becomes
MeanFlow's residual. `Split` has the formula; the members say how alpha, the times and the weight
go, each in a file of its own. No pass has a derivative in forward mode, so each may use fused
attention.

F below are forward passes by row; a backward pass counts as two.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from methods import objective, path
from methods.path import by_row, merge_rows


class SplitDraws(NamedTuple):
    """`objective.Draws`, and where an interval is split."""

    t: jax.Array
    r: jax.Array
    noise: jax.Array
    drop: jax.Array
    alpha: jax.Array  # (B,) in (0, 1]; not read in rows with r = t


class Rows(NamedTuple):
    """The rows of one kind, or of both."""

    z: jax.Array  # z_t, (B, ..., C)
    v: jax.Array  # e - x
    t: jax.Array  # (B,)
    r: jax.Array
    drop: jax.Array
    alpha: jax.Array
    given: dict  # the conditions of the rows,
    dropped: dict  # those that dropping leaves,
    unconditional: dict  # and none

    def batch(self, h, given):
        """Makes a batch for the network."""
        return self.z, {"t": self.t, "h": h, **given}


@dataclasses.dataclass(frozen=True)
class Split(objective.Objective):
    """The formula with the options of all members; `configs/default.py` says what each one means.

    Rows with r = t learn v_g: 3 F, guided 4. Rows with r < t learn the target above: 4 F, guided 6
    (5 without v_c).
    """

    num_classes: int
    P_mean: float
    P_std: float
    P_mean_r: float | None
    P_std_r: float | None
    P_mean_equal: float | None
    P_std_equal: float | None
    data_proportion: float
    class_dropout_prob: float
    guidance_eq: str
    omega: float
    kappa: float
    t_start: float
    t_end: float
    mix: float
    fade_start: float
    norm_p: float
    norm_eps: float
    norm_eps_per_pixel: float

    rows = ("error", "v_loss")
    target_passes = 1  # without gradient, by row with r < t
    guides_differ = True  # whether rows with r < t are guided
    guided_by_ema = False  # whether guidance comes from the averaged parameters
    target_by_ema = False  # whether the passes of the target do

    def __post_init__(self):
        objective.check_options(self)
        objective.check(self.norm_eps_per_pixel >= 0, "norm_eps_per_pixel", "must not be negative")

    def passes(self, batch_size):
        v_c = takes_v_c(self)
        guided = is_guided(self)
        equal = 3 + (1 + (v_c and self.guided_by_ema) if guided else 0)
        differ = 3 + self.target_passes + (1 + v_c if guided and self.guides_differ else 0)
        num_equal = self.equal_count(batch_size)
        return (num_equal * equal + (batch_size - num_equal) * differ) / batch_size

    # What is random ---------------------------------------------------------------------------

    def times(self, equal, first, second):
        """Makes times of standard normals, each (B,): t where r = t, and t and r of the other rows.

        Here the larger and the smaller of two draws for the others, and one draw for r = t.
        """
        t_equal, t, r = self.laws(equal, first, second)
        return t_equal, jnp.maximum(t, r), jnp.minimum(t, r)

    def laws(self, equal, first, second):
        """Maps each normal to sigmoid(mean + std normal), with the options of its draw."""

        def time(normal, mean, std):
            mean, std = self.P_mean if mean is None else mean, self.P_std if std is None else std
            return jax.nn.sigmoid(mean + std * normal)

        return (
            time(equal, self.P_mean_equal, self.P_std_equal),
            time(first, self.P_mean, self.P_std),
            time(second, self.P_mean_r, self.P_std_r),
        )

    def alpha(self, key, step, t, r):
        """Draws alpha by row, float32 (B,)."""
        return jnp.ones_like(t)

    def draw(self, key, shape, step):
        """See `Objective`; every row loses its label with the same probability."""
        batch_size, num_equal = shape[0], self.equal_count(shape[0])
        key_t, key_noise, key_drop, key_alpha = jax.random.split(key, 4)
        t_equal, t, r = self.times(*jax.random.normal(key_t, (3, batch_size)))
        t, r = (path.equal_in(t_equal, a, num_equal) for a in (t, r))
        noise = jax.random.normal(key_noise, shape)
        drop = jax.random.uniform(key_drop, (batch_size,)) < self.class_dropout_prob
        return SplitDraws(t, r, noise, drop, self.alpha(key_alpha, step, t, r))

    # The loss ---------------------------------------------------------------------------------

    def loss(self, net, params, x, given, draws, held):
        """See `Objective`; `error` and `v_loss` as in `methods.meanflow`."""
        t, r, noise, drop, alpha = draws
        v, z = noise - x, path.z_t(x, noise, t)
        conditions = given, self.dropped(given, drop), self.unconditional(given)
        batch = Rows(z, v, t, r, drop, alpha, *conditions)
        differ, equal = path.split_tree(batch, self.equal_count(len(x)))

        ask, held = _asker(net), held | {"params": stop_gradient(params)}
        h, zero = differ.t - differ.r, jnp.zeros_like(equal.t)
        u0, u1 = ask(params, differ.batch(h, differ.dropped), equal.batch(zero, equal.dropped))
        v_g0, v_g1 = self.guided(ask, held, differ, equal, stop_gradient(u1))
        by = held["ema_params" if self.target_by_ema else "params"]
        u_tgt0 = self.target(lambda *batches: ask(by, *batches), differ, v_g0)

        eps = path.norm_eps(self, x.shape)
        error0, error1 = path.squared_error(u0, u_tgt0), path.squared_error(u1, v_g1)
        weight0 = stop_gradient(self.weight(error0, differ, eps))
        weight1 = path.adaptive_weight(error1, self.norm_p, eps)
        error = merge_rows(error0, error1)
        v_loss = path.squared_error(stop_gradient(merge_rows(u0, u1)), v)
        loss = jnp.mean(merge_rows(weight0, weight1) * error)
        return loss, {"error": stop_gradient(error), "v_loss": v_loss}

    def guided(self, ask, held, differ, equal, u1):
        """Computes v_g of the rows of both kinds; where r = t, v_c is their prediction u1."""
        if not is_guided(self):
            return differ.v, equal.v

        def now(rows, given):
            return rows.batch(jnp.zeros_like(rows.t), given)

        batches = {"v_u1": now(equal, equal.unconditional)}
        if self.guides_differ:
            batches["v_u0"] = now(differ, differ.unconditional)
        if takes_v_c(self) and self.guides_differ:
            batches["v_c0"] = now(differ, differ.given)
        if takes_v_c(self) and self.guided_by_ema:
            batches["v_c1"] = now(equal, equal.given)
        by = held["ema_params" if self.guided_by_ema else "params"]
        guides = dict(zip(batches, ask(by, *batches.values()), strict=True))

        def v_g(rows, v_u, v_c):
            return path.guided_velocity(rows.v, v_u, v_c, *scales(self, rows.t), rows.drop)

        v_g1 = v_g(equal, guides["v_u1"], guides.get("v_c1", u1))
        if not self.guides_differ:
            return differ.v, stop_gradient(v_g1)
        v_g0 = v_g(differ, guides["v_u0"], guides.get("v_c0"))
        return stop_gradient(v_g0), stop_gradient(v_g1)

    def target(self, ask, rows, v_g):
        """Computes the target where r < t; `ask` gives u of batches, without a gradient."""
        return split_target(ask, rows, v_g)

    def weight(self, error, rows, eps):
        """Computes the weight of the rows with r < t."""
        return path.adaptive_weight(error, self.norm_p, eps)


def split_target(ask, rows, a):
    """Computes alpha a + (1 - alpha) u(z_t - alpha h a, s, s - r); a: the average over [s, t]."""
    h = rows.t - rows.r
    first = rows.alpha * h
    z_s = rows.z - by_row(first, a) * a
    (u,) = ask((z_s, {"t": rows.t - first, "h": h - first, **rows.dropped}))
    return by_row(rows.alpha, a) * a + by_row(1 - rows.alpha, a) * u


def _asker(net):
    """Turns `net` into a function to u of each batch; a batch without rows is not computed."""

    def ask(params, *batches):
        some = [batch for batch in batches if len(batch[0])]
        predictions = iter(net(params, *some) if some else ())
        return [next(predictions).u if len(z) else z for z, _ in batches]

    return ask


# Guidance -------------------------------------------------------------------------------------


def is_guided(method):
    """Tells whether the target takes predictions of the network."""
    if method.guidance_eq == "mix":
        return (method.omega, method.mix) != (1.0, 1.0)
    return path.is_guided(method)


def takes_v_c(method):
    """Tells whether the target takes the conditional prediction and not only the unconditional."""
    weight = 1 - method.mix if method.guidance_eq == "mix" else method.kappa
    return is_guided(method) and weight != 0


def fade(t, start):
    """Computes 1 up to t = `start`, from where it falls to 0 at t = 1 (arXiv 2512.15657)."""
    if start >= 1:
        return jnp.ones_like(t)
    d = jnp.clip((1 - t) / (1 - start), 0, 1 - 1e-6)
    return jnp.where(t <= start, 1.0, -jnp.expm1(-0.025 * d / (1 - d)))


def scales(method, t):
    """Computes omega and kappa of `path.guided_velocity` at the times t (B,).

    `mix` (arXiv 2512.15657): v_g = m (v + f(t) (w - 1) (v - v_u)) + (1 - m) v_c with w = omega,
    m = mix and f = `fade`.
    """
    if method.guidance_eq != "mix":
        return path.scales(method, t)
    omega = method.mix * (1 + fade(t, method.fade_start) * (method.omega - 1))
    return omega, jnp.full_like(t, 1 - method.mix)


# How alpha goes with the step ------------------------------------------------------------------


def progress(step, begin, end):
    """Tells how far `step` is from `begin` to `end`, in 0..1; an `end` that is not set is near."""
    return jnp.clip((step - begin) / max(end - begin, 1), 0.0, 1.0)


SCHEDULES = ("constant", "linear", "cosine", "exponential")


def schedule(kind, x, first, last):
    """Computes alpha at the progress x, `first` to `last` (arXiv 2512.15657); constant: `last`."""
    if kind == "constant":
        return jnp.full_like(x, last)
    if kind == "linear":
        return last + (first - last) * (1 - x)
    if kind == "cosine":
        return last + (first - last) * (1 + jnp.cos(jnp.pi * x)) / 2
    return first * (last / first) ** x


def check_schedule(method, kinds=SCHEDULES):
    """Checks the options of a schedule."""
    rule = f"is one of {' | '.join(kinds)}, not {method.alpha_schedule!r}"
    objective.check(method.alpha_schedule in kinds, "alpha_schedule", rule)
    for name in ("alpha_first", "alpha_last"):
        value = vars(method)[name]
        objective.check(0 < value <= 1, name, f"must lie above 0 and at most at 1, got {value}")
    check_interval(method)


def check_interval(method):
    """Checks the steps between which alpha changes; `ending` replaces an end of 0."""
    objective.check(method.alpha_begin >= 0, "alpha_begin", "must not be negative")
    objective.check(method.alpha_end >= 0, "alpha_end", "must not be negative")
    rule = f"({method.alpha_end}) must be above method.alpha_begin ({method.alpha_begin})"
    objective.check(
        not method.alpha_end or method.alpha_end > method.alpha_begin, "alpha_end", rule
    )


def ending(method, total):
    """Sets the end of a schedule that has none to the end of the run, after `total` steps.

    Raises:
      ValueError: the run ends before alpha begins to change.
    """
    if method.alpha_end:
        return method
    rule = f"({method.alpha_begin}) is not before the end of the run, step {total}"
    objective.check(method.alpha_begin < total, "alpha_begin", rule)
    return dataclasses.replace(method, alpha_end=total)
