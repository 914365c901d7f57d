"""SplitMeanFlow (arXiv 2507.16884): both parts of an interval are the network's own averages.

The rows with r = t anchor the network to v_g; those with r < t only ask that its averages add up,
so from nothing it needs many of the first (`data_proportion` .8 to .9).
"""

import jax

from methods import split


class SplitMeanFlow(split.Split):
    """The objective; rows with r < t take 5 F, guided or not."""

    target_passes = 2
    guides_differ = False

    def times(self, equal, first, second):
        """Draws as MeanFlow: rows with r = t take the larger of two draws."""
        _, t, r = super().times(equal, first, second)
        return t, t, r

    def alpha(self, key, step, t, r):
        return jax.random.uniform(key, t.shape)

    def target(self, ask, rows, v_g):
        h = rows.alpha * (rows.t - rows.r)
        (a,) = ask((rows.z, {"t": rows.t, "h": h, **rows.dropped}))
        return split.split_target(ask, rows, a)
