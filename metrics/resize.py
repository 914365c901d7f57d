"""How evaluators bring images to the size of their feature networks, inside jit.

Every resize is a pair of small matrices, one for each axis, built once on the host. Two
evaluators that resize differently measure different numbers, so each way has a name.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST
BILINEAR = ("half_pixel", "tf1")
PIL_BITS = 22  # of the fraction in Pillow's fixed-point weights


def apply(images, rows, columns):
    """Resizes (N, H, W, C) to (N, P, Q, C) float32 by `rows` (P, H) and `columns` (Q, W)."""
    x = images.astype(jnp.float32)
    x = jnp.einsum("ph,nhwc->npwc", rows, x, precision=HIGHEST)
    return jnp.einsum("qw,npwc->npqc", columns, x, precision=HIGHEST)


@functools.cache
def bilinear(size, out, kind):
    """Returns the matrix (out, size), float32, of a bilinear resize without antialiasing.

    `kind` is `tf1`, source coordinate i size / out (TensorFlow 1), or `half_pixel`,
    (i + 1/2) size / out - 1/2. Coordinates are rounded to float32, as in every evaluator that is
    to be agreed with.
    """
    index, scale, half = np.arange(out, dtype=np.float32), np.float32(size / out), np.float32(0.5)
    if kind not in BILINEAR:
        raise ValueError(f"fid.resize: {kind!r} is unknown, choose one of {', '.join(BILINEAR)}")
    source = index * scale if kind == "tf1" else (index + half) * scale - half
    source = np.clip(source, 0, np.float32(size - 1))
    low = np.floor(source).astype(int)
    high = np.minimum(low + 1, size - 1)
    matrix, rows = np.zeros((out, size), np.float32), np.arange(out)
    np.add.at(matrix, (rows, low), 1 - (source - low))
    np.add.at(matrix, (rows, high), source - low)
    return matrix


def keys_cubic(x, a):
    """Returns Keys' cubic convolution kernel, support 2 (IEEE ASSP 29 (6), 1981, eq. 15)."""
    x = np.abs(x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


@functools.cache
def bicubic(size, out):
    """Returns the matrix (out, size), float64, of the antialiased bicubic resize, a = -0.5.

    Pixels beyond the border are left out and the weights divided by their sum, as Pillow and
    torch's `interpolate(antialias=True)` do.
    """
    scale = size / out
    width = max(scale, 1.0)
    centre = (np.arange(out) + 0.5) * scale
    weights = keys_cubic((np.arange(size) + 0.5 - centre[:, None]) / width, -0.5)
    return weights / weights.sum(1, keepdims=True)


def pil_bicubic(images, out):
    """Resizes uint8 (N, H, W, C) as Pillow's `resize((out, out), BICUBIC)`, bit by bit.

    Columns first, then rows; after each of the two the values are rounded and clipped to uint8.
    Whole numbers throughout, so the devices agree.
    """
    for axis in (2, 1):
        if images.shape[axis] != out:
            images = _pil_axis(images, axis, out)
    return images


def _pil_axis(images, axis, out):
    fixed = bicubic(images.shape[axis], out) * (1 << PIL_BITS)
    fixed = np.trunc(fixed + np.copysign(0.5, fixed)).astype(np.int32)
    taps = int((fixed != 0).sum(1).max())
    first = np.minimum((fixed != 0).argmax(1), fixed.shape[1] - taps)
    total = jnp.int32(1 << (PIL_BITS - 1))
    shape = [-1 if i == axis else 1 for i in range(images.ndim)]
    for tap in range(taps):  # at most 4 max(1, size / out) + 1 of them
        weights = fixed[np.arange(out), first + tap].reshape(shape)
        total = total + jnp.take(images, first + tap, axis).astype(jnp.int32) * weights
    return jnp.clip(total >> PIL_BITS, 0, 255).astype(jnp.uint8)
