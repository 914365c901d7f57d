"""Posterior moments of an autoencoder on their way into records: what they may be, how they lie."""

import numpy as np

from models.codec import SD_SCALE

SD_CHANNELS = 4  # of the latents of Stable Diffusion's autoencoder


def check(where, moments, dtype):
    """Casts moments (..., 2c), mean then standard deviation, to the type of the records.

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
        stored = moments.astype(dtype, copy=False)
    if stored.dtype != moments.dtype and not np.isfinite(stored).all():
        raise ValueError(
            f"{where}: {np.abs(moments).max():.4g} is more than {np.dtype(dtype)} can hold; take "
            "another --store"
        )
    return stored


class Spread:
    """Mean and standard deviation of latents, of all numbers and by channel."""

    def __init__(self):
        self.count, self._sum, self._square = 0, 0.0, 0.0

    def add(self, moments):
        """Counts moments (..., 2c)."""
        channels = moments.shape[-1] // 2
        mean = moments[..., :channels].astype(np.float64)
        self.count += mean.size
        rows = (-1, mean.shape[-2] * channels)  # many columns are summed faster than few
        for name, values in (("_sum", mean), ("_square", mean * mean)):
            total = values.reshape(rows).sum(axis=0).reshape(-1, channels).sum(axis=0)
            setattr(self, name, getattr(self, name) + total)

    def std(self):
        """Returns the standard deviation of the latents themselves."""
        mean = np.sum(self._sum) / self.count
        return np.sqrt(max(np.sum(self._square) / self.count - mean**2, 0.0))

    def report(self, remedy=""):
        """Says them as training sees them, and what may be wrong; nothing where none was counted.

        Latents of 4 channels are taken for those of SD's autoencoder, and others are not.
        remedy: what the command has against latents that are scaled already.
        """
        if not self.count:
            return
        if len(self._sum) != SD_CHANNELS:
            rows = self.count / len(self._sum)
            mean = self._sum / rows
            std = np.sqrt(np.maximum(self._square / rows - mean**2, 0))
            print(
                f"latents of {len(mean)} channels, deviation {self.std():.3f}. As they are "
                "not of SD's autoencoder, normalised by channel, in the YAML:\n"
                f"{yaml_lines(mean, std)}", flush=True
            )  # fmt: skip
            return
        mean, std = SD_SCALE * np.sum(self._sum) / self.count, SD_SCALE * self.std()
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


def yaml_lines(mean, std):
    """Writes `dataset.latent_mean` and `latent_std` by channel, as a YAML file has them."""
    rows = {"latent_mean": mean, "latent_std": std}
    texts = {name: ", ".join(f"{x:.6g}" for x in values) for name, values in rows.items()}
    return "\n".join(["dataset:", *(f"  {name}: [{text}]" for name, text in texts.items())])
