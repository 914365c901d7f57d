"""Filters along an axis of images, with the samplings by two that go with them. NHWC, float32."""

import math

import jax
import jax.numpy as jnp

SPACE = (1, 2)  # the axes of height and width


def correlate(x, taps, axis, padding, *, stride=1, dilation=1):
    """out[i] = sum_k taps[k] y[stride i + k] along `axis`, y being x between zeros.

    Args:
      padding: how many zeros stand before and behind x, (before, behind).
      dilation: 2 puts a zero between any two samples of x first.

    Shifted copies and sums, no products of matrices: exact in float32 on every device.
    """
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (*padding, dilation - 1)
    y = jax.lax.pad(x, jnp.zeros((), x.dtype), config)
    span = (y.shape[axis] - len(taps)) // stride * stride + 1

    def shifted(k):
        return jax.lax.slice_in_dim(y, k, k + span, stride, axis)

    return sum(float(tap) * shifted(k) for k, tap in enumerate(taps))


def half(x, taps):
    """(B, H, W, C) -> (B, H/2, W/2, C) through the filter `taps`, scaled to the sum 1 per axis."""
    pad = (len(taps) - 1) // 2
    taps = [tap / sum(taps) for tap in taps]
    for axis in SPACE:
        x = correlate(x, taps, axis, (pad, pad), stride=2)
    return x


def double(x, taps):
    """(B, H, W, C) -> (B, 2 H, 2 W, C), the transpose of `half` times 4; an even number of taps."""
    pad = math.ceil((len(taps) - 1) / 2)
    taps = [2 * tap / sum(taps) for tap in reversed(taps)]
    for axis in SPACE:
        x = correlate(x, taps, axis, (pad, pad), dilation=2)
    return x
