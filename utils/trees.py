"""Strict comparison of what weights should be with what a file holds."""

import numpy as np

LONGEST = 200  # characters of names in an error line; the rest is counted


def flatten(tree):
    """Turns a nested dict into {"a/b/c": leaf}; {} for anything else."""
    from flax import traverse_util  # late: it takes as long to import as jax

    return traverse_util.flatten_dict(tree, sep="/") if isinstance(tree, dict) else {}


def check_names(tree, where):
    """Raises ValueError where a name in a nested dict is no text, or a leaf no numbers."""
    stack = [((), tree)]
    while stack:
        path, part = stack.pop()
        entries = part.items() if isinstance(part, dict) else enumerate(part)
        for name, value in entries:
            if isinstance(part, dict) and not isinstance(name, str):
                raise ValueError(f"{where}: the name {str(name)[:40]!r} is no text")
            if isinstance(value, (dict, list, tuple)):
                stack.append(((*path, name), value))
            elif value is not None and np.asarray(value).dtype.kind not in "fiubV":
                place = "/".join(map(str, (*path, name)))
                raise ValueError(f"{where}: {place[:200]} holds no numbers")


def unflatten(arrays):
    """Returns the inverse of `flatten`."""
    from flax import traverse_util

    return traverse_util.unflatten_dict(arrays, sep="/")


def check_shapes(shapes, arrays, where):
    """Holds {name: array} against {name: shape}.

    Raises:
      ValueError: names missing or left over, or arrays of another shape; `where` opens the line.
    """
    raise_problems(
        where,
        missing=sorted(shapes.keys() - arrays.keys()),
        left_over=sorted(arrays.keys() - shapes.keys()),
        misfits=[
            f"{name} {np.shape(arrays[name])} instead of {tuple(shape)}"
            for name, shape in shapes.items()
            if name in arrays and np.shape(arrays[name]) != tuple(shape)
        ],
    )


def check_tree(expected, tree, where):
    """Does `check_shapes` for nested dicts; `expected` has anything with a shape as leaves."""
    shapes = {name: leaf.shape for name, leaf in flatten(expected).items()}
    check_shapes(shapes, flatten(tree), where)


def listed(names):
    """Lists names for an error line, as many as are short enough together, and how many more."""
    names = list(names)
    count = length = 0
    for name in names:
        length += len(name) + 2
        if count and length > LONGEST:
            return f"{', '.join(names[:count])} and {len(names) - count} more"
        count += 1
    return ", ".join(names)


def raise_problems(where, missing=(), left_over=(), misfits=()):
    """Raises ValueError with one line where any of the lists of names is not empty."""
    problems = {"missing": missing, "left over": left_over, "of another shape": misfits}
    parts = []
    for kind, names in problems.items():
        if names:
            parts.append(f"{kind}: {listed(names)}")
    if parts:
        raise ValueError(f"{where}: {'; '.join(parts)}")
