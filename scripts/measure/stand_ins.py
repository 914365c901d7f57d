"""The evaluation step without weight files: for measuring and for compiling ahead."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sample
import score
from models import dit, inception, inception_weights, vae
from utils import sharding


class Evaluation(NamedTuple):
    """The parts of an evaluation; parameters are `ShapeDtypeStruct`s."""

    net: object  # function (params, z, t, h, y) -> u
    params: dict
    autoencoder: vae.Autoencoder
    features: score.Features
    image_shape: tuple  # (H, W, C) of the images


def evaluation(config, mesh):
    """The parts of the evaluation of a config.

    Where `dataset.vae` is `mse` or `ema`, the autoencoder is that of Stable Diffusion.
    """
    net, shape = sample.make_net(config), sample.image_shape(config)
    function = dit.as_function(net, sharding.gather(mesh))
    params = jax.eval_shape(lambda: dit.init_params(net, jax.random.key(0), shape))
    dtype = config.sampling.vae_dtype
    if config.dataset.vae in vae.REPOSITORIES:
        structure = vae.STABLE_DIFFUSION
        autoencoder = vae.build(structure, vae.param_shapes(structure), dtype=dtype)
    else:
        autoencoder = vae.load(config.dataset.vae, dtype=dtype)
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    images = jax.eval_shape(autoencoder.decode, autoencoder.params, x)
    if config.fid.features == "pixels":
        features = score.load_features(config.fid)
    else:
        features = score.Features(
            "Inception",
            inception_shapes(),
            lambda params, images: inception.features(params, images, config.fid.resize),
            config.fid.resize,
            None,
        )
    return Evaluation(function, params, autoencoder, features, images.shape[1:])


def inception_shapes():
    """The parameters of the FID network."""
    shapes = {
        layer: {"kernel": shape, "bias": shape[-1:]}
        for layer, shape in inception_weights.CONV_SHAPES.items()
    }
    shapes["fc"] = {"kernel": inception_weights.FC_SHAPE, "bias": inception_weights.FC_SHAPE[1:]}
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda shape: isinstance(shape, tuple),
    )


def stages(config, parts, batch_size):
    """The stages of the evaluation of a batch as pure functions, and all of them as one.

    Returns:
      name -> (function, its arguments as a tree of shapes; the weights come first).
    """
    index = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    times = jax.ShapeDtypeStruct((max(config.sampling.num_steps) + 1,), jnp.float32)
    metrics, count, seed = config.fid.metrics, config.fid.num_samples, config.sampling.seed
    num_classes, shape = config.dataset.num_classes, sample.image_shape(config)

    def generate(params, vae_params, index, times, decode):
        labels = sample.draw_labels(seed, index, num_classes, config.fid.labels)
        return sample.generate(
            parts.net, decode, params, vae_params, index, labels, times, seed=seed, shape=shape
        )

    def sampling(params, index, times):
        return generate(params, {}, index, times, lambda _, x: x)

    def whole(statistics, params, vae_params, feature_params, index, times):
        images = generate(params, vae_params, index, times, parts.autoencoder.decode)
        found = parts.features.apply(feature_params, images)
        return score.add_features(statistics, found, index, count)

    x = jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)
    images = jax.ShapeDtypeStruct((batch_size, *parts.image_shape), jnp.uint8)
    vae_params, feature_params = parts.autoencoder.params, parts.features.params
    dim = jax.eval_shape(parts.features.apply, feature_params, images)["pool"].shape[-1]
    statistics = jax.eval_shape(lambda: score.init_statistics(metrics, dim))
    return {
        "sampling": (sampling, (parts.params, index, times)),
        "decoding": (parts.autoencoder.decode, (vae_params, x)),
        "features": (parts.features.apply, (feature_params, images)),
        "whole": (whole, (statistics, parts.params, vae_params, feature_params, index, times)),
    }


def random_values(shapes):
    """Arrays for a tree of shapes: small numbers, and bytes for images."""
    rng = np.random.RandomState(0)

    def values(x):
        if x.dtype == jnp.uint8:
            return rng.randint(0, 256, x.shape).astype(x.dtype)
        return rng.uniform(0, 0.02, x.shape).astype(x.dtype)

    return jax.tree.map(values, shapes)
