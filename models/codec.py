"""What lies between a record and the network: a raw batch -> x, inside the compiled step.

Three roads lead there. For latents a record holds the posterior moments of an autoencoder, from
which x is sampled afresh; for pixels it holds the uint8 image itself, for values the numbers. All
arrays are NHWC, all of the network's inputs float32. The way back, x -> image, is models/vae.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models import augment
from utils import conditions, images

# Per-channel variance of ImageNet latents is close to one after this factor
# (Rombach et al., arXiv 2112.10752, appendix D.1).
SD_SCALE = 0.18215


class Normalisation(NamedTuple):
    """x = (z - shift) * scale for latents or values z; entries per channel or one for all."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def apply(self, z):
        """Normalises latents (B, h, w, c): x."""
        return (z - jnp.asarray(self.shift)) * jnp.asarray(self.scale)

    def undo(self, x):
        """Turns x (B, h, w, c) back into latents."""
        return x / jnp.asarray(self.scale) + jnp.asarray(self.shift)


SD_NORMALISATION = Normalisation((0.0,), (SD_SCALE,))
AS_IT_IS = Normalisation((0.0,), (1.0,))


def normalisation(mean, std, channels, default=SD_NORMALISATION) -> Normalisation:
    """Makes (z - mean_c) / std_c by channel where mean and std (C,) are set, else the default.

    Raises ValueError where only one is given, their number is not that of the channels, or a std
    is not positive.
    """
    for name, values in (("latent_mean", mean), ("latent_std", std)):
        if len(values) not in (0, channels):
            raise ValueError(
                f"dataset.{name} needs one number for each of the {channels} channels, or none"
            )
    if bool(mean) != bool(std):
        raise ValueError("dataset.latent_std goes together with latent_mean: give both, or neither")
    if not all(s > 0 for s in std):
        raise ValueError(f"dataset.latent_std must be above 0, got {list(std)}")
    if not mean:
        return default
    return Normalisation(tuple(map(float, mean)), tuple(1 / float(s) for s in std))


class Codec(NamedTuple):
    """Turns raw batches into what the objective takes.

    normalisation: of latents and values; pixels always become u / 127.5 - 1.
    flip: mirror each row with probability 1/2.
    labelled: whether there are classes; without, every row has the null label, which is 0.
    augment_prob: of each transform of models/augment.py, for pixels; 0: none at all.
    given: the conditions of the records that go into the network.
    """

    normalisation: Normalisation = SD_NORMALISATION
    flip: bool = False
    labelled: bool = True
    augment_prob: float = 0.0
    given: tuple[conditions.Condition, ...] = ()

    @property
    def conditions(self):
        """Names what the network has to take beside the labels."""
        return ("augment",) if self.augment_prob else ()

    def encode(self, batch, key):
        """Encodes a batch of raw records: (x float32 (B, h, w, c), given). Pure, for `jit`.

        Args:
          batch: {"moments": (B, h, w, 2c) mean then std of the posterior, unscaled, and for flips
            "moments_flipped" of the same shape, those of the mirrored image}, {"image": uint8
            (B, h, w, c)} or {"values": floats (B, h, w, c)}; and "label" int32 (B,), and the
            conditions `given`.
          key: one key for the whole batch. The draws have the logical shape of the batch, so that
            they are the same on any number of devices.

        Returns:
          x, a posterior sample, pixels in [-1, 1] or values, and {"y": labels, int32 (B,)}, with
          `augment`, float32 (B, 6), where images are augmented, and what `conditions_of` gives.
        """
        noise_key, flip_key = jax.random.split(key)
        given = {"y": batch["label"] if self.labelled else jnp.zeros_like(batch["label"])}
        given |= self.conditions_of(batch, flip_key)
        if "moments" not in batch:
            image = batch["values"] if "values" in batch else batch["image"]  # (B, h, w, c)
            if self.flip:
                image = _choose(flip_key, image[:, :, ::-1], image)
            x = image.astype(jnp.float32)
            x = self.normalisation.apply(x) if "values" in batch else x / 127.5 - 1.0
            if self.augment_prob:
                draws = augment.draw(noise_key, len(x))
                x, given["augment"] = augment.augment(x, draws, self.augment_prob)
            return x, given
        moments = batch["moments"]  # (B, h, w, 2c)
        if self.flip:
            # A latent cannot be mirrored itself: the VAE does not commute with mirroring.
            moments = _choose(flip_key, batch["moments_flipped"], moments)
        mean, std = jnp.split(moments.astype(jnp.float32), 2, axis=-1)  # (B, h, w, c)
        z = mean + std * jax.random.normal(noise_key, mean.shape, jnp.float32)
        return self.normalisation.apply(z), given

    def conditions_of(self, batch, flip_key=None, missing=()):
        """Makes the conditions of a raw batch as networks take them: {name: float32 (B, ...)}.

        Arrays of bytes become [-1, 1], latents are normalised like those of the sample, all other
        numbers stay. With them NAME_mask, bool (B, N), where the batch has one, and `null`, {name:
        bool (B,)}, which of them are dropped. Those that are kept have no such entry.

        Args:
          flip_key: that of `encode`; None: nothing is mirrored.
          missing: names of those that are dropped in all rows; else none is.
        """
        found, null = {}, {}
        for one in self.given:
            value, mask = jnp.asarray(batch[one.feature]), one.name + conditions.MASK
            if self.flip and flip_key is not None and one.kind == "array":
                mirrored = one.feature + conditions.FLIPPED
                mirrored = batch[mirrored] if one.latent else value[:, :, ::-1]
                value = _choose(flip_key, mirrored, value)
            if one.latent:
                value = self.normalisation.apply(value.astype(jnp.float32))
            elif one.kind == "array" and value.dtype == jnp.uint8:
                value = images.to_float(value)
            found[one.name] = value.astype(jnp.float32)
            if mask in batch:
                found[mask] = jnp.asarray(batch[mask]).astype(bool)
            if not one.kept:
                null[one.name] = jnp.full(len(value), one.name in missing)
        return found | ({"null": null} if null else {})


def _choose(key, ours, theirs):
    """Chooses `ours` or `theirs` (B, ...) row by row with probability 1/2."""
    choice = jax.random.bernoulli(key, 0.5, (ours.shape[0],) + (1,) * (ours.ndim - 1))
    return jnp.where(choice, ours, theirs)
