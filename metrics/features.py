"""Feature networks: what turns images into the numbers that are compared.

Builds on metrics/inception.py and metrics/inception_weights.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from metrics import inception, inception_weights


class Features(NamedTuple):
    """What turns images into numbers; `name` says which evaluator a result belongs to."""

    name: str
    params: dict
    apply: Callable  # (params, images uint8 (N, H, W, C)) -> {"pool": (N, D), ...}
    resize: str | None
    weights_sha256: str | None


def load(options):
    """The feature network that the options `fid` name.

    Raises:
      ValueError, FileNotFoundError: no weights, or damaged ones.
    """
    if options.features == "pixels":
        return Features("pixels in [0, 1]", {}, pixel_features, None, None)
    params = inception_weights.load(options.inception_weights or None)
    return of_inception(params, options.resize, inception_weights.digest(params))


def of_inception(params, resize, digest):
    """`Features` of the FID network with these parameters."""

    def apply(params, images):
        if images.shape[-1] == 1:
            images = jnp.repeat(images, 3, axis=-1)
        return inception.features(params, images, resize)

    return Features(f"Inception 2015-12-05, {resize} resize", params, apply, resize, digest)


def pixel_features(params, images):
    """The pixels in [0, 1] as they are, float32 (N, H W C)."""
    return {"pool": images.reshape(len(images), -1).astype(jnp.float32) / 255}
