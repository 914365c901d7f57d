"""What a file of weights gives to a run that begins with them: `init_from`.

A reader (formats/sit.py and others) says which arrays it has under our names, and which parameters
its kind of network lacks; `merge` holds that against fresh parameters, and refuses whatever nobody
expected.
"""

from typing import NamedTuple

import numpy as np

from utils import trees


class Start(NamedTuple):
    """A starting point: the arrays of a file under our names, and what the file has not."""

    arrays: dict[str, np.ndarray]
    fresh: tuple[str, ...] = ()  # beginnings of names that begin anew
    zero: tuple[str, ...] = ()  # beginnings of names that begin at zero
    dropped: tuple[str, ...] = ()  # what the file has and we have no use for, for people
    positions: np.ndarray | None = None  # (1, N, D) of the file, to be compared with ours
    entry: str = ""  # of the file, that the arrays are


def merge(fresh, file, label_table, where):
    """Merges the arrays of a file into fresh parameters.

    A label table of another number of classes is new but for its last row, which stands for no
    label in all of them.

    Args:
      fresh: freshly initialised parameters, a nested dict of numpy arrays.
      file: `Start`.
      label_table: name of the table (K + 1, D) in `fresh`.
      where: opens the lines.

    Returns:
      The parameters, a nested dict of numpy float32 arrays, and a line for people.

    Raises:
      ValueError: parameters that are missing, left over or of another shape, all of them by name.
    """
    params, taken, missing, misfits, begun = {}, [], [], [], []
    ours = trees.flatten(fresh)
    for name, array in ours.items():
        has = file.arrays.get(name)
        if has is not None and has.shape == array.shape:
            params[name] = has
            taken.append(name)
        elif has is not None and name == label_table and has.shape[1:] == array.shape[1:]:
            params[name] = np.concatenate([array[:-1], has[-1:]])
            begun.append(f"{name} of {len(array) - 1} classes but for the row of none")
        elif has is not None:
            misfits.append(f"{name} {has.shape} instead of {array.shape}")
        elif name.startswith(tuple(file.zero)):
            params[name] = np.zeros_like(array)
            begun.append(f"{name} (zero)")
        elif name.startswith(tuple(file.fresh)):
            params[name] = array
            begun.append(name)
        else:
            missing.append(name)
    left_over = sorted(file.arrays.keys() - ours.keys())
    trees.raise_problems(
        f"{where}: not the weights of the configured model", missing, left_over, misfits
    )
    source = f" from its entry {file.entry}" if file.entry else ""
    parts = [f"{len(taken)} of {len(ours)} parameters taken{source}"]
    parts += [f"new: {', '.join(begun)}"] if begun else []
    parts += [f"left over: {', '.join(file.dropped)}"] if file.dropped else []
    return trees.unflatten(params), f"{where}: {'; '.join(parts)}"
