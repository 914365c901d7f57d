"""Feature networks: what turns images into the numbers that are compared."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from formats import weight_files
from metrics import dinov2, dinov2_weights, inception, inception_weights


class Features(NamedTuple):
    """What turns images into numbers, and what the results say of it."""

    params: dict
    apply: Callable  # (params, images uint8 (N, H, W, C)) -> {"pool": (N, D), ...}
    described: dict


def load(options):
    """Loads the feature networks that the options `fid`, as `evaluators.fill` gives them, ask for.

    Raises:
      ValueError, FileNotFoundError: no weights, or damaged ones.
    """
    if options.features == "pixels":
        return Features({}, pixel_features, {"features": "pixels in [0, 1]"})
    parts = []
    if set(options.metrics) != {"fd_dinov2"}:
        params = inception_weights.load(options.inception_weights or None)
        parts.append(of_inception(params, options.resize, weight_files.digest(params)))
    if "fd_dinov2" in options.metrics:
        params = dinov2_weights.load(options.dinov2_weights or None)
        digest = weight_files.digest(params)
        parts.append(of_dinov2(params, options.dinov2_resize, digest))
    return join(parts)


def of_inception(params, resize, digest):
    """Returns `Features` of the FID network with these parameters."""
    described = {
        "features": f"Inception 2015-12-05, {resize} resize",
        "resize": resize,
        "feature_weights_sha256": digest,
    }
    return Features(
        params, lambda params, images: inception.features(params, rgb(images), resize), described
    )


def of_dinov2(params, resize, digest):
    """Returns `Features` of DINOv2 with these parameters."""
    described = {
        "dinov2": dinov2_weights.name(params),
        "dinov2_resize": resize,
        "dinov2_weights_sha256": digest,
    }

    def apply(params, images):
        return {"dinov2": dinov2.features(params, rgb(images), resize)}

    return Features(params, apply, described)


def join(networks):
    """Joins several `Features` into one."""
    if len(networks) == 1:
        return networks[0]
    described = {name: value for network in networks for name, value in network.described.items()}

    def apply(params, images):
        outputs = {}
        for network, own in zip(networks, params["networks"], strict=True):
            outputs |= network.apply(own, images)
        return outputs

    return Features({"networks": [network.params for network in networks]}, apply, described)


def rgb(images):
    """Brings images of one or three channels to three."""
    return jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def pixel_features(params, images):
    """Returns the pixels in [0, 1] as they are, float32 (N, H W C)."""
    return {"pool": images.reshape(len(images), -1).astype(jnp.float32) / 255}
