"""Arrays with a row for each record -> records: `.npz`, folders of `.npy`, Parquet files.

The sample is the array `values` of numbers of any range, or `image` of bytes: signals (N, L) or
(N, L, C), images and fields (N, h, w, c). `label` has the classes, if there are any; every other
array is a condition of its name. Splits are told by a word in the path, as in `labels.by_split`;
`.npy` files of one folder belong together.
"""

import functools
from typing import NamedTuple

import numpy as np

from scripts.prepare import labels, moments, shards
from utils import conditions, dataset, files, npy, order, pictures

KEYS = ("values", "image", "images", "samples", "data", "x")  # what samples are called
ENDINGS = (".npz", ".npy", ".parquet")
LOOKED_AT = 4096  # records that mean and deviation are taken of


def run(args):
    """Runs `prepare_dataset values`; returns whether the records are complete."""
    root, listing = files.local(args.input), pictures.Listing()
    if not root.exists():
        raise FileNotFoundError(f"no folder of arrays, and no file, at {root}")
    names = [root.name] if root.is_file() else [
        path.relative_to(root).as_posix() for path in pictures.below(root, listing, ENDINGS)
    ]  # fmt: skip
    folder = root.parent if root.is_file() else root
    tables = open_tables(folder, names)
    if not tables:
        raise ValueError(f"{root}: no {', '.join(ENDINGS)} files{listing}")
    return write(args, tables, folder)


def open_tables(root, names):
    """Opens files `names` below `root`: {path: {column: array (N, ...)}}."""
    tables = {}
    for name in names:
        path = root / name
        with files.reading(path, "not a file of arrays, or damaged"):
            if name.endswith(".npz"):
                tables[name] = {key: npy.member(path, key) for key in npy.names(path)}
            elif name.endswith(".npy"):
                folder, _, file = name.rpartition("/")
                tables.setdefault(folder, {})[file.removesuffix(".npy")] = npy.mapped(path)
            else:
                tables[name] = _of_parquet(path)
    return tables


def _of_parquet(path):
    from pyarrow import parquet  # late: tensorflow-datasets brings it

    table, columns = parquet.read_table(path, partitioning=None), {}
    for key in table.column_names:
        kind = table.schema.field(key).type
        while hasattr(kind, "value_type"):
            kind = kind.value_type
        values = table[key].to_pylist()
        try:
            columns[key] = np.asarray(values, kind.to_pandas_dtype())
        except (TypeError, ValueError) as error:
            raise ValueError(f"column {key}: rows of several lengths, or no numbers") from error
    return columns


class Form(NamedTuple):
    """Which columns of a table are what, and how their rows lie.

    rows: {name in the records: (column, whether its rows lie as those of the sample)}; the sample
      comes first, as `values` or `image`, the others are its conditions.
    label: its column, or None.
    """

    rows: dict
    label: str | None
    layout: str
    store: np.dtype

    def __call__(self, table, i, where):
        """Returns row `i` of a table as the tensors of a record; any fault names `where`."""
        tensors = {}
        for name, (column, placed) in self.rows.items():
            row = np.asarray(table[column][i])
            if row.dtype.kind not in "biuf":
                raise ValueError(f"{where}: {column} is of {row.dtype}, not of numbers")
            if not np.isfinite(row).all():
                raise ValueError(f"{where}: {column} has values that are not finite")
            tensors[name] = self._stored(row, placed or row.ndim == 3)
        for name, row in tensors.items():
            tokens = tensors.get(name.removesuffix(conditions.MASK), row)
            if name.endswith(conditions.MASK) and tokens.ndim == 2:
                conditions.check_mask(where, name, row, tokens.shape[:1])
        return tensors

    def _stored(self, row, placed):
        if row.dtype == bool:  # of a picture black and white
            row = row.astype(np.uint8) * (255 if placed else 1)
        if row.dtype != np.uint8:
            row = row.astype(self.store if row.dtype.kind == "f" or placed else np.int32)
        return self._placed(row) if placed else row

    def _placed(self, row):
        """Returns a row as (h, w, c); that of a signal has h = 1."""
        if row.ndim == 1:
            return row[None, :, None]
        if row.ndim == 2 and self.layout == "nhw":
            return row[..., None]
        row = np.moveaxis(row, 0, -1) if self.layout == "nchw" else row
        return row if row.ndim == 3 else row[None]


def form_of(args, tables):
    """Chooses the columns of tables that are alike: a `Form`.

    Raises:
      ValueError: there is no sample, or tables differ; in a line.
    """
    (first, table), *_ = tables.items()
    for name, other in tables.items():
        for key in {*table, *other}:
            shapes = [t[key].shape[1:] if key in t else "missing" for t in (table, other)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{name}: {key} is {shapes[1]}, in {first} {shapes[0]}")
        if len({len(array) for array in other.values()}) > 1:
            counts = ", ".join(f"{len(array)} of {key}" for key, array in other.items())
            raise ValueError(f"{args.input}: {name} has not a row for each: {counts}")
    keys = [args.key] if args.key else [key for key in KEYS if key in table]
    if len(keys) != 1 or keys[0] not in table:
        there = ", ".join(table)
        raise ValueError(f"{args.input}: --key has to name the array of samples, one of {there}")
    label_keys = [args.label_key] if args.label_key else [k for k in labels.KEYS if k in table][:1]
    sample, label = table[keys[0]], label_keys[0] if label_keys else None
    if not {*label_keys} <= table.keys():
        raise ValueError(f"{args.input}: --label_key {label} is none of {', '.join(table)}")
    if not 2 <= sample.ndim <= 4 or sample.dtype.kind not in "biuf":
        raise ValueError(f"{args.input}: {keys[0]} is {sample.dtype} {sample.shape}, not numbers "
                         "(N, L), (N, L, C) or (N, h, w, c)")  # fmt: skip
    rows = {"image" if sample.dtype == np.uint8 else "values": (keys[0], True)}
    more = [name for name in table if name not in (keys[0], label)]
    for name in more if args.conditions is None else args.conditions:
        if name not in more:
            raise ValueError(f"--conditions: {name} is none of {', '.join(more) or 'none'}")
        beside = table.get(name.removesuffix(conditions.MASK), sample)  # of a mask: its tokens
        of_tokens = name.endswith(conditions.MASK) and beside.ndim == table[name].ndim + 1 == 3
        rows[name] = (name, not of_tokens and table[name].shape[1:] == sample.shape[1:])
    return Form(rows, label, args.layout, np.dtype(args.store))


def write(args, tables, root):
    """Writes tables {path: {column: array}} as records; returns whether they are complete."""
    form = form_of(args, tables)
    key, (column, _) = next(iter(form.rows.items()))

    def where(row):
        return f"{root}/{row[0]}, record {row[1]}"

    rows_of = {}
    for split, names in labels.by_split([*tables]).items():
        rows = [(name, i) for name in names for i in range(len(tables[name][column]))]
        rows_of[split] = [(row, label_of(form, tables[row[0]], row[1], where(row))) for row in rows]
    classes, items = labels.numbered(rows_of, args, where)

    def example(item):
        (name, i), label = item
        return dataset.example(label, **form(tables[name], i, where((name, i))))

    first = next(iter(items.values()))
    looked = [example(first[i])[key] for i in order.spread(len(first), LOOKED_AT)]
    more = {name: row for name, row in example(first[0]).items() if name not in (key, "label")}
    more = {name: (row.shape, row.dtype) for name, row in more.items()}
    print(describe(key, np.stack(looked), classes, [*more], [*items]), flush=True)
    told = ", ".join(f"{name} {dtype} {shape}" for name, (shape, dtype) in more.items())
    print(f"conditions: {told or 'none'}", flush=True)
    return shards.make(
        args, functools.partial(map, example), key=key, shape=looked[0].shape,
        dtype=looked[0].dtype, classes=classes, items=items,
        names={split: [f"{n}:{i}" for (n, i), _ in rows] for split, rows in items.items()},
        settings={"source": "values", "columns": [*form.rows], "layout": form.layout,
                  "labels": labels.digest(items)}, conditions=more,
    )  # fmt: skip


def label_of(form, table, i, where):
    """Returns the label of row `i` of a table as `labels.read` does; None without classes."""
    return labels.read(where, np.asarray(table[form.label][i]).tolist()) if form.label else None


def describe(key, samples, classes, more, splits):
    """Writes what a YAML file says of samples (N, h, w, c), of values with mean and deviation, of
    the names `more` of what lies beside, and of `splits`."""
    (_, h, w, c), count = samples.shape, classes if isinstance(classes, int) else len(classes)
    size = str(h) if h == w else f"[{h}, {w}]"
    lines = [f"image_size: {size}", f"image_channels: {c}", f"num_classes: {count}", "vae: none"]
    masks = [f"{name}{conditions.MASK}" for name in more]
    if names := [name for name in more if name not in masks]:
        lines += [f"conditions: [{', '.join(names)}]", "condition_shapes: []"]
        lines += [f"condition_split: {'val' if 'val' in splits else splits[0]}"]
    text = "\n".join(["dataset:", *(f"  {line}" for line in lines)])
    if key == "image":
        return text
    flat = samples.astype(np.float64).reshape(-1, c)
    if not (std := flat.std(axis=0)).all():
        raise ValueError(f"channel {int(np.argmin(std))} is the same everywhere: leave it out")
    more = moments.yaml_lines(flat.mean(axis=0), std).removeprefix("dataset:\n")
    return f"values from {flat.min():.4g} to {flat.max():.4g}\n{text}\n  float_values: true\n{more}"
