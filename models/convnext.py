"""ConvNeXt-V2 (Woo et al., arXiv 2301.00808): features of an image, and a distance of two by them.

The features are the mean over the places of the last stage, normalised. As in pixel MeanFlow
(arXiv 2601.22158) the input is the image in [-1, 1] as it is, without ImageNet's mean and standard
deviation. NHWC, float32; products are exact.
"""

import jax
import jax.numpy as jnp
import numpy as np

from formats import weight_files
from formats.arrays import read
from utils import files

EPS = 1e-6
DEPTHS, WIDTHS = (3, 3, 27, 3), (128, 256, 512, 1024)  # of the base size; files may hold another


def distance(params, a, b, unroll=1):
    """Computes the squared distance of the features of pairs of images: float32 (B,).

    Args:
      params: a tree as `convert` makes it.
      a, b: float32 (B, H, W, 3) in [-1, 1]; H and W multiples of 32.
      unroll: see `jax.lax.scan`; True: without loops, for counting.
    """
    features_of_a, features_of_b = (features(params, x, unroll) for x in (a, b))
    return jnp.sum((features_of_a - features_of_b) ** 2, axis=-1)


def features(params, x, unroll=1):
    """Computes the features of images: (B, H, W, 3) in [-1, 1] -> float32 (B, C)."""
    for i, stage in enumerate(params["stages"]):
        # The first stage begins with 4 x 4 patches and then a norm; the others the other way round.
        if i:
            x = _layer_norm(x, stage["norm"])
        x = _conv(x, stage["down"], stride=stage["down"]["kernel"].shape[0])
        if not i:
            x = _layer_norm(x, stage["norm"])
        x, _ = jax.lax.scan(_block, x, stage["blocks"], unroll=unroll)
    return _layer_norm(jnp.mean(x, axis=(1, 2)), params["norm"])


def _block(x, p):
    """Computes a residual block, for `scan`."""
    y = _conv(x, p["dwconv"], groups=x.shape[-1])
    y = _dense(_layer_norm(y, p["norm"]), p["pwconv1"])
    y = jax.nn.gelu(y, approximate=False)
    # Global response normalisation: the root is kept from 0, where it has no derivative.
    g = jnp.sqrt(jnp.sum(y * y, axis=(1, 2), keepdims=True) + EPS)
    y = (
        p["grn"]["scale"] * y * (g / (jnp.mean(g, axis=-1, keepdims=True) + EPS))
        + p["grn"]["bias"]
        + y
    )
    return x + _dense(y, p["pwconv2"]), None


def _conv(x, p, stride=1, groups=1):
    padding = "VALID" if stride > 1 else "SAME"
    x = jax.lax.conv_general_dilated(
        x, p["kernel"], (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups, precision="highest",
    )  # fmt: skip
    return x + p["bias"]


def _dense(x, p):
    return jnp.dot(x, p["kernel"], precision="highest") + p["bias"]


def _layer_norm(x, p):
    mean, var = jnp.mean(x, axis=-1, keepdims=True), jnp.var(x, axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + EPS) * p["scale"] + p["bias"]


def flops(side):
    """Counts the FLOPs of the products of the base size for an image (side, side, 3)."""
    count, width, patch = 0, 3, 4
    for depth, C in zip(DEPTHS, WIDTHS, strict=True):
        side //= patch
        count += 2 * side**2 * (patch**2 * width * C + depth * (49 * C + 8 * C * C))
        width, patch = C, 2
    return count


def param_shapes():
    """Returns the tree of the parameters of the base size as `ShapeDtypeStruct`s, float32."""

    def arrays(*lead, **shapes):
        return {
            name: jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)
            for name, shape in shapes.items()
        }

    stages, width, patch = [], 3, 4
    for depth, C in zip(DEPTHS, WIDTHS, strict=True):
        D = 4 * C
        blocks = {
            "dwconv": arrays(depth, kernel=(7, 7, 1, C), bias=(C,)),
            "norm": arrays(depth, scale=(C,), bias=(C,)),
            "pwconv1": arrays(depth, kernel=(C, D), bias=(D,)),
            "grn": arrays(depth, scale=(D,), bias=(D,)),
            "pwconv2": arrays(depth, kernel=(D, C), bias=(C,)),
        }
        down = arrays(kernel=(patch, patch, width, C), bias=(C,))
        normed = (width if stages else C,)
        norm = arrays(scale=normed, bias=normed)
        stages.append({"down": down, "norm": norm, "blocks": blocks})
        width, patch = C, 2
    return {"stages": stages, "norm": arrays(scale=(width,), bias=(width,))}


# The files that people have --------------------------------------------------------------------


def load():
    """Loads the parameters from a file.

    Raises:
      FileNotFoundError: which file is needed, and where; ValueError: see `convert`.
    """
    names = "convnextv2_base_22k_224.safetensors", "convnextv2_base_22k_224_ema.pt"
    advice = (
        "no ConvNeXt-V2: put the model.safetensors of facebook/convnextv2-base-22k-224 as "
        f"{names[0]} into {files.cache_folder()}, or name a file in CONVNEXT_WEIGHTS"
    )
    path = weight_files.find(None, "", "CONVNEXT_WEIGHTS", names, advice)
    return convert(read(path), path)


def convert(arrays, where):
    """Makes the parameters of the arrays of a file; the sizes follow from them.

    Args:
      arrays: {name: array} of Hugging Face's ConvNextV2 (with or without `convnextv2.` before each
        name) or of Meta's `.pt`; a classifier in it is left out.
      where: the file, for the error line.

    Raises:
      ValueError: an array that is missing, of another shape, unknown or not finite; by name.
    """
    arrays = _Arrays(arrays, where)
    stages, width = [], 3
    while f"downsample_layers.{len(stages)}.0.weight" in arrays.rest:
        stages.append(_stage(arrays, len(stages), width))
        width = len(stages[-1]["down"]["bias"])
    params = {"stages": stages, "norm": arrays.norm("norm", width)}
    if arrays.rest:
        unknown = sorted(arrays.rest)[0]
        raise ValueError(f"{where}: not the weights of ConvNeXt-V2: unknown {unknown}")
    return jax.tree.map(np.ascontiguousarray, params)


def _stage(arrays, i, width):
    # The first stage begins with 4 x 4 patches and then a norm; the others the other way round.
    first = not i
    kernel = (None, width, 4, 4) if first else (None, width, 2, 2)
    down = arrays.conv(f"downsample_layers.{i}.{0 if first else 1}", *kernel)
    C = len(down["bias"])
    norm = arrays.norm(f"downsample_layers.{i}.{1 if first else 0}", C if first else width)
    blocks = []
    while not blocks or f"stages.{i}.{len(blocks)}.dwconv.weight" in arrays.rest:
        blocks.append(_block_of(arrays, f"stages.{i}.{len(blocks)}", C))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    return {"down": down, "norm": norm, "blocks": stacked}


def _block_of(arrays, name, C):
    shape = 1, 1, 1, 4 * C
    scale, bias = (arrays.take(f"{name}.grn.{part}", *shape) for part in ("gamma", "beta"))
    return {
        "dwconv": arrays.conv(f"{name}.dwconv", C, 1, 7, 7),
        "norm": arrays.norm(f"{name}.norm", C),
        "pwconv1": arrays.dense(f"{name}.pwconv1", C, 4 * C),
        "grn": {"scale": scale.reshape(-1), "bias": bias.reshape(-1)},
        "pwconv2": arrays.dense(f"{name}.pwconv2", 4 * C, C),
    }


class _Arrays:
    """The arrays of a file in Meta's names; each is taken once, of a known shape."""

    def __init__(self, arrays, where):
        named = {_meta_name(name): value for name, value in arrays.items()}
        self.rest = {name: a for name, a in named.items() if not name.startswith("head.")}
        self.where = where

    def take(self, name, *shape):
        """Takes an array; an axis of `shape` that is None may have any length."""
        if name not in self.rest:
            raise ValueError(f"{self.where}: not the weights of ConvNeXt-V2: no {name}")
        value = self.rest.pop(name)
        wanted = tuple(b if a is None else a for a, b in zip(shape, value.shape, strict=False))
        if value.shape != wanted or value.ndim != len(shape):
            raise ValueError(f"{self.where}: {name} is {value.shape}, not {shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"{self.where}: {name} has values that are not finite")
        return np.asarray(value, np.float32)

    def norm(self, name, C):
        return {"scale": self.take(f"{name}.weight", C), "bias": self.take(f"{name}.bias", C)}

    def dense(self, name, C, D):
        return {"kernel": self.take(f"{name}.weight", D, C).T, "bias": self.take(f"{name}.bias", D)}

    def conv(self, name, *shape):
        kernel = self.take(f"{name}.weight", *shape).transpose(2, 3, 1, 0)  # OIHW -> HWIO
        return {"kernel": kernel, "bias": self.take(f"{name}.bias", kernel.shape[-1])}


_HUGGING_FACE = (
    ("convnextv2.", ""),
    ("embeddings.patch_embeddings", "downsample_layers.0.0"),
    ("embeddings.layernorm", "downsample_layers.0.1"),
    ("encoder.stages.", "stages."),
    (".layers.", "."),
    (".layernorm.", ".norm."),
    ("grn.weight", "grn.gamma"),
    ("grn.bias", "grn.beta"),
    ("classifier.", "head."),
)


def _meta_name(name):
    """Renames an array of Hugging Face's form as Meta's has it."""
    for theirs, ours in _HUGGING_FACE:
        name = name.replace(theirs, ours)
    if name.startswith("layernorm."):
        return name.replace("layernorm.", "norm.")
    stage, _, rest = name.partition(".downsampling_layer.")
    return f"downsample_layers.{stage.removeprefix('stages.')}.{rest}" if rest else name
