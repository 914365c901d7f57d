"""Upsampling by two and the convolution behind it, as one."""

import jax
import jax.numpy as jnp
import numpy as np

from models import hardware


def doubled(x, kernel, bias, dtype):
    """Convolves x with each pixel repeated 2 x 2, at 4/9 of the products.

    Three rows of such an image are two of x, so the 3 x 3 kernel becomes a 2 x 2 one for each of
    the four places that a pixel of x becomes: the same number but for rounding. On a TPU the four
    are one of 4 x 4 for x with zeros between its pixels: four times the products, and less than
    half the cycles, since putting four results together costs more there (docs/speed.md).
    x (B, h, w, c); kernel (3, 3, c, d), bias (d,) float32; dtype: of products and result,
    (B, 2 h, 2 w, d).
    """
    batch, height, width, _ = x.shape
    axes = ("NHWC", "HWIO", "NHWC")
    if hardware.platform() == "tpu":
        shifts = [((a, 1 - a), (b, 1 - b), (0, 0), (0, 0)) for a in (0, 1) for b in (0, 1)]
        kernel = sum(jnp.pad(kernel, shift) for shift in shifts).astype(dtype)
        y = jax.lax.conv_general_dilated(
            jnp.asarray(x, dtype), kernel, (1, 1), ((2, 2), (2, 2)), (2, 2), dimension_numbers=axes
        )
        return y + jnp.asarray(bias, dtype)
    rows = np.float32([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # (place, row of x, of 3)
    kernels = jnp.einsum("ayh,bxw,hwcd->yxcabd", rows, rows, kernel, precision="highest")
    y = jax.lax.conv_general_dilated(
        jnp.asarray(x, dtype),
        kernels.reshape(2, 2, kernel.shape[2], -1).astype(dtype),
        window_strides=(1, 1),
        padding=((1, 1), (1, 1)),
        dimension_numbers=axes,
    ).reshape(batch, height + 1, width + 1, 2, 2, -1)
    y = jnp.stack([y[:, a : a + height, :, a] for a in (0, 1)], axis=2)
    y = jnp.stack([y[:, :, :, b : b + width, b] for b in (0, 1)], axis=4)
    return y.reshape(batch, 2 * height, 2 * width, -1) + jnp.asarray(bias, dtype)
