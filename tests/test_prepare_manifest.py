"""What a set says of itself, its members, labels and splits, is read before its folders are."""

import csv
import io
import json
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import test_prepare_foreign as foreign
import test_prepare_tables as tables
from PIL import Image
from pyarrow import parquet

from scripts import prepare_dataset
from scripts.prepare import labels, manifest
from utils import dataset, pictures

SIZE = 8
LABELS = [i % 3 for i in range(12)]


def prepare(source, output, *more, status=0, command="images"):
    argv = [command, f"--input={source}", f"--output={output}", f"--image_size={SIZE}"]
    argv += ["--vae=none", "--workers=2", "--preview=0", *more]
    assert prepare_dataset.main(argv) == status


def refused(capsys, source, output, *more, **how):
    prepare(source, output, *more, status=1, **how)
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def read(output):
    records = dataset.open_records(output)
    batch = records.read(np.arange(records.num_records))
    return batch["image"][:, 0, 0, 0].tolist(), batch["label"].tolist(), records.num_classes


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((SIZE, SIZE, 3), value, np.uint8)).save(path)


def bundles(root, folder=""):
    """12 pictures, the value 20 i each, in bundles of 6; their names."""
    names = [f"0000{i // 6}/img{i:08d}.png" for i in range(12)]
    for i, name in enumerate(names):
        save(root / folder / name, 20 * i)
    return names


def edm(root, rows):
    (root / "dataset.json").write_text(json.dumps({"labels": rows}))


def metadata_csv(root, rows):
    with open(root / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("file_name", "text", "label"), *([n, "x", y] for n, y in rows)]
        )


def metadata_jsonl(root, rows):
    lines = [json.dumps({"file_name": name, "label": label}) + "\n" for name, label in rows]
    (root / "metadata.jsonl").write_text("".join(lines))


def metadata_parquet(root, rows):
    names, values = zip(*rows, strict=True)
    parquet.write_table(pa.table({"file_name": names, "label": values}), root / "metadata.parquet")


@pytest.mark.parametrize("write", [edm, metadata_csv, metadata_jsonl, metadata_parquet])
@pytest.mark.parametrize("packed", [False, True])
def test_labels_are_those_of_the_list(tmp_path, write, packed, capsys):
    root = tmp_path / "set"
    names = bundles(root)
    write(root, list(zip(names, LABELS, strict=True)))
    save(root / "00000" / "other.png", 0)
    if packed:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for path in root.rglob("*.*"):
                archive.write(path, path.relative_to(root))
        root = tmp_path / "set.zip"
    prepare(root, tmp_path / "out")
    assert read(tmp_path / "out") == ([20 * i for i in range(12)], LABELS, 3)
    assert "1 that no list of labels names" in capsys.readouterr().out
    prepare(root, tmp_path / "out", "--num_classes=5", "--overwrite")
    assert read(tmp_path / "out")[2] == 5


def test_lists_of_splits_and_of_names(tmp_path):
    root = tmp_path / "set"
    for split in ("train", "test"):
        rows = zip(bundles(root / split), [("owl", "cat")[i % 2] for i in range(12)], strict=True)
        metadata_jsonl(root / split, rows)
    prepare(root, tmp_path / "out")
    assert read(tmp_path / "out")[1] == [1, 0] * 6
    assert dataset.open_records(tmp_path / "out", "test").num_records == 12
    rows = [(f"{s}/{n}", i % 2) for s in ("train", "val") for i, n in enumerate(bundles(root, s))]
    for path in root.rglob("metadata.jsonl"):
        path.unlink()
    edm(root, rows)
    prepare(root, tmp_path / "two")
    assert dataset.open_records(tmp_path / "two", "val").num_records == 12


def test_lists_without_labels(tmp_path, capsys):
    root = tmp_path / "set"
    names = bundles(root)
    (root / "metadata.csv").write_text("\n".join(["file_name,text", *(f"{n},x" for n in names)]))
    assert "--labels=folders takes the class" in refused(capsys, root, tmp_path / "out")
    prepare(root, tmp_path / "out", "--labels=folders")
    assert read(tmp_path / "out")[2] == 2
    (root / "metadata.csv").unlink()
    (root / "dataset.json").write_text('{"labels": null}')
    prepare(root, tmp_path / "none")
    assert read(tmp_path / "none") == ([20 * i for i in range(12)], [0] * 12, 0)
    assert prepare_dataset.main(["preview", f"--root={tmp_path / 'none'}"]) == 0
    (root / "dataset.json").write_text('{"name": "of another kind"}')
    prepare(root, tmp_path / "folders")
    assert read(tmp_path / "folders")[2] == 2


def test_lists_that_are_refused(tmp_path, capsys):
    root, output = tmp_path / "set", tmp_path / "out"
    rows = list(zip(bundles(root), LABELS, strict=True))
    for wrong, said in (
        ([*rows, ("gone.png", 0)], "dataset.json names gone.png, which is not there"),
        ([*rows, rows[0]], f"names {rows[0][0]} twice"),
        ([*rows[1:], (rows[0][0], None)], f"no label for {rows[0][0]}"),
        ([(name, [0.5, 1.5]) for name, _ in rows], "'label' is [0.5, 1.5], not a whole number"),
    ):
        edm(root, wrong)
        assert said in refused(capsys, root, output)
    (root / "dataset.json").write_text("{")
    assert "dataset.json: not a list of labels" in refused(capsys, root, output)
    edm(root, [*rows, ("gone.png", 0)])
    prepare(root, output, "--on_bad_image=skip")
    assert read(output)[1] == LABELS


def test_flat_folders_and_those_of_kaggle(tmp_path, capsys):
    flat = tmp_path / "flat"
    for i in range(3):
        save(flat / f"{i}.png", i)
    prepare(flat, tmp_path / "out")
    assert read(tmp_path / "out") == ([0, 1, 2], [0] * 3, 0)
    root = tmp_path / "kaggle"
    inner = root / "ILSVRC" / "Data" / "CLS-LOC"
    for i, name in enumerate(("n02", "n01", "n02")):
        save(inner / "train" / name / f"{name}_{i}.JPEG", 10 * i)
        save(inner / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", 10 * i)
        save(inner / "test" / f"ILSVRC2012_test_{i:08d}.JPEG", 10 * i)
    assert "LOC_val_solution.csv of Kaggle is not" in refused(capsys, root, tmp_path / "k")
    rows = [f"ILSVRC2012_val_{i:08d},{n} 1 2 3 4 {n} 5 6 7 8" for i, n in enumerate(("n02", "n01"))]
    path = root / "LOC_val_solution.csv"
    path.write_text("\n".join(["ImageId,PredictionString", *rows]))
    assert "00000002.JPEG" in refused(capsys, root, tmp_path / "k")
    path.write_text(
        "\n".join(["ImageId,PredictionString", *rows, rows[0].replace("00000,", "00002,")])
    )
    prepare(root, tmp_path / "k")
    assert read(tmp_path / "k")[1:] == ([0, 1, 1], 2)
    val = dataset.open_records(tmp_path / "k", "val")
    assert val.read(np.arange(3))["label"].tolist() == [1, 0, 1]


# Tables and shards -----------------------------------------------------------------------------


def save_to_disk(root, *names):
    rows = tables.table()
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        with pa.ipc.new_stream(root / name, rows.schema) as writer:
            writer.write_table(rows)


def test_save_to_disk_says_which_files_are_the_data(tmp_path, capsys):
    root, output = tmp_path / "set", tmp_path / "out"
    data = "data-00000-of-00001.arrow"
    for split in ("train", "extra", "old"):
        save_to_disk(root / split, data, "cache-0123456789abcdef.arrow", "tmp123.arrow")
        state = {"_data_files": [{"filename": data}]}
        (root / split / "state.json").write_text(json.dumps(state))
    (root / "dataset_dict.json").write_text('{"splits": ["train", "extra"]}')
    tables.prepare(root, output)
    tables.check(output)
    tables.check(output, "extra")
    said = capsys.readouterr().out
    assert "that state.json does not name" in said and "that dataset_dict.json does not" in said
    (root / "train" / data).unlink()
    assert f"names {data}, which is not there" in tables.refused(root, tmp_path / "x", capsys)
    save_to_disk(tmp_path / "cache", "flowers-train.arrow", "cache-0123456789abcdef_1_of_2.arrow")
    tables.prepare(tmp_path / "cache", tmp_path / "y")
    tables.check(tmp_path / "y")


README = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/*.parquet
  - {split: extra, path: [more/small.parquet]}
- config_name: large
  data_dir: large
---
"""


def test_sets_of_a_repository_are_asked_for_by_name(tmp_path, capsys):
    root = tmp_path / "set"
    for name in ("small/a.parquet", "large/train.parquet", "more/small.parquet"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(tables.table(), root / name)
    line = tables.refused(root, tmp_path / "x", capsys)
    assert "have the same labels in the same order" in line
    (root / "README.md").write_text(README)
    assert "--config_name names one of small, large" in tables.refused(root, tmp_path / "x", capsys)
    tables.prepare(root, tmp_path / "small", "--config_name=small")
    tables.check(tmp_path / "small", "extra")
    tables.check(tmp_path / "small")
    assert "no config 'x'" in tables.refused(root, tmp_path / "x", capsys, "--config_name=x")
    (root / "README.md").unlink()
    for part in ("16px", "32px"):
        (root / part).mkdir()
        rows = tables.table(slice(*((0, 6) if part == "16px" else (1, 7))))
        parquet.write_table(rows, root / part / "train-00000-of-00001.parquet")
    for name in ("small", "large", "more"):
        next((root / name).iterdir()).unlink()
    line = tables.refused(root, tmp_path / "x", capsys)
    assert "32px both have train-00000-of-00001: several sets?" in line


def test_two_encodings_are_refused_and_parts_are_not(tmp_path, capsys):
    root = tmp_path / "set"
    for folder in ("vae-sd", "vae-sd-ema"):
        (root / folder).mkdir(parents=True)
        foreign.an_index(root / folder)
    line = foreign.refused("arrays", root, tmp_path / "out", capsys)
    assert "two versions of one set? --input names" in line
    for old, new in (("vae-sd", "part0"), ("vae-sd-ema", "part1")):
        (root / old).rename(root / new)
    foreign.prepare("arrays", root, tmp_path / "out")
    assert dataset.open_records(tmp_path / "out").num_records == 24


def test_names_of_shards_tell_the_splits_and_what_lacks(tmp_path, capsys):
    manifest.members(tmp_path, ["train-00001-of-00003.tar"], pictures.Listing())
    assert "1 of the 3 parts of train are there" in capsys.readouterr().out
    names = [f"{word}-00000-of-00001.parquet" for word in ("train", "extra")]
    _, said = manifest.members(tmp_path, names, pictures.Listing())
    assert said == {names[1]: "extra"}
    assert manifest.members(tmp_path, names[1:], pictures.Listing())[1] == {}


@pytest.mark.parametrize(
    "written, label",
    [("3.0", 3), ("3.", 3), ("tensor(3)", 3), ("tensor(3, device='cuda:0')", 3), ("-1", -1),
     ("tensor([3])", 3), ("np.float32(3.0)", 3), ("[3]", 3), ("b'3'", 3), (" 03\n", 3),
     ("cat3", "cat3"), ("0.5", "0.5"), ("crane(2)", "crane(2)"), ([0, 0, 1], 2), ([0.0, 1.0], 1)],
)  # fmt: skip
def test_labels_as_they_are_written(written, label):
    assert labels.read("here", written) == label


@pytest.mark.parametrize("written", ["", "tensor(0.5)", "tensor([1, 2])", [1, 1], [0, 2], [0, 0]])
def test_labels_that_are_none(written):
    with pytest.raises(ValueError, match="^here: "):
        labels.read("here", written)


def test_endings_of_two_parts_and_names_in_text(tmp_path, capsys):
    records = [{"input.png": foreign.png(i), "target.cls": b"%d.0" % (i % 2)} for i in range(4)]
    foreign.tar(tmp_path / "a.tar", *records)
    foreign.prepare("webdataset", tmp_path / "a.tar", tmp_path / "out")
    assert foreign.everything(tmp_path / "out")["label"].tolist() == [0, 1, 0, 1]
    foreign.tar(tmp_path / "b.tar", *({"png": foreign.png(i), "txt": b"cat"} for i in range(2)))
    line = foreign.refused("webdataset", tmp_path / "b.tar", tmp_path / "b", capsys)
    assert "--label_key=txt" in line
    foreign.prepare("webdataset", tmp_path / "b.tar", tmp_path / "b", "--label_key=txt")
    assert foreign.names_of(tmp_path / "b") == ["cat"]
    foreign.tar(tmp_path / "c.tar", {"cls": b"0"}, {"png": foreign.png(1), "cls": b"0"})
    foreign.prepare("webdataset", tmp_path / "c.tar", tmp_path / "c", "--on_bad_image=skip")
    assert dataset.open_records(tmp_path / "c").num_records == 1


def test_rows_without_a_picture_are_skipped(tmp_path, capsys):
    images = [{"bytes": tables.png(p), "path": None} for p in tables.PICTURES]
    images[3], images[7] = {"bytes": None, "path": None}, {"bytes": None, "path": "gone.png"}
    parquet.write_table(tables.table(images=images), tmp_path / "a.parquet")
    tables.prepare(tmp_path / "a.parquet", tmp_path / "out", "--on_bad_image=skip")
    tables.check(tmp_path / "out", rows=~np.isin(np.arange(12), (3, 7)))
    assert "a.parquet, row 3: no bytes" in capsys.readouterr().out


def test_a_file_that_is_no_array_is_called_so(tmp_path, capsys):
    np.save(tmp_path / "labels.npy", foreign.LABELS)
    for content, said in ((b"\x80\x04N.", "a pickle"), (b"PK\x03\x04", "a .npz"), (b"", "empty")):
        (tmp_path / "latents.npy").write_bytes(content)
        line = foreign.refused("arrays", tmp_path, tmp_path / "out", capsys)
        assert f"no .npy but {said}" in line and "unsafe" not in line
    file = io.BytesIO()
    np.save(file, foreign.MEAN)
    (tmp_path / "latents.npy").write_bytes(file.getvalue())
    np.save(tmp_path / "labels.npy", np.eye(3, dtype=int)[foreign.LABELS])
    foreign.prepare("arrays", tmp_path, tmp_path / "out")
    assert foreign.everything(tmp_path / "out")["label"].tolist() == foreign.LABELS.tolist()
