"""ConvNeXt-V2 (Woo et al., arXiv 2301.00808): features of an image, and a distance of two by them.

The features are the mean over the places of the last stage, normalised. As in pixel MeanFlow
(arXiv 2601.22158) the input is the image in [-1, 1] as it is, without ImageNet's mean and standard
deviation. NHWC, float32; products are exact.
"""

import jax
import jax.numpy as jnp
import numpy as np

EPS = 1e-6


def distance(params, a, b):
    """Computes the squared distance of the features of pairs of images: float32 (B,).

    Args:
      params: a tree as `convert` makes it.
      a, b: float32 (B, H, W, 3) in [-1, 1]; H and W multiples of 32.
    """
    return jnp.sum((features(params, a) - features(params, b)) ** 2, axis=-1)


def features(params, x):
    """Computes the features of images: (B, H, W, 3) in [-1, 1] -> float32 (B, C)."""
    for i, stage in enumerate(params["stages"]):
        # The first stage begins with 4 x 4 patches and then a norm; the others the other way round.
        if i:
            x = _layer_norm(x, stage["norm"])
        x = _conv(x, stage["down"], stride=stage["down"]["kernel"].shape[0])
        if not i:
            x = _layer_norm(x, stage["norm"])
        x, _ = jax.lax.scan(_block, x, stage["blocks"])
    return _layer_norm(jnp.mean(x, axis=(1, 2)), params["norm"])


def _block(x, p):
    """A residual block, for `scan`."""
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


# Names of the files that people have -----------------------------------------------------------


def convert(arrays, where):
    """Makes the parameters of the arrays of a file; the sizes follow from them.

    Args:
      arrays: {name: array} of Hugging Face's ConvNextV2 (with or without `convnextv2.` before each
        name) or of Meta's `.pt`; a classifier in it is left out.
      where: the file, for the error line.

    Raises:
      ValueError: an array that is missing, of another shape, unknown or not finite; by name.
    """
    rest = {_meta_name(name): value for name, value in arrays.items()}
    rest = {name: value for name, value in rest.items() if not name.startswith("head.")}

    def take(name, *axes):
        if name not in rest:
            raise ValueError(f"{where}: not the weights of ConvNeXt-V2: no {name}")
        value = rest.pop(name)
        wanted = tuple(b if a is None else a for a, b in zip(axes, value.shape, strict=False))
        if value.shape != wanted or value.ndim != len(axes):
            raise ValueError(f"{where}: {name} is {value.shape}, not {axes}")
        if not np.isfinite(value).all():
            raise ValueError(f"{where}: {name} has values that are not finite")
        return np.asarray(value, np.float32)

    def norm(name, C):
        return {"scale": take(f"{name}.weight", C), "bias": take(f"{name}.bias", C)}

    def dense(name, C, D):
        return {"kernel": take(f"{name}.weight", D, C).T, "bias": take(f"{name}.bias", D)}

    def conv(name, *axes):
        kernel = take(f"{name}.weight", *axes)
        return {"kernel": kernel.transpose(2, 3, 1, 0), "bias": take(f"{name}.bias", len(kernel))}

    def block(name, C):
        grn = {ours: take(f"{name}.grn.{theirs}", 1, 1, 1, 4 * C).reshape(-1)
               for ours, theirs in (("scale", "gamma"), ("bias", "beta"))}  # fmt: skip
        return {
            "dwconv": conv(f"{name}.dwconv", C, 1, 7, 7),
            "norm": norm(f"{name}.norm", C),
            "pwconv1": dense(f"{name}.pwconv1", C, 4 * C),
            "grn": grn,
            "pwconv2": dense(f"{name}.pwconv2", 4 * C, C),
        }

    stages, width = [], 3
    while f"downsample_layers.{len(stages)}.0.weight" in rest:
        i, first = len(stages), not stages
        down = conv(f"downsample_layers.{i}.{0 if first else 1}", None, width,
                    *((4, 4) if first else (2, 2)))  # fmt: skip
        C = len(down["bias"])
        normed = norm(f"downsample_layers.{i}.{1 if first else 0}", C if first else width)
        blocks = []
        while f"stages.{i}.{len(blocks)}.dwconv.weight" in rest:
            blocks.append(block(f"stages.{i}.{len(blocks)}", C))
        if not blocks:
            raise ValueError(f"{where}: not the weights of ConvNeXt-V2: no stages.{i}.0")
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
        stages.append({"down": down, "norm": normed, "blocks": stacked})
        width = C
    params = {"stages": stages, "norm": norm("norm", width)}
    if rest:
        raise ValueError(f"{where}: not the weights of ConvNeXt-V2: unknown {sorted(rest)[0]}")
    return jax.tree.map(np.ascontiguousarray, params)


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
