"""MeanFlow's derivative by a central difference (Transition Models, TiM), in place of its JVP.

    du/dt = [u(z_t + e d, t + e, h + e) - u(z_t - e d, t - e, h - e)] / (2 e),    r fixed,

along d: the data's line v as in TiM, or v_g, which approximates MeanFlow's JVP. Nothing is clipped:
t + e may pass 1, and h - e may be negative.
"""

import dataclasses

import jax.numpy as jnp

from methods import objective, path, split
from methods.path import by_row, merge_rows, split_rows

ZERO_PROPORTION = 0.1  # share of the rows that go the whole way to the data
PATHS = ("data", "guided")


@dataclasses.dataclass(frozen=True)
class Difference(split.Split):
    """MeanFlow with the difference; rows with r < t take 5 F, guided 7 (6)."""

    difference_step: float
    difference_path: str

    target_passes = 2

    def __post_init__(self):
        super().__post_init__()
        objective.check(self.difference_step > 0, "difference_step", "must be above 0")
        rule = f"is one of {' | '.join(PATHS)}, not {self.difference_path!r}"
        objective.check(self.difference_path in PATHS, "difference_path", rule)

    def times(self, equal, first, second):
        """Draws as MeanFlow: rows with r = t take the larger of two draws."""
        _, t, r = super().times(equal, first, second)
        return t, t, r

    def target(self, ask, rows, v_g):
        e, h = self.difference_step, rows.t - rows.r
        d = rows.v if self.difference_path == "data" else v_g
        after, before = (
            (rows.z + s * d, {"t": rows.t + s, "h": h + s, **rows.dropped}) for s in (e, -e)
        )
        u_after, u_before = ask(after, before)
        return v_g - by_row(h, v_g) * (u_after - u_before) / (2 * e)


class TiM(Difference):
    """TiM: the averaged weights guide, some rows reach the data, and long intervals weigh less."""

    guided_by_ema = True

    def equal_count(self, batch_size):
        return round(batch_size * self.data_proportion)

    def draw(self, key, shape, step):
        draws = super().draw(key, shape, step)
        r, r_equal = split_rows(draws.r, self.equal_count(shape[0]))
        whole = min(round(ZERO_PROPORTION * shape[0]), len(r))
        return draws._replace(r=merge_rows(r.at[len(r) - whole :].set(0.0), r_equal))

    def weight(self, error, rows, eps):
        length = jnp.tan(rows.t) - jnp.tan(rows.r) + 1
        return path.adaptive_weight(error, self.norm_p, eps) / jnp.sqrt(length)
