"""Imports latents that people have: a folder of the published `.pt` files -> records.

A file holds `image` (2c, h, w), mean and standard deviation of the VAE's posterior, and `label`.
"""

import functools
from pathlib import Path

import grain
import numpy as np

from formats import torch_files
from scripts.prepare import moments, shards
from utils import pictures


def run(args):
    """The job behind `prepare_dataset pt`."""
    root, listing = Path(args.input), pictures.Listing()
    items = list_files(root, listing)
    counts = ", ".join(f"{len(names)} {split}" for split, names in items.items())
    print(f"{root}: {counts} latents{f'; {listing}' if str(listing) else ''}", flush=True)
    first = next(iter(items.values()))[0]
    shape = load(root / first)[0].shape
    dtype = np.dtype(args.store)
    job = shards.Job(
        output=Path(args.output),
        key="moments",
        shape=shape,
        dtype=dtype,
        classes=args.num_classes,
        flipped=False,
        items=items,
        names=items,
        records_per_shard=args.records_per_shard,
        settings={"source": "pt", "store": args.store, "num_classes": args.num_classes},
    )
    spread = moments.Spread()
    read = functools.partial(examples, root, shape, dtype, args.num_classes, args.workers, spread)
    shards.write(job, read, args.process_id, args.num_processes, args.overwrite)
    spread.report()


def list_files(root, listing=None):
    """{split: [path below root]} of `.pt` files in `root/train` and `root/val`, else in `root`.

    What is left out is counted in `listing`.
    """
    listing = pictures.Listing() if listing is None else listing
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of latents at {root}")
    there, _ = pictures.entries(root, pictures.Listing())
    splits = [split for split in ("train", "val") if split in there]
    folders = {split: root / split for split in splits} or {"train": root}
    for name in set(there).difference(splits) if splits else ():
        listing.leave_out("folders that are not among the splits", root / name)
    items = {}
    for split, folder in folders.items():
        deeper, names = pictures.entries(folder, listing)
        for name in deeper:
            listing.leave_out("deeper folders", folder / name)
        prefix = folder.relative_to(root)
        names = pictures.wanted(folder, names, listing, ".pt")
        items[split] = [str(prefix / name) for name in names]
        if not items[split]:
            raise ValueError(f"no .pt files in {folder}{f'; {listing}' if str(listing) else ''}")
    return items


def load(path):
    """One file -> (moments (h, w, 2c) float32, label). ValueError if it holds anything else."""
    content = torch_files.load(path)
    content = content if isinstance(content, dict) else {}
    image = content.get("image")
    image = image if isinstance(image, np.ndarray) else np.asarray(image, object)
    if "label" not in content or image.ndim != 3 or len(image) % 2:
        raise ValueError(f"{path}: not a latent; it should hold 'image' (2c, h, w) and 'label'")
    if not np.can_cast(image.dtype, np.float64):
        raise ValueError(f"{path}: 'image' holds {image.dtype}, not real numbers")
    moments_of_file = np.moveaxis(image.astype(np.float32), 0, -1)
    return moments_of_file, whole_number(path, content["label"])


def whole_number(path, label):
    """The label of a file as int; ValueError where it is no whole number."""
    value = np.asarray(label) if np.isscalar(label) or isinstance(label, np.ndarray) else None
    if value is None or value.size != 1 or value.dtype.kind not in "iuf" or value.item() % 1 != 0:
        found = " ".join(repr(label).split())[:60]
        raise ValueError(f"{path}: 'label' is {found}, not a whole number")
    return int(value.item())


def examples(root, shape, dtype, num_classes, workers, spread, names):
    """Paths below `root` -> examples, in order; anything odd is an error that names the file."""

    def read(name):
        found, label = load(root / name)
        if found.shape != shape:
            raise ValueError(f"{root / name}: latent {found.shape}, the others have {shape}")
        if not 0 <= label < num_classes:
            raise ValueError(f"{root / name}: label {label}; --num_classes is {num_classes}")
        return {"moments": moments.check(root / name, found, dtype), "label": label}

    if names:
        files = grain.MapDataset.source(names).map(read)
        for example in files.to_iter_dataset(grain.ReadOptions(workers, 8 * workers)):
            spread.add(example["moments"])
            yield example
