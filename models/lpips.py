"""LPIPS (Zhang et al., arXiv 1801.03924, version 0.1): how far apart two images look, by VGG16.

The outputs of five layers are divided by their length over the channels; their squared differences
are weighted by channel, averaged over the places and summed over the layers. Images are NHWC in
[-1, 1], float32; products are exact.
"""

import jax
import jax.numpy as jnp
import numpy as np

from formats import arrays, weight_files
from utils import files

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in [0, 1]
# Channels of the convolutions of each stage; the last output of each stage is compared.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
EPS = 1e-10  # added to the length of a feature


def distance(params, a, b):
    """Computes the LPIPS of pairs of images.

    Args:
      params: a tree like `param_shapes`.
      a, b: float32 (B, H, W, 3) in [-1, 1]; H and W at least 16.

    Returns:
      float32 (B,), at least 0 for the published weights; with a derivative everywhere.
    """
    features = zip(_features(params, a), _features(params, b), params["weights"], strict=True)
    return sum(
        jnp.mean(jnp.sum((_unit(x) - _unit(y)) ** 2 * weight, axis=-1), axis=(1, 2))
        for x, y, weight in features
    )


def _features(params, x):
    """Yields the output of each stage, (B, h, w, C)."""
    x = ((x + 1) / 2 - np.float32(MEAN)) / np.float32(STD)
    for i, stage in enumerate(params["stages"]):
        if i:
            window = (1, 2, 2, 1)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
        for layer in stage:
            x = jax.lax.conv_general_dilated(
                x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision="highest",
            )  # fmt: skip
            x = jax.nn.relu(x + layer["bias"])
        yield x


def _unit(x):
    # Where all channels are 0 the root has no derivative, and a NaN would come of it.
    square = jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-30)
    return x / (jnp.sqrt(square) + EPS)


def flops(side):
    """Counts the FLOPs of the convolutions for an image (side, side, 3)."""
    count, width = 0, 3
    for i, stage in enumerate(STAGES):
        for features in stage:
            count += 2 * (side >> i) ** 2 * 9 * width * features
            width = features
    return count


def param_shapes():
    """Returns the tree of the parameters as `ShapeDtypeStruct`s, float32."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    stages, width = [], 3
    for stage in STAGES:
        layers = []
        for features in stage:
            layers.append({"kernel": array(3, 3, width, features), "bias": array(features)})
            width = features
        stages.append(layers)
    return {"stages": stages, "weights": [array(stage[-1]) for stage in STAGES]}


# The files that people have --------------------------------------------------------------------


def load():
    """Loads the parameters from two files: VGG16, and the weights by channel.

    Raises:
      FileNotFoundError: which file is needed, and where; ValueError: see `convert`.
    """
    paths = []
    for what, variable, names in (
        ("VGG16", "VGG16_WEIGHTS", ("vgg16-397923af.pth", "vgg16_weights.h5")),
        ("weights by channel", "LPIPS_WEIGHTS", ("lpips_vgg.pth", "lpips_lin.h5")),
    ):
        advice = (
            f"no {what} for LPIPS: put {' or '.join(names)} into {files.cache_folder()}, or "
            f"name a file in {variable} (docs/pixel.md)"
        )
        paths.append(weight_files.find(None, "", variable, names, advice))
    return convert(*map(arrays.read, paths), " and ".join(map(str, paths)))


def convert(vgg, weights, where):
    """Makes the parameters of the arrays of two files.

    Args:
      vgg: {name: array} of VGG16: torchvision's (`features.0.weight`, OIHW) or flaxmodels' HDF5
        (`conv1_1/weight`, HWIO).
      weights: {name: array} of the weights by channel: those of the package `lpips`
        (`lin0.model.1.weight`, (1, C, 1, 1)) or of lpips_j's HDF5 (`lin0`, (1, 1, C, 1)).
      where: the files, for the error line.

    Raises:
      ValueError: an array that is missing, of another shape or not finite; by name.
    """
    rest = {name: value for name, value in vgg.items()
            if not name.startswith(("classifier.", "fc"))}  # fmt: skip
    stages, place = [], 0
    for i, stage in enumerate(STAGES):
        layers = []
        for j, _ in enumerate(stage):
            torch, flax = f"features.{place + 2 * j}.", f"conv{i + 1}_{j + 1}/"
            kernel = rest.pop(f"{flax}weight", None)
            if kernel is None:
                kernel = np.transpose(_take(rest, f"{torch}weight", where), (2, 3, 1, 0))
            bias = rest.pop(f"{flax}bias", None)
            bias = _take(rest, f"{torch}bias", where) if bias is None else bias
            layers.append({"kernel": kernel, "bias": bias})
        place += 2 * len(stage) + 1  # each layer's ReLU, and the pooling
        stages.append(layers)
    if rest:
        raise ValueError(f"{where}: not the weights of VGG16: unknown {sorted(rest)[0]}")
    names = [f"lin{i}.model.1.weight" if f"lin{i}.model.1.weight" in weights else f"lin{i}"
             for i in range(len(STAGES))]  # fmt: skip
    by_channel = [_take(dict(weights), name, where) for name in names]
    return _checked({"stages": stages, "weights": [w.reshape(-1) for w in by_channel]}, where)


def _take(arrays, name, where):
    if name not in arrays:
        raise ValueError(f"{where}: not the weights of LPIPS by VGG16: no {name}")
    return arrays.pop(name)


def _checked(params, where):
    shapes, paths = param_shapes(), jax.tree_util.tree_leaves_with_path(params)
    for (path, value), shape in zip(paths, jax.tree.leaves(shapes), strict=True):
        name = jax.tree_util.keystr(path)
        if value.shape != shape.shape:
            raise ValueError(f"{where}: {name} is {value.shape}, not {shape.shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"{where}: {name} has values that are not finite")
    return jax.tree.map(lambda x: np.ascontiguousarray(x, np.float32), params)
