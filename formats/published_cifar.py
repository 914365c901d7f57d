"""Published checkpoints of MeanFlow for CIFAR-10 (PyTorch) -> parameter trees of models/unet.py.

`checkpoint-*.pth` is a torch file: a dict with `model`, a flat state of the network (`net.`) and of
three averages of it, and with what a run of its own needs. Nothing that runs code is unpickled.
Reading is strict: each name is used once.
"""

import numpy as np

from formats import state_dicts, torch_files
from utils import trees

# Prefix of each average -> its decay; first that of the published FID of 2.80.
AVERAGES = {"net_ema1.": 0.99995, "net_ema.": 0.9999, "net_ema2.": 0.9996}
POINTWISE = ("skip", "qkv", "proj")  # convolutions of one pixel there, products here
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
PARTS = ("model", "optimizer", "lr_schedule", "epoch", "args")


def load(path):
    """Reads a published checkpoint.

    Returns:
      {"step": updates done, "params": tree, "ema_params": (tree, ...), "ema_vals": their decays,
      "opt_state": None}; trees as in models/unet.py, float32 numpy arrays. Adam's moments, which
      are stored without names, are left out.

    Raises:
      FileNotFoundError, or ValueError with one line that says what does not fit.
    """
    content = torch_files.load(path)
    state, entry = state_dicts.find(content, path, average=False)
    if entry:
        unknown = content.keys() - {*PARTS, entry}
        trees.raise_problems(str(path), left_over=sorted(map(str, unknown)))
    if "num_updates" not in state:
        raise ValueError(f"{path}: not a published checkpoint of CIFAR-10: it has no 'num_updates'")
    step = int(np.asarray(state.pop("num_updates")).item())
    prefixes = ("net.", *AVERAGES)
    unknown = [name for name in state if not str(name).startswith(prefixes)]
    trees.raise_problems(str(path), left_over=sorted(map(str, unknown)))
    networks = {
        prefix: from_published(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)},
            f"{path}: {prefix[:-1]}",
        )
        for prefix in prefixes
    }
    return {
        "step": step,
        "params": networks["net."],
        "ema_params": tuple(networks[prefix] for prefix in AVERAGES),
        "ema_vals": tuple(AVERAGES.values()),
        "opt_state": None,
    }


def is_published(path):
    """Tells whether a path has the name of such a checkpoint."""
    return str(path).endswith(".pth")


def from_published(arrays, where):
    """Turns {published name: array} into our tree.

    The names say what the shapes mean; whether they are those of a given network, `trees` tells.
    The filters of the resampling, which are stored beside the parameters, must be [1, 3, 3, 1].

    Raises:
      ValueError: a name of another kind, another filter, nothing at all.
    """
    if not arrays:
        raise ValueError(f"{where}: no parameters there")
    ours, strange = {}, []
    for name, array in arrays.items():
        array = np.asarray(array)
        if name.endswith(".resample_filter"):
            taps = np.array([1, 3, 3, 1]) / 8
            if array.shape != (1, 1, 4, 4) or not np.allclose(array[0, 0], np.outer(taps, taps)):
                raise ValueError(f"{where}: {name} is not the filter [1, 3, 3, 1]")
            continue
        layer, _, kind = name.rpartition(".")
        layer = layer.replace("enc.", "enc_", 1).replace("dec.", "dec_", 1).replace(".", "/")
        if not layer or kind not in ("weight", "bias") or array.ndim not in (1, 2, 4):
            strange.append(name)
            continue
        if array.ndim == 4 and layer.endswith(POINTWISE) and array.shape[2:] == (1, 1):
            array = array[:, :, 0, 0]
        if array.ndim > 1:
            kind, array = "kernel", np.moveaxis(array, (0, 1), (-1, -2))
        elif kind == "weight":
            kind = "scale"
        ours[f"{layer}/{kind}"] = np.ascontiguousarray(array, dtype=np.float32)
    trees.raise_problems(where, left_over=sorted(strange))
    return trees.unflatten(ours)


def to_published(tree):
    """Inverts `from_published`, without the filters: {published name: numpy array}."""
    theirs = {}
    for name, array in trees.flatten(tree).items():
        layer, _, kind = name.rpartition("/")
        array = np.asarray(array)
        if array.ndim > 1:
            array = np.moveaxis(array, (-1, -2), (0, 1))
        if kind == "kernel" and layer.endswith(POINTWISE):
            array = array[:, :, None, None]
        layer = layer.replace("enc_", "enc.", 1).replace("dec_", "dec.", 1).replace("/", ".")
        theirs[f"{layer}.{LEAVES[kind]}"] = array
    return theirs
