"""Pictures of what stands beside images: the conditions that are arrays, and the truth."""

import jax
import numpy as np

from utils import compiling, images


def truth(renderer, batch):
    """Decodes the samples of a raw batch: images uint8 (N, H, W, C), or values.

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
        shown = images.to_uint8 if one.dtype == "uint8" else images.shown
        return shown(found[one.name])

    arrays = [one for one in renderer.codec.given if one.kind == "array"]
    return {one.name: images.fitted(view(one), shape) for one in arrays}


def around(renderer, source, drawn):
    """Returns images uint8 or values (N, H, W, C) and what stands beside them: {name: uint8}.

    `truth` is among it where the `utils.conditions.Source` has records; the last is `sample`.
    """
    batch, rows = source(np.arange(len(drawn))), {}
    if source.records is not None:
        rows["truth"] = truth(renderer, batch)
    rows["sample"] = drawn
    shown = images.shown(np.concatenate([*rows.values()]))  # on one scale
    rows = dict(zip(rows, np.split(shown, len(rows)), strict=True))
    return conditions(renderer, batch, shown.shape[1:]) | rows
