"""Image sets of Hugging Face as they lie on disk -> records: Parquet files, or `save_to_disk`.

pyarrow reads both, and no code of the set runs. An image is bytes of a picture, alone or as `bytes`
of a struct; names of classes are in the files' own metadata.
"""

import collections
import io
import json
import threading
from pathlib import Path

from scripts.prepare import images, labels, manifest
from utils import files, pictures

ENDINGS = (".parquet", ".arrow")
IMAGES = ("image", "img", "jpg", "png")  # names of columns
OPEN = 4  # groups of rows in memory


def run(args):
    """Runs `prepare_dataset huggingface`; returns whether the records are complete."""
    root, listing = files.local(args.input), pictures.Listing()
    root, names, said = manifest.find(root, ENDINGS, listing, args.config_name)
    tables = Tables(root, names)
    image_key, label_key = columns(tables, args.image_key, args.label_key)

    def where(name):
        table, _, row = name.rpartition(":")
        return f"{root / table}, row {row}"

    rows = {}
    for split, of_split in labels.by_split(names, args.splits, said).items():
        keys = [
            (f"{t}:{i}", y) for t in of_split for i, y in enumerate(tables.column(t, label_key))
        ]
        rows[split] = [(key, labels.read(where(key), label)) for key, label in keys]
        manifest.check_versions(root, [(key.rpartition(":")[0], y) for key, y in rows[split]])
    said = f"{images.counted(rows)} images, '{image_key}' and '{label_key}'"
    print(f"{args.input}: {said}{listing}", flush=True)
    classes, items = labels.numbered(rows, args, where, tables.class_names(names[0], label_key))

    def find(name):
        table, _, row = name.rpartition(":")
        return where(name), picture(tables.value(table, int(row), image_key), where(name))

    def fetch(name, column):
        table, _, row = name.rpartition(":")
        return where(name), tables.value(table, int(row), column)

    if unknown := {*args.conditions.values()}.difference(there := tables.columns(names[0])):
        raise ValueError(f"--conditions: {min(unknown)} is no column; there are {', '.join(there)}")
    settings = {"source": "huggingface", "image_key": image_key, "label_key": label_key}
    settings["labels"] = labels.digest(items)
    return images.convert(args, classes, items, find, settings, fetch)


def columns(tables, image_key=None, label_key=None):
    """Finds the columns of images and labels: those that are named, or the only ones.

    Raises:
      ValueError: there is none, or more than one.
    """
    name = tables.names[0]
    there, features = tables.columns(name), tables.features(name)
    keys = []
    for option, named, kind, common in (
        ("image_key", image_key, "Image", IMAGES),
        ("label_key", label_key, "ClassLabel", labels.KEYS),
    ):
        typed = [key for key in there if _kind(features.get(key)) == kind]
        known = typed or [key for key in there if key in common]
        known = [named] if named in there else known if named is None else []
        if len(known) != 1:
            among = f"one of {', '.join(known or there)}"
            said = f"'{named}' is no column; there are {', '.join(there)}" if named else among
            raise ValueError(f"{tables.root / name}: --{option} has to be named: {said}")
        keys += known
    return keys


def _kind(feature):
    return feature.get("_type") if isinstance(feature, dict) else None


def picture(value, place):
    """Opens what stands in the column of images: its bytes, or where only the path of a
    file is stored (`to_parquet` of a set from local files), that."""
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if value is None and path:
        if not Path(path).is_file():
            raise ValueError(f"{place}: only the path of an image is stored, {path}: no such file")
        value = Path(path).read_bytes()
    if not isinstance(value, bytes):
        raise ValueError(f"{place}: no bytes of a picture but {type(value).__name__}")
    return io.BytesIO(value)


class Tables:
    """The tables in files below `root`, of both kinds, in groups of rows. For several threads."""

    def __init__(self, root, names):
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "Hugging Face's files are read by pyarrow, which is not there: pip install pyarrow"
            ) from error
        self.root, self.names = root, names
        self._lock, self._groups = threading.Lock(), collections.OrderedDict()
        self._files = {name: self._open(name) for name in names}
        first = self.columns(names[0])
        for name in names:
            if self.columns(name) != first:
                raise ValueError(
                    f"{root / name} has the columns {', '.join(self.columns(name))}, "
                    f"{names[0]} has {', '.join(first)}"
                )

    def _open(self, name):
        """Returns (schema, rows in each group, Arrow table of a file that is mapped, or None)."""
        import pyarrow
        from pyarrow import parquet

        path = self.root / name
        with files.reading(path, "not a table of Arrow, or damaged"):
            if name.lower().endswith(".parquet"):
                meta = parquet.read_metadata(path)
                sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
                return meta.schema.to_arrow_schema(), sizes, None
            table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
            return table.schema, [table.num_rows], table

    def columns(self, name):
        """Returns the names of the columns."""
        return list(self._files[name][0].names)

    def features(self, name):
        """Returns what Hugging Face's metadata say of the columns; {} without."""
        try:
            metadata = self._files[name][0].metadata or {}
            return dict(json.loads(metadata[b"huggingface"])["info"]["features"])
        except (KeyError, ValueError, TypeError):
            return {}

    def class_names(self, name, key):
        """Returns the names of the classes; () where they are not known."""
        feature = self.features(name).get(key)
        return (feature.get("names") or ()) if _kind(feature) == "ClassLabel" else ()

    def column(self, name, key):
        """Reads all values of a column."""
        from pyarrow import parquet

        table = self._files[name][2]
        with files.reading(self.root / name, "damaged"):
            if table is None:
                table = parquet.read_table(self.root / name, columns=[key], partitioning=None)
            return table[key].to_pylist()

    def value(self, name, row, key):
        """Reads one value; the latest groups of rows stay in memory."""
        _, sizes, table = self._files[name]
        group = 0
        while row >= sizes[group]:
            row -= sizes[group]
            group += 1
        if table is None:
            table = self._group(name, group, key)
        with files.reading(self.root / name, "damaged"):
            return table[key][row].as_py()

    def _group(self, name, group, key):
        from pyarrow import parquet

        with self._lock:
            at = (name, group, key)
            if at not in self._groups:
                with (
                    files.reading(self.root / name, f"damaged, group of rows {group}"),
                    parquet.ParquetFile(self.root / name) as file,
                ):
                    self._groups[at] = file.read_row_group(group, columns=[key])
                while len(self._groups) > OPEN:
                    self._groups.popitem(last=False)
            return self._groups[at]
