"""Checkpoints of the published pixel MeanFlow <-> the parameter tree of models/pmf_dit.py.

The published code (repository pMF, arXiv 2601.22158) writes its state as improved MeanFlow's does
(formats/published_imf.py), with an average for each half-life in thousands of images. No released
file has been opened here: the names are those of the published modules.
"""

import jax
import numpy as np
import optax

from formats import published_imf, renames
from formats.published_imf import PREFIX, STACKS
from utils import moments, trees

MARK = "x_embedder/proj1/kernel"  # a parameter that improved MeanFlow does not have
TABLE = "y_embedder/embedding_table/embedding"
W1, HEAD = "u_heads_0/mlp/w1/_flax_linear/kernel", "u_heads_0/attn/q_norm/kernel"


def find(path):
    """Returns the newest checkpoint of pixel MeanFlow at `path`, itself one or a folder of some."""
    checkpoint = published_imf.find(path)
    if checkpoint is None:
        return None
    averages = published_imf.structure(checkpoint).get("ema_params", {})
    one = averages if "net" in averages else next(iter(averages.values()), {})
    return checkpoint if MARK in trees.flatten(one.get("net")) else None


def is_ours(tree):
    """Tells whether a tree is one of models/pmf_dit.py."""
    return "embedding/positions" in trees.flatten(tree)


def load(path, optimizer=True):
    """Reads a published checkpoint, from `find`.

    Args:
      optimizer: whether to read the moments of Muon and Adam too.

    Returns:
      {"step": int, "params": tree as in models/pmf_dit.py or None, "ema_params": {half-life in
      thousands of images, text: tree}, "opt_state": see utils/moments.py, or None}, float32 numpy
      arrays.

    Raises:
      ValueError: one line that names whatever is missing, left over or of another shape.
    """
    state = published_imf.restore(path, leave_out=() if optimizer else ("opt_state",))
    published_imf.check_entries(state, path)
    params, averages = state.get("params"), state["ema_params"]
    found = moments.find(state.get("opt_state"))
    return {
        "step": int(state.get("step", published_imf.NAME.search(str(path))[1])),
        "params": params and from_published(params, f"{path}: params"),
        "ema_params": {
            half_life: from_published(tree, f"{path}: ema_params of {half_life}")
            for half_life, tree in sorted(averages.items(), key=lambda item: float(item[0]))
        },
        "opt_state": found and _moved(found, from_published, f"{path}: opt_state"),
    }


def export(params, ema_params, step, folder, opt_state=None):
    """Writes folder/checkpoint_STEP as the published code does; returns its path.

    Args:
      params: tree as in models/pmf_dit.py.
      ema_params: {half-life, text: tree}.
      opt_state: see utils/moments.py; where it is none of Muon's, a fresh state is written.

    Raises:
      FileExistsError, ValueError: see `published_imf.export`.
    """
    params = to_published(params, "params")
    # Its optimizer goes by the number of axes, which here tells matrices from everything else.
    fresh = optax.contrib.muon(optax.constant_schedule(1e-3), adam_b2=0.95).init(params)
    put = opt_state and moments.put(fresh, _moved(opt_state, to_published, "opt_state"))
    state = {"step": np.asarray(step, np.int32), "params": params, "opt_state": put or fresh}
    state["ema_params"] = {
        half_life: to_published(tree, f"ema_params of {half_life}")
        for half_life, tree in ema_params.items()
    }
    return published_imf.write(jax.device_get(state), folder)


def _moved(found, convert, where):
    """Brings moments into another form; a second one that Muon lacks is not a number meanwhile."""
    mu, nu = found["mu"], found["nu"]
    nu = jax.tree.map(lambda m, n: np.full_like(m, np.nan) if n is None else n, mu, nu)
    mu, nu = convert(mu, f"{where}: mu"), convert(nu, f"{where}: nu")
    nu = jax.tree.map(lambda n: None if np.isnan(n).all() else n, nu)
    return {"count": np.asarray(found["count"], np.int32), "mu": mu, "nu": nu}


def _table(arrays, names, depths, where):
    """Returns the table of `renames`; five arrays of these names tell the size of the network."""
    ndims = dict(zip(names, (4, 3, 3, 2, 1), strict=True))
    patch, (_, labels, D), (_, tokens, _), w1, (head,) = renames.shapes_of(
        arrays, ndims, "a pmfDiT", where
    )
    out, bottleneck = int(np.prod(patch[:-1])), patch[-1]
    table = {
        "embedding/x_embedder/kernel": ([MARK], patch),
        "embedding/x_embedder/bias": (["x_embedder/proj1/bias"], (bottleneck,)),
        "embedding/x_embedder2/kernel": (["x_embedder/proj2/kernel"], (1, 1, bottleneck, D)),
        "embedding/x_embedder2/bias": (["x_embedder/proj2/bias"], (D,)),
        "embedding/y_embedder/embedding": ([TABLE], (1, labels, D)),
        "embedding/positions": (["pos_embed"], (1, tokens, D)),
    }
    table |= published_imf.common_table(D, head, w1[1], out, depths)
    for name in (f"embedding/{name}_tokens" for name in PREFIX):
        table[name] = (table[name][0], (1, *table[name][1]))
    return table


def from_published(tree, where):
    """Turns a published tree into ours; strict as `published_imf.from_published`."""
    trees.raise_problems(where, left_over=sorted(tree.keys() - {"net"}))
    theirs = trees.flatten(tree.get("net"))
    depths = published_imf.depths_of(theirs)
    table = _table(theirs, (MARK, TABLE, "pos_embed", W1, HEAD), depths, where)
    ours = renames.to_ours(table, depths, theirs, where)
    for name, (names, shape) in table.items():
        if len(shape) == 3:
            ours[name] = ours[name][0]
        elif len(names) > 1:  # beside each other on an axis of their own
            ours[name] = ours[name].reshape(*ours[name].shape[:-1], len(names), -1)
    return trees.unflatten(ours)


def to_published(tree, where):
    """Turns our tree into a published one."""
    ours = trees.flatten(tree)
    depths = {stack: len(ours.get(f"{stack}/norm1", ())) for stack in STACKS}
    for name, array in ours.items():
        if name.endswith(("qkv/kernel", "w13/kernel")):
            ours[name] = np.reshape(array, (*array.shape[:-2], -1))
        elif name.endswith(("_tokens", "positions", "y_embedder/embedding")):
            ours[name] = array[None]
    kernel, embedding = "embedding/x_embedder/kernel", "embedding/y_embedder/embedding"
    w1, head = np.split(ours["u_blocks/mlp/w13/kernel"][0], 2, axis=-1)[0], "u_blocks/attn/q_norm"
    sizes = ours | {W1: w1, HEAD: ours[head][0]}
    table = _table(sizes, (kernel, embedding, "embedding/positions", W1, HEAD), depths, where)
    return {"net": trees.unflatten(renames.to_theirs(table, depths, ours, where))}
