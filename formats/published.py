"""Checkpoints of the published MeanFlow code <-> the parameter tree of models/dit.py.

The published code (github.com/Gsunshine/meanflow, flax 0.8.5, orbax 0.4.4) writes a training state
as FOLDER/checkpoint_STEP in one of two forms: a msgpack file, or an orbax folder, whose one file of
data, `checkpoint`, is msgpack too. Both are read and written here without unpickling anything.

A tree of ours stacks the blocks along a leading axis and has shorter names; `_layers` is the whole
map. Reading is strict: each key is used once, each shape follows from the size of the network.
"""

import re
from pathlib import Path

import numpy as np
from flax import serialization

from formats import renames
from utils import files, trees

FREQUENCIES = 256  # of the sinusoidal time embeddings
LABEL_TABLE = "y_embedder/embedding_table/_flax_embedding/embedding"
NAME = re.compile(r"checkpoint_(\d+)$")


def is_published(path) -> bool:
    """Tells whether path is a published checkpoint, or a folder that holds some.

    A run of ours keeps its checkpoints in folders named by the step alone.
    """
    path = Path(path)
    return path.is_file() or (path / "checkpoint").is_file() or bool(numbered(path))


def numbered(folder):
    """Lists the checkpoints in a folder: {step: path}."""
    if not folder.is_dir():
        return {}
    children = {NAME.match(child.name): child for child in folder.iterdir()}
    return {int(match[1]): child for match, child in children.items() if match}


def load(path) -> dict:
    """Reads a published checkpoint.

    path: checkpoint_N itself or the folder that holds it; of several the one with the largest N.
    Returns {"step": int, "params": tree, "ema_params": tree, "opt_state": {"count": int32 (),
    "mu": tree, "nu": tree} of Adam, or None where the file has none}; trees as in models/dit.py,
    float32 numpy arrays.
    Raises FileNotFoundError where there is no checkpoint, and ValueError with one line that names
    whatever is missing, left over or of a shape that does not fit.
    """
    path = Path(path)
    if steps := numbered(path):
        path = steps[max(steps)]
    file = path / "checkpoint" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: no published checkpoint, that is a file or folder checkpoint_STEP"
        )
    with files.reading(file, "damaged or not a published checkpoint"):
        state = serialization.msgpack_restore(file.read_bytes())
    if not isinstance(state, dict):
        raise ValueError(f"{file}: not a published checkpoint, but a {type(state).__name__}")
    trees.check_names(state, file)
    trees.raise_problems(
        file,
        missing=sorted({"step", "params", "ema_params"} - state.keys()),
        left_over=sorted(state.keys() - {"step", "params", "ema_params", "opt_state"}),
    )
    return {
        "step": renames.steps(state["step"], f"{file}: step"),
        "params": from_published(state["params"], f"{file}: params"),
        "ema_params": from_published(state["ema_params"], f"{file}: ema_params"),
        "opt_state": renames.adam_to_ours(
            state.get("opt_state"), from_published, f"{file}: opt_state"
        ),
    }


def export(params, ema_params, step, folder, opt_state=None, form="msgpack") -> Path:
    """Writes folder/checkpoint_STEP in the layout of the published code.

    params, ema_params: trees as in models/dit.py. opt_state: as from `load`; without one a fresh
    Adam state is written, since the published code restores nothing less. form: "msgpack" or
    "orbax". Returns the path, which appears only when it is complete.
    Raises FileExistsError where it is there already, ValueError where the trees do not fit.
    """
    if form not in ("msgpack", "orbax"):
        raise ValueError(f"format={form}: choose msgpack or orbax")
    path = Path(folder) / f"checkpoint_{int(step)}"
    if path.exists():
        raise FileExistsError(f"{path} is there already: remove it or choose another folder")
    params = to_published(params, "params")
    adam = renames.adam_to_theirs(opt_state, params, to_published)
    state = {
        "step": int(step),
        "params": params,
        "ema_params": to_published(ema_params, "ema_params"),
        # optax.adamw: Adam, weight decay, learning rate; the latter two have no state.
        "opt_state": {"0": adam, "1": {}, "2": {}} if form == "msgpack" else [adam, None, None],
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    data = serialization.msgpack_serialize(state)
    with files.complete(path) as unfinished:
        if form == "orbax":
            unfinished.mkdir()
            unfinished = unfinished / "checkpoint"
        unfinished.write_bytes(data)
    return path


def _layers(D, patch, out):
    """Maps our layers to (published layer, shape of its kernel) for a hidden size D; biases follow.

    patch: shape of the patch embedding's kernel (p, p, c, D); out: p * p * c.
    """
    linear = "_flax_linear"
    block = "blocks/layers_{}"
    time = {
        f"{name}/{ours}": (f"{name}/mlp/layers_{i}/{linear}", (rows, D))
        for name in ("t_embedder", "h_embedder")
        for ours, i, rows in (("fc1", 0, FREQUENCIES), ("fc2", 2, D))
    }
    return time | {
        "x_embedder": ("x_embedder/proj", patch),
        "blocks/attn/qkv": (f"{block}/attn/qkv/{linear}", (D, 3 * D)),
        "blocks/attn/proj": (f"{block}/attn/proj/{linear}", (D, D)),
        "blocks/mlp/fc1": (f"{block}/mlp/fc1/{linear}", (D, 4 * D)),
        "blocks/mlp/fc2": (f"{block}/mlp/fc2/{linear}", (4 * D, D)),
        "blocks/adaLN": (f"{block}/adaLN_modulation/layers_1/{linear}", (D, 6 * D)),
        "final_layer/adaLN": (f"final_layer/adaLN_modulation/layers_1/{linear}", (D, 2 * D)),
        "final_layer/linear": (f"final_layer/linear/{linear}", (D, out)),
    }


def _table(arrays, patch_kernel, label_table, where):
    """Returns the table of `renames`, for the network whose size two of the arrays tell by name."""
    patch, table = renames.shapes_of(arrays, {patch_kernel: 4, label_table: 2}, "a DiT", where)
    D, out = patch[-1], int(np.prod(patch[:-1]))
    layout = {"y_embedder/embedding": ([f"net/{LABEL_TABLE}"], (table[0], D))}
    for ours, (theirs, shape) in _layers(D, patch, out).items():
        layout[f"{ours}/kernel"] = ([f"net/{theirs}/kernel"], shape)
        layout[f"{ours}/bias"] = ([f"net/{theirs}/bias"], shape[-1:])
    return layout


def from_published(tree, where):
    """Turns a published tree into ours."""
    theirs = trees.flatten(tree)
    table = _table(theirs, "net/x_embedder/proj/kernel", f"net/{LABEL_TABLE}", where)
    depths = {"blocks": max(renames.depth("net/blocks/layers_{}/", theirs), 1)}
    return trees.unflatten(renames.to_ours(table, depths, theirs, where))


def to_published(tree, where):
    """Turns our tree into a published one."""
    ours = trees.flatten(tree)
    table = _table(ours, "x_embedder/kernel", "y_embedder/embedding", where)
    depth = next((len(array) for name, array in ours.items() if name.startswith("blocks/")), 0)
    return trees.unflatten(renames.to_theirs(table, {"blocks": depth}, ours, where))
