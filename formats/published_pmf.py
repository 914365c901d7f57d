"""Checkpoints of the published pixel MeanFlow <-> the parameter tree of models/pmf_dit.py.

The published code (repository pMF, arXiv 2601.22158) writes its state as improved MeanFlow's does
(formats/published_imf.py), with an average for each half-life in thousands of images. No released
file has been opened here: the names are those of the published modules.
"""

import re

import numpy as np

from formats import published_imf
from formats.published_imf import PREFIX, STACKS
from utils import trees

MARK = "x_embedder/proj1/kernel"  # a parameter that improved MeanFlow does not have
TABLE = "y_embedder/embedding_table/embedding"


def find(path):
    """Returns the newest checkpoint of pixel MeanFlow at `path`, itself one or a folder of some."""
    found = published_imf.find(path)
    if found is None:
        return None
    averages = published_imf.structure(found).get("ema_params", {})
    one = averages if "net" in averages else next(iter(averages.values()), {})
    return found if MARK in trees.flatten(one.get("net")) else None


def load(path):
    """Reads a published checkpoint, from `find`; the state of its optimizer is left out.

    Returns:
      {"step": int, "params": tree as in models/pmf_dit.py or None, "ema_params": {half-life in
      thousands of images, text: tree}}, float32 numpy arrays.

    Raises:
      ValueError: one line that names whatever is missing, left over or of another shape.
    """
    state = published_imf.restore(path, leave_out=("opt_state",))
    published_imf.check_entries(state, path)
    params, averages = state.get("params"), state["ema_params"]
    return {
        "step": int(state.get("step", published_imf.NAME.search(str(path))[1])),
        "params": params and from_published(params, f"{path}: params"),
        "ema_params": {
            half_life: from_published(tree, f"{path}: ema_params of {half_life}")
            for half_life, tree in sorted(averages.items(), key=lambda item: float(item[0]))
        },
    }


def _layout(arrays, depths, where):
    """{our parameter: (published parameters, shape of each)}; "{}" stands for the block."""
    known = {name: np.shape(arrays.get(name)) for name in (MARK, TABLE, "pos_embed")}
    w1, head = "u_heads_0/mlp/w1/_flax_linear/kernel", "u_heads_0/attn/q_norm/kernel"
    known |= {name: np.shape(arrays.get(name)) for name in (w1, head)}
    misshapen = [n for n, ndim in zip(known, (4, 3, 3, 2, 1), strict=True) if len(known[n]) != ndim]
    if misshapen:
        raise ValueError(f"{where}: not a pmfDiT: missing or misshapen: {', '.join(misshapen)}")
    patch, (_, labels, D), tokens = known[MARK], known[TABLE], known["pos_embed"][1]
    out, bottleneck = int(np.prod(patch[:-1])), patch[-1]
    layout = {
        "embedding/x_embedder/kernel": ([MARK], patch),
        "embedding/x_embedder/bias": (["x_embedder/proj1/bias"], (bottleneck,)),
        "embedding/x_embedder2/kernel": (["x_embedder/proj2/kernel"], (1, 1, bottleneck, D)),
        "embedding/x_embedder2/bias": (["x_embedder/proj2/bias"], (D,)),
        "embedding/y_embedder/embedding": ([TABLE], (1, labels, D)),
        "embedding/positions": (["pos_embed"], (1, tokens, D)),
    }
    for name, number in PREFIX.items():
        layout[f"embedding/{name}_tokens"] = ([f"{name}_tokens"], (1, number, D))
    block, ends = published_imf.common_layout(D, known[head], known[w1][1], out, depths)
    for stack, depth in depths.items():
        for i in range(depth):
            for ours, (theirs, shape) in block.items():
                names = [f"{STACKS[stack].format(i)}/{name}" for name in theirs]
                layout[f"{stack}/{i}/{ours}"] = (names, shape)
    return layout | ends


def from_published(tree, where):
    """Brings a published tree into the form of ours; strict as `published_imf.from_published`."""
    trees.raise_problems(where, left_over=sorted(tree.keys() - {"net"}))
    theirs = trees.flatten(tree.get("net"))
    depths = {}
    for stack, template in STACKS.items():
        matches = [re.match(template.format(r"(\d+)") + "/", name) for name in theirs]
        depths[stack] = len({match[1] for match in matches if match})
    depths["v_blocks"] = depths["u_blocks"] if depths["v_blocks"] else 0
    layout = _layout(theirs, depths, where)
    shapes = {name: shape for names, shape in layout.values() for name in names}
    trees.check_shapes(shapes, theirs, where)
    ours, stacks = {}, {}
    for name, (names, shape) in layout.items():
        arrays = [np.asarray(theirs[source], np.float32) for source in names]
        array = arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=-2)
        if len(shape) == 3:
            array = array[0]
        stack, _, rest = name.partition("/")
        if stack in STACKS:
            number, _, rest = rest.partition("/")
            stacks.setdefault(f"{stack}/{rest}", []).append(array)
        else:
            ours[name] = array
    return trees.unflatten(ours | {name: np.stack(arrays) for name, arrays in stacks.items()})


def to_published(tree, where):
    """Brings a tree of ours into the published form."""
    ours = trees.flatten(tree)
    depths = {stack: len(ours.get(f"{stack}/norm1", ())) for stack in STACKS}
    sizes = {
        MARK: ours.get("embedding/x_embedder/kernel"),
        TABLE: np.asarray(ours.get("embedding/y_embedder/embedding"))[None],
        "pos_embed": np.asarray(ours.get("embedding/positions"))[None],
        "u_heads_0/mlp/w1/_flax_linear/kernel": ours["u_blocks/mlp/w13/kernel"][0, :, 0],
        "u_heads_0/attn/q_norm/kernel": ours["u_blocks/attn/q_norm"][0],
    }
    theirs = {}
    for name, (names, shape) in _layout(sizes, depths, where).items():
        stack, _, rest = name.partition("/")
        if stack in STACKS:
            number, _, rest = rest.partition("/")
            array = np.asarray(ours[f"{stack}/{rest}"])[int(number)]
        else:
            array = np.asarray(ours[name])
        parts = [array] if len(names) == 1 else np.moveaxis(array, -2, 0)
        theirs |= {
            source: np.reshape(part, shape) for source, part in zip(names, parts, strict=True)
        }
    return {"net": trees.unflatten(theirs)}
