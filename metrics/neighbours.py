"""Precision and recall by balls around samples (Kynkaanniemi et al., arXiv 1904.06991)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST
HALF_ROWS = 10_000  # side of the blocks in which ADM computes, which matter where float16 overflows


def precision_recall(reference, generated, k=3, rows=2048, half=False):
    """Returns `(precision, recall)`: the share of samples inside a ball of the other set.

    A ball reaches from a sample to its k-th nearest neighbour within its own set; its surface
    belongs to it. The sets need not be of the same size, and their sizes matter: the balls of a
    larger set are smaller, and more.

    Args:
      reference, generated: float32 features (N, D) and (M, D).
      rows: samples that are held against a whole set at a time, on the default device.
      half: ADM's float16 arithmetic, to reproduce its numbers; its errors grow with the norms.
    """
    inside_generated, inside_reference = flags(reference, generated, k, rows, half)
    return float(inside_generated.mean()), float(inside_reference.mean())


def flags(reference, generated, k=3, rows=2048, half=False):
    """Tells which samples lie inside a ball of the other set: bool (M,) generated, (N,) reference.

    Raises ValueError where a set has no k-th neighbour.
    """
    for name, features in (("reference", reference), ("generated", generated)):
        if len(features) <= k:
            raise ValueError(f"precision and recall: {len(features)} {name} samples, k = {k}")
    if not half:
        # Distances do not change with the origin; near it they lose fewer digits.
        origin = np.mean(reference, axis=0, dtype=np.float64).astype(reference.dtype)
        reference, generated = reference - origin, generated - origin
    reference, generated = jnp.asarray(reference), jnp.asarray(generated)
    radii_reference = radii(reference, k, rows, half)
    radii_generated = radii(generated, k, rows, half)
    return (
        _by_rows(_inside, generated, rows, reference, radii_reference, half),
        _by_rows(_inside, reference, rows, generated, radii_generated, half),
    )


def radii(features, k=3, rows=2048, half=False):
    """Returns each sample's squared distance to its k-th neighbour in its set, float32 (N,)."""
    return _by_rows(_kth_distance, features, rows, features, k, half)


def _by_rows(function, features, rows, others, *args):
    rows = HALF_ROWS if args[-1] else rows
    parts = [function(features[i : i + rows], others, *args) for i in range(0, len(features), rows)]
    return np.concatenate([np.asarray(part) for part in parts])


@partial(jax.jit, static_argnums=3)
def _inside(samples, centres, radii, half):
    return (_squared_distances(samples, centres, half) <= radii).any(1)


@partial(jax.jit, static_argnums=(2, 3))
def _kth_distance(samples, others, k, half):
    # The nearest of all is the sample itself.
    return -jax.lax.top_k(-_squared_distances(samples, others, half), k + 1)[0][:, k]


def _squared_distances(a, b, half):
    """Returns |a_i - b_j|^2, float32 (N, M), of a (N, D) and b (M, D)."""
    if not half:
        return _distances(a, b)
    parts = [b[i : i + HALF_ROWS] for i in range(0, len(b), HALF_ROWS)]
    return jnp.concatenate([_half_distances(a, part) for part in parts], axis=1)


def _distances(a, b):
    cross = jnp.einsum("nd,md->nm", a, b, precision=HIGHEST)
    return jnp.maximum((a**2).sum(1)[:, None] - 2 * cross + (b**2).sum(1), 0)


def _half_distances(a, b):
    """Returns a block of ADM's distances, each rounded to float16 unless one is not finite."""

    def half(x):  # a cast to float16 might be left out where it is fused
        return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)

    x, y = half(a), half(b)
    square_x, square_y = (half(half(f**2).sum(1)) for f in (x, y))
    cross = half(jnp.einsum("nd,md->nm", x, y, precision=HIGHEST))
    distances = half(half(square_x[:, None] - 2 * cross) + square_y)
    return jnp.where(jnp.isfinite(distances).all(), jnp.maximum(distances, 0), _distances(a, b))
