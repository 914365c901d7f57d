"""The evaluation without weight files: for measuring and for compiling ahead."""

import jax
import jax.numpy as jnp
import numpy as np

import evaluate
import parts
import sample
from metrics import evaluators, features, inception_weights, scorer
from models import vae
from utils import sharding


def evaluator(config, made):
    """Returns the evaluator of a config, with `ShapeDtypeStruct`s as the weights of others.

    Where `dataset.vae` is `mse` or `ema`, the autoencoder is that of Stable Diffusion.
    """
    dtype = config.sampling.vae_dtype
    if config.dataset.vae in vae.REPOSITORIES:
        structure = vae.STABLE_DIFFUSION
        autoencoder = vae.build(structure, vae.param_shapes(structure), dtype=dtype)
    else:
        autoencoder = parts.load_autoencoder(config.dataset, dtype)
    x = jax.ShapeDtypeStruct((1, *made.image_shape), jnp.float32)
    images = jax.eval_shape(autoencoder.decode, autoencoder.params, x)
    options = evaluators.fill(config.fid, config.dataset.vae != "none")
    if options.features != "inception":
        normalisation = made.codec.normalisation if autoencoder.values else None
        network = features.load(options, normalisation)
    else:
        network = features.of_inception(inception_shapes(), options.resize, None)
    score = scorer.Scorer(network, made.mesh, options, images.shape[1:])
    counts = np.ones(made.num_classes)
    return evaluate.Evaluator(made, autoencoder, score, config.sampling, counts)


def inception_shapes():
    """Returns the parameters of the FID network."""
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


def stages(evaluator):
    """Returns the stages of a batch in the evaluation as pure functions, and `whole`, the step.

    Returns:
      name -> (function, its arguments as a tree of `ShapeDtypeStruct`s with shardings).
    """
    made, score, autoencoder = evaluator.parts, evaluator.score, evaluator.autoencoder
    mesh, count = made.mesh, max(evaluator.options.num_steps)
    everywhere, rows = sharding.replicated(mesh), sharding.by_row(mesh)

    def copied(tree):
        return sharding.with_shardings(tree, jax.tree.map(lambda _: everywhere, tree))

    params = made.param_shapes()
    params = sharding.with_shardings(params, sharding.by_parameter(mesh, params))
    vae_params, feature_params = copied(autoencoder.params), copied(score.features.params)
    statistics = copied(jax.eval_shape(lambda: score.init(score.options.num_samples)))
    start = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    times = jax.ShapeDtypeStruct((count + 1,), jnp.float32, sharding=everywhere)
    setting = sample.settings(evaluator.options)[0].replace(times=times)
    x = jax.ShapeDtypeStruct((score.batch_size, *made.image_shape), jnp.float32, sharding=rows)
    shape = (score.batch_size, *score.image_shape)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows)
    return {
        "sampling": (evaluator.draw, (params, start, setting)),
        "decoding": (jax.jit(autoencoder.decode), (vae_params, x)),
        "features": (
            jax.jit(score.features.apply, compiler_options=scorer.compiler_options(mesh)),
            (feature_params, images),
        ),
        "whole": (
            evaluator.step,
            (statistics, params, vae_params, feature_params, start, setting),
        ),
    }


def random_values(shapes):
    """Returns arrays for a tree of shapes: small numbers, and bytes for images."""
    rng = np.random.RandomState(0)

    def values(x):
        if x.dtype == jnp.uint8:
            return rng.randint(0, 256, x.shape).astype(x.dtype)
        return rng.uniform(0, 0.02, x.shape).astype(x.dtype)

    return jax.tree.map(values, shapes)
