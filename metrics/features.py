"""Feature networks: what turns images into the numbers that are compared."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp

from formats import weight_files
from metrics import dinov2, dinov2_weights, evaluators, inception, inception_weights


class Features(NamedTuple):
    """What turns images into numbers, and what the results say of it."""

    params: dict
    apply: Callable  # (params, images uint8 (N, H, W, C)) -> {"pool": (N, D), ...}
    described: dict
    dtype: type = jnp.uint8  # of the images


def load(options, normalisation=None):
    """Loads the feature networks that the options `fid`, as `evaluators.fill` gives them, ask for.

    Args:
      normalisation: that of values, `models.codec.Normalisation`, whose units they are compared in;
        None for images.

    Raises:
      ValueError, FileNotFoundError: no weights, or damaged ones.
    """
    if options.features == "pixels":
        return Features({}, pixel_features, {"features": "pixels in [0, 1]"})
    if (options.features == "values") != (normalisation is not None):
        fits = "inception or pixels" if normalisation is None else "values"
        raise ValueError(
            f"fid.features: {fits}, as dataset.float_values is, not {options.features}"
        )
    if options.features == "values":
        described = {"features": "values, in deviations by channel"}
        return Features({}, partial(value_features, normalisation), described, jnp.float32)
    parts, asked = [], evaluators.of_features(options.metrics)
    if not asked:
        return Features({}, lambda params, images: {}, {"features": "none"}, jnp.uint8)
    if set(asked) != {"fd_dinov2"}:
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


def value_features(normalisation, params, values):
    """Returns values in units of their deviation by channel, float32 (N, h w c)."""
    return {"pool": normalisation.apply(values.astype(jnp.float32)).reshape(len(values), -1)}
