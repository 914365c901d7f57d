"""The image space and the space of the network: raw record -> x, x -> image.

Two roads lead there. For latents a record holds the posterior moments of the Stable Diffusion VAE,
from which x is sampled afresh; for pixels it holds the uint8 image itself. All arrays are NHWC,
all of the network's inputs float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Per-channel variance of ImageNet latents is close to one after this factor
# (Rombach et al., arXiv 2112.10752, appendix D.1).
SD_SCALE = 0.18215


class Normalisation(NamedTuple):
    """x = (z - shift) * scale for latents z; entries per channel or one for all."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]


SD_NORMALISATION = Normalisation((0.0,), (SD_SCALE,))


def normalisation(mean=(), std=()) -> Normalisation:
    """The factor 0.18215, or where mean and std (C,) are given, (z - mean_c) / std_c by channel.

    Raises ValueError where only one is given, lengths differ or a std is not positive.
    """
    mean, std = tuple(float(m) for m in mean), tuple(float(s) for s in std)
    if not mean and not std:
        return SD_NORMALISATION
    if len(mean) != len(std):
        raise ValueError(
            f"dataset.latent_mean has {len(mean)} entries and dataset.latent_std {len(std)}: "
            "give both, one entry per latent channel, or neither"
        )
    if not all(s > 0 for s in std):
        raise ValueError(f"dataset.latent_std must be positive, found {list(std)}")
    return Normalisation(mean, tuple(1 / s for s in std))


def to_x(batch, key, *, flip=False, normalisation=SD_NORMALISATION):
    """Turns one batch of raw records into the network's space, inside jit.

    batch: {"moments": (B, h, w, 2c) mean then std of the posterior, unscaled, and for flips
        "moments_flipped" of the same shape, those of the mirrored image} or
        {"image": uint8 (B, h, w, c)}. Other entries are not read.
    key: one key for the whole batch. The draws have the logical shape of the batch, so that under
        jit they are the same on any number of devices.
    flip: mirror each row with probability 1/2.
    normalisation: of the latents; pixels always become u / 127.5 - 1.
    Returns x float32 (B, h, w, c): a fresh posterior sample, or pixels in [-1, 1].
    """
    noise_key, flip_key = jax.random.split(key)
    if "moments" in batch:
        moments = batch["moments"]  # (B, h, w, 2c)
        if flip:
            # A latent cannot be mirrored itself: the VAE does not commute with mirroring.
            if "moments_flipped" not in batch:
                raise ValueError(
                    "dataset.use_flip: the dataset holds no latents of mirrored images; "
                    "prepare it again with them, or turn the option off"
                )
            moments = _choose(flip_key, batch["moments_flipped"], moments)
        mean, std = jnp.split(moments.astype(jnp.float32), 2, axis=-1)  # (B, h, w, c)
        z = mean + std * jax.random.normal(noise_key, mean.shape, jnp.float32)
        return (z - jnp.asarray(normalisation.shift)) * jnp.asarray(normalisation.scale)
    image = batch["image"]  # (B, h, w, c)
    if flip:
        image = _choose(flip_key, image[:, :, ::-1], image)
    return image.astype(jnp.float32) / 127.5 - 1.0


def _choose(key, ours, theirs):
    """Row by row `ours` or `theirs` (B, ...) with probability 1/2."""
    choice = jax.random.bernoulli(key, 0.5, (ours.shape[0],) + (1,) * (ours.ndim - 1))
    return jnp.where(choice, ours, theirs)


class Autoencoder(NamedTuple):
    """Images <-> x. `params` travel as an argument, so that nothing large is baked into a jit.

    encode(params, images float (B, H, W, 3) in [-1, 1]) -> (mean, std), float32
        (B, H/downscale, W/downscale, latent_channels), unscaled.
    decode(params, x float32 (B, h, w, c)) -> images float32 (B, H, W, C), about [-1, 1], unclipped.
    """

    params: dict
    encode: callable
    decode: callable
    downscale: int


def load(name, dtype=jnp.float32, normalisation=SD_NORMALISATION) -> Autoencoder:
    """The autoencoder called `name`.

    name: "none" for pixels: images are x.
    """
    if name == "none":
        return Autoencoder({}, _encode_pixels, _decode_pixels, downscale=1)
    raise ValueError(f"dataset.vae={name}: not known")


def _encode_pixels(params, images):
    images = images.astype(jnp.float32)
    return images, jnp.zeros_like(images)


def _decode_pixels(params, x):
    return x.astype(jnp.float32)
