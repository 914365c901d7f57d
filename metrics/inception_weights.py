"""Weights of the FID network: finding the file, reading its format, making `inception`'s tree.

The tree is the one that `inception.features` takes: layer -> {kernel, bias}, batch norms folded.
No framework is needed for any format, nothing is executed, and every mapping is strict: each array
is consumed once, each shape checked.
"""

import numpy as np
from safetensors.numpy import load_file

from formats import state_dicts, torch_files, weight_files
from utils import files, trees

BN_EPSILON = 1e-3
PTH_NAME = "pt_inception-2015-12-05-6726825d.pth"
PTH_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILE_NAMES = (PTH_NAME, "inception_v3_weights_fid.pickle")
NOT_OURS = "not the weights of the FID network"


def load(path=None):
    """Returns the parameters of `inception.features` as numpy float32: layer -> {kernel, bias}.

    `path` (option `fid.inception_weights`), else the environment variable INCEPTION_WEIGHTS,
    else a file of one of FILE_NAMES in `files.cache_folder()`.

    Raises:
      FileNotFoundError, ValueError: in a line, which file is needed, or what is wrong with it.
    """
    return read(find(path))


def find(path=None):
    """Returns the path of the file that `load` will read; raises FileNotFoundError."""
    advice = (
        f"no Inception weights: put {PTH_NAME} (sha256 {PTH_SHA256}, from the releases of "
        f"github.com/mseitzer/pytorch-fid) into {files.cache_folder()}, or name a file in "
        "fid.inception_weights or INCEPTION_WEIGHTS"
    )
    option = "fid.inception_weights"
    return weight_files.find(path, option, "INCEPTION_WEIGHTS", FILE_NAMES, advice)


def read(path):
    """Reads a weight file of any known format, recognised by its content. Errors as `load`."""
    with open(path, "rb") as file:
        start = file.read(16)
    if start[:4] == b"PK\x03\x04" or start[:4] == b"\x80\x02\x8a\n":
        arrays, _ = state_dicts.find(torch_files.load(path), path)
        arrays = {k: v for k, v in arrays.items() if not k.endswith(".num_batches_tracked")}
        return _assemble(path, arrays, TORCH)
    if start[:1] == b"\x80":
        try:
            arrays = weight_files.flatten(torch_files.load_pickle(path))
        except ValueError as error:
            raise ValueError(f"{error}; as Inception weights use {PTH_NAME} instead") from error
        return _assemble(path, arrays, FLAX)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    raise ValueError(f"{path}: not a weight file of a known format; use {PTH_NAME}")


# ------------------------------------------------------------------------------------- layers


def _conv_shapes():
    """Returns {layer: (height, width, channels in, channels out)} of the 94 convolutions."""
    shapes = {
        "Conv2d_1a_3x3": (3, 3, 3, 32),
        "Conv2d_2a_3x3": (3, 3, 32, 32),
        "Conv2d_2b_3x3": (3, 3, 32, 64),
        "Conv2d_3b_1x1": (1, 1, 64, 80),
        "Conv2d_4a_3x3": (3, 3, 80, 192),
    }

    def tower(name, channels, *convs):
        for i, (height, width, out) in enumerate(convs, start=1):
            suffix = f"_{i}" if len(convs) > 1 else ""
            shapes[name + suffix] = (height, width, channels, out)
            channels = out

    for b, c, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        tower(f"{b}.branch1x1", c, (1, 1, 64))
        tower(f"{b}.branch5x5", c, (1, 1, 48), (5, 5, 64))
        tower(f"{b}.branch3x3dbl", c, (1, 1, 64), (3, 3, 96), (3, 3, 96))
        tower(f"{b}.branch_pool", c, (1, 1, pool))
    tower("Mixed_6a.branch3x3", 288, (3, 3, 384))
    tower("Mixed_6a.branch3x3dbl", 288, (1, 1, 64), (3, 3, 96), (3, 3, 96))
    for b, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        double = (1, 1, c), (7, 1, c), (1, 7, c), (7, 1, c), (1, 7, 192)
        tower(f"{b}.branch1x1", 768, (1, 1, 192))
        tower(f"{b}.branch7x7", 768, (1, 1, c), (1, 7, c), (7, 1, 192))
        tower(f"{b}.branch7x7dbl", 768, *double)
        tower(f"{b}.branch_pool", 768, (1, 1, 192))
    tower("Mixed_7a.branch3x3", 768, (1, 1, 192), (3, 3, 320))
    tower("Mixed_7a.branch7x7x3", 768, (1, 1, 192), (1, 7, 192), (7, 1, 192), (3, 3, 192))
    for b, c in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        tower(f"{b}.branch1x1", c, (1, 1, 320))
        tower(f"{b}.branch3x3dbl", c, (1, 1, 448), (3, 3, 384))
        tower(f"{b}.branch_pool", c, (1, 1, 192))
        shapes[f"{b}.branch3x3_1"] = (1, 1, c, 384)
        for last in ("branch3x3_2", "branch3x3dbl_3"):
            shapes |= {f"{b}.{last}a": (1, 3, 384, 384), f"{b}.{last}b": (3, 1, 384, 384)}
    return shapes


CONV_SHAPES = _conv_shapes()
FC_SHAPE = (2048, 1008)


# What the files call the arrays of a convolution and its batch norm.
LEAVES = ("kernel", "gamma", "beta", "mean", "var")
TORCH = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
FLAX = ("conv.kernel", "bn.scale", "bn.bias", "bn.mean", "bn.var")  # of jax-fid


def _assemble(path, arrays, names):
    """Folds {name: array} into the tree; `names` is TORCH, with kernels (O, I, ...), or FLAX."""
    torch, fc = names is TORCH, f"fc.{names[0].partition('.')[2]}"
    axes = (-1, -2) if torch else (0, 1)  # where the first two of a kernel belong
    wanted = {"fc.bias": FC_SHAPE[-1:]}
    for layer, shape in CONV_SHAPES.items():
        wanted |= {f"{layer}.{name}": shape[-1:] for name in names[1:]}
    for name, shape in ((fc, FC_SHAPE), *((f"{k}.{names[0]}", s) for k, s in CONV_SHAPES.items())):
        wanted[name] = (shape[-1], shape[-2], *shape[:-2]) if torch else shape
    trees.check_shapes(wanted, arrays, f"{path}: {NOT_OURS}")
    arrays = {k: np.asarray(v, np.float64) for k, v in arrays.items()}
    params = {"fc": {"kernel": np.moveaxis(arrays[fc], (0, 1), axes), "bias": arrays["fc.bias"]}}
    for layer in CONV_SHAPES:
        part = {leaf: arrays[f"{layer}.{name}"] for leaf, name in zip(LEAVES, names, strict=True)}
        scale = part["gamma"] / np.sqrt(part["var"] + BN_EPSILON)
        kernel = np.moveaxis(part["kernel"], (0, 1), axes) * scale
        params[layer] = {"kernel": kernel, "bias": part["beta"] - part["mean"] * scale}
    for name, value in weight_files.flatten(params).items():
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {name} has values that are not finite")
    return {
        layer: {k: np.ascontiguousarray(v, np.float32) for k, v in leaves.items()}
        for layer, leaves in params.items()
    }


def _read_safetensors(path):
    """Reads the folded weights, as earlier versions of this project kept them in the cache."""
    with files.reading(path, "damaged safetensors file"):
        flat = load_file(path)
    wanted = {f"{layer}.kernel": shape for layer, shape in CONV_SHAPES.items()}
    wanted |= {f"{layer}.bias": shape[-1:] for layer, shape in CONV_SHAPES.items()}
    wanted |= {"fc.kernel": FC_SHAPE, "fc.bias": FC_SHAPE[-1:]}
    trees.check_shapes(wanted, flat, f"{path}: {NOT_OURS}")
    params = {}
    for name, value in flat.items():
        layer, _, leaf = name.rpartition(".")
        params.setdefault(layer, {})[leaf] = value
    return params
