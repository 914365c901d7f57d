"""What a set says of itself, read before its folders are: its members, their labels and splits.

- `dataset.json` of EDM, StyleGAN and REPA, `metadata.csv`, `.jsonl` and `.parquet` of Hugging
  Face's folders of images: a label for each file
- `state.json` and `dataset_dict.json` of `save_to_disk`: which files are the data
- `configs:` in the README of a repository of the Hub: which files are one set of several
"""

import collections
import csv
import io
import json
import posixpath
import re

import yaml

from scripts.prepare import labels
from utils import files, pictures

LISTS = ("dataset.json", "metadata.csv", "metadata.jsonl", "metadata.parquet")
# What `datasets` leaves beside the data: map, filter, shuffle.
CACHE = re.compile(r"cache-[0-9a-f]{8,}\S*\.arrow")
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\b.*")
CHOICES = "--labels=folders takes the class folders, --labels=none goes without"


# Labels -------------------------------------------------------------------------------------------


def has_lists(root):
    """Tells whether a folder has lists of labels where they are looked for."""
    below = list(root.glob("*/"))
    deeper = [place for split in below if split.name in labels.SPLITS for place in split.glob("*/")]
    return any((place / name).is_file() for place in (root, *below, *deeper) for name in LISTS)


def labelled(tree, listing, label_key=None, skip=False):
    """Reads the lists in a tree: {split: [(name, label of `labels.read`)]}; None where is none.

    Args:
      tree: of `trees`; its names are those of records and of lists.
      listing: counts what no list names, or with `skip` what a list names and is not there.
      label_key: the column of labels; None: the one there is.

    Raises:
      ValueError: a list that names no labels, or files that are not there or come twice; two lists
        of the same records.
    """
    there = {name for name in tree.names if posixpath.basename(name) not in LISTS}
    lists = {}
    for name in tree.names:
        if name not in there and (rows := _rows(tree, name, there, label_key)) is not None:
            if not there.isdisjoint(file for file, _ in rows) or not rows:
                lists[name] = rows
            elif posixpath.dirname(name) == "":
                raise ValueError(f"{tree.where(name)} names {rows[0][0]}, which is not there")
    if not lists:
        return None
    rows_of = {}
    for split, of_split in labels.by_split(lists).items():
        check_versions(tree.root, [(name, row[1]) for name in of_split for row in lists[name]])
        for name in of_split:
            for of_row, row in _by_folder(split, lists[name]):
                rows_of.setdefault(of_row, []).append((*row, name))
    return {split: _there(tree, rows, there, listing, skip) for split, rows in rows_of.items()}


def _there(tree, rows, there, listing, skip):
    """Returns the rows [(file, label)] whose files are there."""
    seen = set()
    for file, _, name in rows:
        if file not in there:
            if not skip:
                raise ValueError(f"{tree.where(name)} names {file}, which is not there")
            listing.leave_out("that a list names and are not there", tree.where(file))
        if file in seen:
            raise ValueError(f"{tree.where(name)} names {file} twice")
        seen.add(file)
    folders = {posixpath.dirname(name) for *_, name in rows}
    for file in there - seen:
        if any(not folder or file.startswith(f"{folder}/") for folder in folders):
            listing.leave_out("that no list of labels names", tree.where(file))
    return [(file, label) for file, label, _ in rows if file in there]


def _by_folder(split, rows):
    """Returns (split, row) of each, by the first folder where that is a split in all rows."""
    first = [row[0].split("/")[0] if "/" in row[0] else "" for row in rows]
    if split == "train" and all(word in labels.SPLITS for word in first):
        return [(labels.SPLITS[word], row) for word, row in zip(first, rows, strict=True)]
    return [(split, row) for row in rows]


def _rows(tree, name, there, label_key):
    """Reads one list: [(file below the tree, label or None)]; None where it is none."""
    where, folder = tree.where(name), posixpath.dirname(name)
    with files.reading(where, "not a list of labels"):
        if name.endswith(".json"):
            pairs = _of_json(json.loads(tree.read(name)), folder, there)
        else:
            pairs = _of_table(_table(name, tree.read(name)), label_key)
    if pairs is None:
        return None
    rows = []
    for file, label in pairs:
        path = posixpath.normpath(posixpath.join(folder, str(file)))
        rows.append((path, None if label is None else labels.read(f"{where}, {file}", label)))
    if len({label is None for _, label in rows}) > 1:
        file = next(file for file, label in rows if label is None)
        raise ValueError(f"{where}: no label for {file}, while others have one")
    return rows


def _of_json(content, folder, there):
    if not isinstance(content, dict) or "labels" not in content:
        return None
    entries = content["labels"]
    if entries is None:
        inside = [n for n in sorted(there) if not folder or n.startswith(f"{folder}/")]
        return [(posixpath.relpath(name, folder or "."), None) for name in inside]
    entries = entries.items() if isinstance(entries, dict) else entries
    if not entries:
        raise ValueError("it has no labels")
    return [(file, label) for file, label in entries]


def _table(name, content):
    if name.endswith(".parquet"):
        from pyarrow import parquet

        return parquet.read_table(io.BytesIO(content)).to_pylist()
    text = content.decode("utf-8-sig")
    if name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(text, newline="")))
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _of_table(rows, label_key):
    columns = list(rows[0]) if rows and isinstance(rows[0], dict) else []
    named = [c for c in columns if c == "file_name"]
    named = named or [c for c in columns if isinstance(c, str) and c.endswith("_file_name")]
    if not named:
        return None
    keys = [key for key in columns if key == label_key or label_key is None and key in labels.KEYS]
    if len(keys) != 1 or len(named) != 1:
        raise ValueError(
            f"of its columns {', '.join(map(str, columns))} --label_key names that of the labels; "
            f"{CHOICES}"
        )
    return [(row[named[0]], row.get(keys[0])) for row in rows]


def check_versions(root, rows):
    """Raises ValueError where two folders hold the same records: one set, encoded twice.

    Those are told by labels that are the same in the same order. Folders that are counted, 0, 1, 2,
    are parts of one set.

    Args:
      rows: [(file, label)] of one split, in order.
    """
    folders, seen = collections.defaultdict(list), {}
    for file, label in rows:
        folders[posixpath.dirname(file)].append(label)
    numbers = sorted(int("".join(re.findall(r"\d", folder)) or -1) for folder in folders)
    if numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return
    for folder, labels_of in folders.items():
        other = seen.setdefault(tuple(labels_of), folder)
        if other != folder and len(set(labels_of)) > 1:
            raise ValueError(
                f"{root / other} and {root / folder} have the same labels in the same "
                "order: two versions of one set? --input names the one that is meant; folders that "
                "are parts of one are called 0, 1, 2, ..."
            )


# Members ------------------------------------------------------------------------------------------


def find(root, endings, listing, config=None):
    """Lists the files of a set at `root`, a folder or one of the files itself.

    Args:
      endings: one of these for all; files with others are counted in `listing`.
      config: as in `members`.

    Returns:
      (folder, names of the files below it, {name: split} where that is said).

    Raises:
      FileNotFoundError: nothing is there. ValueError: none of the files, of two kinds, or as
        `members`.
    """
    if root.is_file():
        return root.parent, [root.name], {}
    if not root.is_dir():
        raise FileNotFoundError(f"no folder, and no file, at {root}")
    names = [path.relative_to(root).as_posix() for path in pictures.below(root, listing, endings)]
    names, said = members(root, names, listing, config)
    kinds = {ending for ending in endings for name in names if name.lower().endswith(ending)}
    if len(kinds) != 1:
        what = f"both {' and '.join(sorted(kinds))}" if kinds else f"no {' or '.join(endings)}"
        raise ValueError(f"{what} files below {root}{listing}")
    return root, names, said


def members(root, names, listing, config=None):
    """Returns (the names of files that are the set's data, {name: split} where that is said).

    Args:
      root: folder that the names are below.
      config: name of one of the sets in the repository, as its README has it.

    Raises:
      ValueError: several sets, of which none is named; a file that is listed is not there.
    """
    names, said = _of_configs(root, names, listing, config)
    chosen, folders = [], collections.defaultdict(list)
    for name in names:
        folders[posixpath.dirname(name)].append(posixpath.basename(name))
    splits = _json(root / "dataset_dict.json").get("splits")
    for folder, bases in folders.items():
        state = _json(root / folder / "state.json")
        if listed := [str(entry["filename"]) for entry in state.get("_data_files", ())]:
            if missing := [name for name in listed if not (root / folder / name).is_file()]:
                raise ValueError(
                    f"{root / folder / 'state.json'} names {missing[0]}, which is not there"
                )
            if state.get("_indices_data_files"):
                raise ValueError(
                    f"{root / folder}: a selection of rows (indices); save_to_disk writes it out"
                )
        for name in bases:
            path = posixpath.join(folder, name)
            if listed and name not in listed:
                listing.leave_out("that state.json does not name", root / path)
            elif not listed and CACHE.fullmatch(name):
                listing.leave_out("that `datasets` left as a cache", root / path)
            elif splits and folder.split("/")[0] not in splits:
                listing.leave_out("that dataset_dict.json does not name", root / path)
            else:
                chosen.append(path)
                if splits:
                    said[path] = folder.split("/")[0]
    _check_parts(root, chosen, said)
    return chosen, said


def _json(path):
    """Reads a JSON file; {} where it is not there."""
    if not path.is_file():
        return {}
    with files.reading(path, "not JSON"):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def configs(root):
    """Reads the README of a repository: {name: [(split or None, pattern of files)]}."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        entries = yaml.safe_load(head[1])["configs"] if head else []
    except (yaml.YAMLError, TypeError, KeyError):
        entries = []
    sets = {}
    for entry in entries if isinstance(entries, list) else []:
        data, folder = entry.get("data_files"), str(entry.get("data_dir") or "")
        if isinstance(data, dict):
            data = [{"split": split, "path": path} for split, path in data.items()]
        data = [data] if isinstance(data, str) else data or [posixpath.join(folder, "**")]
        rows = [row if isinstance(row, dict) else {"path": row} for row in data]
        sets[str(entry.get("config_name", "default"))] = [
            (row.get("split"), pattern)
            for row in rows
            for pattern in ([row["path"]] if isinstance(row["path"], str) else row["path"])
        ]
    return sets


def _of_configs(root, names, listing, config):
    sets = {}
    for title, rows in configs(root).items():
        of_title = {}
        for split, pattern in rows:
            pattern = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*\*", ".*")
            pattern = pattern.replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
            of_title |= {n: split for n in names if re.fullmatch(pattern, n) and n not in of_title}
        if of_title:
            sets[title] = of_title
    if config is not None and config not in sets:
        there = ", ".join(sets) or "none"
        raise ValueError(
            f"{root / 'README.md'}: no config '{config}' with files here; there is {there}"
        )
    if not sets:
        return names, {}
    if config is None and len(sets) > 1:
        raise ValueError(
            f"{root} holds several sets, says its README: --config_name names one of "
            f"{', '.join(sets)}"
        )
    chosen = sets[config or next(iter(sets))]
    for name in names:
        if name not in chosen:
            listing.leave_out("of no config, or of another", root / name)
    return list(chosen), {name: split for name, split in chosen.items() if split}


def _check_parts(root, names, said):
    """Raises ValueError where NAME-00000-of-00002 is there in several folders, each of them whole;
    a word that is no split, beside ones that are, becomes one."""
    places, words = collections.defaultdict(set), {}
    for name in names:
        folder, base = posixpath.split(name)
        if part := PART.fullmatch(base):
            split = said.get(name) or (set(folder.split("/")) & {*labels.SPLITS} or {""}).pop()
            places[part.groups(), split].add(folder)
            words[name] = part[1]
    for (part, _), folders in places.items():
        if len(folders) > 1:
            a, b = sorted(folders)[:2]
            raise ValueError(
                f"{root / a} and {root / b} both have {part[0]}-{part[1]}-of-{part[2]}: several "
                "sets? --input names one"
            )
    parts = collections.defaultdict(set)
    for (stem, part, total), split in places:
        parts[stem, int(total), split].add(part)
    for (stem, total, _), there in parts.items():
        if len(there) < total:
            print(f"{root}: {len(there)} of the {total} parts of {stem} are there", flush=True)
    if any(word in labels.SPLITS for word in words.values()):
        for name, word in words.items():
            if word not in labels.SPLITS and re.fullmatch(r"[a-z]\w*", word):
                said.setdefault(name, word)


def check_configs(root):
    """Raises ValueError where the README of a folder says that it holds several sets."""
    titles = [name for name, rows in configs(root).items()
             if any(True for _, pattern in rows for _ in root.glob(pattern))]  # fmt: skip
    if len(titles) > 1:
        raise ValueError(
            f"{root} holds several sets, says its README ({', '.join(titles)}): --input names the "
            "folder of one"
        )
