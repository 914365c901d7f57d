"""CIFAR-10 from whatever form people have it in, and what is refused."""

import hashlib
import json
import os
import pickle

import cifar_writer
import numpy as np
import pytest
from jobs import ALONE

import main
from scripts import prepare_dataset
from scripts.prepare import cifar10
from utils import dataset


@pytest.fixture(scope="module")
def data():
    return cifar_writer.random_set()


def write(form, folder, data):
    """The set in a form below a folder; returns what `--input` names."""
    if form in ("py", "bin"):
        return cifar_writer.write_archive(folder / f"cifar-10-{form}.tar.gz", data, form)
    if form == "unpacked":
        cifar_writer.write_folder(folder / "data" / "cifar-10-batches-py", data, "py")
    elif form == "downloads":  # of TensorFlow Datasets: the archive beside what was in it
        extracted = folder / "downloads" / "extracted" / "TAR_GZ.abc"
        cifar_writer.write_folder(extracted / "cifar-10-batches-bin", data, "bin")
    elif form == "torchvision":
        cifar_writer.write_archive(folder / "cifar-10-python.tar.gz", data, "py")
    elif form == "tfrecord":
        cifar_writer.write_tfrecords(folder / "cifar10" / "3.0.2", data)
    else:
        cifar_writer.write_pictures(folder, data)
    return folder


FORMS = ("py", "bin", "unpacked", "downloads", "torchvision", "tfrecord", "pictures")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_images(tmp_path, data, form):
    splits = cifar10.load(write(form, tmp_path, data), check=False)
    train = [batch for name, batch in data.items() if name != "test_batch"]
    wanted = {
        "train": [np.concatenate(column) for column in zip(*train, strict=True)],
        "test": data["test_batch"],
    }
    assert splits.keys() == wanted.keys()
    for name, (images, labels) in wanted.items():
        found = splits[name]
        assert found.images.dtype == np.uint8 and found.images.shape == images.shape
        # Pictures lie by class; every other form keeps the order.
        order = [f"{label}{image.tobytes()}" for image, label in zip(images, labels, strict=True)]
        there = [f"{y}{x.tobytes()}" for x, y in zip(found.images, found.labels, strict=True)]
        assert (sorted(there) == sorted(order)) if form == "pictures" else (there == order)


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("prepare_dataset: ") and error.count("\n") == 1, error
    return error


def prepare(source, output, *options):
    return prepare_dataset.main(["cifar10", f"--input={source}", f"--output={output}", *options])


def test_records(tmp_path, data, capsys, monkeypatch):
    """An archive whose checksum is known becomes records; the command again does nothing."""
    archive = write("py", tmp_path, data)
    sha = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(cifar10, "ARCHIVES", (("known", archive.stat().st_size, sha),))
    monkeypatch.setattr(cifar10, "COUNTS", {"train": 100, "test": 20})
    for said in ("100 records", "nothing to do"):
        assert prepare(archive, tmp_path / "records") == 0
        assert said in capsys.readouterr().out
    records = dataset.open_records(tmp_path / "records")
    assert (records.num_records, records.num_classes, records.shape) == (100, 10, (32, 32, 3))
    batch = records.read(np.arange(20))
    np.testing.assert_array_equal(batch["image"], data["data_batch_1"][0])
    np.testing.assert_array_equal(batch["label"], data["data_batch_1"][1])


def test_what_is_not_cifar10_is_refused(tmp_path, data, capsys):
    output = tmp_path / "records"
    archive = write("py", tmp_path, data)
    assert prepare(archive, output) == 1
    assert "sha256" in (line := one_line(capsys)) and "--check=False" in line
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[:-5000])
    assert prepare(cut, output, "--check=False") == 1
    assert "cut" in one_line(capsys)
    assert prepare(tmp_path / "none", output) == 1
    assert "none" in one_line(capsys)
    assert prepare(write("unpacked", tmp_path / "a", data), output) == 1
    assert "data_batch_1" in one_line(capsys)
    assert prepare(write("downloads", tmp_path / "b", data), output) == 1
    assert "100 images of 'train'" in one_line(capsys)
    lacking = write("downloads", tmp_path / "c", data)
    next(lacking.rglob("data_batch_4.bin")).unlink()
    assert prepare(lacking, output, "--check=False") == 1
    assert "no data_batch_4" in one_line(capsys)
    short = next(write("downloads", tmp_path / "d", data).rglob("test_batch.bin"))
    short.write_bytes(short.read_bytes()[:-1])
    assert prepare(tmp_path / "d", output, "--check=False") == 1
    assert "test_batch.bin" in one_line(capsys)
    records = next(write("tfrecord", tmp_path / "e", data).rglob("*train*"))
    records.write_bytes(records.read_bytes()[:-1])
    assert prepare(tmp_path / "e", output, "--check=False") == 1
    assert "cut short" in one_line(capsys)
    assert not output.exists()


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def test_nothing_in_a_batch_runs(tmp_path, data, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write("unpacked", tmp_path, data)
    next(folder.rglob("data_batch_2")).write_bytes(pickle.dumps({"data": Malicious()}, 2))
    assert prepare(folder, tmp_path / "records", "--check=False") == 1
    assert "refused" in one_line(capsys)
    assert not (tmp_path / "hacked").exists()


TINY = [
    "--config.model.model_channels=16", "--config.model.channel_mult=1,1",
    "--config.model.channel_mult_emb=1", "--config.model.num_blocks=1",
    "--config.training.batch_size=8", "--config.training.log_per_step=4",
    "--config.training.ema_val=0.9,0.99", "--config.training.ema_period=4",
    "--config.training.checkpoint_per_epoch=100", "--config.fid.features=pixels",
    "--config.fid.num_samples=40", "--config.fid.device_batch_size=40",
    "--config.training.sample_on_training=False",
]  # fmt: skip


@pytest.mark.slow
def test_from_an_archive_to_a_result(tmp_path, data, monkeypatch):
    """Prepare, train, stop, go on, evaluate."""
    archive = write("bin", tmp_path, data)
    assert prepare(archive, tmp_path / "cifar10", "--check=False") == 0
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))

    def job(workdir, *options):
        argv = [f"--workdir={tmp_path / workdir}", "--config=configs/load_config.py:cifar10_unet"]
        assert main.main([*argv, *TINY, *options, ALONE]) == 0

    job("run", "--config.training.num_steps=9")
    job("run", "--config.training.num_steps=20")
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == [4, 8, 9, 12, 16, 20] and np.all(np.isfinite(list(losses.values())))
    job("scored", "--config.eval_only", f"--config.load_from={tmp_path / 'run'}",
        "--config.fid.weights=ema,ema_0.99,params")  # fmt: skip
    results = json.loads((tmp_path / "scored" / "results.json").read_text())
    assert [result["weights"] for result in results] == ["ema", "ema_0.99", "params"]
    assert all(np.isfinite(result["fid"]) for result in results)
