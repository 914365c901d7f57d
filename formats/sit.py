"""Weights of SiT, REPA and DiT (`.pt`) as starting points for models/dit.py.

Such a file is a state dict, or what a training run saved (formats/state_dicts.py). The three share
the transformer's names, which are in `_table`, and differ in what they predict:

  sit   x - e at a time that is 1 at the data (github.com/willisma/SiT): turned here, see `_turned`
  repa  e - x at a time that is 1 at the noise (github.com/sihyun-yu/REPA): as here
  dit   the noise, on another path of 1,000 times (github.com/facebookresearch/DiT): no exact map,
        so the embedders of the times and the last layer begin anew

A file does not say which it is, and a wrong guess trains without an error: it has to be named. None
has an embedder of h: its last layer begins at zero, so that u does not depend on h at first.
Reading is strict: each key is used once or named here as dropped, and each shape is checked.

The other way, `state_of` writes our network under these names. SiT has one embedder, of t, where
ours adds several; whatever is constant while one samples (h of equal steps, a guidance) goes into
its last bias, exactly.
"""

import numpy as np

from formats import renames, start, state_dicts, torch_files
from utils import trees

FREQUENCIES = 256  # of the sinusoidal time embedding
MAX_PERIOD = 10000.0
CONVENTIONS = ("sit", "repa", "dit")


def recognises(path):
    """Tells whether a path is named like one of these files."""
    return str(path).endswith(".pt")


def load(path, weights, convention):
    """Reads a starting point.

    Args:
      path: the `.pt` file.
      weights: `ema` or `params`: which set; of an average that is not there the network itself.
      convention: one of CONVENTIONS.

    Returns:
      `start.Start`, its arrays under the names of models/dit.py.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file or keys of another kind; one line.
    """
    if convention not in CONVENTIONS:
        raise ValueError(
            f"init_format: {path} does not say what its network predicts; name it: "
            f"{' | '.join(CONVENTIONS)}, not {convention!r}"
        )
    state, entry = state_dicts.find(torch_files.load(path), path, average=weights == "ema")
    where = f"{path}: {entry}" if entry else str(path)
    projectors = sorted(name for name in state if name.startswith("projectors."))
    dropped = ["pos_embed", *projectors]
    positions = state.get("pos_embed")
    state = {name: array for name, array in state.items() if name not in dropped}
    arrays, sigma = _arrays(state, where)
    if np.ndim(positions) != 3:
        raise ValueError(f"{where}: not the weights of a SiT, REPA or DiT: no pos_embed of 3 axes")
    if sigma:
        dropped.append("the sigma half of final_layer.linear")
    fresh = ("h_embedder/fc1", "r_embedder/fc1")
    if convention == "sit":
        _turn(arrays)
    if convention == "dit":
        begin_anew = ("t_embedder", "final_layer")
        reason = "of a DiT, which predicts noise on another path and only initialises"
        dropped.append(f"{' and '.join(begin_anew)} {reason}")
        arrays = {k: v for k, v in arrays.items() if not k.startswith(begin_anew)}
        fresh, zero = (*begin_anew, "h_embedder", "r_embedder"), ()
    else:
        zero = ("h_embedder/fc2", "r_embedder/fc2")
    return start.Start(arrays, fresh, zero, dropped, positions, entry)


def _table(D, p, C, out, labels):
    """Returns the table of `renames`, the shapes those of torch."""
    block = "blocks.{}"
    layers = {
        "x_embedder": ("x_embedder.proj", (D, C, p, p)),
        "t_embedder/fc1": ("t_embedder.mlp.0", (D, FREQUENCIES)),
        "t_embedder/fc2": ("t_embedder.mlp.2", (D, D)),
        "blocks/attn/qkv": (f"{block}.attn.qkv", (3 * D, D)),
        "blocks/attn/proj": (f"{block}.attn.proj", (D, D)),
        "blocks/mlp/fc1": (f"{block}.mlp.fc1", (4 * D, D)),
        "blocks/mlp/fc2": (f"{block}.mlp.fc2", (D, 4 * D)),
        "blocks/adaLN": (f"{block}.adaLN_modulation.1", (6 * D, D)),
        "final_layer/adaLN": ("final_layer.adaLN_modulation.1", (2 * D, D)),
        "final_layer/linear": ("final_layer.linear", (out, D)),
    }
    table = {"y_embedder/embedding": (["y_embedder.embedding_table.weight"], (labels, D))}
    for ours, (theirs, shape) in layers.items():
        table[f"{ours}/kernel"] = ([f"{theirs}.weight"], shape)
        table[f"{ours}/bias"] = ([f"{theirs}.bias"], shape[:1])
    return table


def _arrays(state, where):
    """Turns a state dict without positions into {our name: float32 array}; and: had it sigma?"""
    patch = np.shape(state.get("x_embedder.proj.weight"))
    table = np.shape(state.get("y_embedder.embedding_table.weight"))
    last = np.shape(state.get("final_layer.linear.weight"))
    if (len(patch), len(table), len(last)) != (4, 2, 2):
        raise ValueError(f"{where}: not the weights of a SiT, REPA or DiT")
    D, C, p, _ = patch
    sigma = last[0] == 2 * p * p * C
    renamed = _table(D, p, C, last[0] if sigma else p * p * C, table[0])
    depths = {"blocks": max(renames.depth("blocks.{}.", state), 1)}
    arrays = renames.to_ours(renamed, depths, state, where)
    arrays = {name: _transposed(name, array, (2, 3, 1, 0)) for name, array in arrays.items()}
    if sigma:  # (p, p, 2 C): the first C channels are the velocity
        for name in ("final_layer/linear/kernel", "final_layer/linear/bias"):
            a = arrays[name].reshape(*arrays[name].shape[:-1], p * p, 2 * C)
            arrays[name] = a[..., :C].reshape(*a.shape[:-2], p * p * C)
    return arrays, sigma


def _transposed(name, array, order):
    """Turns a kernel of torch into one of ours or back; `order` of the axes of a convolution."""
    if name.endswith("/kernel"):
        return np.transpose(array, order) if array.ndim == 4 else np.swapaxes(array, -1, -2)
    return array


def _turn(arrays):
    """Turns the direction of time and of the velocity, by the parameters alone.

    u(z, t, 0, y) = -SiT(z, 1 - t, y). cos w (1 - t) and sin w (1 - t) are linear in cos w t and
    sin w t, so the first kernel of the time embedder takes the new time; the last layer the sign.
    """
    half = FREQUENCIES // 2
    w = MAX_PERIOD ** -(np.arange(half) / half)[:, None]
    kernel = np.float64(arrays["t_embedder/fc1/kernel"])
    cos, sin = kernel[:half], kernel[half:]
    turned = [np.cos(w) * cos + np.sin(w) * sin, np.sin(w) * cos - np.cos(w) * sin]
    arrays["t_embedder/fc1/kernel"] = np.float32(np.concatenate(turned))
    for name in ("final_layer/linear/kernel", "final_layer/linear/bias"):
        arrays[name] = -arrays[name]


# The other way ----------------------------------------------------------------------------------


def state_of(arrays, constants, positions):
    """Brings our parameters under SiT's names, with the conditions that are constant folded in.

    Args:
      arrays: {our name: float32 array} of a network of models/dit.py.
      constants: {name of an embedder beside t: what it is to embed}; with a `t`, that is constant
        too: where the network embeds none, or where t = 1 is the only time.
      positions: (N, D), the fixed embedding of the patches.

    Returns:
      {their name: float32 array} as SiT with `learn_sigma`, its default, loads it: the half of the
      last layer that SiT leaves out is zero.

    Raises:
      ValueError: parameters that have no place there, by name.
    """
    arrays, embedded = dict(arrays), 0.0
    trees.raise_problems(
        "not a DiT: SiT's names describe no other network",
        missing=sorted({"x_embedder/kernel", "y_embedder/embedding"} - arrays.keys()),
    )
    for name, value in constants.items():
        layers = [arrays.pop(f"{name}_embedder/{part}", None) for part in EMBEDDER]
        if any(layer is None for layer in layers):
            raise ValueError(f"the network has no embedder of {name}")
        embedded = embedded + _embed(value, *layers)
    width = arrays["y_embedder/embedding"].shape[1]
    for part, shape in zip(EMBEDDER, ((FREQUENCIES, width), width, (width, width), width),
                           strict=True):  # fmt: skip
        arrays.setdefault(f"t_embedder/{part}", np.zeros(shape, np.float32))
    bias = np.float64(arrays["t_embedder/fc2/bias"]) + embedded
    arrays["t_embedder/fc2/bias"] = np.float32(bias)
    _turn(arrays)
    state = _state_dict(arrays)
    return state | {"pos_embed": positions[None]}


EMBEDDER = ("fc1/kernel", "fc1/bias", "fc2/kernel", "fc2/bias")


def _embed(value, kernel1, bias1, kernel2, bias2):
    """Computes `models.dit.TimeEmbedder` of one number, in float64: (D,)."""
    half = FREQUENCIES // 2
    angle = value * MAX_PERIOD ** -(np.arange(half) / half)
    x = np.concatenate([np.cos(angle), np.sin(angle)]) @ np.float64(kernel1) + bias1
    return (x / (1 + np.exp(-x))) @ np.float64(kernel2) + bias2


def _state_dict(arrays):
    """Inverts `_arrays`, with a half for sigma, which is zero."""
    p, _, C, D = arrays["x_embedder/kernel"].shape
    table = _table(D, p, C, 2 * p * p * C, len(arrays["y_embedder/embedding"]))
    trees.raise_problems(
        "no DiT that SiT's names describe",
        missing=sorted(table.keys() - arrays.keys()),
        left_over=sorted(arrays.keys() - table.keys()),
    )
    for name in ("final_layer/linear/kernel", "final_layer/linear/bias"):
        a = arrays[name].reshape(*arrays[name].shape[:-1], p * p, C)
        a = np.concatenate([a, np.zeros_like(a)], axis=-1)
        arrays[name] = a.reshape(*a.shape[:-2], 2 * p * p * C)
    depths = {"blocks": len(arrays["blocks/adaLN/bias"])}
    arrays = {name: _transposed(name, array, (3, 2, 0, 1)) for name, array in arrays.items()}
    state = renames.to_theirs(table, depths, arrays, "SiT")
    return {name: np.ascontiguousarray(array) for name, array in state.items()}
