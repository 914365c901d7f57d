"""Numbers of any range in the place of images: prepared, trained on, drawn, measured, clipped."""

import json

import jax
import jobs
import make
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import generator
import main
import parts
from benchmarks import costs
from configs import load_config
from models import codec
from scripts import prepare_dataset
from utils import dataset, images

RNG = np.random.default_rng(0)
LENGTH, ROWS = 6, 40
LABELS = np.arange(ROWS) % 2
SIGNALS = (5 + 3 * RNG.standard_normal((ROWS, LENGTH)) + 4 * LABELS[:, None]).astype(np.float32)
FIELDS = np.stack([RNG.standard_normal((ROWS, 4, 6)), 1e3 * RNG.random((ROWS, 4, 6))], axis=1)


def prepare(source, output, *more, status=0):
    argv = ["values", f"--input={source}", f"--output={output}", *more]
    assert prepare_dataset.main(argv) == status


def all_of(root, split="train"):
    records = dataset.open_records(root, split)
    return records, records.read(np.arange(records.num_records))


def npz(folder):
    np.savez(folder / "signals.npz", values=SIGNALS, label=LABELS)
    return folder / "signals.npz"


def npy(folder):
    np.save(folder / "values.npy", SIGNALS[..., None].astype(np.float64))
    np.save(folder / "label.npy", LABELS)
    return folder


def tables(folder):
    columns = {"signal": list(SIGNALS), "cls": LABELS}
    parquet.write_table(pyarrow.table(columns), folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def signals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    prepare(npz(folder), folder / "records")
    return folder / "records"


@pytest.mark.parametrize("write", [npz, npy, tables])
def test_signals(tmp_path, write, capsys):
    """Each form gives the same records, and says what the YAML file needs."""
    (tmp_path / "there").mkdir()
    key = ["--key=signal"] if write is tables else []
    prepare(write(tmp_path / "there"), tmp_path / "records", *key)
    records, batch = all_of(tmp_path / "records")
    assert (records.key, records.shape, records.num_classes) == ("values", (1, LENGTH, 1), 2)
    np.testing.assert_array_equal(batch["values"][:, 0, :, 0], SIGNALS)
    np.testing.assert_array_equal(batch["label"], LABELS)
    said = capsys.readouterr().out
    assert (
        "image_size: [1, 6]" in said and "float_values: true" in said and "num_classes: 2" in said
    )
    assert f"latent_std: [{SIGNALS.std():.6g}]" in said
    assert (tmp_path / "records" / "preview.png").exists()


def test_fields_and_bytes(tmp_path):
    """Channels come first in one set, splits are told, and bytes stay images."""
    for name in ("train", "val"):
        np.savez(tmp_path / f"{name}.npz", x=FIELDS)
    prepare(tmp_path, tmp_path / "fields", "--layout=nchw", "--store=float16")
    records, batch = all_of(tmp_path / "fields", "val")
    assert (records.shape, records.num_classes, records.dtype) == ((4, 6, 2), 0, np.float16)
    np.testing.assert_array_equal(batch["values"][..., 1], FIELDS[:, 1].astype(np.float16))
    np.savez(tmp_path / "bytes.npz", image=np.arange(48, dtype=np.uint8).reshape(2, 4, 6))
    prepare(tmp_path / "bytes.npz", tmp_path / "images", "--layout=nhw")
    records, batch = all_of(tmp_path / "images")
    assert (records.key, records.shape) == ("image", (4, 6, 1)) and batch["image"].max() == 47


def test_what_samples_are_drawn_by(tmp_path, capsys):
    """Arrays beside the sample lie as it does, where they have its shape; others as they are."""
    more = {"mask": RNG.random((ROWS, 2, 4, 6)) > 0.5, "noisy": FIELDS + 1, "state": LABELS / 3,
            "word": np.ones((ROWS, 3, 5)), "word_mask": np.ones((ROWS, 3), bool)}  # fmt: skip
    np.savez(tmp_path / "a.npz", values=FIELDS, label=LABELS, **more)
    prepare(tmp_path / "a.npz", tmp_path / "all", "--layout=nchw", "--preview=0")
    records, _ = all_of(tmp_path / "all")
    batch = records.holding(tuple(more)).read(np.arange(ROWS))
    np.testing.assert_array_equal(batch["noisy"], np.moveaxis(FIELDS + 1, 1, -1).astype(np.float32))
    np.testing.assert_array_equal(batch["mask"], 255 * np.moveaxis(more["mask"], 1, -1))
    np.testing.assert_array_equal(batch["state"], np.float32(LABELS / 3))
    assert batch["word"].shape == (ROWS, 3, 5) and batch["word_mask"].dtype == np.uint8
    told = capsys.readouterr().out
    assert "mask uint8 (4, 6, 2), noisy float32 (4, 6, 2)" in told
    assert "  conditions: [mask, noisy, state, word]\n  condition_shapes: []\n" in told
    prepare(tmp_path / "a.npz", tmp_path / "few", "--layout=nchw", "--conditions=state")
    assert [*all_of(tmp_path / "few")[0].features] == ["state"]
    prepare(tmp_path / "a.npz", tmp_path / "none", "--conditions=low", status=1)
    assert "--conditions: low is none of mask, noisy" in capsys.readouterr().err


@pytest.mark.parametrize(
    "columns, line",
    [
        ({"values": np.where(SIGNALS == SIGNALS[3, 2], np.nan, SIGNALS)},
         "/a.npz, record 3: values has values that are not finite"),
        ({"values": SIGNALS, "label": LABELS[:9]}, "not a row for each: 40 of values, 9 of label"),
        ({"left": SIGNALS}, "--key has to name the array of samples, one of left"),
        ({"values": SIGNALS.astype(str)}, "not numbers"),
        ({"values": SIGNALS * 0 + 1}, "channel 0 is the same everywhere"),
        ({"values": SIGNALS, "word": np.ones((ROWS, 3, 5)), "word_mask": np.ones((ROWS, 2))},
         "/a.npz, record 0: word_mask is float32 (2,); a mask has"),
    ],
)  # fmt: skip
def test_arrays_that_are_refused(tmp_path, columns, line, capsys):
    np.savez(tmp_path / "a.npz", **columns)
    prepare(tmp_path / "a.npz", tmp_path / "records", status=1)
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert line in said and not dataset.is_dataset(tmp_path / "records")


def test_the_codec_and_back():
    """By channel to mean 0 and deviation 1, and back; mirrored as images are; clipped if asked."""
    words = ["dataset.vae=none", "dataset.float_values=true", "dataset.image_channels=2"]
    words += ["dataset.latent_mean=0,500", "dataset.latent_std=1,250"]
    batch = {"values": np.moveaxis(FIELDS, 1, -1), "label": LABELS}
    data = make.config(*words).dataset
    x, _ = parts.make_codec(data).encode(batch, jax.random.key(0))
    np.testing.assert_allclose(x[..., 1], (FIELDS[:, 1] - 500) / 250, rtol=1e-5, atol=1e-6)
    decoded = parts.load_autoencoder(data, "float32").finished({}, x)
    np.testing.assert_allclose(decoded, batch["values"], rtol=1e-5, atol=1e-3)
    clipped = make.config(*words, "dataset.value_range=0,100").dataset
    decoded = parts.load_autoencoder(clipped, "float32").finished({}, x)
    np.testing.assert_allclose(decoded, batch["values"].clip(0, 100), rtol=1e-5, atol=1e-3)
    flip = parts.make_codec(data)._replace(flip=True)
    flipped = np.asarray(flip.encode(batch, jax.random.key(0))[0])
    is_mirrored = (flipped == x[:, :, ::-1]).all(axis=(1, 2, 3))
    assert 5 < is_mirrored.sum() < 35 and (flipped == x).all(axis=(1, 2, 3))[~is_mirrored].all()
    assert codec.Codec().encode({"image": batch["values"], "label": LABELS}, jax.random.key(0))


def test_a_run_of_signals(signals, tmp_path):
    """Trains, draws curves, measures in units of deviations, samples numbers and not bytes."""
    words = {
        "dataset.root": signals, "dataset.image_size": "1,6", "dataset.num_classes": 2,
        "dataset.float_values": True, "dataset.latent_mean": 7, "dataset.latent_std": 3.6,
        "dataset.value_range": "0.5,9", "model.patch_size": "1,2", "training.num_steps": 4,
        "fid.features": "values", "fid.num_samples": 64,
    }  # fmt: skip
    run = jobs.Jobs(tmp_path)
    run.run_here(tmp_path / "run", words)
    (result,) = jobs.results(tmp_path / "run")
    assert "values" in result["features"] and 0 < result["fid"] < 50
    model = generator.load(tmp_path / "run")
    values = model.sample([0, 1] * 50)
    assert values.shape == (100, 1, 6, 1) and values.dtype == np.float32
    assert values.min() == 0.5 and values.max() == 9 and len(np.unique(values)) > 200
    with pytest.raises(ValueError, match="output: 'uint8' is not one of float, latents"):
        model.sample([0], output="uint8")
    argv = [f"--workdir={tmp_path / 'run'}", "--config=configs/load_config.py:digits"]
    argv += ["--config.sample_only=True", "--config.sampling.num_images=4", jobs.ALONE]
    assert main.main(argv) == 0
    (folder,) = [path for path in (tmp_path / "run" / "samples").iterdir() if path.is_dir()]
    assert sorted(path.name for path in folder.iterdir()) == ["grid.png", "samples.npz"]
    np.testing.assert_allclose(np.load(folder / "samples.npz")["arr_0"], values[:4], atol=1e-5)
    config = json.loads(json.dumps(model.options))
    assert config["dataset"]["image_size"] == [1, 6]


def test_options_that_do_not_fit(signals, tmp_path):
    for words, line in (
        (["dataset.float_values=true"], "dataset.float_values needs dataset.vae: none"),
        (["dataset.value_range=0,1"], "value_range is .low, high. of dataset.float_values"),
        (
            ["dataset.vae=none", "dataset.float_values=true", "dataset.value_range=1,0"],
            "value_range",
        ),
    ):
        with pytest.raises(ValueError, match=line):
            make.config(*words)
    words = ["dataset.vae=none", f"dataset.root={signals}", "dataset.image_size=1,6"]
    data = make.config(*words, "dataset.image_channels=1", "dataset.num_classes=2").dataset
    with pytest.raises(ValueError, match="records of key values, the config asks for image"):
        parts.open_records(data, 2)


def test_the_batch_that_is_compiled_ahead():
    batch = costs.batch_shapes(load_config.get_config("signals"))
    assert (batch["values"].shape, batch["values"].dtype) == ((128, 1, 24, 1), np.float32)


def test_what_is_shown():
    """Curves keep the order of their values; fields fill the range from black to white."""
    rising = np.linspace(-1, 1, 24).reshape(1, 1, 24, 1)
    picture = images.shown(rising)[0]
    dark = np.argmin(picture.sum(axis=-1), axis=0)  # row of the curve in each column
    assert picture.shape == (48, 72, 3) and dark[5] > dark[35] > dark[65]
    field = images.shown(np.moveaxis(FIELDS, 1, -1))
    assert field.shape == (ROWS, 4, 6, 1) and (field.min(), field.max()) == (0, 255)
    byte = np.zeros((1, 2, 2, 1), np.uint8)
    assert images.shown(byte) is byte
