"""Preparing datasets from what others have made: published latents, TFDS sets, the digits."""

import os
import pickle
import shutil
import sys
import types
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from scripts import prepare_dataset
from scripts.prepare import tfds as prepare_tfds
from utils import dataset


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Published latents


@pytest.mark.parity
def test_published_latents(golden, tmp_path):
    argv = [
        "pt",
        f"--input={golden / 'latents_pt'}",
        f"--output={tmp_path}",
        "--records_per_shard=4",
    ]
    assert prepare_dataset.main(argv) == 0
    expected = np.load(golden / "latents_pt" / "expected.npz")
    records = dataset.open_records(tmp_path)
    assert records.shape == expected["moments"].shape[1:] and records.num_classes == 1000
    batch = records.read(np.arange(records.num_records))
    np.testing.assert_array_equal(batch["moments"], expected["moments"])
    np.testing.assert_array_equal(batch["label"], expected["labels"])


@pytest.mark.parity
def test_published_latents_in_half_precision(golden, tmp_path):
    argv = ["pt", f"--input={golden / 'latents_pt' / 'train'}", f"--output={tmp_path}"]
    assert prepare_dataset.main([*argv, "--store=float16"]) == 0
    expected = np.load(golden / "latents_pt" / "expected.npz")["moments"]
    batch = dataset.open_records(tmp_path).read(np.arange(len(expected)))
    np.testing.assert_array_equal(batch["moments"], expected.astype(np.float16))


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def test_odd_pt_files_are_named(golden, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "latents"
    shutil.copytree(golden / "latents_pt" / "train", source)
    victim = source / "00000001.pt"
    argv = ["pt", f"--input={source}", f"--output={tmp_path / 'set'}"]
    whole = victim.read_bytes()
    for content in (whole[: len(whole) // 2], b"", pickle.dumps(Malicious())):
        victim.write_bytes(content)
        assert prepare_dataset.main(argv) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert str(victim) in error and not (tmp_path / "hacked").exists()
    victim.write_bytes(whole)
    assert prepare_dataset.main([*argv, "--num_classes=3", f"--output={tmp_path / 'few'}"]) == 1
    assert "--num_classes is 3" in capsys.readouterr().err
    assert prepare_dataset.main(argv) == 0


# Named sets and the digits


def test_cifar10_is_downloaded_and_generated_without_tensorflow(tmp_path, monkeypatch):
    folder = tmp_path / "extracted" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    files, written = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], {}
    for name in files:
        written[name] = rng.integers(0, 256, (4, 3, 32, 32), np.uint8)
        rows = [bytes([i]) + image.tobytes() for i, image in enumerate(written[name])]
        (folder / f"{name}.bin").write_bytes(b"".join(rows))
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n")
    argv = ["tfds", "--name=cifar10", f"--output={tmp_path / 'set'}", "--records_per_shard=4"]
    with mock.patch(
        "tensorflow_datasets.core.download.DownloadManager.download_and_extract",
        lambda manager, url: folder.parent,
    ):
        assert prepare_dataset.main([*argv, f"--data_dir={tmp_path / 'tfds'}"]) == 0
    assert "tensorflow" not in sys.modules
    train, test = (dataset.open_records(tmp_path / "set", split) for split in ("train", "test"))
    assert (train.num_records, test.num_records, train.num_classes) == (20, 4, 10)
    batch = train.read(np.arange(20))
    expected = np.concatenate([written[name] for name in files[:5]]).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(batch["image"], expected)
    np.testing.assert_array_equal(batch["label"], np.tile(np.arange(4), 5))


def imagenette(tmp_path):
    """Prepares it from made-up pictures; returns the exit status."""
    for split in ("train", "val"):
        for label in ("n01440764", "n03888257"):
            folder = tmp_path / "extracted" / "imagenette2-160" / split / label
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (200, 160), (40 * i, 0, 0)).save(folder / f"{i}.JPEG")
    argv = ["tfds", "--name=imagenette/160px-v2", f"--output={tmp_path / 'set'}", "--image_size=32"]
    with mock.patch(
        "tensorflow_datasets.core.download.DownloadManager.download_and_extract",
        lambda manager, url: tmp_path / "extracted",
    ):
        return prepare_dataset.main([*argv, f"--data_dir={tmp_path / 'tfds'}"])


def test_a_set_of_files_is_generated_without_tensorflow(tmp_path):
    assert imagenette(tmp_path) == 0
    records = dataset.open_records(tmp_path / "set")
    assert (records.shape, records.num_records, records.num_classes) == ((32, 32, 3), 4, 10)


def test_what_only_tensorflow_can_generate_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    missing = types.SimpleNamespace(glob=lambda _: types.SimpleNamespace().data)
    monkeypatch.setattr(prepare_tfds, "glob", missing)
    assert imagenette(tmp_path) == 1
    error = capsys.readouterr().err.strip()
    assert "can only be generated with TensorFlow" in error and len(error.splitlines()) == 1


def test_a_set_that_tfds_has_prepared(tmp_path):
    argv = ["tfds", "--name=mnist", f"--output={tmp_path / 'set'}", "--splits=train,test"]
    argv.append("--preview=0")  # it would read the mocked data
    with tfds.testing.mock_data(num_examples=5, data_dir=tmp_path / "tfds"):
        assert prepare_dataset.main([*argv, "--image_size=14"]) == 0
    records = dataset.open_records(tmp_path / "set", "test")
    assert (records.shape, records.num_records, records.num_classes) == ((14, 14, 1), 5, 10)


@pytest.mark.parametrize(
    "name,message", [("cifarr10", "no set 'cifarr10'"), ("imagenette", "set --image_size")]
)
def test_sets_that_cannot_be_prepared(tmp_path, name, message, capsys):
    argv = ["tfds", f"--name={name}", f"--output={tmp_path / 'set'}"]
    assert prepare_dataset.main([*argv, f"--data_dir={tmp_path}"]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_digits(tmp_path, capsys):
    argv = ["digits", f"--output={tmp_path / 'digits'}"]
    assert prepare_dataset.main(argv) == 0
    first = contents(tmp_path / "digits")
    records = dataset.open_records(tmp_path / "digits")
    assert (records.shape, records.num_records, records.num_classes) == ((8, 8, 1), 1797, 10)
    batch = records.read(np.arange(1797))
    assert batch["image"].min() == 0 and batch["image"].max() == 255
    assert len(np.unique(batch["image"])) == 17
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert prepare_dataset.main(argv) == 0
    assert "nothing to do" in capsys.readouterr().out and contents(tmp_path / "digits") == first


def test_digits_do_not_overwrite_other_files(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("not ours")
    assert prepare_dataset.main(["digits", f"--output={tmp_path}"]) == 1
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
