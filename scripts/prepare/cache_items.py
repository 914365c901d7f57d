"""Latents of which each has a file of its own, in a folder or a `.zip`: MAR, DC-AE, drifting, EDM2,
REPA and the published ones."""

import posixpath
import re

from formats import caches
from scripts.prepare import labels, latents, manifest

KEYS = ("", "moments", "latents", "latent", "samples", "image", "features")  # "": an array alone
FLIP = "_flip"
BUNDLE = re.compile(r"(.*/)?\d{5}/img(-mean-std-)?\d{8}\.npy")


def item(content, where):
    """Returns the `latents.Item` of a dict as `formats.caches.parse` gives it."""
    keys = [key for key in content if key in KEYS]
    flips = [key for key in content if str(key).endswith((FLIP, f"{FLIP}ped"))]
    if len(keys) != 1 or [key for key in flips if key.partition(FLIP)[0] != keys[0]]:
        names = ", ".join(map(str, content)) or "nothing"
        raise ValueError(f"{where}: holds {names}, not one latent, {', '.join(KEYS[1:])}")
    label = content.get("label", content.get("labels"))
    return latents.Item(content[keys[0]], content[flips[0]] if flips else None, label)


def of_tree(tree, args, listing):
    """Returns the `Cache` of a tree with files of one of the endings `caches.ITEMS`.

    args: `labels` (auto, folders, none).

    Raises:
      ValueError: files of several kinds, a half that is missing, or labels that cannot be told.
    """
    tree.names, flips = _without_flips(tree)
    names = [name for name in tree.names if posixpath.basename(name) not in manifest.LISTS]
    listed = manifest.labelled(tree, listing) if args.labels == "auto" else None
    named = [name for rows in (listed or {}).values() for name, _ in rows] or names
    endings = sorted({posixpath.splitext(name)[1] for name in named})
    if len(endings) != 1:
        raise ValueError(f"{tree.root} holds files of {' and '.join(endings) or 'no latents'}: "
                         "--input names those that are meant")  # fmt: skip

    def read(name):
        one = item(caches.parse(name, tree.read(name), tree.where(name)), tree.where(name))
        if flips:
            other = tree.where(flips[name])
            mirrored = item(caches.parse(name, tree.read(flips[name]), other), other)
            one = one._replace(flipped=mirrored.latent)
        return one

    first = caches.parse(named[0], tree.read(named[0]), tree.where(named[0]))
    inside = "label" in first and listed is None and args.labels == "auto"
    if inside:
        split = labels.by_split(names)
        listed = {split: [(name, None) for name in of_split] for split, of_split in split.items()}
    if listed is None:
        listed = _of_folders(tree, endings[0], args.labels)
    foldered = not inside and any(y is not None for rows in listed.values() for _, y in rows)
    title, content = _known(endings[0], first, named[0], foldered)
    return latents.Cache(
        title, listed, read, tree.where, {"source": "arrays"}, content, inside=inside, name=named[0]
    )  # fmt: skip


def _without_flips(tree):
    """Returns (names without those of mirrored images, {name: that of its mirrored image})."""
    there, flips = set(tree.names), {}
    for name in tree.names:
        stem, ending = posixpath.splitext(name)
        if stem.endswith(FLIP):
            partner = f"{stem.removesuffix(FLIP)}{ending}"
            if partner not in there:
                raise ValueError(
                    f"{tree.where(name)} is of a mirrored image, and {partner} is not there"
                )
            flips[partner] = name
    names = [name for name in tree.names if name not in {*flips.values()}]
    if flips:
        for name in names:
            if posixpath.basename(name) not in manifest.LISTS and name not in flips:
                raise ValueError(
                    f"{tree.where(name)} has no {FLIP} beside it, while others have one"
                )
    return names, flips


def _of_folders(tree, ending, wanted):
    """Reads labels off class folders, where they can be no bundles and nothing else."""
    if wanted == "auto" and any(map(BUNDLE.fullmatch, tree.names)):
        raise ValueError(
            f"{tree.root}: bundles of EDM2 or REPA without the dataset.json that has their labels; "
            "--labels=none goes without"
        )
    rows_of = labels.of_folders(tree, (ending,), wanted == "none")
    folders = {folder for rows in rows_of.values() for _, folder in rows}
    if wanted != "auto" or folders == {None}:
        return rows_of
    if len(folders) == 1:
        raise ValueError(
            f"{tree.root}: all latents lie in one folder, {folders.pop()}: --labels=folders, if it "
            "is a class, --labels=none, if it is not"
        )
    return rows_of


def _known(ending, first, name, foldered):
    """Returns (whose cache it is, what its writer is known to write)."""
    if ending == ".npz" and "moments" in first:
        if foldered:
            return "MAR's cache: one .npz an image", "log_moments"
        return "one .npz an image", "either"
    if ending == ".npy" and "mean-std" in name:
        return "EDM2's or REPA's cache: one .npy an image", "moments"
    if ending == ".npy" and foldered:
        return "DC-AE's cache: one .npy an image", "samples"
    if ending == ".pt" and "image" in first:
        return "the published cache: one .pt an image", "moments"
    if ending == ".pt" and "moments" in first:
        return "drifting's cache: one .pt an image", "either"
    return f"one {ending} an image", None
