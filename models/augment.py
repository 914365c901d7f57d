"""Augmentation of small images that the network is told of (Karras et al., arXiv 2206.00364, F.2).

Mirror, scale, stretch and shift as one map of the plane, executed by a filtered resampling, with
the strengths of MeanFlow on CIFAR-10 (arXiv 2505.13447, appendix A). What is drawn comes back as
LABELS numbers per image, which go into the network as a condition, so that it does not draw
distorted images by itself. Shapes are static: an image is padded by as much as can be reflected.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.filters import SPACE, correlate, upsample

LABELS = 6
SCALE, SHIFT = 0.2, 0.125  # of log2 of a scale; of a shift, in widths of the image
# The low-pass filter of the symlet of order 6 (Daubechies, Ten Lectures on Wavelets, 1992, 8.1.1).
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
MARGIN = 6  # samples beyond the image that the filter reaches, on each side


class Draws(NamedTuple):
    """What is random, float32 (B,) each: normals, and uniforms for gates and the angle."""

    flip_bit: jax.Array  # 0 or 1
    flip_gate: jax.Array
    scale_normal: jax.Array
    scale_gate: jax.Array
    aniso_normal: jax.Array
    aniso_uniform: jax.Array
    aniso_gate: jax.Array
    aniso_rotate_gate: jax.Array
    translate_normal: jax.Array  # (2, B): to the right, downwards
    translate_gate: jax.Array


def draw(key, batch_size):
    """Draws `Draws` for a batch."""
    key_bit, key_normal, key_uniform = jax.random.split(key, 3)
    bit = jax.random.bernoulli(key_bit, 0.5, (batch_size,)).astype(jnp.float32)
    normal = jax.random.normal(key_normal, (4, batch_size))
    uniform = jax.random.uniform(key_uniform, (6, batch_size))
    return Draws(
        flip_bit=bit,
        flip_gate=uniform[0],
        scale_normal=normal[0],
        scale_gate=uniform[1],
        aniso_normal=normal[1],
        aniso_uniform=uniform[2],
        aniso_gate=uniform[3],
        aniso_rotate_gate=uniform[4],
        translate_normal=normal[2:],
        translate_gate=uniform[5],
    )


def augment(x, draws, p):
    """Augments images, deterministic in `draws`: images and their labels.

    Args:
      x: images in [-1, 1], float32 (B, H, W, C).
      p: probability of each transform but the mirror, which is always on: every image is mirrored
        or not with probability 1/2.

    Returns:
      Images, which may leave [-1, 1], and labels, float32 (B, LABELS): mirrored or not, log2 of
      the scale / SCALE, the same of the stretch by the cosine and sine of its angle, the shift to
      the right and downwards in widths / SHIFT.
    """
    flip = jnp.where(draws.flip_gate < 1e8 * p, draws.flip_bit, 0.0)
    scale = jnp.where(draws.scale_gate < p, draws.scale_normal, 0.0)
    stretch = jnp.where(draws.aniso_gate < p, draws.aniso_normal, 0.0)
    angle = jnp.pi * (2 * draws.aniso_uniform - 1)
    angle = jnp.where(draws.aniso_rotate_gate < 0.5, angle, 0.0)
    shift = jnp.where(draws.translate_gate < p, draws.translate_normal, 0.0)  # (2, B)
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    x = jnp.where(flip[:, None, None, None] > 0, x[:, :, ::-1], x)
    _, H, W, _ = x.shape
    matrix = _matrix(2.0 ** (SCALE * scale), 2.0 ** (SCALE * stretch), cos, sin)
    offset = SHIFT * jnp.array([W, H], jnp.float32)[:, None] * shift
    labels = jnp.stack([flip, scale, stretch * cos, stretch * sin, *shift], axis=-1)
    return warp(x, matrix, offset.T), labels


def _matrix(scale, stretch, cos, sin):
    """Computes (B, 2, 2): from a place (x, y) in the output to that in the input, about the centre.

    S(1 / scale) R(-a) diag(1 / stretch, stretch) R(a) for the angle a of `cos` and `sin`.
    """
    a, b = 1 / stretch, stretch
    xx, yy = a * cos**2 + b * sin**2, a * sin**2 + b * cos**2
    xy = (b - a) * cos * sin
    return jnp.array([[xx, xy], [xy, yy]]).transpose(2, 0, 1) / scale[:, None, None]


def warp(x, matrix, offset):
    """Warps images: the value at the place p is that of x at `matrix (p - offset)`.

    Args:
      x: float32 (B, H, W, C).
      matrix: (B, 2, 2); offset: (B, 2) in pixels; places are (x, y) from the centre, x to the
        right and y down.

    x is continued by reflection, sampled up by two, read bilinearly, and sampled down again.
    """
    _, H, W, _ = x.shape
    x = jnp.pad(x, ((0, 0), (H - 1, H - 1), (W - 1, W - 1), (0, 0)), mode="reflect")
    for axis in SPACE:
        x = upsample(x, SYM6[::-1], axis)
    with jax.default_matmul_precision("highest"):  # places, not values: they have to be exact
        x = bilinear(x, _places(x.shape[1:3], (H, W), matrix, offset))
    for axis in SPACE:
        x = correlate(x, SYM6, axis, (MARGIN - 1, MARGIN - 1), stride=2)
    cut = MARGIN // 2
    return x[:, cut:-cut, cut:-cut]


def _places(source, image, matrix, offset):
    """Computes where in an image of shape `source` a grid of half pixels is read: (B, h, w, 2).

    The grid is that of an image (H, W) with MARGIN // 2 pixels more on every side.
    """
    rows, columns = (
        np.arange(2 * (n + MARGIN), dtype=np.float32) + 1 - (n + MARGIN) for n in image
    )  # half pixels from the centre
    grid = np.stack(np.broadcast_arrays(columns[None, :], rows[:, None]), axis=-1)  # (h, w, 2)
    away = grid - 2 * offset[:, None, None]
    places = jnp.einsum("bij,bhwj->bhwi", matrix, away)
    return places - 0.5 + (np.array(source[::-1], np.float32) - 1) / 2


@jax.vmap
def bilinear(x, places):
    """Reads x (h, w, C) at the indices (column, row) of `places` (h', w', 2), 0 beyond its border.

    Mapped over a batch; returns (h', w', C).
    """
    h, w, _ = x.shape
    x = jnp.pad(x, ((2, 2), (2, 2), (0, 0)))
    floor = jnp.floor(places)
    column, row = jnp.moveaxis(places - floor, -1, 0)[..., None]
    # Whatever lies beyond the border falls on two zeros.
    first = jnp.clip(floor + 2, 0, jnp.array([w + 2, h + 2])).astype(jnp.int32)
    j, i = jnp.moveaxis(first, -1, 0)
    above = (1 - column) * x[i, j] + column * x[i, j + 1]
    below = (1 - column) * x[i + 1, j] + column * x[i + 1, j + 1]
    return (1 - row) * above + row * below
