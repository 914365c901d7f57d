"""The networks without training that objectives ask for by name."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from models import convnext, lpips

SIDE = 224  # pixels of the images that are compared


class Frozen(NamedTuple):
    """A network without training."""

    apply: Callable  # (params, *inputs) -> outputs
    load: Callable  # () -> params, a tree of numpy arrays
    shapes: Callable  # () -> their shapes, a tree of `ShapeDtypeStruct`s
    flops: float = 0  # of its products in a step, by image
    unrolled: Callable | None = None  # `apply` without loops, for counting


def compares(module):
    """Makes the `Frozen` of a module with the distance of two images."""
    passes = 3  # forward of both, backward of one
    return Frozen(module.distance, module.load, module.param_shapes, passes * module.flops(SIDE))


FROZEN = {
    "lpips": compares(lpips),
    "convnext": compares(convnext)._replace(unrolled=partial(convnext.distance, unroll=True)),
}
