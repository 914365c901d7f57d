"""Which images of a folder or a `.zip` are meant, and their labels."""

import csv
from pathlib import Path

from scripts.prepare import labels, manifest, trees
from utils import files, pictures

KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")  # where the competition's archive has train/ and val/


def find_images(root, args, listing):
    """Finds the images at `root`: classes, {split: [(name, label)]}, find, settings for `convert`.

    The labels are those of a list, such as dataset.json, where there is one; else those of class
    folders; where there is neither, or with `labels` none, there are 0 classes.

    Args:
      root: folder, or `.zip`.
      args: `splits`, `label_key`, `num_classes`, `on_bad_image`, and `labels`: auto, folders, none.
      listing: counts what is left out.
    """
    root = root / KAGGLE if (root / KAGGLE).is_dir() else root
    listed = args.labels == "auto" and (root.is_file() or manifest.has_lists(root))
    if not (root.is_file() or listed or args.labels == "none"):
        if root.is_dir():
            manifest.check_configs(root)
        classes, items = list_images(root, args.splits, listing)
        return classes, items, lambda name: (root / name, None), {}
    tree = trees.open_tree(root, listing, pictures.EXTENSIONS + manifest.LISTS)
    skip = args.on_bad_image == "skip"
    rows_of = manifest.labelled(tree, listing, args.label_key, skip) if listed else None
    if rows_of is None:
        if root.is_dir() and args.labels == "auto":  # other people's files of those names
            classes, items = list_images(root, args.splits, listing)
            return classes, items, lambda name: (root / name, None), {}
        rows_of = labels.of_folders(tree, pictures.EXTENSIONS, args.labels == "none")
    classes, items = labels.numbered(rows_of, args, tree.where)
    settings = {"labels": labels.digest(items)}
    return classes, items, lambda name: (tree.where(name), tree.open(name)), settings


def list_images(root, splits=(), listing=None):
    """Lists images below `root/SPLIT/CLASS/`, or `root/CLASS/` where there is no `root/train`.

    Returns (class names sorted, {split: [(path below root, label)] sorted}); the label is the
    index of the class folder among the sorted ones of the first split. Where that has no class
    folders there are 0 classes, and the labels are None; a later one without takes its labels from
    Kaggle's LOC_SPLIT_solution.csv. What is left out is counted in `listing`.
    """
    listing = pictures.Listing() if listing is None else listing
    folders = of_splits(root, splits, listing, "images")
    classes, items = None, {}
    for split, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder} for the split '{split}'")
        names, loose = pictures.entries(folder, listing)
        if names:
            classes, rows = _of_class_folders(folder, names, classes, listing)
            for name in loose:
                listing.leave_out("beside the class folders", folder / name)
        else:
            classes, rows = _of_flat_folder(root, split, folder, loose, classes, listing)
        prefix = folder.relative_to(root)
        items[split] = [(str(prefix / name), label) for name, label in rows]
    return classes, items


def of_splits(root, splits, listing, kind):
    """Returns {split: its folder} below `root`, which is that of train where it has no splits.

    Args:
      splits: those that are wanted; (): train and val, as far as they are there.
      listing: counts the other folders.
      kind: what should be there, for the error.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of {kind} at {root}")
    there, _ = pictures.entries(root, pictures.Listing())
    splits = splits or [split for split in ("train", "val") if split in there]
    for name in set(there).difference(splits) if splits else ():
        listing.leave_out("folders that are not among the splits", root / name)
    return {split: root / split for split in splits} or {"train": root}


def _of_class_folders(folder, class_names, classes, listing):
    """Returns (classes, [(name, label)]) of a split; `classes`: of the first, None in it."""
    first, classes = classes is None, class_names if classes is None else classes
    numbers = {name: label for label, name in enumerate(classes or ())}
    if unknown := [name for name in class_names if name not in numbers]:
        raise ValueError(f"{folder / unknown[0]}: no such class in the first split")
    of_class = {name: list_class(folder / name, listing) for name in class_names}
    empty = [name for name, names in of_class.items() if not names]
    if len(empty) == len(class_names):
        raise ValueError(_nothing(folder, listing))
    if empty and first:
        raise ValueError(
            f"{folder / empty[0]} is a class folder without images, one of {len(empty)}: take "
            "them away, or put the images there; a class without images would move the labels"
        )
    for name in empty:
        listing.leave_out("class folders without images", folder / name)
    return classes, [
        (f"{name}/{file}", numbers[name]) for name, names in of_class.items() for file in names
    ]


def _of_flat_folder(root, split, folder, loose, classes, listing):
    """Returns the same of a split without class folders."""
    names = pictures.wanted(folder, loose, listing)
    if not names and not classes:
        raise ValueError(
            f"{folder} has no class folders and no images; images belong into {folder}/CLASS/, and "
            "--splits says which splits to take"
        )
    if not classes:
        return 0, [(name, None) for name in names]
    path = Path(f"LOC_{split}_solution.csv")
    places = [place / path for place in (root, *root.resolve().parents[:3])]
    path = next((place for place in places if place.is_file()), None)
    if not names or path is None:
        raise ValueError(
            f"{folder} has no class folders, and LOC_{split}_solution.csv of Kaggle is not there "
            "to tell the classes; --splits says which splits to take"
        )
    with files.reading(path, "not Kaggle's list of labels"):
        with open(path, newline="", encoding="utf-8") as file:
            said = {r["ImageId"]: r["PredictionString"].split()[0] for r in csv.DictReader(file)}
    numbers, rows = {name: label for label, name in enumerate(classes)}, []
    for name in names:
        wnid = said.get(name.rpartition(".")[0])
        if wnid not in numbers:
            told = f"class {wnid}, which the first split does not have" if wnid else "no class"
            raise ValueError(f"{folder / name}: {path} tells {told}")
        rows.append((name, numbers[wnid]))
    return classes, rows


def _nothing(folder, listing):
    return f"no images below {folder}; known are {' '.join(pictures.EXTENSIONS)}{listing}"


def list_class(folder, listing):
    """Returns the names of the images in a class folder, sorted."""
    deeper, names = pictures.entries(folder, listing, links_matter=False)
    for name in deeper:
        for path in pictures.below(folder / name, pictures.Listing()):
            listing.leave_out("in deeper folders", path)
    return pictures.wanted(folder, names, listing)
