"""Discrete consistency training (arXiv 2303.01469): the family at r = 0, the whole way to the data.

z_s lies on the row's own straight line, where u at s is the target of u at t. alpha follows a
schedule, or the times lie on a grid of n steps, t = 1 - j/n and s = t - 1/n, and n doubles over the
run (the baseline of arXiv 2410.12557), with the averaged weights at s.
"""

import dataclasses

import jax
import jax.numpy as jnp

from methods import objective, split

DOUBLINGS = 7  # n = 1, 2, 4, ... 64


@dataclasses.dataclass(frozen=True)
class Consistency(split.Split):
    """The objective with its options; 4 F, guided 6 (5). It has no rows with r = t."""

    alpha_schedule: str
    alpha_first: float
    alpha_last: float
    alpha_begin: int
    alpha_end: int

    def __post_init__(self):
        super().__post_init__()
        split.check_schedule(self, (*split.SCHEDULES, "grid"))
        rule = f"is 0 for consistency training, got {self.data_proportion}"
        objective.check(self.data_proportion == 0, "data_proportion", rule)

    @property
    def target_by_ema(self):
        return self.alpha_schedule == "grid"

    def phase(self, step, total):
        return split.ending(self, total)

    def times(self, equal, first, second):
        t_equal, t, _ = self.laws(equal, first, second)
        return t_equal, t, jnp.zeros_like(t)

    def draw(self, key, shape, step):
        draws = super().draw(key, shape, step)
        if self.alpha_schedule != "grid":
            return draws
        n = self.grid(step)
        key_j = jax.random.fold_in(key, 4)  # 0 to 3 are those of the other draws
        t = 1 - jax.random.randint(key_j, shape[:1], 0, n) / n
        return draws._replace(t=t, alpha=1 / (n * t))

    def grid(self, step):
        """Computes n when `step` steps are done, int32 ()."""
        x = split.progress(step, self.alpha_begin, self.alpha_end)
        return 2 ** jnp.int32(DOUBLINGS * x)

    def alpha(self, key, step, t, r):
        x = split.progress(step, self.alpha_begin, self.alpha_end)
        kind = "constant" if self.alpha_schedule == "grid" else self.alpha_schedule
        return jnp.full_like(t, split.schedule(kind, x, self.alpha_first, self.alpha_last))
