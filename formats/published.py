"""Checkpoints of the published MeanFlow code <-> the parameter tree of models/dit.py.

The published code (github.com/Gsunshine/meanflow, flax 0.8.5, orbax 0.4.4) writes a training state
as FOLDER/checkpoint_STEP in one of two forms: a msgpack file, or an orbax folder, whose one file of
data, `checkpoint`, is msgpack too. Both are read and written here without unpickling anything.

A tree of ours stacks the blocks along a leading axis and has shorter names; `_layers` is the whole
map. Reading is strict: each key is used once, each shape follows from the size of the network.
"""

import re
from pathlib import Path

import jax
import numpy as np
from flax import serialization

from utils import files, trees

FREQUENCIES = 256  # of the sinusoidal time embeddings
LABEL_TABLE = "y_embedder/embedding_table/_flax_embedding/embedding"
NAME = re.compile(r"checkpoint_(\d+)$")


def is_published(path) -> bool:
    """Tells whether path is a published checkpoint, or a folder that holds some.

    A run of ours keeps its checkpoints in folders named by the step alone.
    """
    path = Path(path)
    return path.is_file() or (path / "checkpoint").is_file() or bool(_numbered(path))


def _numbered(folder):
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
    numbered = _numbered(path)
    if numbered:
        path = numbered[max(numbered)]
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
        "step": _step(state["step"], f"{file}: step"),
        "params": from_published(state["params"], f"{file}: params"),
        "ema_params": from_published(state["ema_params"], f"{file}: ema_params"),
        "opt_state": _read_adam(state.get("opt_state"), f"{file}: opt_state"),
    }


def _step(value, where):
    value = np.asarray(value)
    if value.size != 1 or value.dtype.kind not in "iu" or not 0 <= value.item() < 2**31:
        raise ValueError(f"{where} is {str(value)[:60]}, not a number of steps")
    return int(value.item())


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
    if opt_state is None:
        zeros = jax.tree.map(np.zeros_like, params)
        adam = {"count": np.zeros((), np.int32), "mu": zeros, "nu": zeros}
    else:
        adam = {
            "count": np.asarray(opt_state["count"], np.int32),
            "mu": to_published(opt_state["mu"], "opt_state.mu"),
            "nu": to_published(opt_state["nu"], "opt_state.nu"),
        }
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


def _layout(arrays, patch_kernel, label_table, where):
    """Maps our parameters to (published parameter, its shape there); "{}" stands for the block.

    patch_kernel (p, p, c, D) and label_table (rows, D) are the names of the two entries of
    {name: array} that tell the size of the network.
    """
    patch, table = np.shape(arrays.get(patch_kernel)), np.shape(arrays.get(label_table))
    absent = [
        n for n, s, ndim in ((patch_kernel, patch, 4), (label_table, table, 2)) if len(s) != ndim
    ]
    if absent:
        raise ValueError(f"{where}: not a DiT: missing or misshapen: {', '.join(absent)}")
    D, out = patch[-1], int(np.prod(patch[:-1]))
    layout = {"y_embedder/embedding": (f"net/{LABEL_TABLE}", (table[0], D))}
    for ours, (theirs, shape) in _layers(D, patch, out).items():
        layout[f"{ours}/kernel"] = (f"net/{theirs}/kernel", shape)
        layout[f"{ours}/bias"] = (f"net/{theirs}/bias", shape[-1:])
    return layout


def from_published(tree, where):
    """Turns a published tree into ours."""
    theirs = trees.flatten(tree)
    layout = _layout(theirs, "net/x_embedder/proj/kernel", f"net/{LABEL_TABLE}", where)
    blocks = [re.match(r"net/blocks/layers_(\d+)/", name) for name in theirs]
    depth = 1 + max((int(match[1]) for match in blocks if match), default=0)
    shapes = {
        source: shape for template, shape in layout.values() for source in _sources(template, depth)
    }
    trees.check_shapes(shapes, theirs, where)
    ours = {}
    for name, (template, _) in layout.items():
        arrays = [np.asarray(theirs[s], np.float32) for s in _sources(template, depth)]
        ours[name] = np.stack(arrays) if "{}" in template else arrays[0]
    return trees.unflatten(ours)


def to_published(tree, where):
    """Turns our tree into a published one."""
    ours = trees.flatten(tree)
    layout = _layout(ours, "x_embedder/kernel", "y_embedder/embedding", where)
    depth = next((len(array) for name, array in ours.items() if name.startswith("blocks/")), 0)
    shapes = {
        name: (depth, *shape) if "{}" in template else shape
        for name, (template, shape) in layout.items()
    }
    trees.check_shapes(shapes, ours, where)
    theirs = {}
    for name, (template, _) in layout.items():
        array = np.asarray(ours[name], np.float32)
        sources = _sources(template, depth)
        theirs |= zip(sources, array if "{}" in template else [array], strict=True)
    return trees.unflatten(theirs)


def _sources(template, depth):
    """Lists the published names that one of ours gathers."""
    return [template.format(i) for i in range(depth)] if "{}" in template else [template]


def _read_adam(opt_state, where):
    """Turns the state of optax.adamw, a dict or (orbax) a list, into our dict, or None."""
    if isinstance(opt_state, list):
        opt_state = {str(i): entry for i, entry in enumerate(opt_state)}
    if not opt_state:
        return None
    adam = (opt_state.get("0") or {}) if isinstance(opt_state, dict) else None
    if not isinstance(adam, dict):
        raise ValueError(f"{where}: not the state of Adam")
    trees.raise_problems(
        where,
        missing=[f"0/{k}" for k in ("count", "mu", "nu") if k not in adam],
        left_over=[f"0/{k}" for k in adam if k not in ("count", "mu", "nu")]
        + [k for k, entry in opt_state.items() if k != "0" and entry],
    )
    return {
        "count": np.int32(_step(adam["count"], f"{where}/0/count")),
        "mu": from_published(adam["mu"], f"{where}/0/mu"),
        "nu": from_published(adam["nu"], f"{where}/0/nu"),
    }
