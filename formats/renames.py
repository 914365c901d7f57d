"""Gives a network's parameters other names, by a table, in both directions.

A table maps each of our names to (their names, shape of each). Several arrays of theirs are joined
along the last axis. Where `depths` has the first part of a name of ours, it stands for that many
blocks: ours are stacked along a leading axis, theirs have their number in the place of "{}".
"""

import re

import jax
import numpy as np

from utils import trees


def shapes_of(arrays, ndims, kind, where):
    """Returns the shapes of the arrays that tell the size of a network, in the order of `ndims`.

    Args:
      arrays: {name: array}; ndims: {name: number of axes}.
      kind: what they should be, with its article.

    Raises:
      ValueError: one is absent or has other axes.
    """
    shapes = {name: np.shape(arrays.get(name)) for name in ndims}
    if wrong := [name for name, ndim in ndims.items() if len(shapes[name]) != ndim]:
        raise ValueError(f"{where}: not {kind}: missing or misshapen: {', '.join(wrong)}")
    return list(shapes.values())


def depth(template, names):
    """Counts blocks: one more than the largest number in names that begin as `template`."""
    matches = [re.match(template.format(r"(\d+)"), name) for name in names]
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def to_ours(table, depths, theirs, where):
    """Returns {our name: float32 array} of {their name: array}.

    Raises:
      ValueError: a name missing or left over, or an array of another shape, after `where`.
    """
    shapes = {
        name: shape
        for ours, (templates, shape) in table.items()
        for names in _names(ours, templates, depths)
        for name in names
    }
    trees.check_shapes(shapes, theirs, where)
    arrays = {}
    for ours, (templates, _) in table.items():
        blocks = [
            np.concatenate([np.asarray(theirs[name], np.float32) for name in names], axis=-1)
            for names in _names(ours, templates, depths)
        ]
        arrays[ours] = np.stack(blocks) if _stack(ours) in depths else blocks[0]
    return arrays


def to_theirs(table, depths, ours, where):
    """Inverts `to_ours`; raises as it does."""
    shapes = {}
    for name, (templates, shape) in table.items():
        stacked = (depths[_stack(name)],) if _stack(name) in depths else ()
        shapes[name] = (*stacked, *shape[:-1], len(templates) * shape[-1])
    trees.check_shapes(shapes, ours, where)
    arrays = {}
    for name, (templates, _) in table.items():
        array = np.asarray(ours[name], np.float32)
        blocks = array if _stack(name) in depths else [array]
        for names, block in zip(_names(name, templates, depths), blocks, strict=True):
            arrays |= zip(names, np.split(block, len(names), axis=-1), strict=True)
    return arrays


def _stack(name):
    return name.partition("/")[0]


def _names(ours, templates, depths):
    """Lists their names for one of ours: a list for each block."""
    if _stack(ours) not in depths:
        return [templates]
    return [[t.format(i) for t in templates] for i in range(depths[_stack(ours)])]


# Adam -----------------------------------------------------------------------------------------

MOMENTS = ("mu", "nu")


def adam_to_ours(opt_state, convert, where, beside=()):
    """Returns {"count": int32 (), "mu": tree, "nu": tree} of a stored optax.adamw, or None.

    Args:
      opt_state: a list, a dict with "0", "1", ... for one, or nothing.
      convert: function (their tree, where) -> ours.
      beside: names that the entries behind Adam's may have; they are left out.

    Raises:
      ValueError: it is none.
    """
    if isinstance(opt_state, list):
        opt_state = {str(i): entry for i, entry in enumerate(opt_state)}
    if not opt_state:
        return None
    adam = (opt_state.get("0") or {}) if isinstance(opt_state, dict) else None
    if not isinstance(adam, dict):
        raise ValueError(f"{where}: not the state of Adam")
    trees.raise_problems(
        where,
        missing=[f"0/{k}" for k in ("count", *MOMENTS) if k not in adam],
        left_over=[f"0/{k}" for k in adam if k not in ("count", *MOMENTS)]
        + [
            name
            for name, entry in opt_state.items()
            if name != "0" and entry and not (isinstance(entry, dict) and {*entry} <= {*beside})
        ],
    )
    count = np.int32(steps(adam["count"], f"{where}/0/count"))
    return {"count": count} | {k: convert(adam[k], f"{where}/0/{k}") for k in MOMENTS}


def adam_to_theirs(opt_state, params, convert):
    """Inverts `adam_to_ours`: Adam's entry alone; a fresh one for their tree `params` of None."""
    if opt_state is None:  # the published code restores nothing less
        zeros = jax.tree.map(np.zeros_like, params)
        return {"count": np.zeros((), np.int32)} | dict.fromkeys(MOMENTS, zeros)
    moments = {k: convert(opt_state[k], f"opt_state.{k}") for k in MOMENTS}
    return {"count": np.asarray(opt_state["count"], np.int32)} | moments


def steps(value, where):
    """Returns a stored number of steps as an int, or raises ValueError."""
    value = np.asarray(value)
    if value.size != 1 or value.dtype.kind not in "iu" or not 0 <= value.item() < 2**31:
        raise ValueError(f"{where} is {str(value)[:60]}, not a number of steps")
    return int(value.item())
