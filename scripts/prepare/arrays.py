"""Latents in files of many rows with their labels beside them: `.npy`, `.npz`, safetensors, HDF5.

- `NAME.npz`, `.safetensors` or `.hdf5`, which holds the latents and `labels`
- `latents.npy` (N, ...) and `labels.npy` (N,), or any number of such pairs: the path of the labels
  is that of the latents with the word replaced (`imagenet256_features/0.npy` has its labels in
  `imagenet256_labels/0.npy`)

Latents of the mirrored images are called the same with `_flip` behind. Splits are told by a word in
the path, as in `labels.by_split`.
"""

import collections
import functools
import re
import threading
import types

from formats import caches
from scripts.prepare import cache_items, labels, latents, manifest, trees
from utils import files, npy, pictures

WORDS = ("moments", "samples", "latents", "features")  # what latents are called
LABELS, FLIP = "labels", "_flip"
BINARY = (".npz", ".safetensors", ".hdf5", ".h5")
OPEN = 8  # files at a time
FAST_DIT = re.compile(r".*features/\d+\.npy")


def run(args):
    """Runs `prepare_dataset arrays`; returns whether the records are complete."""
    root, listing = files.local(args.input), pictures.Listing()
    args.labels = "auto"
    if root.is_dir() or root.suffix == ".zip":
        manifest.check_configs(root)
        tree = trees.open_tree(root, listing, (".npy", ".npz", "dataset.json"))
        if root.is_file() or any(name.endswith("dataset.json") for name in tree.names):
            return latents.bring(args, cache_items.of_tree(tree, args, listing), listing)
        cache = of_rows(root, tree.names, listing)
    elif root.is_file():
        cache = of_file(root, listing)
    else:
        raise FileNotFoundError(f"no folder of latents, and no file, at {root}")
    return latents.bring(args, cache._replace(content=None, scaled=False), listing)


def of_file(path, listing):
    """Returns the `Cache` of one file, whose labels may lie in another one beside it."""
    beside = [p.name for p in path.parent.iterdir() if p.name.endswith(".npy")]
    return of_rows(path.parent, [*beside, path.name], listing, only=path.name)


def of_rows(root, names, listing, only=None):
    """Returns the `Cache` of files `names` below `root`.

    Args:
      listing: counts what is left out.
      only: the name of the one that is meant.

    Raises:
      ValueError: no latents, no labels, or numbers that do not fit.
    """
    there = set(names)
    chosen = [only] if only else [n for n in sorted(there) if _is_latents(root, n, there, listing)]
    if not chosen:
        raise ValueError(
            f"no latents in {root}: looked for dataset.json, NAME.npz, or pairs of .npy files such "
            f"as latents.npy and labels.npy{listing}"
        )
    opened, rows = Arrays(root, there), {}
    for split, of_split in labels.by_split(chosen).items():
        of_name = {name: opened.rows(name) for name in of_split}
        manifest.check_versions(root, [(n, y) for n, of in of_name.items() for _, y in of])
        rows[split] = [row for of in of_name.values() for row in of]
    title, content, scaled, first = "arrays of latents with labels", None, False, chosen[0]
    if first.endswith(".safetensors"):
        title, content = "LightningDiT's cache: safetensors", "samples"
    elif first.endswith((".hdf5", ".h5")):
        title, content = "SoFlow's cache: HDF5", "moments"
    elif FAST_DIT.fullmatch(first):
        title, content, scaled = "fast-DiT's cache: one .npy an image", "samples", True
    elif "moments" in (opened.key(first), _word(first)):
        content = "either"
    return latents.Cache(
        title, rows, opened.item, opened.where, {"source": "arrays"}, content, scaled,
        name=f"{first} {opened.key(first)}", foreign=content == "either", fetch=opened.beside,
    )  # fmt: skip


def _word(name):
    """Finds the last word in a path that latents are called by; "" in that of labels."""
    word = max((LABELS, *WORDS), key=name.rfind)
    return word if word != LABELS else ""


def _is_latents(root, name, there, listing):
    if name.endswith(f"{FLIP}.npy"):
        if name.replace(f"{FLIP}.npy", ".npy") not in there:
            raise ValueError(
                f"{root / name} is of mirrored images, and {FLIP[1:]}less it is not there"
            )
        return False
    if name.endswith(BINARY) or _word(name):
        return True
    if LABELS not in name:
        listing.leave_out(f"with none of {', '.join(WORDS)} in their name", root / name)
    return False


class Arrays:
    """The latents of files below `root`; the latest few stay open. For several threads."""

    def __init__(self, root, there):
        self._root, self._there, self._lock = root, there, threading.Lock()
        self._open = collections.OrderedDict()
        self._whole = functools.lru_cache(OPEN)(self._columns)

    def where(self, key):
        """Returns the place of a record (file, row), for people."""
        return f"{self._root / key[0]}, record {key[1]}"

    def rows(self, name):
        """Returns [((file, row), label)] of a file, where its latents and labels fit together."""
        path = self._root / name
        columns = self._columns(name, scan=True)
        shape, column = columns[self.key(name, columns)].shape, columns[LABELS]
        column = column.reshape(-1) if column.ndim == 2 and 1 in column.shape else column
        if len(shape) != 4 or column.shape[:1] != shape[:1] or column.ndim > 2:  # 2: one-hot
            raise ValueError(
                f"{path}: latents {shape} and labels {column.shape} do not fit together: they are "
                "(N, h, w, c) or (N, c, h, w), and (N,)"
            )
        amount = columns.get("amount")  # of SoFlow
        if amount is not None and int(amount) != len(column):
            raise ValueError(f"{path}: 'amount' is {int(amount)}, and {len(column)} rows are there")
        if column.dtype.kind not in "iufU":
            raise ValueError(f"{path}: labels of {column.dtype}, neither whole numbers nor names")
        return [
            ((name, i), labels.read(f"{path}, record {i}", label))
            for i, label in enumerate(column.tolist())
        ]

    def key(self, name, columns=None):
        """Names the latents of a file in it; "" where it is one array."""
        if name.endswith(".npy"):
            return ""
        names = list(self._columns(name, scan=True) if columns is None else columns)
        keys = [key for key in names if key in WORDS]
        flips = [key for key in names if key.endswith(FLIP) and key.removesuffix(FLIP) not in names]
        if len(keys) != 1 or LABELS not in names or flips:
            raise ValueError(
                f"{self._root / name}: holds {', '.join(names) or 'nothing'}, not '{LABELS}' and "
                f"one of {', '.join(WORDS)}"
            )
        return keys[0]

    def item(self, key):
        """Returns the `latents.Item` of a record (file, row)."""
        name, row = key
        with self._lock:
            if name not in self._open:
                columns = self._columns(name)
                latent = self.key(name, columns)
                self._open[name] = columns[latent], columns.get(f"{latent}{FLIP}")
                if len(self._open) > OPEN:
                    self._open.popitem(last=False)
            views = self._open[name]
        with files.reading(self.where(key), "damaged"):
            return latents.Item(*(view if view is None else view[row] for view in views))

    def beside(self, key, column):
        """Returns (place, array) of a condition of a record.

        An array of the same file, or of the .npy that is called like that of the latents, with the
        name in the place of their word.
        """
        (name, row), where = key, self.where(key)
        if name.endswith(".npy"):
            other = column.join(name.rsplit(_word(name) or name.removesuffix(".npy"), 1))
            with files.reading(self._root / other, "not an array of conditions"):
                columns = {column: npy.mapped(self._root / other)}
        else:
            columns = self._whole(name)
        with files.reading(where, f"no array '{column}' with a row for it"):
            return where, columns[column][row]

    def _columns(self, name, scan=False):
        """Reads {name: array} of a file; with `scan` those of a .npz have no more than a shape."""
        path = self._root / name
        with files.reading(path, "not an array of latents, or damaged"):
            if name.endswith(".npy"):
                return self._pair(name, scan)
            if name.endswith(".safetensors"):
                return caches.safetensors(path)
            if name.endswith((".hdf5", ".h5")):
                return caches.Hdf5(path).arrays
            return {
                key: types.SimpleNamespace(shape=npy.header_of_member(path, key)[0])
                if scan and key != LABELS
                else npy.member(path, key)
                for key in npy.names(path)
            }

    def _pair(self, name, scan):
        """Maps a .npy, and that of the mirrored images, if any; with `scan` its labels too."""
        path, word = self._root / name, _word(name) or name
        columns = {"": npy.mapped(path)}
        flip = name.replace(".npy", f"{FLIP}.npy")
        if flip in self._there:
            columns[FLIP] = npy.mapped(self._root / flip)
            if columns[FLIP].shape != columns[""].shape:
                raise ValueError(
                    f"{flip} has the shape {columns[FLIP].shape}, not {columns[''].shape}"
                )
        if not scan:
            return columns
        beside = LABELS.join(name.rsplit(word, 1))
        if word == name or beside not in self._there:
            place = self._root / (f"{LABELS}.npy" if word == name else beside)
            raise ValueError(f"it has no labels: {place} is expected to hold them")
        with files.reading(self._root / beside, "not an array of labels"):
            return columns | {LABELS: npy.mapped(self._root / beside)}
