"""Checkpoints of the published improved MeanFlow <-> the parameter tree of models/imf_dit.py.

The published code (repository imeanflow, arXiv 2512.02012; orbax 0.6.4) writes a training state as
FOLDER/checkpoint_STEP, an orbax folder whose arrays lie in an OCDBT store; by `manifest.ocdbt` it
is told from the checkpoints of formats/published.py. Two forms are released: `full`, and
`inference`, a state without the blocks of the v head. Older files have other names (`ALIASES`).

A tree of ours stacks the blocks along a leading axis, joins products of the same input (q, k, v;
w1, w3), and has shorter names; `_table` is the whole map. Reading is strict: each name is used
once, each shape follows from the size of the network.
"""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from formats import renames
from formats.published import FREQUENCIES, LABEL_TABLE, NAME, numbered
from utils import files, trees

DAMAGED = "damaged or not a published checkpoint"
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
    checkpoints = {
        step: child
        for step, child in numbered(path).items()
        if (child / "manifest.ocdbt").is_file()
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
        "opt_state": renames.adam_to_ours(
            state.get("opt_state"), from_published, f"{path}: opt_state", beside=("count",)
        ),
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
    with files.reading(path, DAMAGED), ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.metadata(Path(path).absolute()).item_metadata.tree


def restore(path, leave_out):
    """Reads the state as nested dicts of numpy arrays, without the entries `leave_out`."""
    with files.reading(path, DAMAGED), ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        item = {name: tree[name] for name in tree if name not in leave_out}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        return checkpointer.restore(
            path, args=ocp.args.PyTreeRestore(item, restore_args=as_numpy, partial_restore=True)
        )


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
    params = to_published(params, "params")
    adam = renames.adam_to_theirs(opt_state, params, to_published)
    state = {
        "step": np.asarray(step, np.int32),
        "params": params,
        "ema_params": to_published(ema_params, "ema_params"),
        # optax.adamw: Adam, weight decay (no state), the count of the learning rate's schedule.
        "opt_state": [adam, None, {"count": adam["count"]}],
    }
    return write(state, folder)


def write(state, folder):
    """Writes the state of a published code as folder/checkpoint_STEP; see `export`."""
    path = Path(folder).absolute() / f"checkpoint_{int(state['step'])}"
    if path.exists():
        raise FileExistsError(f"{path} is there already: remove it or choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.complete(path) as unfinished, ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(unfinished, state)
    return path


# The map --------------------------------------------------------------------------------------


def _table(patch, labels, head, depths):
    """Returns the table of `renames`.

    Args:
      patch: shape of the patch embedding's kernel, (p, p, c, D).
      labels: rows of the label table.
      head: features of an attention head.
      depths: {stack: blocks}; of v 0 where the network has no such head.
    """
    D, out = patch[-1], int(np.prod(patch[:-1]))
    table = {
        "embedding/x_embedder/kernel": (["x_embedder/proj/kernel"], patch),
        "embedding/x_embedder/bias": (["x_embedder/proj/bias"], (D,)),
        "embedding/y_embedder/embedding": ([LABEL_TABLE], (labels, D)),
    }
    return table | common_table(D, head, D * 8 // 3, out, depths)


def common_table(D, head, features, out, depths):
    """Returns what pixel MeanFlow's table has too: the blocks, the scalars' embedders, the ends."""
    linear = "_flax_linear/kernel"
    layout = {f"embedding/{k}_tokens": ([f"{k}_tokens"], (n, D)) for k, n in PREFIX.items()}
    block = {
        "norm1": (["norm1/kernel"], (D,)),
        "norm2": (["norm2/kernel"], (D,)),
        "attn_scale": (["attn_scale"], (D,)),
        "mlp_scale": (["mlp_scale"], (D,)),
        "attn/q_norm": (["attn/q_norm/kernel"], (head,)),
        "attn/k_norm": (["attn/k_norm/kernel"], (head,)),
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
    for stack, depth in depths.items():
        for ours, (theirs, shape) in block.items() if depth else ():
            layout[f"{stack}/{ours}"] = ([f"{STACKS[stack]}/{name}" for name in theirs], shape)
    return layout


def depths_of(theirs):
    """Counts the blocks of each stack; those of the head of v are whole or not at all."""
    depths = {stack: renames.depth(f"{template}/", theirs) for stack, template in STACKS.items()}
    return depths | {"v_blocks": depths["u_blocks"] if depths["v_blocks"] else 0}


def from_published(tree, where):
    """Turns a published tree into ours."""
    trees.raise_problems(where, left_over=sorted(tree.keys() - {"net"}))
    theirs = _today(trees.flatten(tree.get("net")), where)
    depths = depths_of(theirs)
    if not depths["v_blocks"]:  # what is left of the head is of no use
        theirs = {k: a for k, a in theirs.items() if not k.startswith("v_final_layer/")}
    ndims = {"x_embedder/proj/kernel": 4, LABEL_TABLE: 2, "u_heads_0/attn/q_norm/kernel": 1}
    patch, table, head = renames.shapes_of(theirs, ndims, "an imfDiT", where)
    table = _table(patch, table[0], head[0], depths)
    ours = renames.to_ours(table, depths, theirs, where)
    trees.raise_problems(
        where, misfits=[f"{k} of {a.dtype}" for k, a in theirs.items() if a.dtype != np.float32]
    )
    return trees.unflatten(ours)


def to_published(tree, where):
    """Turns our tree into a published one."""
    ours = trees.flatten(tree)
    depths = {stack: len(ours.get(f"{stack}/norm1", ())) for stack in STACKS}
    ndims = {"embedding/x_embedder/kernel": 4, "embedding/y_embedder/embedding": 2}
    shapes = renames.shapes_of(ours, ndims | {"u_blocks/attn/q_norm": 2}, "an imfDiT", where)
    patch, table, head = shapes
    table = _table(patch, table[0], head[1], depths)
    return {"net": trees.unflatten(renames.to_theirs(table, depths, ours, where))}


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
