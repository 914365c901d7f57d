"""Finds out whose cache of latents it is that lies there: the job of `prepare_dataset latents`.

docs/data.md has a table of those that are known.
"""

from pathlib import Path

import numpy as np

from formats import caches, torch_files
from scripts.prepare import (
    arrays,
    cache_items,
    labels,
    latents,
    manifest,
    moments,
    trees,
    webdataset,
)
from utils import files, pictures

LMDB = (".mdb", ".lmdb")
ROWS = (".safetensors", ".hdf5", ".h5")
ENDINGS = (*caches.ITEMS, *ROWS, ".tar", ".zip", *manifest.LISTS)
STATS = "latents_stats.pt"  # of LightningDiT: mean and std by channel


def run(args):
    """Runs `prepare_dataset latents`; returns whether the records are complete."""
    listing = pictures.Listing()
    cache = find(files.local(args.input), args, listing)
    complete = latents.bring(args, cache, listing)
    root = files.local(args.input)
    for path in sorted(root.rglob(STATS)) if root.is_dir() else []:
        print(statistics(path), flush=True)
    return complete


def find(root, args, listing):
    """Returns the `Cache` at `root`, a folder or a file.

    Raises:
      FileNotFoundError: nothing is there. ValueError: no cache that is known, or several.
    """
    if places := _lmdbs(root):
        return _of_lmdbs(places)
    if root.is_file() and root.suffix in (".npy", ".npz", *ROWS):
        return arrays.of_file(root, listing)
    if root.is_file() and root.suffix == ".tar":
        return webdataset.open_cache(root, args, listing)
    if root.is_file() and root.suffix != ".zip":
        raise ValueError(
            f"{root}: no file of latents; known are {' '.join((*ENDINGS[:-4], *LMDB))}"
        )
    tree = trees.open_tree(root, listing, ENDINGS)
    if root.is_dir():
        manifest.check_configs(root)
    tree.names = [name for name in tree.names if Path(name).name != STATS]
    kinds = {Path(name).suffix for name in tree.names if Path(name).name not in manifest.LISTS}
    known = " ".join((*ENDINGS[:-4], *LMDB))
    if not kinds:
        raise ValueError(f"{root} holds no latents; known are {known}{listing}")
    if kinds & {".h5", ".hdf5"}:
        kinds = kinds - {".h5"} | {".hdf5"}
    if len(kinds) > 1 and kinds != {".npy", ".npz"}:
        raise ValueError(
            f"{root} holds files of {' and '.join(sorted(kinds))}: --input names those to take"
        )
    (kind, *_) = kinds
    if kind == ".tar":
        return webdataset.open_cache(root, args, listing)
    if kind == ".zip":
        if len(tree.names) > 1:
            raise ValueError(f"{root} holds several .zip files: --input names one")
        return cache_items.of_tree(
            trees.open_tree(root / tree.names[0], listing, ENDINGS), args, listing
        )
    return _of_arrays(root, tree, kind, args, listing)


def _of_arrays(root, tree, kind, args, listing):
    """Tells rows with labels beside them from files of one item; returns the `Cache`."""
    lists = any(Path(name).name in manifest.LISTS for name in tree.names)
    rows = kind in ROWS
    if kind in (".npy", ".npz") and root.is_dir() and not lists and args.labels == "auto":
        first = next(name for name in tree.names if Path(name).name not in manifest.LISTS)
        if kind == ".npz" or first.endswith(".npz"):
            rows = arrays.LABELS in caches.parse(first, tree.read(first), tree.where(first))
        else:
            rows = any(arrays.LABELS in Path(name).as_posix() for name in tree.names)
            array = caches.parse(first, tree.read(first), tree.where(first))[""]
            rows = rows or array.ndim == 4 and len(array) > 1
    if rows:
        return arrays.of_rows(root, tree.names, listing)
    return cache_items.of_tree(tree, args, listing)


def _lmdbs(root):
    """Returns the LMDBs at or below a place: folders with data.mdb, or files."""
    if root.is_file():
        return [root] if root.suffix in LMDB else []
    places = [path.parent for path in (*root.glob("data.mdb"), *sorted(root.glob("*/data.mdb")))]
    return places or sorted(p for e in LMDB for p in root.glob(f"*{e}") if p.is_file())


def _of_lmdbs(places):
    opened = {place.name: caches.Lmdb(place) for place in places}
    rows = {
        split: [((name, i), None) for name in names for i in range(opened[name].count)]
        for split, names in labels.by_split(opened).items()
    }
    where = lambda key: f"{opened[key[0]].path}, record {key[1]}"  # noqa: E731
    return latents.Cache(
        "zhuyu-cs/MeanFlow's cache: LMDB", rows,
        lambda key: cache_items.item(opened[key[0]].read(key[1]), where(key)), where,
        {"source": "lmdb"}, "log_moments", inside=True,
    )  # fmt: skip


def statistics(path):
    """Returns the lines of a YAML file that normalise latents as the statistics at a path say."""
    content = torch_files.load(path)
    if not isinstance(content, dict) or not {"mean", "std"} <= set(content):
        raise ValueError(f"{path}: no statistics, which have 'mean' and 'std'")
    values = {name: np.ravel(content[name]).astype(float) for name in ("mean", "std")}
    return f"{path} says, for the YAML:\n{moments.yaml_lines(**values)}"
