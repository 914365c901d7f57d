"""alpha-Flow (arXiv 2510.20771): from trajectory flow matching to MeanFlow.

alpha falls from 1, where the target is v_g and the second pass drops out, to 0, where it is
MeanFlow's with its JVP (or to a floor, and there is never a JVP).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from methods import meanflow, objective, path, split

GAMMA = 25.0  # steepness of the fall
CLAMP = 0.005  # nearer to 0 or to 1, alpha is there


@dataclasses.dataclass(frozen=True)
class Trajectory(split.Split):
    """Trajectory flow matching: v_g is the target for every h (alpha = 1). 3 F, guided 5 (4)."""

    target_clip: float

    target_passes = 0

    def __post_init__(self):
        super().__post_init__()
        objective.check(self.target_clip >= 0, "target_clip", "must not be negative")

    def draw(self, key, shape, step):
        draws = super().draw(key, shape, step)
        inside = (self.t_start <= draws.t) & (draws.t <= self.t_end)
        return draws._replace(drop=draws.drop & inside)

    def target(self, ask, rows, v_g):
        return self.clipped(v_g)

    def clipped(self, target):
        """Clips the numbers of a target; a `target_clip` of 0 leaves it as it is."""
        limit = self.target_clip
        return jnp.clip(target, -limit, limit) if limit else target


@dataclasses.dataclass(frozen=True)
class AlphaFlow(Trajectory):
    """The phase of the split interval, and the others by `phase`. 4 F, guided 6 (5)."""

    alpha_begin: int
    alpha_end: int
    alpha_floor: bool

    target_passes = 1

    def __post_init__(self):
        super().__post_init__()
        split.check_interval(self)

    def phase(self, step, total):
        """Returns trajectory flow matching first, and MeanFlow last unless alpha has a floor."""
        method = split.ending(self, total)
        x = (step - method.alpha_begin) / (method.alpha_end - method.alpha_begin)
        distance = math.log((1 - CLAMP) / CLAMP) / GAMMA  # of alpha = CLAMP from 1/2
        if x < 0.5 - distance:
            common = [field.name for field in dataclasses.fields(Trajectory)]
            return Trajectory(**{name: vars(method)[name] for name in common})
        if x <= 0.5 + distance or method.alpha_floor:
            return method
        return End(**vars(method))

    def alpha(self, key, step, t, r):
        alpha = alpha_at(step, self.alpha_begin, self.alpha_end)
        return jnp.full_like(t, jnp.maximum(alpha, CLAMP))  # 0 is of another phase

    def target(self, ask, rows, v_g):
        return self.clipped(split.split_target(ask, rows, v_g))

    def weight(self, error, rows, eps):
        return rows.alpha * path.adaptive_weight(error, self.norm_p, eps)


class End(AlphaFlow):
    """The last phase: MeanFlow with the draws of the others."""

    target_passes = 1  # the JVP

    def loss(self, net, params, x, given, draws, held):
        names = {field.name for field in dataclasses.fields(meanflow.MeanFlow)}
        options = {name: value for name, value in vars(self).items() if name in names}
        options |= {"noise_dist": "logit_normal", "tr_sampler": "v0", "equal_rows": "fixed"}
        options |= {"tangent": (0.0, 1.0), "norm_eps": path.norm_eps(self, x.shape)}
        method = meanflow.MeanFlow(**options)
        plain = objective.Draws(draws.t, draws.r, draws.noise, draws.drop)
        return method.loss(net, params, x, given, plain, held)


def alpha_at(step, begin, end, gamma=GAMMA, clamp=CLAMP):
    """Computes alpha after `step` steps: 1 before `begin`, 0 after `end`, a sigmoid between."""
    x = (step - begin) / max(end - begin, 1)
    alpha = jax.nn.sigmoid(-gamma * (x - 0.5))
    alpha = jnp.where((alpha < clamp) | (x > 1), 0.0, alpha)
    return jnp.where((alpha > 1 - clamp) | (x < 0), 1.0, alpha)
