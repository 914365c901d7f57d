"""Filters along an axis of images, with the samplings by two that go with them. NHWC.

Shifted copies and sums, no products of matrices: exact in float32 on every device.
"""

import jax
import jax.numpy as jnp

SPACE = (1, 2)  # the axes of height and width


def correlate(x, taps, axis, padding, stride=1):
    """Computes out[i] = sum_k taps[k] y[stride i + k] along `axis`, y being x between zeros.

    Args:
      padding: how many zeros stand before and behind x, (before, behind).
    """
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (*padding, 0)
    y = jax.lax.pad(x, jnp.zeros((), x.dtype), config)
    span = (y.shape[axis] - len(taps)) // stride * stride + 1

    def shifted(k):
        return jax.lax.slice_in_dim(y, k, k + span, stride, axis)

    return sum(float(tap) * shifted(k) for k, tap in enumerate(taps))


def upsample(x, taps, axis):
    """Computes `correlate` of x with a zero between any two samples: n -> 2 n, for L even taps.

    L / 2 zeros stand on either side. The two halves of the output, its even and its odd places,
    meet every other tap each; so no zero is multiplied.
    """
    front = len(taps) // 2
    phases = []
    for phase in (0, 1):
        first = (front - phase) % 2  # the first tap that meets a sample
        before = (front - phase - first) // 2
        every_second = taps[first::2]
        phases.append(correlate(x, every_second, axis, (before, len(every_second) - 1 - before)))
    shape = list(x.shape)
    shape[axis] *= 2
    return jnp.stack(phases, axis=axis + 1).reshape(shape)


def half(x, taps, axes=SPACE):
    """Halves (B, H, W, C) to (B, H/2, W/2, C) by a filter that is scaled to the sum 1 per axis."""
    pad = (len(taps) - 1) // 2
    taps = [tap / sum(taps) for tap in taps]
    for axis in axes:
        x = correlate(x, taps, axis, (pad, pad), stride=2)
    return x


def double(x, taps, axes=SPACE):
    """Doubles (B, H, W, C) to (B, 2 H, 2 W, C): the transpose of `half` times 4, for even taps."""
    taps = [2 * tap / sum(taps) for tap in reversed(taps)]
    for axis in axes:
        x = upsample(x, taps, axis)
    return x
