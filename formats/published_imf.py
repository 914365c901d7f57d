"""Checkpoints of the published improved MeanFlow <-> the parameter tree of models/imf_dit.py.

The published code (repository imeanflow, arXiv 2512.02012; orbax 0.6.4) writes a training state as
FOLDER/checkpoint_STEP, an orbax folder whose arrays lie in an OCDBT store; by `manifest.ocdbt` it
is told from the checkpoints of formats/published.py. Two forms are released: `full`, and
`inference`, a state without the blocks of the v head. Older files have other names (`ALIASES`).

A tree of ours stacks the blocks along a leading axis, joins products of the same input (q, k, v;
w1, w3), and has shorter names; `_layout` is the whole map. Reading is strict: each name is used
once, each shape follows from the size of the network.
"""

import contextlib
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from utils import files, trees

FREQUENCIES = 256  # of the scalars' sinusoidal embeddings
LABEL_TABLE = "y_embedder/embedding_table/_flax_embedding/embedding"
NAME = re.compile(r"checkpoint_(\d+)$")
# Of its latents, per channel, before the network; not the factor 0.18215.
LATENT_MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
LATENT_STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)
PREFIX = {"class": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}  # learned tokens
STACKS = {"blocks": "shared_blocks_{}", "u_blocks": "u_heads_{}", "v_blocks": "v_heads_{}"}
EMBEDDERS = {
    "h": "h_embedder",
    "omega": "omega_embedder",
    "t_min": "cfg_t_start_embedder",
    "t_max": "cfg_t_end_embedder",
}
# Names in older files, as last or as first part of a path -> those of today.
ALIASES = {
    "attn_gate": "attn_scale",
    "mlp_gate": "mlp_scale",
    "k_embedder": "omega_embedder",
    "kappa_cond_tokens": "omega_tokens",
    "cfg_start_cond_tokens": "t_min_tokens",
    "cfg_end_cond_tokens": "t_max_tokens",
    "time_cond_tokens": "time_tokens",
    "class_cond_tokens": "class_tokens",
}


def find(path):
    """Finds the newest checkpoint of this format at `path` or in its folder, or None."""
    path = Path(path)
    if (path / "manifest.ocdbt").is_file() and NAME.search(path.name):
        return path
    if not path.is_dir():
        return None
    children = {NAME.match(child.name): child for child in path.glob("checkpoint_*/")}
    checkpoints = {
        int(match[1]): child
        for match, child in children.items()
        if match and (child / "manifest.ocdbt").is_file()
    }
    return checkpoints[max(checkpoints)] if checkpoints else None


def load(path, optimizer=True):
    """Reads a published checkpoint.

    Args:
      path: from `find`.
      optimizer: whether to read the moments of Adam too, half of the bytes.

    Returns:
      {"step": int, "params", "ema_params": trees as in models/imf_dit.py, float32 numpy arrays,
      without a head of v where the file has none; "opt_state": {"count": int32 (), "mu", "nu":
      trees} of Adam}; `params` and `opt_state` are None where they are absent or not asked for.

    Raises:
      ValueError: one line that names whatever is missing, twice there, left over, or of a shape or
        type that does not fit.
    """
    path = Path(path).absolute()
    state = restore(path, leave_out=() if optimizer else ("opt_state",))
    check_entries(state, path)
    params = state.get("params")
    return {
        "step": int(state.get("step", NAME.search(path.name)[1])),
        "params": params and from_published(params, f"{path}: params"),
        "ema_params": from_published(state["ema_params"], f"{path}: ema_params"),
        "opt_state": _read_adam(state.get("opt_state"), f"{path}: opt_state"),
    }


def check_entries(state, path):
    """Raises ValueError where a state has other entries than the published code writes."""
    trees.raise_problems(
        path,
        missing=sorted({"ema_params"} - state.keys()),
        left_over=sorted(state.keys() - {"step", "params", "ema_params", "opt_state"}),
    )


def structure(path):
    """Reads the names in a checkpoint: nested dicts, with what orbax knows of each array."""
    with _damage(path), ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.metadata(Path(path).absolute()).item_metadata.tree


def restore(path, leave_out):
    """Reads the state as nested dicts of numpy arrays, without the entries `leave_out`."""
    with _damage(path), ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        item = {name: tree[name] for name in tree if name not in leave_out}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        return checkpointer.restore(
            path, args=ocp.args.PyTreeRestore(item, restore_args=as_numpy, partial_restore=True)
        )


@contextlib.contextmanager
def _damage(path):
    """Makes a ValueError of whatever goes wrong while a checkpoint is read."""
    try:
        yield
    except Exception as error:  # orbax and its store raise many kinds of their own
        line = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: damaged or not a published checkpoint ({line})") from error


def export(params, ema_params, step, folder, opt_state=None):
    """Writes folder/checkpoint_STEP in the layout of the published code.

    Args:
      params, ema_params: trees as in models/imf_dit.py.
      opt_state: as from `load`; None: a fresh state of Adam, since the published code restores
        nothing less.

    Returns:
      The path, which appears only when it is complete.

    Raises:
      FileExistsError: it is there already.
      ValueError: the trees do not fit.
    """
    path = Path(folder).absolute() / f"checkpoint_{int(step)}"
    if path.exists():
        raise FileExistsError(f"{path} is there already: remove it or choose another folder")
    params = to_published(params, "params")
    if opt_state is None:
        zeros = jax.tree.map(np.zeros_like, params)
        opt_state = {"count": 0, "mu": zeros, "nu": zeros}
    else:
        opt_state = {
            "count": opt_state["count"],
            "mu": to_published(opt_state["mu"], "opt_state.mu"),
            "nu": to_published(opt_state["nu"], "opt_state.nu"),
        }
    count = np.asarray(opt_state["count"], np.int32)
    state = {
        "step": np.asarray(step, np.int32),
        "params": params,
        "ema_params": to_published(ema_params, "ema_params"),
        # optax.adamw: Adam, weight decay (no state), the count of the learning rate's schedule.
        "opt_state": [opt_state | {"count": count}, None, {"count": count}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.complete(path) as unfinished, ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(unfinished, state)
    return path


# The map --------------------------------------------------------------------------------------


class Size(NamedTuple):
    """The numbers that the shapes of a network follow from."""

    patch: tuple[int, ...]  # shape of the patch embedding's kernel, (p, p, c, D)
    labels: int  # rows of the label table
    head: int  # features of an attention head
    depths: dict[str, int]  # blocks by name of the stack; of v 0 where it has no head


def _layout(size):
    """Maps our parameters to (published parameters, their shape); "{}" stands for the block.

    Several published parameters are joined along their last axis.
    """
    D, out = size.patch[-1], int(np.prod(size.patch[:-1]))
    layout = {
        "embedding/x_embedder/kernel": (["x_embedder/proj/kernel"], size.patch),
        "embedding/x_embedder/bias": (["x_embedder/proj/bias"], (D,)),
        "embedding/y_embedder/embedding": ([LABEL_TABLE], (size.labels, D)),
    }
    for name, number in PREFIX.items():
        layout[f"embedding/{name}_tokens"] = ([f"{name}_tokens"], (number, D))
    block, ends = common_layout(D, (size.head,), D * 8 // 3, out, size.depths)
    for stack, depth in size.depths.items():
        for ours, (theirs, shape) in block.items() if depth else ():
            layout[f"{stack}/{ours}"] = ([f"{STACKS[stack]}/{name}" for name in theirs], shape)
    return layout | ends


def common_layout(D, head, features, out, depths):
    """Maps as `_layout` does what pixel MeanFlow has too: a block, and all that is in no stack."""
    linear, layout = "_flax_linear/kernel", {}
    block = {
        "norm1": (["norm1/kernel"], (D,)),
        "norm2": (["norm2/kernel"], (D,)),
        "attn_scale": (["attn_scale"], (D,)),
        "mlp_scale": (["mlp_scale"], (D,)),
        "attn/q_norm": (["attn/q_norm/kernel"], head),
        "attn/k_norm": (["attn/k_norm/kernel"], head),
        "attn/qkv/kernel": ([f"attn/{name}_proj/{linear}" for name in "qkv"], (D, D)),
        "attn/proj/kernel": ([f"attn/out_proj/{linear}"], (D, D)),
        "mlp/w13/kernel": ([f"mlp/{name}/{linear}" for name in ("w1", "w3")], (D, features)),
        "mlp/w2/kernel": ([f"mlp/w2/{linear}"], (features, D)),
    }
    for ours, theirs in EMBEDDERS.items():
        for fc, i, rows in (("fc1", 0, FREQUENCIES), ("fc2", 2, D)):
            layer = f"{theirs}/mlp/layers_{i}/_flax_linear"
            layout[f"embedding/{ours}_embedder/{fc}/kernel"] = ([f"{layer}/kernel"], (rows, D))
            layout[f"embedding/{ours}_embedder/{fc}/bias"] = ([f"{layer}/bias"], (D,))
    for name in "uv" if depths["v_blocks"] else "u":
        layer = f"{name}_final_layer"
        layout[f"{layer}/norm"] = ([f"{layer}/norm/kernel"], (D,))
        layout[f"{layer}/linear/kernel"] = ([f"{layer}/linear/{linear}"], (D, out))
        layout[f"{layer}/linear/bias"] = ([f"{layer}/linear/_flax_linear/bias"], (out,))
    return block, layout


def _size(arrays, patch, labels, head, depths, where):
    """Returns the `Size` of {name: array}; patch, labels, head: names of arrays that tell it."""
    shapes = [np.shape(arrays.get(name)) for name in (patch, labels, head)]
    absent = [
        name
        for name, shape, ndims in zip((patch, labels, head), shapes, (4, 2, (1, 2)), strict=True)
        if len(shape) not in np.atleast_1d(ndims)
    ]
    if absent:
        raise ValueError(f"{where}: not an imfDiT: missing or misshapen: {', '.join(absent)}")
    return Size(shapes[0], shapes[1][0], shapes[2][-1], depths)


def from_published(tree, where):
    """Turns a published tree into ours."""
    trees.raise_problems(where, left_over=sorted(tree.keys() - {"net"}))
    theirs = _today(trees.flatten(tree.get("net")), where)
    depths = {}
    for stack, template in STACKS.items():
        blocks = [re.match(template.format(r"(\d+)") + "/", name) for name in theirs]
        depths[stack] = len({match[1] for match in blocks if match})
    if depths["v_blocks"]:  # whole or not at all
        depths["v_blocks"] = depths["u_blocks"]
    else:  # what is left of the head is of no use
        theirs = {k: a for k, a in theirs.items() if not k.startswith("v_final_layer/")}
    head = "u_heads_0/attn/q_norm/kernel"
    size = _size(theirs, "x_embedder/proj/kernel", LABEL_TABLE, head, depths, where)
    layout = _layout(size)
    shapes = {
        source: shape
        for name, (templates, shape) in layout.items()
        for sources in _sources(name, templates, size)
        for source in sources
    }
    trees.check_shapes(shapes, theirs, where)
    trees.raise_problems(
        where, misfits=[f"{k} of {a.dtype}" for k, a in theirs.items() if a.dtype != np.float32]
    )
    ours = {}
    for name, (templates, _) in layout.items():
        arrays = [
            np.concatenate([theirs[source] for source in sources], axis=-1)
            for sources in _sources(name, templates, size)
        ]
        ours[name] = np.stack(arrays) if _stacked(name) else arrays[0]
    return trees.unflatten(ours)


def to_published(tree, where):
    """Turns our tree into a published one."""
    ours = trees.flatten(tree)
    depths = {stack: len(ours.get(f"{stack}/norm1", ())) for stack in STACKS}
    names = ("embedding/x_embedder/kernel", "embedding/y_embedder/embedding")
    size = _size(ours, *names, "u_blocks/attn/q_norm", depths, where)
    layout = _layout(size)
    shapes = {}
    for name, (templates, shape) in layout.items():
        stack = (depths[name.partition("/")[0]],) if _stacked(name) else ()
        shapes[name] = (*stack, *shape[:-1], len(templates) * shape[-1])
    trees.check_shapes(shapes, ours, where)
    theirs = {}
    for name, (templates, _) in layout.items():
        array = np.asarray(ours[name], np.float32)
        blocks = array if _stacked(name) else [array]
        for sources, block in zip(_sources(name, templates, size), blocks, strict=True):
            theirs |= zip(sources, np.split(block, len(sources), axis=-1), strict=True)
    return {"net": trees.unflatten(theirs)}


def _stacked(name):
    return name.partition("/")[0] in STACKS


def _sources(name, templates, size):
    """Lists the published names that one of ours gathers: by block a list."""
    if not _stacked(name):
        return [templates]
    depth = size.depths[name.partition("/")[0]]
    return [[template.format(i) for template in templates] for i in range(depth)]


def _today(arrays, where):
    """Brings {name: array} under the names of today.

    Raises:
      ValueError: a parameter is there under two names.
    """
    renamed, twice = {}, []
    for name, array in arrays.items():
        today = "/".join(ALIASES.get(part, part) for part in name.split("/"))
        if today in renamed:
            twice.append(today)
        renamed[today] = array
    if twice:
        raise ValueError(f"{where}: there under two names: {trees.listed(twice)}")
    return renamed


def _read_adam(opt_state, where):
    """Turns the state of optax.adamw into our dict, or None."""
    if not opt_state:
        return None
    adam, *others = opt_state
    trees.raise_problems(
        where,
        missing=[f"0/{k}" for k in ("count", "mu", "nu") if k not in (adam or {})],
        left_over=[f"0/{k}" for k in adam or {} if k not in ("count", "mu", "nu")]
        + [str(i) for i, entry in enumerate(others, 1) if (entry or {}).keys() - {"count"}],
    )
    return {
        "count": np.asarray(adam["count"], np.int32),
        "mu": from_published(adam["mu"], f"{where}/0/mu"),
        "nu": from_published(adam["nu"], f"{where}/0/nu"),
    }
