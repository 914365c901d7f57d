"""The picture that a preparation ends with."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from models import vae
from scripts import prepare_dataset
from scripts.prepare import preview
from utils import dataset, images

RNG = np.random.default_rng(0)


def write(root, key, values, labels, classes=("a", "b", "c", "d")):
    root.mkdir(parents=True)
    rows = ({key: x, "label": y} for x, y in zip(values, labels, strict=True))
    count = dataset.write_shard(dataset.shard_path(root, "train", 0, 1), rows)
    dtype = values.dtype
    dataset.write_metadata(root, key, values.shape[1:], dtype, list(classes), {"train": [count]})
    return root


def cells(path, side, count, columns, top):
    """The pictures of a sheet, cut out of it."""
    sheet = np.asarray(Image.open(path))
    width, height = side + preview.GAP, side + preview.TEXT + preview.GAP
    corners = [(preview.GAP + i % columns * width, top + i // columns * height)
               for i in range(count)]  # fmt: skip
    return np.stack([sheet[y : y + side, x : x + side] for x, y in corners])


ONE_LINE = preview.TEXT + 2 * preview.GAP  # above the first row


def test_records_are_shown_by_label_and_enlarged(tmp_path):
    values = RNG.integers(0, 256, (9, 7, 7, 3), np.uint8)
    labels = [3, 1, 2, 0, 3, 1, 2, 0, 1]
    root = write(tmp_path / "set", "image", values, labels)
    preview.draw(root)
    found = cells(root / "preview.png", 112, 9, 3, ONE_LINE)
    order = np.argsort(labels, kind="stable")
    np.testing.assert_array_equal(found[:, 8::16, 8::16], values[order])
    assert dataset.open_records(root).num_records == 9
    assert {path.name for path in root.iterdir() if "unfinished" in path.name} == set()


def test_latents_that_nothing_decodes(tmp_path, capsys):
    mean = np.zeros((4, 5, 5, 4), np.float32)
    mean[1, ..., 0], mean[2, ..., 1], mean[3, ..., 2] = 3 / 0.18215, -3 / 0.18215, 99
    moments = np.concatenate([mean, mean * 0], axis=-1)
    root = write(tmp_path / "set", "moments", moments, range(4))
    preview.draw(root, tmp_path / "x.png", vae="none")
    middle = cells(tmp_path / "x.png", 110, 4, 2, ONE_LINE + preview.TEXT)[:, 50, 50]
    assert middle.tolist() == [[128] * 3, [255, 128, 128], [128, 0, 128], [128, 128, 255]]
    assert "not decoded: channels 1-3 from -3 to 3" in capsys.readouterr().out


def test_latents_are_decoded(tmp_path, capsys, monkeypatch):
    def encode(params, x):
        mean = jnp.concatenate([x[:, ::2, ::2], x[:, ::2, ::2, :1]], axis=-1)
        return mean, jnp.zeros_like(mean)

    def decode(params, x):  # of the network's numbers, as `vae.load` gives it
        return jnp.repeat(jnp.repeat(x[..., :3] * params["times"], 2, axis=1), 2, axis=2)

    made = vae.Autoencoder({"times": np.float32(0.5)}, encode, decode, downscale=2)
    monkeypatch.setattr(vae, "load", {"mine": made}.get)
    x = RNG.standard_normal((10, 4, 4, 4)).astype(np.float32)  # 10: a batch that is not full
    moments = np.concatenate([x / 0.18215, np.ones_like(x)], axis=-1)
    root = write(tmp_path / "set", "moments", moments, [0] * 5 + [1] * 5)
    argv = ["preview", f"--root={root}", f"--output={tmp_path / 'x.png'}", "--vae=mine"]
    assert prepare_dataset.main(argv) == 0
    assert "decoded by mine" in capsys.readouterr().out
    found = cells(tmp_path / "x.png", 112, 10, 4, ONE_LINE + preview.TEXT)
    np.testing.assert_array_equal(found[:, 14::28, 14::28], images.to_uint8(x[..., :3] * 0.5))
    assert not (root / "preview.png").exists()
    wrong = write(tmp_path / "wrong", "moments", moments[..., 1:-1], [0] * 10)
    assert prepare_dataset.main(["preview", f"--root={wrong}", "--vae=mine"]) == 1
    assert "4 channels, the records have 3: --vae names another" in capsys.readouterr().err


def test_every_preparation_ends_with_it(tmp_path, capsys):
    output = tmp_path / "set"
    for split, side in (("train", 20), ("val", 30)):
        for label in "ab":
            (tmp_path / "in" / split / label).mkdir(parents=True)
            path = tmp_path / "in" / split / label / "0.png"
            Image.new("RGB", (side, side), (side, 0, ord(label))).save(path)
    argv = ["images", f"--input={tmp_path / 'in'}", f"--output={output}", "--vae=none"]
    assert prepare_dataset.main([*argv, "--image_size=16"]) == 0
    path = output / "preview.png"
    drawn = path.read_bytes()
    assert np.asarray(Image.open(path))[ONE_LINE + 5, preview.GAP + 5].tolist() == [20, 0, 97]
    assert "preview: 2 of 2 (train)" in capsys.readouterr().out
    path.unlink()  # as where the preparation was killed before the end
    assert prepare_dataset.main([*argv, "--image_size=16"]) == 0 and path.read_bytes() == drawn
    path.write_bytes(b"of before")
    assert prepare_dataset.main([*argv, "--image_size=16"]) == 0
    assert path.read_bytes() == b"of before"
    assert prepare_dataset.main([*argv, "--image_size=8", "--overwrite"]) == 0
    assert "16x16" not in capsys.readouterr().out.splitlines()[-1]
    assert path.read_bytes() != b"of before"
    assert prepare_dataset.main([*argv, "--image_size=8", "--overwrite", "--preview=0"]) == 0
    assert not path.exists()
    assert prepare_dataset.main(["preview", f"--root={output}", "--split=val", "--count=1"]) == 0
    assert np.asarray(Image.open(path))[ONE_LINE + 5, preview.GAP + 5].tolist()[0] == 30


@pytest.mark.parametrize(
    "words, line",
    [
        (["preview", "--root=nowhere"], "no dataset at nowhere"),
        (["arrays", "--input=a.npz", "--output=set", "--vae=gone"], "dataset.vae=gone"),
    ],
)
def test_what_cannot_be_drawn_is_told_first(tmp_path, words, line, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", latents=np.zeros((2, 4, 8, 8), "f4"), labels=[0, 1])
    assert prepare_dataset.main(words) == 1
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert line in error and not (tmp_path / "set").exists()


def test_labels_and_titles_fit():
    font = preview.ImageFont.load_default(preview.FONT)
    assert preview._short("3", font, 50) == "3"
    short = preview._short("207 golden retriever", font, 60)
    assert short.startswith("207 g") and short.endswith("...") and font.getlength(short) <= 60
    pixels = np.zeros((1, 300, 200, 1), np.uint8)
    low, tall = (preview.sheet(pixels, ["0"], "one two " * n).shape for n in (1, 30))
    assert low[1] == tall[1] == 4 * 112 and tall[0] > low[0] + 2 * preview.TEXT
