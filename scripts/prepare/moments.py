"""Posterior moments of an autoencoder on their way into records: what they may be, how they lie."""

import numpy as np

from models.codec import SD_SCALE


def check(where, moments, dtype):
    """Moments (..., 2c), mean then standard deviation, in the type in which they are stored.

    Raises:
      ValueError: they cannot be that; in one line that begins with `where`.
    """
    if not np.isfinite(moments).all():
        raise ValueError(f"{where}: latents that are not finite")
    smallest = moments[..., moments.shape[-1] // 2 :].min(initial=0)
    if smallest < 0:
        raise ValueError(
            f"{where}: the second half of the moments, the standard deviations, has "
            f"{smallest:.4g}; are they logarithms of variances? exp(x / 2) makes them deviations"
        )
    with np.errstate(over="ignore"):
        stored = moments.astype(dtype)
    if not np.isfinite(stored).all():
        raise ValueError(
            f"{where}: {np.abs(moments).max():.4g} is more than {np.dtype(dtype)} can hold; take "
            "another --store"
        )
    return stored


class Spread:
    """Mean and standard deviation of latents as training sees them by default, times 0.18215."""

    def __init__(self):
        self.count, self.sum, self.square = 0, 0.0, 0.0

    def add(self, moments):
        """Counts moments (..., 2c)."""
        mean = np.split(moments.astype(np.float64), 2, axis=-1)[0]
        self.count += mean.size
        self.sum += mean.sum()
        self.square += (mean**2).sum()

    def std(self):
        """Standard deviation of the latents themselves."""
        return np.sqrt(max(self.square / self.count - (self.sum / self.count) ** 2, 0.0))

    def report(self, remedy=""):
        """Says them, and what may be wrong; nothing where nothing was counted.

        remedy: what the command has against latents that are scaled already.
        """
        if not self.count:
            return
        mean, std = SD_SCALE * self.sum / self.count, SD_SCALE * self.std()
        hint = ""
        if std < 0.5:
            hint = f": are they scaled already? They are multiplied once more in training{remedy}"
        elif std > 2:
            hint = ": another autoencoder? dataset.latent_mean and latent_std normalise them"
        print(
            f"latents times {SD_SCALE}: mean {mean:.3f}, standard deviation {std:.3f} "
            f"(about 1 is right){hint}",
            flush=True,
        )
