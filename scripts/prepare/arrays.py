"""Latents in NumPy's files, `.npy` and `.npz`, with their labels beside them -> records.

Three layouts; splits are told by a word in the path, as in `labels.by_split`:

- `NAME.npz`, which holds the latents and `labels`
- `latents.npy` (N, ...) and `labels.npy` (N,), or any number of such pairs: the path of the labels
  is that of the latents with the word replaced (`imagenet256_features/0.npy` has its labels in
  `imagenet256_labels/0.npy`)
- `dataset.json`, {"labels": [[FILE, LABEL], ...]}, and each FILE a `.npy` of one latent, as EDM2
  and REPA write them
"""

import collections
import json
import threading
from pathlib import Path

import numpy as np

from scripts.prepare import labels, latents, manifest
from utils import files, npy, pictures

WORDS = ("moments", "samples", "latents", "features")  # what latents are called
LABELS = "labels"
INDEX = "dataset.json"
OPEN = 8  # files at a time; a `.npz` is in memory as a whole


def run(args):
    """The job behind `prepare_dataset arrays`; returns whether the records are complete."""
    root, listing = Path(args.input), pictures.Listing()
    if root.is_file():
        root, only = root.parent, root.name
    else:
        only = None
    found = list_records(root, listing, args.splits, only)
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in found.items())
    print(f"{args.input}: {counts} latents{f'; {listing}' if str(listing) else ''}", flush=True)

    def where(split, i):
        return _where(root, *found[split][i][:2])

    classes, numbers = labels.settle(
        {split: [label for *_, label in rows] for split, rows in found.items()},
        where, args.num_classes,
    )  # fmt: skip
    arrays = Arrays(root)
    (split, rows), *_ = found.items()
    look = [arrays.record(*row[:2]) for row in rows[:: -(-len(rows) // latents.LOOKED_AT)]]
    form = latents.form(args, look, where(split, 0), f"{rows[0][0]} {arrays.key(rows[0][0])}")
    items = {
        split: [
            (name, row, label) for (name, row, _), label in zip(rows, numbers[split], strict=True)
        ]
        for split, rows in found.items()
    }

    def read(item):
        name, row, label = item
        return _where(root, name, row), form(arrays.record(name, row)), label

    names = {split: [f"{name} {row}" for name, row, _ in rows] for split, rows in items.items()}
    settings = {"source": "arrays", "labels": labels.digest(numbers)} | form.settings()
    return latents.write(args, classes, items, names, read, settings)


def _where(root, name, row):
    return str(root / name) if row is None else f"{root / name}, record {row}"


# The files


def list_records(root, listing, chosen=(), only=None):
    """{split: [(file below root, row in it, label)]}; the row is None where the file is one record.

    Args:
      listing: counts what is left out.
      chosen: the splits that are wanted; () for all.
      only: name of the one file in `root` that is meant.

    Raises:
      FileNotFoundError, or ValueError: no latents, no labels, or numbers that do not fit.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of latents, and no file, at {root}")
    paths = [*root.glob(INDEX), *sorted(root.glob(f"*/{INDEX}"))]
    names = [path.relative_to(root).as_posix() for path in paths]
    read = _of_index
    if only or not names:
        paths = pictures.below(root, listing, (".npy", ".npz"))
        there = {path.relative_to(root).as_posix() for path in paths}
        names = [only] if only else [n for n in sorted(there) if _is_latents(root, n, listing)]
        read = lambda root, name: _of_file(root, name, there)  # noqa: E731
    if not names:
        raise ValueError(
            f"no latents in {root}: looked for {INDEX}, NAME.npz, or pairs of .npy files such as "
            f"latents.npy and labels.npy{f'; {listing}' if str(listing) else ''}"
        )
    manifest.check_configs(root)
    found = labels.by_split(names, chosen)
    rows = {}
    for split, of_split in found.items():
        of_name = {name: read(root, name) for name in of_split}
        manifest.check_versions(root, [(n, y) for n, of in of_name.items() for *_, y in of])
        rows[split] = [row for of in of_name.values() for row in of]
    return rows


def _word(name):
    """What the latents are called in a path, the last of such words; "" in that of labels."""
    word = max((LABELS, *WORDS), key=name.rfind)
    return word if word != LABELS else ""


def _is_latents(root, name, listing):
    if name.endswith(".npz") or _word(name):
        return True
    if LABELS not in name:
        listing.leave_out(f"with none of {', '.join(WORDS)} in their name", root / name)
    return False


def _of_file(root, name, there):
    """The records of a `.npz`, or of one of the files `there` and that of its labels."""
    path = root / name
    if name.endswith(".npz"):
        return _rows(name, *_read_npz(path), path)
    word = _word(name) or name
    beside = LABELS.join(name.rsplit(word, 1))
    if word == name or beside not in there:
        place = root / (f"{LABELS}.npy" if word == name else beside)
        raise ValueError(f"{path} has no labels: {place} is expected to hold them")
    with files.reading(root / beside, "not an array of labels"):
        of_file = npy.mapped(root / beside)
    with files.reading(path, "not an array of latents"):
        shape = npy.mapped(path).shape
    return _rows(name, shape, of_file, path)


def _rows(name, shape, found, path):
    """One entry for each record of a file, where its latents and labels fit together."""
    found = found.reshape(-1) if found.ndim == 2 and 1 in found.shape else found
    if len(shape) != 4 or found.shape[:1] != shape[:1] or found.ndim > 2:  # 2: one-hot
        raise ValueError(
            f"{path}: latents {shape} and labels {found.shape} do not fit together: they are "
            "(N, h, w, c) or (N, c, h, w), and (N,)"
        )
    if found.dtype.kind not in "iufU":
        raise ValueError(f"{path}: labels of {found.dtype}, neither whole numbers nor names")
    return [
        (name, i, labels.read(f"{path}, record {i}", label))
        for i, label in enumerate(found.tolist())
    ]


def _read_npz(path):
    """Shape of the latents, and the labels, of a `.npz`; the latents stay where they are."""
    with files.reading(path, "not a .npz of latents and labels"):
        key = _key(path, npy.names(path))
        return npy.header_of_member(path, key)[0], npy.member(path, LABELS)


def _key(path, names):
    """What the latents are called in a `.npz`."""
    keys = [name for name in names if name in WORDS]
    if len(keys) != 1 or LABELS not in names:
        raise ValueError(
            f"holds {', '.join(names) or 'nothing'}, not '{LABELS}' and one of {', '.join(WORDS)}"
        )
    return keys[0]


def _of_index(root, name):
    """The records of a `dataset.json`."""
    path = root / name
    with files.reading(path, "not an index of records"):
        entries = json.loads(path.read_text())["labels"]
        if not entries:
            raise ValueError("it has no labels")
        pairs = [(str(file), label) for file, label in entries]
    rows = []
    for file, label in pairs:
        if not (path.parent / file).is_file():
            raise ValueError(f"{path} names {file}, which is not there")
        below = (path.parent / file).relative_to(root).as_posix()
        rows.append((below, None, labels.read(f"{path}, {file}", label)))
    return rows


class Arrays:
    """The latents of files below `root`; the latest few stay open. For several threads."""

    def __init__(self, root):
        self._root, self._lock = root, threading.Lock()
        self._open = collections.OrderedDict()

    def key(self, name):
        """What the latents of a `.npz` are called in it; "" for others."""
        path = self._root / name
        if not name.endswith(".npz"):
            return ""
        return _key(path, npy.names(path))

    def record(self, name, row):
        """One record, as it is in the file; `row` None: the file is one."""
        with self._lock:
            if name not in self._open:
                self._open[name] = self._load(name)
                if len(self._open) > OPEN:
                    self._open.popitem(last=False)
            array = self._open[name]
        with files.reading(self._root / name, "damaged"):
            found = np.array(array if row is None else array[row])
        return latents.checked(_where(self._root, name, row), found)

    def _load(self, name):
        path = self._root / name
        with files.reading(path, "not an array of numbers, or damaged"):
            return npy.member(path, self.key(name)) if name.endswith(".npz") else npy.mapped(path)
