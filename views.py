"""Pictures of what stands beside images: the conditions that are arrays, and the truth."""

import jax
import numpy as np

from utils import compiling, images


def truth(renderer, batch):
    """Decodes the samples of a raw batch: images uint8 (N, H, W, C).

    `renderer`: `sample.Renderer`.
    """
    codec = renderer.codec._replace(flip=False, augment_prob=0.0)
    options = compiling.quick(renderer.mesh)
    x, _ = jax.jit(codec.encode, compiler_options=options)(batch, jax.random.key(0))
    return renderer.decode(np.asarray(x))


def conditions(renderer, batch, shape):
    """Draws the arrays among the conditions of a raw batch: {name: uint8 (N, *shape)}."""
    found = jax.device_get(renderer.codec.conditions_of(batch))

    def view(one):
        if one.latent:
            return renderer.decode(found[one.name])
        array = found[one.name]
        return images.to_uint8(array if one.dtype == "uint8" else images.stretched(array))

    arrays = [one for one in renderer.codec.given if one.kind == "array"]
    return {one.name: images.fitted(view(one), shape) for one in arrays}


def around(renderer, source, drawn):
    """Returns what stands beside images that are drawn, uint8 (N, H, W, C): {name: (N, H, W, C)}.

    `truth` is among it where the `utils.conditions.Source` has records.
    """
    batch = source(np.arange(len(drawn)))
    found = conditions(renderer, batch, drawn.shape[1:])
    return found | ({} if source.records is None else {"truth": truth(renderer, batch)})
