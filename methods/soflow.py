"""SoFlow (arXiv 2512.15657): the interval is split ever nearer to its beginning.

alpha falls from `alpha_first` to `alpha_last` over the run.
"""

import dataclasses

import jax.numpy as jnp

from methods import path, split

SHORTEST = 1e-4  # of a part of an interval, and of a time from its limit


@dataclasses.dataclass(frozen=True)
class SoFlow(split.Split):
    """The objective with its options. The published guidance is `mix`, with a fade."""

    alpha_schedule: str
    alpha_first: float
    alpha_last: float
    alpha_begin: int
    alpha_end: int

    def __post_init__(self):
        super().__post_init__()
        split.check_schedule(self)

    def phase(self, step, total):
        return split.ending(self, total)

    def times(self, equal, first, second):
        """Makes t and r by laws of their own, r at least 1e-4 below t."""
        t_equal, t, r = self.laws(equal, first, second)
        t = jnp.maximum(t, SHORTEST)
        return t_equal, t, jnp.minimum(r, t - SHORTEST)

    def alpha(self, key, step, t, r):
        x = split.progress(step, self.alpha_begin, self.alpha_end)
        alpha = split.schedule(self.alpha_schedule, x, self.alpha_first, self.alpha_last)
        return limited(alpha, t - r)

    def weight(self, error, rows, eps):
        """Computes alpha^(2 p - 1) / 2 (error + E alpha^2)^-p: the error is of order alpha^2."""
        p, alpha = self.norm_p, rows.alpha
        return alpha ** (2 * p - 1) / 2 * path.adaptive_weight(error, p, eps * alpha**2)


def limited(alpha, h):
    """Limits alpha, so that s = t - alpha h stays 1e-4 below t: alpha by row (B,)."""
    return jnp.minimum(1.0, jnp.maximum(alpha, SHORTEST / jnp.maximum(h, SHORTEST)))
