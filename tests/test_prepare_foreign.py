"""Preparing datasets from arrays, WebDataset's shards and Hugging Face's tables."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from scripts import prepare_dataset
from utils import dataset

SIZE = 8
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (12, SIZE, SIZE, 3), np.uint8)
LABELS = np.arange(12) * 5 % 3  # 0, 2, 1, 0, ...
MEAN = (RNG.standard_normal((12, 4, 6, 6)) / 0.18215).astype(np.float32)  # NCHW
STD = np.abs(RNG.standard_normal((12, 4, 6, 6))).astype(np.float32)
MOMENTS = np.concatenate([MEAN, STD], axis=1)


def prepare(command, source, output, *more, status=0):
    argv = [command, f"--input={source}", f"--output={output}", "--workers=2", "--preview=0"]
    if command != "arrays" and "latents" not in source.name:
        argv += [f"--image_size={SIZE}", "--vae=none"]
    assert prepare_dataset.main([*argv, *more]) == status


def refused(command, source, output, capsys, *more):
    """The line of a preparation that is refused; it leaves no dataset."""
    prepare(command, source, output, *more, status=1)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert not dataset.is_dataset(output)
    return line


def everything(root, split="train"):
    records = dataset.open_records(root, split)
    return records.read(np.arange(records.num_records))


def names_of(root):
    return (root / "label.labels.txt").read_text().split()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# NumPy's arrays


def nothing_of_deviation(mean):
    return np.concatenate([mean, np.zeros_like(mean)], axis=1)


def npz(folder):
    np.savez(folder / "train.npz", latents=MEAN.transpose(0, 2, 3, 1), labels=LABELS)
    np.savez(folder / "validation.npz", latents=MEAN[:2].transpose(0, 2, 3, 1), labels=LABELS[:2])
    return nothing_of_deviation(MEAN), 1e-6


def npz_of_moments(folder):
    np.savez_compressed(folder / "a.npz", moments=MOMENTS.astype("f2"), labels=LABELS[:, None])
    return MOMENTS, 1e-3


def pairs_of_npy(folder):
    for part, rows in enumerate((slice(0, 7), slice(7, 12))):
        np.save(folder / f"latents_{part}.npy", MOMENTS[rows])
        np.save(folder / f"labels_{part}.npy", LABELS[rows].astype(np.float32))
    return MOMENTS, 0


def a_pair_in_a_folder_that_is_called_so(folder):
    (folder / "latents").mkdir()
    np.save(folder / "latents" / "moments.npy", MOMENTS)
    np.save(folder / "latents" / "labels.npy", LABELS)
    return MOMENTS, 0


def one_npy_for_each(folder):
    for name in ("imagenet256_features", "imagenet256_labels"):
        (folder / name).mkdir()
    for i in range(12):
        np.save(folder / f"imagenet256_features/{i:02d}.npy", MEAN[i : i + 1])
        np.save(folder / f"imagenet256_labels/{i:02d}.npy", LABELS[i : i + 1])
    return nothing_of_deviation(MEAN), 1e-6


def an_index(folder):
    (folder / "00000").mkdir()
    names = [f"00000/img-mean-std-latents-{i:08d}.npy" for i in range(12)]
    for name, moments in zip(names, MOMENTS, strict=True):
        np.save(folder / name, moments)
    pairs = [[name, int(label)] for name, label in zip(names, LABELS, strict=True)]
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return MOMENTS, 0


MAKERS = (
    npz, npz_of_moments, pairs_of_npy, a_pair_in_a_folder_that_is_called_so, one_npy_for_each,
    an_index,
)  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
def test_latents_in_arrays(tmp_path, make, capsys):
    source = tmp_path / "in"
    source.mkdir()
    expected, tolerance = make(source)
    prepare("arrays", source, tmp_path / "set", "--records_per_shard=5")
    found = everything(tmp_path / "set")
    expected = expected.transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found["moments"], expected, rtol=tolerance, atol=0)
    np.testing.assert_array_equal(found["label"], LABELS)
    assert dataset.open_records(tmp_path / "set").num_classes == 3
    assert "12 records in 3 shards (train)" in capsys.readouterr().out
    if make is npz:
        np.testing.assert_array_equal(everything(tmp_path / "set", "val")["label"], LABELS[:2])


def test_arrays_that_are_scaled_and_what_they_are_called(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", samples=MEAN * 0.18215, labels=LABELS)
    prepare("arrays", tmp_path / "a.npz", tmp_path / "set")
    assert "scaled already?" in (out := capsys.readouterr().out) and "--scaled_by=0.18215" in out
    more = ["--scaled_by=0.18215", "--num_classes=7", "--overwrite"]
    prepare("arrays", tmp_path / "a.npz", tmp_path / "set", *more)
    found = everything(tmp_path / "set")["moments"]
    np.testing.assert_allclose(found[..., :4], MEAN.transpose(0, 2, 3, 1), rtol=1e-6)
    assert dataset.open_records(tmp_path / "set").num_classes == 7
    assert "scaled already?" not in (out := capsys.readouterr().out)
    assert "4 of the labels 0..6 have no record in 'train': 3, 4, 5, 6" in out


WRONG = {
    "logarithms of variances": {"latents": np.concatenate([MEAN, -1 - STD], 1), "labels": LABELS},
    "1 of the labels 0..3 have no record": {"latents": MEAN, "labels": LABELS + 1},
    "a.npz, record 0: label -1; labels begin at 0": {"latents": MEAN, "labels": LABELS - 1},
    "(12, 4, 6, 6) and labels (11,) do not fit": {"latents": MEAN, "labels": LABELS[:11]},
    "(12, 144) and labels (12,) do not fit": {"latents": MEAN.reshape(12, -1), "labels": LABELS},
    "holds arr_0, not 'labels'": {"arr_0": MEAN},
    "uint8, not the floats": {"latents": MEAN.astype(np.uint8), "labels": LABELS},
    "'label' is 0.5": {"latents": MEAN, "labels": LABELS + 0.5},
    "which axis of (6, 6, 6)": {"latents": np.ones((12, 6, 6, 6), "f4"), "labels": LABELS},
    "3 channels are not": {"moments": MEAN[:, :3], "labels": LABELS},
    "record 11: latents that are not finite": {
        "latents": np.where(np.arange(12)[:, None, None, None] == 11, np.nan, MEAN),
        "labels": LABELS,
    },
    "it holds Python's objects, not numbers": {"latents": MEAN, "labels": np.array([{}], object)},
}


@pytest.mark.parametrize("line", WRONG)
def test_arrays_that_are_refused(tmp_path, line, capsys):
    np.savez(tmp_path / "a.npz", **WRONG[line])
    assert line in refused("arrays", tmp_path, tmp_path / "set", capsys)


def test_files_of_arrays_that_are_refused(tmp_path, capsys):
    source, output = tmp_path / "in", tmp_path / "set"
    source.mkdir()
    assert "looked for dataset.json" in refused("arrays", source, output, capsys)
    path = source / "latents.npy"
    np.save(path, MEAN)
    assert f"{source / 'labels.npy'} is expected" in refused("arrays", source, output, capsys)
    np.save(source / "labels.npy", LABELS)
    path.write_bytes(path.read_bytes()[:-100])
    line = refused("arrays", source, output, capsys)
    assert line.startswith(f"prepare_dataset: {path}: not an array of latents")
    (source / "dataset.json").write_text('{"labels": [["gone.npy", 0]]}')
    assert "names gone.npy, which is not there" in refused("arrays", source, output, capsys)


# WebDataset's shards


def png(i, picture=None):
    file = io.BytesIO()
    Image.fromarray(PICTURES[i] if picture is None else picture).save(file, "PNG")
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tar(path, *records, mode="w"):
    """Each record: {ending: bytes}, under the names 000, 001, ..."""
    with tarfile.open(path, mode) as archive:
        for i, record in enumerate(records):
            for ending, content in record.items():
                info = tarfile.TarInfo(f"./{i:03d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def wds(folder, label=lambda i: {"cls": str(LABELS[i]).encode()}, change=None):
    """Two shards of pictures; `change` {number of the record: ...} takes the place of files."""
    folder.mkdir()
    change = change or {}
    records = [{"png": png(i)} | label(i) | change.get(i, {}) for i in range(12)]
    tar(folder / "photos-train-000000.tar", *records[:7])
    tar(folder / "photos-train-000001.tar", *records[7:])
    return folder


def as_json(i):
    names = ("cat", "dog", "owl")
    return {"json": json.dumps({"label": int(LABELS[i]), "kind": names[LABELS[i]]}).encode()}


@pytest.mark.parametrize("form", ["cls", "label", "kind"])
def test_pictures_in_tars(tmp_path, form):
    source = wds(tmp_path / "in", **({} if form == "cls" else {"label": as_json}))
    more = ["--label_key=kind"] if form == "kind" else []
    prepare("webdataset", source, tmp_path / "set", "--records_per_shard=5", *more)
    found = everything(tmp_path / "set")
    np.testing.assert_array_equal(found["image"], PICTURES)
    np.testing.assert_array_equal(found["label"], LABELS)
    if form == "kind":
        assert names_of(tmp_path / "set") == ["cat", "dog", "owl"]


def test_latents_in_tars(tmp_path):
    records = [{"npy": npy(MOMENTS[i]), "cls": b"%d\n" % LABELS[i]} for i in range(12)]
    tar(tmp_path / "latents.tar", *records)
    prepare("webdataset", tmp_path / "latents.tar", tmp_path / "set")
    found = everything(tmp_path / "set")
    np.testing.assert_array_equal(found["moments"], MOMENTS.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(found["label"], LABELS)


NO_LABEL = {"png": png(0)}
REFUSED_TARS = {
    "a.tar:./001.png has no label: there is no .cls": [{"png": png(0), "cls": b"0"}, NO_LABEL],
    "a.tar:./000.cls has a label, and no image": [{"cls": b"0"}],
    "a.tar:./000.png has no label": [{"png": png(0), "json": b'{"y": 0}'}],
    "has the keys y; --label_key names": [{"png": png(0), "json": b'{"y": 0}'}],
    "a.tar:./000.json: not JSON": [{"png": png(0), "json": b"{"}],
    "'label' is [1], not a whole": [{"png": png(0), "json": b'{"label": [1]}'}],
    "a.tar:./001.png: label 'x' is a name": [
        {"png": png(0), "cls": b"0"}, {"png": png(0), "cls": b"x"},
    ],
    "has png and jpg: which": [{"png": png(0), "jpg": png(0), "cls": b"0"}],
    "of latents, others are of images": [NO_LABEL | {"cls": b"0"}, {"npy": b"", "cls": b"0"}],
    "a.tar:./000.png (": [{"png": b"no picture", "cls": b"0"}],
    "no images or latents in it; left out 1": [{"txt": b""}],
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED_TARS)
def test_tars_that_are_refused(tmp_path, line, capsys):
    tar(tmp_path / "a.tar", *REFUSED_TARS[line])
    assert line in refused("webdataset", tmp_path, tmp_path / "set", capsys)


def test_a_name_that_comes_again_is_refused(tmp_path, capsys):
    record = {"png": png(0), "cls": b"0"}
    tar(tmp_path / "a.tar", record, {"png": png(1), "cls": b"0"})
    tar(tmp_path / "a.tar", record, mode="a")
    line = refused("webdataset", tmp_path, tmp_path / "set", capsys)
    assert line.endswith("a.tar:./000.png is there twice")


@pytest.mark.parametrize("kind", ["cut", "cut between", "header", "compressed", "npy"])
def test_damaged_tars_are_named(tmp_path, kind, capsys):
    record = {"npy": npy(MOMENTS[0]), "cls": b"0"}
    path = tmp_path / "latents.tar"
    tar(path, record, record, mode="w:gz" if kind == "compressed" else "w")
    whole = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    if kind == "header":  # which tarfile itself takes for the end
        whole[members[2].offset] ^= 1
    elif kind.startswith("cut"):
        whole = whole[: members[2].offset + 700 * (kind == "cut")]
    elif kind == "npy":
        whole[members[2].offset_data] ^= 1
    path.write_bytes(whole)
    line = refused("webdataset", tmp_path / "latents.tar", tmp_path / "set", capsys)
    where = f"{path}:./001.npy" if kind == "npy" else str(path)
    assert (
        line.startswith(f"prepare_dataset: {where}: ") and "not an array" in line or "cut" in line
    )


def test_a_preparation_from_tars_goes_on(tmp_path, capsys):
    source = wds(tmp_path / "in")
    prepare("webdataset", source, tmp_path / "whole", "--records_per_shard=4")
    broken = wds(tmp_path / "broken", change={9: {"png": png(9)[:60]}})
    output, more = tmp_path / "set", ["--records_per_shard=4"]
    line = refused("webdataset", broken, output, capsys, *more)
    assert f"{broken / 'photos-train-000001.tar'}:./002.png" in line
    first = dataset.shard_path(output, "train", 0, 3)
    before = first.stat().st_mtime_ns
    prepare("webdataset", source, output, *more)
    assert contents(output) == contents(tmp_path / "whole")
    assert first.stat().st_mtime_ns == before, "a finished shard was written again"
    prepare("webdataset", broken, tmp_path / "fewer", "--on_bad_image=skip", *more)
    kept = np.arange(12) != 9
    np.testing.assert_array_equal(everything(tmp_path / "fewer")["label"], LABELS[kept])
    other = wds(tmp_path / "other", label=lambda i: {"cls": str((LABELS[i] + 1) % 3).encode()})
    prepare("webdataset", other, output, *more, status=1)
    assert "begun with other settings (labels:" in capsys.readouterr().err
