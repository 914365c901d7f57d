"""Pixel MeanFlow (arXiv 2601.22158): improved MeanFlow on pixels, with perceptual losses.

The network predicts clean images, from which it gives u and v (models/pmf_dit.py). Beside the loss
on the velocity, the image x = z_t - t u that the average velocity points to is compared with the
true one by frozen networks, on a random crop, where t lies below `perceptual_max_t`.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from methods import improved, objective, path
from methods.path import by_row

CLIP = 0.05  # the smallest time that a velocity is divided by
UNIFORM = 0.1  # share of the rows whose times are uniform, with `tr_uniform`
AREA, ASPECT, SIDE = (0.08, 1.0), (3 / 4, 4 / 3), 224  # of a crop: share, width / height, pixels


class Crop(NamedTuple):
    """Where the crop of each row lies, in pixels; each float32 (B, 2): height and width."""

    start: jax.Array
    size: jax.Array


class Draws(NamedTuple):
    """What is random in one step."""

    t: jax.Array  # (B,) in [0, 1]
    r: jax.Array  # (B,) in [0, t]
    noise: jax.Array  # (B, H, W, C), standard normal
    drop: jax.Array  # (B,) bool: the row trains without its label
    omega: jax.Array  # (B,) in [1, omega_max]
    t_min: jax.Array  # (B,) in [0, 1/2]; 0 where r = t
    t_max: jax.Array  # (B,) in [1/2, 1]; 1 where r = t
    crop: Crop | None = None  # None: the images as they are


@dataclasses.dataclass(frozen=True)
class Pixel(improved.Improved):
    """The objective with its options; `configs/default.py` (`method`) says what each one means."""

    tr_uniform: bool
    lpips_weight: float
    convnext_weight: float
    perceptual_max_t: float
    noise_scale: float  # last, as a dataclass takes the base's value for its default

    rows = ("error_u", "error_v", "loss_u", "loss_v", "loss_lpips", "loss_convnext")

    def __post_init__(self):
        super().__post_init__()
        for name in ("lpips_weight", "convnext_weight"):
            objective.check(getattr(self, name) >= 0, name, "must not be negative")
        objective.check(self.noise_scale > 0, "noise_scale", "must be above 0")

    @property
    def frozen(self):
        """Names of the networks that `held` has to have, (images, images) -> float32 (B,)."""
        weights = {"lpips": self.lpips_weight, "convnext": self.convnext_weight}
        return tuple(name for name, weight in weights.items() if weight)

    def draw(self, key, shape, step):
        """See `Objective`; the rows with r = t have the plain law of one time."""
        batch_size, num_equal = shape[0], self.equal_count(shape[0])
        draws = super().draw(key, shape, step)
        key_t, key_gate, key_uniform, key_crop = jax.random.split(jax.random.fold_in(key, 1), 4)
        times = jnp.stack([
            path.draw_time(k, batch_size, self.noise_dist, self.P_mean, self.P_std)
            for k in jax.random.split(key_t)
        ])  # fmt: skip
        if self.tr_uniform:
            uniform = jax.random.uniform(key_gate, (batch_size,)) < UNIFORM
            times = jnp.where(uniform, jax.random.uniform(key_uniform, times.shape), times)
        t, r = order_times(*times, num_equal)
        crop = draw_crop(key_crop, shape) if self.frozen else None
        return Draws(**(draws._asdict() | {"t": t, "r": r}), crop=crop)

    def point(self, x, noise, t):
        """Returns z_t and the velocity there, damped for t < 0.05 as the network's are."""
        z = path.z_t(x, self.noise_scale * noise, t)
        return z, (z - x) / by_row(jnp.maximum(t, CLIP), z)

    def loss(self, net, params, x, given, draws, held):
        """See `Objective`; beside improved MeanFlow's terms those of the frozen networks in `held`.

        `loss_lpips` and `loss_convnext` are 0 where t is not below `perceptual_max_t`.
        """
        fields = self.fields(net, params, x, given, draws)
        loss, rows = self.of_fields(fields, x, draws)
        with jax.named_scope("perceptual"):  # as benchmarks/cycles.py tells it apart
            return self.compared(loss, rows, fields.u, x, draws, held)

    def compared(self, loss, rows, u, x, draws, held):
        """Adds to the loss and the rows of `loss` what frozen networks say of x and z_t - t u."""
        z, _ = self.point(x, draws.noise, draws.t)
        pair = [z - by_row(draws.t, z) * u, x]
        if draws.crop is not None and self.frozen:
            pair = [cropped(rgb(image), draws.crop) for image in pair]
        seen = draws.t < self.perceptual_max_t
        for name, weight in (("lpips", self.lpips_weight), ("convnext", self.convnext_weight)):
            error = jnp.zeros_like(draws.t)
            if weight:
                error = jnp.where(seen, held[name](*pair), 0.0)
                weighted = error * path.adaptive_weight(error, self.norm_p, self.norm_eps)
                loss += weight * jnp.mean(weighted)
            rows |= {f"loss_{name}": stop_gradient(error)}
        return loss, rows


def rgb(images):
    """Repeats a single channel: (B, H, W, 1 or 3) -> (B, H, W, 3)."""
    return jnp.broadcast_to(images, (*images.shape[:-1], 3))


def order_times(first, second, num_equal):
    """Orders two times by row, after those with r = t have got the first of them: t, r (B,)."""
    second = path.equal_in(first, second, num_equal)
    return jnp.maximum(first, second), jnp.minimum(first, second)


def draw_crop(key, shape):
    """Draws a rectangle in each image of `shape` (B, H, W, C): a `Crop`."""
    area, aspect, place = jax.random.split(key, 3)
    full = jnp.float32(shape[1:3])
    area = jax.random.uniform(area, shape[:1], minval=AREA[0], maxval=AREA[1]) * full.prod()
    low, high = map(math.log, ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspect, shape[:1], minval=low, maxval=high))
    size = jnp.sqrt(jnp.stack([area / aspect, area * aspect], axis=1))
    size = jnp.clip(jnp.round(size), 1, full)
    start = jnp.floor(jax.random.uniform(place, (shape[0], 2)) * (full - size + 1))
    return Crop(start, size)


def cropped(images, crop):
    """Cuts a rectangle out of each image and resizes it: (B, H, W, C) -> (B, 224, 224, C)."""

    def one(image, start, size):
        scale = SIDE / size
        return jax.image.scale_and_translate(
            image, (SIDE, SIDE, image.shape[-1]), (0, 1), scale, -start * scale, "cubic",
            antialias=True,
        )  # fmt: skip

    return jax.vmap(one)(images, crop.start, crop.size)
