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
        return _assemble(path, arrays, _torchvision_names)
    if start[:1] == b"\x80":
        try:
            arrays = weight_files.flatten(torch_files.load_pickle(path))
        except ValueError as error:
            raise ValueError(f"{error}; as Inception weights use {PTH_NAME} instead") from error
        return _assemble(path, arrays, _jax_fid_names)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    raise ValueError(f"{path}: not a weight file of a known format; use {PTH_NAME}")


def from_torch(state):
    """Returns the parameters of `inception.features` from arrays by the names of a `.pth`."""
    return _assemble("state dict", state, _torchvision_names)


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


def _assemble(path, arrays, names):
    """Folds `arrays` (flat: name -> array) into the tree; `names` tells a layer's arrays.

    `names(layer)` gives a dict of kernel, gamma, beta, mean, var (for `fc`: kernel, bias), each
    a pair of the name in the file and the axes that bring it into our order.
    """
    wanted = {}
    for layer, shape in CONV_SHAPES.items():
        parts = names(layer)
        wanted[parts["kernel"][0]] = _permuted(shape, parts["kernel"][1])
        wanted.update({name: shape[-1:] for k, (name, _) in parts.items() if k != "kernel"})
    fc = names("fc")
    wanted[fc["kernel"][0]] = _permuted(FC_SHAPE, fc["kernel"][1])
    wanted[fc["bias"][0]] = FC_SHAPE[-1:]
    trees.check_shapes(wanted, arrays, f"{path}: {NOT_OURS}")

    def get(part):
        name, axes = part
        return np.transpose(np.asarray(arrays[name], np.float64), axes)

    params = {"fc": {"kernel": get(fc["kernel"]), "bias": get(fc["bias"])}}
    for layer in CONV_SHAPES:
        part = {kind: get(name) for kind, name in names(layer).items()}
        scale = part["gamma"] / np.sqrt(part["var"] + BN_EPSILON)
        kernel, bias = part["kernel"] * scale, part["beta"] - part["mean"] * scale
        params[layer] = {"kernel": kernel, "bias": bias}
    params = {
        layer: {k: np.ascontiguousarray(v, np.float32) for k, v in leaves.items()}
        for layer, leaves in params.items()
    }
    _check_finite(path, params)
    return params


def _check_finite(path, params):
    for name, value in weight_files.flatten(params).items():
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {name} has values that are not finite")


def _permuted(shape, axes):
    """Returns the shape in the file of what becomes `shape` when transposed by `axes`."""
    stored = [0] * len(shape)
    for ours, theirs in enumerate(axes):
        stored[theirs] = shape[ours]
    return tuple(stored)


# ----------------------------------------------------------------------------- names by format

_HWIO, _OIHW, _VECTOR = (0, 1, 2, 3), (2, 3, 1, 0), (0,)


def _torchvision_names(layer):
    """Names a layer's arrays in the state dict of pytorch-fid and torch-fidelity."""
    if layer == "fc":
        return {"kernel": ("fc.weight", (1, 0)), "bias": ("fc.bias", _VECTOR)}
    return {
        "kernel": (f"{layer}.conv.weight", _OIHW),
        "gamma": (f"{layer}.bn.weight", _VECTOR),
        "beta": (f"{layer}.bn.bias", _VECTOR),
        "mean": (f"{layer}.bn.running_mean", _VECTOR),
        "var": (f"{layer}.bn.running_var", _VECTOR),
    }


def _jax_fid_names(layer):
    """Names them in jax-fid's nested dicts: the state dict in Flax's names and order."""
    if layer == "fc":
        return {"kernel": ("fc.kernel", (0, 1)), "bias": ("fc.bias", _VECTOR)}
    return {
        "kernel": (f"{layer}.conv.kernel", _HWIO),
        "gamma": (f"{layer}.bn.scale", _VECTOR),
        "beta": (f"{layer}.bn.bias", _VECTOR),
        "mean": (f"{layer}.bn.mean", _VECTOR),
        "var": (f"{layer}.bn.var", _VECTOR),
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
