"""Preparing datasets from Hugging Face's tables: parquet files, and what `save_to_disk` writes."""

import builtins
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from scripts import prepare_dataset
from scripts.prepare import labels
from utils import dataset

SIZE = 8
PICTURES = np.random.default_rng(0).integers(0, 256, (12, SIZE, SIZE, 3), np.uint8)
LABELS = np.arange(12) * 5 % 3
NAMES = ["cat", "a dog", "owl"]


def png(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def table(rows=slice(None), named=True, images=None, **columns):
    """A table as the library `datasets` writes it; `named`: with its metadata."""
    images = images or [{"bytes": png(p), "path": None} for p in PICTURES[rows]]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    kind = kind if isinstance(images[0], dict) else pa.binary()
    columns = columns or {"label": LABELS[rows]}
    features = {"image": {"_type": "Image"}}
    features |= {name: {"names": NAMES, "_type": "ClassLabel"} for name in columns}
    found = pa.table({"image": pa.array(images, kind), **columns})
    info = {"huggingface": json.dumps({"info": {"features": features}})}
    return found.replace_schema_metadata(info if named else None)


def prepare(source, output, *more, status=0):
    argv = ["huggingface", f"--input={source}", f"--output={output}", f"--image_size={SIZE}"]
    argv += ["--vae=none", "--workers=2", "--preview=0", "--records_per_shard=5"]
    assert prepare_dataset.main([*argv, *more]) == status


def refused(source, output, capsys, *more):
    prepare(source, output, *more, status=1)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert not dataset.is_dataset(output)
    return line


def check(root, split="train", rows=slice(None)):
    records = dataset.open_records(root, split)
    found = records.read(np.arange(records.num_records))
    np.testing.assert_array_equal(found["image"], PICTURES[rows])
    np.testing.assert_array_equal(found["label"], LABELS[rows])


def names_of(root):
    return (root / "label.labels.txt").read_text().splitlines()


def test_parquet_in_parts_and_splits(tmp_path, capsys):
    data = tmp_path / "in" / "data"
    data.mkdir(parents=True)
    for part, rows in enumerate((slice(0, 5), slice(5, 12))):
        path = data / f"train-{part:05d}-of-00002-0123abcd.parquet"
        parquet.write_table(table(rows), path, row_group_size=2)
    parquet.write_table(table(slice(3, 8)), data / "validation-00000-of-00001.parquet")
    (tmp_path / "in" / "README.md").write_text("---")
    prepare(tmp_path / "in", tmp_path / "set")
    check(tmp_path / "set")
    check(tmp_path / "set", "val", slice(3, 8))
    assert names_of(tmp_path / "set") == NAMES
    assert "12 train, 5 val images, 'image' and 'label'; left out 1" in capsys.readouterr().out


def test_what_save_to_disk_writes(tmp_path):
    for split, rows in (("train", slice(0, 9)), ("test", slice(9, 12))):
        path = tmp_path / "in" / split / "data-00000-of-00001.arrow"
        path.parent.mkdir(parents=True)
        content = table(rows)
        with pa.ipc.new_stream(path, content.schema) as writer:
            writer.write_table(content, max_chunksize=2)
    prepare(tmp_path / "in", tmp_path / "set")
    check(tmp_path / "set", "train", slice(0, 9))
    check(tmp_path / "set", "test", slice(9, 12))


def test_tables_of_others(tmp_path):
    """No metadata, plain bytes, names of classes as text; a picture that is a file of its own."""
    images = [png(picture) for picture in PICTURES]
    kinds = [("b", "c", "a")[label] for label in LABELS]
    parquet.write_table(table(named=False, images=images, label=kinds), tmp_path / "a.parquet")
    prepare(tmp_path / "a.parquet", tmp_path / "set")
    assert names_of(tmp_path / "set") == ["a", "b", "c"]
    records = dataset.open_records(tmp_path / "set")
    np.testing.assert_array_equal(records.read(np.arange(12))["label"], (LABELS + 1) % 3)
    (tmp_path / "x.png").write_bytes(images[0])
    pairs = [{"bytes": image, "path": "gone"} for image in images]
    pairs[0] = {"bytes": None, "path": str(tmp_path / "x.png")}
    parquet.write_table(table(images=pairs), tmp_path / "a.parquet")
    prepare(tmp_path / "a.parquet", tmp_path / "other")
    check(tmp_path / "other")


def test_columns_are_asked_for(tmp_path, capsys):
    path, output = tmp_path / "a.parquet", tmp_path / "set"
    parquet.write_table(table(fine=LABELS, coarse=LABELS * 0), path)
    line = refused(path, output, capsys)
    assert line.endswith("--label_key has to be named: one of fine, coarse")
    assert "'x' is no column" in refused(path, output, capsys, "--label_key=x")
    prepare(path, output, "--label_key=fine")
    check(output)


REFUSED = {
    "row 1: label -1; labels are 0..2": {"label": [0, -1]},
    "row 1: label 3; labels are 0..2": {"label": [0, 3]},
    "row 1: label 'x' is a name": {"label": ["0", "x"]},
    "row 1: 'label' is None": {"label": [0, None]},
    "row 1: only the path of an image is stored, gone: no": {
        "images": [{"bytes": png(PICTURES[0])}, {"path": "gone"}],
    },
    "row 1: no bytes of a picture but NoneType": {"images": [{"bytes": png(PICTURES[0])}, {}]},
    "cannot read the image": {"images": [{"bytes": png(PICTURES[0])[:60]}] * 2},
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_tables_that_are_refused(tmp_path, line, capsys):
    path = tmp_path / "train.parquet"
    parquet.write_table(table(slice(0, 2), **REFUSED[line]), path)
    found = refused(path, tmp_path / "set", capsys)
    assert line in found and str(path) in found


def test_files_of_tables_that_are_refused(tmp_path, capsys, monkeypatch):
    source, output = tmp_path / "in", tmp_path / "set"
    source.mkdir()
    assert "no .parquet or .arrow" in refused(source, output, capsys)
    path = source / "a.parquet"
    parquet.write_table(table(), path, row_group_size=6, compression="none")
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert f"{path}: not a table of Arrow" in refused(source, output, capsys)
    place = whole.index(png(PICTURES[7]))
    path.write_bytes(whole[:place] + b"\0" * 30 + whole[place + 30 :])
    line = refused(source, output, capsys)
    assert f"cannot read the image {path}, row 7" in line
    prepare(source, output, "--on_bad_image=skip")
    check(output, rows=np.arange(12) != 7)
    parquet.write_table(table(cls=LABELS), source / "b.parquet")
    assert "b.parquet has the columns image, cls" in refused(source, tmp_path / "other", capsys)
    importing = builtins.__import__

    def without(name, *arguments):
        if name == "pyarrow":
            raise ImportError(name)
        return importing(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install pyarrow" in refused(source, tmp_path / "other", capsys)


# Splits and labels


def test_splits_are_told_by_a_word():
    names = ["val/train.npz", "dev.npz", "a/x-testing-0.tar", "x_train_1.tar", "constrain.npz"]
    found = labels.by_split(names)
    assert found == {
        "train": ["val/train.npz", "x_train_1.tar", "constrain.npz"],
        "val": ["dev.npz"],
        "test": ["a/x-testing-0.tar"],
    }
    assert list(labels.by_split(names, ["test", "train"])) == ["test", "train"]
    with pytest.raises(ValueError, match="no 'valid', only train, val, test"):
        labels.by_split(names, ["valid"])


def where(split, i):
    return f"{split} {i}"


def test_labels_of_names():
    found = {"train": ["b", "a", "b"], "val": ["a"]}
    assert labels.settle(found, where) == (["a", "b"], {"train": [1, 0, 1], "val": [0]})
    with pytest.raises(ValueError, match="val 1: no such class in the first split: 'c'"):
        labels.settle(found | {"val": ["a", "c"]}, where)


@pytest.mark.parametrize(
    "found, count, line",
    [
        ({"train": [0, 2]}, None, "1 of the labels 0..2 have no record in 'train': 1; --num_cl"),
        ({"train": [1, 2]}, None, "1 of the labels 0..2 have no record in 'train': 0; --num_cl"),
        (
            {"train": [0, 10**9]},
            None,
            "999999999 of the labels 0..1000000000 .* 1, 2, 3, 4, 5, ...",
        ),
        ({"train": [0, 1], "val": [2]}, None, "1 of the labels 0..2 have no record in 'train': 2"),
        ({"train": [0], "val": [0, -1]}, None, "val 1: label -1; .*--splits leaves it out"),
        ({"train": [0, 2]}, 2, "train 1: label 2; labels are 0..1"),
        ({"train": []}, None, "no records in the split 'train'"),
        ({"train": [0], "val": []}, None, "no records in the split 'val'"),
    ],
)
def test_labels_with_holes_or_out_of_range(found, count, line):
    with pytest.raises(ValueError, match=line):
        labels.settle(found, where, count)


def test_holes_that_are_meant_are_told(capsys):
    assert labels.settle({"train": [0, 2]}, where, 4) == (4, {"train": [0, 2]})
    assert "2 of the labels 0..3 have no record in 'train': 1, 3" in capsys.readouterr().out
    assert labels.settle({"train": [0]}, where, names=["a", "b"])[0] == ["a", "b"]
