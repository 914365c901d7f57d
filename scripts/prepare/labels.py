"""What the labels of other people's records and the names of their files say: classes, splits."""

import itertools
import os
import re

import numpy as np

from scripts.prepare import shards

# Words in the names of files and folders, as they are in use -> our splits.
SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
KEYS = ("label", "labels", "cls", "class")  # what people call a column of labels
SHOWN = 5  # labels in a line
# How str() writes a whole number: 3, 3.0, tensor(3), np.float32(3.0), b'3', [3].
WRAPPED = re.compile(
    r"(?:tensor|array|Array|(?:np|numpy|jnp|torch)\.\w+)\((.*?)(?:, *(?:device|dtype)=.*)?\)"
    r"|b'(.*)'"
)


def by_split(names, chosen=(), said=None):
    """Sorts relative paths by split, by a word such as `train` in the file's name, or else in
    that of a folder above it; train where there is none. Train comes first, then val, then test.

    Args:
      chosen: the splits that are wanted; () for all.
      said: {name: split} where the set itself tells it.

    Raises:
      ValueError: a split is chosen that is not there.
    """
    of_split = {split: [] for split in dict.fromkeys(SPLITS.values())}
    for name in names:
        words = [re.split(r"[^a-z]+", part.lower()) for part in reversed(name.split("/"))]
        known = [SPLITS[word] for word in itertools.chain(*words) if word in SPLITS]
        split = (said or {}).get(name) or (known[0] if known else "train")
        of_split.setdefault(SPLITS.get(split, split), []).append(name)
    of_split = {split: names for split, names in of_split.items() if names}
    if unknown := [split for split in chosen if split not in of_split]:
        raise ValueError(f"--splits: no '{unknown[0]}', only {', '.join(of_split)}")
    return {split: of_split[split] for split in chosen or of_split}


def read(where, value):
    """Reads one label as it stands in a file: an int, or the name of a class, str.

    A number may be written as str() of any library does it, or as a vector of one 1 among zeros.

    Raises:
      ValueError: anything else, in a line that begins with `where`.
    """
    if isinstance(value, str):
        text = value.strip()
        wrapped = WRAPPED.fullmatch(text)
        inner = text if wrapped is None else wrapped[1] or wrapped[2] or ""
        if number := re.fullmatch(r"\[?\s*(-?\d+)(?:\.0*)?\s*\]?", inner):
            return int(number[1])
        if wrapped or not text:
            raise ValueError(f"{where}: the label {value!r} is no whole number and no name")
        return text
    if isinstance(value, (list, np.ndarray)) and len(value) > 1:
        array = np.asarray(value)
        if array.dtype.kind in "iufb" and sorted(array.tolist()) == [0] * (len(array) - 1) + [1]:
            return int(array.argmax())
    return whole_number(where, value)


def whole_number(where, label):
    """Reads a label as int; ValueError where it is no whole number."""
    value = np.asarray(label) if np.isscalar(label) or isinstance(label, np.ndarray) else None
    if value is None or value.size != 1 or value.dtype.kind not in "iuf" or value.item() % 1 != 0:
        text = " ".join(repr(label).split())[:60]
        raise ValueError(f"{where}: 'label' is {text}, not a whole number")
    return int(value.item())


def of_folders(tree, endings, without=False):
    """Reads labels off SPLIT/CLASS/ or CLASS/: {split: [(file, class folder or None)]}.

    Args:
      endings: of the files that count.
      without: whether to take no classes, whatever the folders.

    Raises:
      ValueError: files beside class folders, or in deeper ones.
    """
    names = [name for name in tree.names if name.lower().endswith(endings)]
    above = os.path.commonpath(names) if len(names) > 1 else ""
    above = (
        "/".join(above.split("/")[: min(name.count("/") for name in names) - 1]) if above else ""
    )
    start = len(above) + 1 if above and above not in SPLITS else 0  # of a .zip of one folder
    first = {name[start:].split("/")[0] for name in names if "/" in name[start:]}
    if not first & {"train", "training"}:
        first = set()  # of classes
    rows_of = {}
    for name in names:
        top, _, rest = name[start:].partition("/")
        split, path = (SPLITS.get(top), rest) if first else ("train", name[start:])
        if split is not None:
            rows_of.setdefault(split, []).append((name, path.rpartition("/")[0] or None))
    if without:
        return {split: [(name, None) for name, _ in rows] for split, rows in rows_of.items()}
    for rows in rows_of.values():
        for name, folder in rows:
            if (folder is None) != (rows[0][1] is None) or "/" in (folder or ""):
                raise ValueError(
                    f"{tree.where(name)} lies not in a class folder as others do; --labels=none "
                    "goes without classes"
                )
    return rows_of


def numbered(rows_of, args, where, names=()):
    """Numbers the labels of {split: [(name, label as `read` gives it)]}: (classes, the same).

    Args:
      args: `splits`, those that are wanted, and `num_classes`.
      where: function of a name -> its place, for people.
      names: what the classes are called, in their order, where the set says that.
    """
    splits = getattr(args, "splits", ())
    if unknown := [split for split in splits if split not in rows_of]:
        raise ValueError(f"--splits: no '{unknown[0]}', only {', '.join(rows_of)}")
    order = [*dict.fromkeys(SPLITS.values()), *rows_of]
    chosen = splits or [split for split in dict.fromkeys(order) if split in rows_of]
    rows_of = {split: rows_of[split] for split in chosen}
    classes, numbers = settle(
        {split: [label for _, label in rows] for split, rows in rows_of.items()},
        lambda split, i: where(rows_of[split][i][0]),
        args.num_classes,
        names,
    )
    return classes, {
        split: [(name, y) for (name, _), y in zip(rows, numbers[split], strict=True)]
        for split, rows in rows_of.items()
    }


def settle(labels_of, where, num_classes=None, names=()):
    """Numbers labels, as `read` gives them: (classes, {split: [int]}).

    Numbers have to be 0, 1, ... without a hole in the first split, unless `num_classes` or `names`
    say how many there are; names of classes are numbered in their order as text; where all are None
    there are 0 classes.

    Args:
      labels_of: {split: [int, str or None]}.
      where: function (split, index) -> whose label it is, for people.
      num_classes: how many there are; names: what they are called, in their order.

    Returns:
      classes: their names, or their number; see `shards.Job`.

    Raises:
      ValueError: no records; labels of both kinds, out of range, or with holes; names the record.
    """
    if empty := [split for split, of_split in labels_of.items() if not of_split]:
        raise ValueError(f"no records in the split '{empty[0]}'; --splits chooses others")
    words = {int: "a number", str: "a name", type(None): "none"}
    kind = type(next(iter(labels_of.values()))[0])
    for split, i, label in _each(labels_of):
        if type(label) is not kind:
            other = words[type(label)]
            raise ValueError(
                f"{where(split, i)}: label {label!r} is {other}, the first is {words[kind]}"
            )
    if kind is type(None):
        return 0, labels_of
    if kind is str:
        names, number = _numbered(labels_of, where)
    else:
        number = None
    if names and num_classes not in (None, len(names)):
        raise ValueError(f"there are {len(names)} names of classes; --num_classes={num_classes}")
    if number is not None:
        return names, {split: [number[y] for y in labels] for split, labels in labels_of.items()}
    _check_range(labels_of, where, len(names) or num_classes)
    return names or num_classes or 1 + max(map(max, labels_of.values())), labels_of


def digest(items):
    """Returns what stands for the labels of {split: [(name, int)]}, for the settings of a job."""
    return {split: shards.digest(str(y) for _, y in rows) for split, rows in items.items()}


def _each(labels_of):
    return (
        (split, i, label) for split, labels in labels_of.items() for i, label in enumerate(labels)
    )


def _numbered(labels_of, where):
    """Returns names of classes, those of the first split, and {name: label}."""
    names = sorted(set(next(iter(labels_of.values()))))
    number = {name: i for i, name in enumerate(names)}
    for split, i, name in _each(labels_of):
        if name not in number:
            raise ValueError(f"{where(split, i)}: no such class in the first split: '{name}'")
    return names, number


def _check_range(labels_of, where, count):
    """Raises ValueError for labels that are not of 0..count-1, or where None says how many there
    are, for numbers of which the first split has none."""
    for split, i, label in _each(labels_of):
        if not 0 <= label < (count or label + 1):
            allowed = f"labels are 0..{count - 1}" if count else "labels begin at 0"
            hint = "; is this split without labels? --splits leaves it out" if label == -1 else ""
            raise ValueError(f"{where(split, i)}: label {label}; {allowed}{hint}")
    first, there = next((split, set(labels)) for split, labels in labels_of.items())
    total = count or 1 + max(map(max, labels_of.values()))
    if missing := total - len(there):
        some = list(itertools.islice((y for y in range(total) if y not in there), SHOWN))
        line = f"{missing} of the labels 0..{total - 1} have no record in '{first}'"
        line = f"{line}: {', '.join(map(str, some))}{', ...' if missing > SHOWN else ''}"
        if not count:
            raise ValueError(f"{line}; --num_classes={total} says that this is meant")
        print(line, flush=True)
