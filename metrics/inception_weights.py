"""Weights of the FID network: finding the file, reading its format, making `inception`'s tree.

The tree is the one that `inception.features` takes: layer -> {kernel, bias}, batch norms folded.
Builds on the file readers of `utils/torch_files.py` and `utils/graph_files.py`. No framework is
needed for any format, nothing is executed, and every mapping is strict: each array is consumed
once, each shape checked.
"""

import hashlib
import os
import pathlib

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from utils import graph_files, torch_files

BN_EPSILON = 1e-3
PTH_NAME = "pt_inception-2015-12-05-6726825d.pth"
PTH_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILE_NAMES = (
    PTH_NAME,
    "inception-2015-12-05.pt",
    "classify_image_graph_def.pb",
    "inception_v3_weights_fid.pickle",
)


def load(path=None):
    """The parameters of `inception.features` as numpy float32: layer -> {kernel, bias}.

    `path` (option `fid.inception_weights`), else the environment variable INCEPTION_WEIGHTS,
    else a file of one of FILE_NAMES in `cache_folder()`. What is read is kept there as
    safetensors, so that the next start is quick. Raises FileNotFoundError or ValueError with
    one line that says which file is needed, or what is wrong with it.
    """
    source = find(path)
    cached = cache_folder() / f"inception-{_file_hash(source)[:16]}.safetensors"
    if cached.is_file():
        try:
            return _read_safetensors(cached)
        except ValueError:
            pass  # damaged: it is made anew
    params = read(source)
    _write_safetensors(cached, params)
    return params


def find(path=None):
    """The weight file that `load` will read, as a pathlib.Path; raises FileNotFoundError."""
    for given, origin in (
        (path, "fid.inception_weights"),
        (os.environ.get("INCEPTION_WEIGHTS"), "INCEPTION_WEIGHTS"),
    ):
        if given:
            given = pathlib.Path(given).expanduser()
            if not given.is_file():
                raise FileNotFoundError(f"{origin}: no such file: {given}")
            return given
    for name in FILE_NAMES:
        if (cache_folder() / name).is_file():
            return cache_folder() / name
    raise FileNotFoundError(
        f"no Inception weights: put {PTH_NAME} (sha256 {PTH_SHA256}, from the releases of "
        f"github.com/mseitzer/pytorch-fid) into {cache_folder()}, or name a file in "
        "fid.inception_weights or INCEPTION_WEIGHTS"
    )


def cache_folder():
    """Where weights are looked for and kept: `meanflow` in $XDG_CACHE_HOME, else in ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "meanflow"


def digest(params):
    """SHA-256 (hex) over the parameters: the same for the same weights out of any format."""
    total = hashlib.sha256()
    for name, value in sorted(_flatten(params).items()):
        value = np.ascontiguousarray(value, np.float32)
        total.update(f"{name}{value.shape}".encode())
        total.update(value.tobytes())
    return total.hexdigest()


def read(path):
    """Read a weight file of any known format, recognised by its content. Errors as `load`."""
    with open(path, "rb") as file:
        start = file.read(16)
    if start[:4] == b"PK\x03\x04" or start[:4] == b"\x80\x02\x8a\n":
        arrays = _flatten(torch_files.load(path))
        if any(name.startswith("layers.") for name in arrays):
            return _assemble(path, arrays, _nvidia_names)
        arrays = {k: v for k, v in arrays.items() if not k.endswith(".num_batches_tracked")}
        return _assemble(path, arrays, _torchvision_names)
    if start[:1] == b"\x80":
        try:
            arrays = _flatten(torch_files.load_pickle(path))
        except ValueError as error:
            raise ValueError(
                f"{error}; as Inception weights use {PTH_NAME} or inception-2015-12-05.pt instead"
            ) from error
        return _assemble(path, arrays, _jax_fid_names)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    return _assemble(path, _read_graph(path), _graph_names)


def _file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------- layers


def _conv_shapes():
    """layer -> (height, width, channels in, channels out), for the 94 convolutions."""
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
    """Fold `arrays` (flat: name -> array) into the tree; `names` tells a layer's arrays.

    `names(layer)` gives a dict of kernel, gamma, beta, mean, var (for `fc`: kernel, bias), each
    a pair of the name in the file and the axes that bring it into our order; gamma may be
    absent (then it is 1).
    """
    wanted = {}
    for layer, shape in CONV_SHAPES.items():
        parts = names(layer)
        wanted[parts["kernel"][0]] = _permuted(shape, parts["kernel"][1])
        wanted.update({name: shape[-1:] for k, (name, _) in parts.items() if k != "kernel"})
    fc = names("fc")
    wanted[fc["kernel"][0]] = _permuted(FC_SHAPE, fc["kernel"][1])
    wanted[fc["bias"][0]] = FC_SHAPE[-1:]
    _compare(path, wanted, arrays)

    def get(part):
        name, axes = part
        return np.transpose(np.asarray(arrays[name], np.float64), axes)

    params = {"fc": {"kernel": get(fc["kernel"]), "bias": get(fc["bias"])}}
    for layer in CONV_SHAPES:
        part = {kind: get(name) for kind, name in names(layer).items()}
        scale = part.get("gamma", 1.0) / np.sqrt(part["var"] + BN_EPSILON)
        kernel, bias = part["kernel"] * scale, part["beta"] - part["mean"] * scale
        params[layer] = {"kernel": kernel, "bias": bias}
    params = {
        layer: {k: np.ascontiguousarray(v, np.float32) for k, v in leaves.items()}
        for layer, leaves in params.items()
    }
    _check_finite(path, params)
    return params


def _check_finite(path, params):
    for name, value in _flatten(params).items():
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {name} has values that are not finite")


def _permuted(shape, axes):
    """The shape in the file of what becomes `shape` when transposed by `axes`."""
    stored = [0] * len(shape)
    for ours, theirs in enumerate(axes):
        stored[theirs] = shape[ours]
    return tuple(stored)


def _compare(path, wanted, arrays):
    """Raise ValueError unless `arrays` has exactly the names and shapes `wanted`."""
    faults = []
    for kind, names in (
        ("missing", wanted.keys() - arrays.keys()),
        ("not known", arrays.keys() - wanted.keys()),
    ):
        if names:
            listed = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            faults.append(f"{len(names)} {kind} ({listed})")
    for name in sorted(wanted.keys() & arrays.keys()):
        if np.shape(arrays[name]) != wanted[name]:
            faults.append(f"{name} is {np.shape(arrays[name])}, should be {wanted[name]}")
            break
    if faults:
        raise ValueError(f"{path}: not the weights of the FID network: {'; '.join(faults)}")


def _flatten(tree, prefix=""):
    """The arrays of a nested dict under dotted names; everything else is left out."""
    flat = {}
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        elif isinstance(value, np.ndarray):
            flat[f"{prefix}{key}"] = value
    return flat


# ----------------------------------------------------------------------------- names by format

_HWIO, _OIHW, _VECTOR = (0, 1, 2, 3), (2, 3, 1, 0), (0,)


def _torchvision_names(layer):
    """State dict of pytorch-fid and torch-fidelity."""
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
    """Nested dicts of jax-fid, which mirror the state dict with Flax names and order."""
    if layer == "fc":
        return {"kernel": ("fc.kernel", (0, 1)), "bias": ("fc.bias", _VECTOR)}
    return {
        "kernel": (f"{layer}.conv.kernel", _HWIO),
        "gamma": (f"{layer}.bn.scale", _VECTOR),
        "beta": (f"{layer}.bn.bias", _VECTOR),
        "mean": (f"{layer}.bn.mean", _VECTOR),
        "var": (f"{layer}.bn.var", _VECTOR),
    }


def _graph_names(layer):
    """Const nodes of classify_image_graph_def.pb."""
    if layer == "fc":
        return {"kernel": ("softmax/weights", (0, 1)), "bias": ("softmax/biases", _VECTOR)}
    scope = _scope(layer)
    return {
        "kernel": (f"{scope}/conv2d_params", _HWIO),
        "gamma": (f"{scope}/batchnorm/gamma", _VECTOR),
        "beta": (f"{scope}/batchnorm/beta", _VECTOR),
        "mean": (f"{scope}/batchnorm/moving_mean", _VECTOR),
        "var": (f"{scope}/batchnorm/moving_variance", _VECTOR),
    }


def _nvidia_names(layer):
    """Modules of inception-2015-12-05.pt: the graph's scopes, without gamma."""
    if layer == "fc":
        return {"kernel": ("output.weight", (1, 0)), "bias": ("output.bias", _VECTOR)}
    block, _, rest = _scope(layer).partition("/")
    # The two last blocks have no submodules, their convolutions carry the whole path.
    rest = rest.replace("/", "_" if block in ("mixed_9", "mixed_10") else ".")
    module = f"layers.{block}.{rest}" if rest else f"layers.{block}"
    return {
        "kernel": (f"{module}.weight", _OIHW),
        "beta": (f"{module}.beta", _VECTOR),
        "mean": (f"{module}.mean", _VECTOR),
        "var": (f"{module}.var", _VECTOR),
    }


_BLOCKS = "5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split()
_STEM = "1a 2a 2b 3b 4a".split()
_TOWERS = {  # branch -> tower, by block; the suffix _1, _2, ... counts the convolutions in it
    "5": {"branch5x5": "tower", "branch3x3dbl": "tower_1", "branch_pool": "tower_2"},
    "6a": {"branch3x3dbl": "tower"},
    "6": {"branch7x7": "tower", "branch7x7dbl": "tower_1", "branch_pool": "tower_2"},
    "7a": {"branch3x3": "tower", "branch7x7x3": "tower_1"},
    "7": {"branch3x3": "tower", "branch3x3dbl": "tower_1", "branch_pool": "tower_2"},
}
_PLACES = {
    "1": "conv",
    "2": "conv_1",
    "3": "conv_2",
    "4": "conv_3",
    "5": "conv_4",
    "2a": "mixed/conv",
    "2b": "mixed/conv_1",
    "3a": "mixed/conv",
    "3b": "mixed/conv_1",
}


def _scope(layer):
    """The scope in the graph of 2015, e.g. Mixed_5b.branch5x5_2 -> mixed/tower/conv_1."""
    block, _, branch = layer.partition(".")
    if not branch:
        number = _STEM.index(block.split("_")[1])
        return f"conv_{number}" if number else "conv"
    block = block.removeprefix("Mixed_")
    number = _BLOCKS.index(block)
    mixed = f"mixed_{number}" if number else "mixed"
    if branch == "branch1x1" or (block, branch) == ("6a", "branch3x3"):
        return f"{mixed}/conv"
    towers = _TOWERS.get(block) or _TOWERS[block[0]]
    if branch in towers:  # a tower of one convolution
        return f"{mixed}/{towers[branch]}/conv"
    name, _, place = branch.rpartition("_")
    return f"{mixed}/{towers[name]}/{_PLACES[place]}"


# --------------------------------------------------------------------------- TensorFlow graph


def _read_graph(path):
    """The weights among the constants of the graph, by node name; gamma is 1 where unused."""
    nodes = graph_files.load(path)
    arrays = {name: node.attrs.get("value") for name, node in nodes.items() if _is_weight(name)}
    for name, node in nodes.items():
        if node.kind == "BatchNormWithGlobalNormalization":
            epsilon = node.attrs.get("variance_epsilon", 0.0)
            if abs(epsilon - BN_EPSILON) > 1e-6:
                raise ValueError(f"{path}: {name} has epsilon {epsilon:.4g}, {BN_EPSILON} expected")
            gamma = f"{name}/gamma"
            if gamma in arrays and not node.attrs.get("scale_after_normalization", False):
                arrays[gamma] = np.ones_like(arrays[gamma])
    return arrays


def _is_weight(name):
    if name.startswith("softmax/"):
        return name in ("softmax/weights", "softmax/biases")
    leaves = ("gamma", "beta", "moving_mean", "moving_variance")
    return name.endswith(("/conv2d_params", *(f"/batchnorm/{leaf}" for leaf in leaves)))


# -------------------------------------------------------------------------------- safetensors


def _write_safetensors(path, params):
    """Keep `params` for the next start; a folder that cannot be written to is no error."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_flatten(params), temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError):
        if temporary.exists():
            temporary.unlink()


def _read_safetensors(path):
    try:
        flat = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from error
    wanted = {f"{layer}.kernel": shape for layer, shape in CONV_SHAPES.items()}
    wanted |= {f"{layer}.bias": shape[-1:] for layer, shape in CONV_SHAPES.items()}
    wanted |= {"fc.kernel": FC_SHAPE, "fc.bias": FC_SHAPE[-1:]}
    _compare(path, wanted, flat)
    params = {}
    for name, value in flat.items():
        layer, _, leaf = name.rpartition(".")
        params.setdefault(layer, {})[leaf] = value
    return params
