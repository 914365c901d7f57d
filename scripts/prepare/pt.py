"""Imports latents that people have: a folder of the published `.pt` files -> records.

A file holds `image` (2c, h, w), mean and standard deviation of the VAE's posterior, and `label`.
"""

import numpy as np

from formats import torch_files
from scripts.prepare import class_folders, latents
from utils import files, pictures


def run(args):
    """Runs `prepare_dataset pt`; returns whether the records are complete."""
    root, listing = files.local(args.input), pictures.Listing()
    rows = {split: [(name, None) for name in n] for split, n in list_files(root, listing).items()}
    args.layout, args.content, args.scaled_by = "nchw", "moments", 1.0
    cache = latents.Cache(
        "published .pt latents", rows, lambda name: load(root / name), lambda name: root / name,
        {"source": "pt", "num_classes": args.num_classes}, inside=True,
    )  # fmt: skip
    return latents.bring(args, cache, listing)


def list_files(root, listing=None):
    """Lists `.pt` files in `root/train` and `root/val`, else in `root`: {split: [path]}.

    What is left out is counted in `listing`.
    """
    listing = pictures.Listing() if listing is None else listing
    folders = class_folders.of_splits(root, (), listing, "latents")
    items = {}
    for split, folder in folders.items():
        deeper, names = pictures.entries(folder, listing)
        for name in deeper:
            listing.leave_out("deeper folders", folder / name)
        prefix = folder.relative_to(root)
        names = pictures.wanted(folder, names, listing, ".pt")
        items[split] = [str(prefix / name) for name in names]
        if not items[split]:
            raise ValueError(f"no .pt files in {folder}{listing}")
    return items


def load(path):
    """Reads one file: `latents.Item`. ValueError if it holds anything else."""
    content = torch_files.load(path)
    content = content if isinstance(content, dict) else {}
    image = content.get("image")
    image = image if isinstance(image, np.ndarray) else np.asarray(image, object)
    if "label" not in content or image.ndim != 3 or len(image) % 2:
        raise ValueError(f"{path}: not a latent; it should hold 'image' (2c, h, w) and 'label'")
    if not np.can_cast(image.dtype, np.float64):
        raise ValueError(f"{path}: 'image' holds {image.dtype}, not real numbers")
    return latents.Item(image.astype(np.float32), None, content["label"])
