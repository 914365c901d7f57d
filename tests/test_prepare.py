"""Preparing datasets from folders of images, and their FID statistics."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from metrics import inception, inception_weights
from metrics.reference import load_reference
from models import vae
from scripts import prepare_dataset
from scripts.prepare.class_folders import list_images
from utils import contents as digests
from utils import dataset, images

ROOT = Path(__file__).resolve().parent.parent
SIZE = 32
SHARD_OF_FOUR = "--records_per_shard=4"


def smooth(width, height, seed):
    """A picture that survives JPEG."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """14 + 3 images in 3 classes: odd sizes, gray, CMYK, a PNG and an RGBA PNG named JPEG."""
    root = tmp_path_factory.mktemp("images")
    sizes = [(33, 200), (32, 32), (65, 64), (129, 70), (40, 41), (300, 45), (50, 50)]
    for split, count in (("train", 10), ("val", 3)):
        for i in range(count):
            name = ("n02", "n10", "n01")[i % 3]
            (root / split / name).mkdir(parents=True, exist_ok=True)
            path = root / split / name / f"{name}_{i}.JPEG"
            smooth(*sizes[i % 7], seed=i).save(path, quality=95)
    (root / "train" / "n01" / "notes.txt").write_text("not an image")
    smooth(70, 50, 20).convert("L").save(root / "train/n01/gray.JPEG")
    smooth(70, 50, 21).convert("CMYK").save(root / "train/n01/cmyk.jpg")
    smooth(70, 50, 22).save(root / "train/n10/png.JPEG", format="PNG")
    smooth(70, 50, 23).convert("RGBA").save(root / "train/n10/rgba.JPEG", format="PNG")
    return root


def crops(tree, split="train"):
    """[(image uint8, label)] as they should be stored."""
    found = []
    for label, name in enumerate(("n01", "n02", "n10")):
        for path in sorted((tree / split / name).iterdir(), key=lambda path: path.name):
            if path.suffix != ".txt":
                image = Image.open(path).convert("RGB")
                found.append((np.asarray(images.center_crop(image, SIZE)), label))
    return found


def prepare(tree, output, *more, vae="none", status=0):
    argv = ["images", f"--input={tree}", f"--output={output}", f"--image_size={SIZE}"]
    argv += [f"--vae={vae}", SHARD_OF_FOUR, "--workers=2", "--device_batch_size=4", *more]
    argv += [] if vae == "none" else ["--preview=0"]  # it compiles the decoder
    assert prepare_dataset.main(argv) == status


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def pixels(tree, tmp_path_factory):
    output = tmp_path_factory.mktemp("pixels") / "set"
    prepare(tree, output)
    return output


def test_pixels(tree, pixels):
    for split in ("train", "val"):
        records = dataset.open_records(pixels, split)
        expected = crops(tree, split)
        assert (records.key, records.shape, records.num_classes) == ("image", (SIZE, SIZE, 3), 3)
        batch = records.read(np.arange(records.num_records))
        assert records.num_records == len(expected) == {"train": 14, "val": 3}[split]
        np.testing.assert_array_equal(batch["image"], [image for image, _ in expected])
        np.testing.assert_array_equal(batch["label"], [label for _, label in expected])
    info = tfds.builder_from_directory(pixels).info
    assert info.features["label"].names == ["n01", "n02", "n10"]
    assert list(info.splits["train"].shard_lengths) == [4, 4, 4, 2]


@pytest.mark.parametrize("encoding", ["webp", "png"])
def test_pictures_hold_the_same_pixels(tree, pixels, tmp_path, encoding, capsys):
    """And they are the same records: a run goes on with either."""
    prepare(tree, tmp_path / "a", f"--encoding={encoding}")
    raw, found = (dataset.open_records(root) for root in (pixels, tmp_path / "a"))
    assert found.pictures and not raw.pictures
    every = np.arange(raw.num_records)
    jax.tree.map(np.testing.assert_array_equal, found.read(every), raw.read(every))
    for name in ("content", "sample"):
        assert found.identity[name] == raw.identity[name]
    read = partial(dataset._raw_records, pictures=True)  # where a note of it was lost
    assert digests.of_shards(found.shard_paths, read) == found.identity["content"]
    source = tfds.builder_from_directory(tmp_path / "a").as_data_source(split="train")
    np.testing.assert_array_equal(source[3]["image"], raw.read(every)["image"][3])
    prepare(tree, tmp_path / "b", f"--encoding={encoding}", vae="mse", status=1)
    assert "--encoding" in capsys.readouterr().err


def test_images_of_special_kinds_keep_their_colours(tree, pixels):
    records = dataset.open_records(pixels)
    names = sorted(os.listdir(tree / "train/n01"))
    names.remove("notes.txt")
    stored = dict(zip(names, records.read(np.arange(len(names)))["image"], strict=True))
    for name, seed in (("gray.JPEG", 20), ("cmyk.jpg", 21)):
        original = smooth(70, 50, seed)
        original = original.convert("L").convert("RGB") if seed == 20 else original
        expected = np.asarray(images.center_crop(original, SIZE)).astype(int)
        assert np.abs(stored[name] - expected).mean() < 8, name  # CMYK is not exact


@pytest.mark.parametrize("store", ["float32", "float16", "bfloat16"])
def test_latents(tree, tmp_path, golden, store, capsys):
    flip = store == "float32"
    name = golden / "vae" / "tiny"
    prepare(tree, tmp_path / "set", f"--store={store}", f"--flip={flip}", vae=name)
    records = dataset.open_records(tmp_path / "set")
    autoencoder = vae.load(str(name))
    expected = np.stack([image for image, _ in crops(tree)])

    def moments(batch):
        encoded = jax.jit(autoencoder.encode)(autoencoder.params, images.to_float(batch))
        return np.concatenate(encoded, axis=-1)

    batch = records.read(np.arange(records.num_records))
    assert records.dtype == {"bfloat16": ml_dtypes.bfloat16}.get(store, store)
    assert records.shape == moments(expected).shape[1:] and records.has_flipped == flip
    tolerance = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 1e-2}[store]
    np.testing.assert_array_equal(batch["label"], [label for _, label in crops(tree)])
    stored = batch["moments"].astype(np.float32)
    np.testing.assert_allclose(stored, moments(expected), rtol=tolerance, atol=tolerance)
    if flip:
        mirrored = moments(expected[:, :, ::-1])
        np.testing.assert_allclose(batch["moments_flipped"], mirrored, rtol=2e-5, atol=2e-5)
        # Why they are stored: mirroring the latents themselves gives something else.
        assert np.abs(batch["moments"][:, :, ::-1] - mirrored).max() > 1e-2
    else:
        assert f"{store} storage: rms error" in capsys.readouterr().out


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_makes_the_same_records(tree, pixels, tmp_path, count):
    # The last process first: no order is needed, and the last to finish writes the metadata.
    for p in reversed(range(count)):
        assert not dataset.is_dataset(tmp_path / "set")
        prepare(tree, tmp_path / "set", f"--num_processes={count}", f"--process_id={p}")
    assert contents(tmp_path / "set") == contents(pixels)


def test_batches_do_not_change_latents(tree, tmp_path, golden):
    # Batches of 3 do not fit into shards of 4, and leave a part of the last one empty.
    for i, size in enumerate((3, 14)):
        more = f"--device_batch_size={size}"
        prepare(tree, tmp_path / f"{i}", more, vae=golden / "vae" / "tiny")
    one, other = (dataset.open_records(tmp_path / f"{i}").read(np.arange(14)) for i in (0, 1))
    np.testing.assert_allclose(one["moments"], other["moments"], rtol=1e-5, atol=1e-5)


def test_all_devices_share_a_batch(tree, tmp_path, golden, run_python):
    name = golden / "vae" / "tiny"
    prepare(tree, tmp_path / "one", vae=name)
    command = ["-m", "scripts.prepare_dataset", "images", f"--input={tree}", f"--vae={name}"]
    command += [f"--image_size={SIZE}", f"--output={tmp_path / 'four'}", "--device_batch_size=1"]
    command.append("--preview=0")
    run_python(command, devices=4)
    one, four = (dataset.open_records(tmp_path / n).read(np.arange(14)) for n in ("one", "four"))
    np.testing.assert_allclose(one["moments"], four["moments"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(one["label"], four["label"])


def test_goes_on_after_an_interruption(tree, pixels, tmp_path, capsys):
    broken = tmp_path / "images"
    shutil.copytree(tree, broken)
    victim = broken / "train/n02/n02_3.JPEG"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    output = tmp_path / "set"
    prepare(broken, output, status=1)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(victim) in error and "--on_bad_image=skip" in error
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("records-*")}
    assert list(before) and not dataset.is_dataset(output)
    assert not list(output.glob("unfinished-records-*"))
    with pytest.raises(FileNotFoundError, match="not finished"):
        dataset.open_records(output)

    stale = f"unfinished-{dataset.shard_path(output, 'val', 0, 1).name}-999"
    (output / stale).write_bytes(b"left by a process that was killed")
    victim.write_bytes(whole)
    prepare(broken, output)
    assert contents(output) == contents(pixels)
    for name, time in before.items():
        assert (output / name).stat().st_mtime_ns == time, "a finished shard was written again"


def test_a_finished_one_is_recognised_and_a_lost_shard_made_again(tree, pixels, tmp_path, capsys):
    output = tmp_path / "set"
    shutil.copytree(pixels, output)
    prepare(tree, output)
    assert "complete already" in capsys.readouterr().out
    dataset.shard_path(output, "train", 2, 4).unlink()
    prepare(tree, output)
    assert contents(output) == contents(pixels)


def test_other_settings_are_refused_and_overwrite_starts_over(tree, pixels, tmp_path, capsys):
    output = tmp_path / "set"
    shutil.copytree(pixels, output)
    (output / "mine.txt").write_text("not ours")
    other = ["--records_per_shard=5", "--image_size=16"]
    prepare(tree, output, *other, status=1)
    error = capsys.readouterr().err
    assert "image_size: 32, now 16" in error and "records_per_shard: 4, now 5" in error
    assert dataset.open_records(output).shape == (32, 32, 3)
    prepare(tree, output, *other, "--overwrite")
    records = dataset.open_records(output)
    assert records.shape == (16, 16, 3) and len(records.shard_paths) == 3
    assert (output / "mine.txt").exists() and len(list(output.glob("records-train*"))) == 3
    parts = ["--num_processes=2", "--process_id=1", "--overwrite"]
    prepare(tree, output, *parts, status=1)
    assert "needs --coordinator_address" in capsys.readouterr().err


@pytest.mark.parametrize("latents", [False, True])
def test_bad_images_are_skipped_and_counted(tree, tmp_path, golden, latents, capsys):
    broken = tmp_path / "images"
    shutil.copytree(tree, broken)
    (broken / "train/n01/a.JPEG").write_bytes(b"no image at all")
    cut = (broken / "train/n10/png.JPEG").read_bytes()
    (broken / "train/n10/png.JPEG").write_bytes(cut[: len(cut) // 2])
    name = golden / "vae" / "tiny" if latents else "none"
    prepare(broken, tmp_path / "set", "--on_bad_image=skip", vae=name)
    out = capsys.readouterr().out
    assert "2 unreadable images were left out" in out
    assert str(broken / "train/n01/a.JPEG") in out and "png.JPEG" in out
    records = dataset.open_records(tmp_path / "set")
    kept = [pair for i, pair in enumerate(crops(tree)) if i != 12]  # a.JPEG was never among them
    batch = records.read(np.arange(records.num_records))
    np.testing.assert_array_equal(batch["label"], [label for _, label in kept])
    if not latents:
        np.testing.assert_array_equal(batch["image"], [image for image, _ in kept])


def test_the_order_is_not_that_of_the_file_system(tree, monkeypatch):
    classes, expected = list_images(tree)
    scandir, listdir = os.scandir, os.listdir
    monkeypatch.setattr(
        os, "scandir", lambda path: sorted(scandir(path), key=lambda e: e.name)[::-1]
    )
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path))[::-1])
    assert list_images(tree) == (classes, expected)
    assert classes == ["n01", "n02", "n10"] and expected["train"][0][0] == "train/n01/cmyk.jpg"


def test_a_plain_folder_of_classes(tree, tmp_path):
    prepare(tree / "train", tmp_path / "set")
    assert dataset.open_records(tmp_path / "set").num_records == 14


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda root: None, "no folder of images"),
        (lambda root: root.mkdir(), "no class folders"),
        (lambda root: (root / "a").mkdir(parents=True), "no images below"),
    ],
)
def test_folders_without_images(tmp_path, make, message, capsys):
    make(tmp_path / "images")
    prepare(tmp_path / "images", tmp_path / "set", status=1)
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "set").exists()


def test_other_data_is_not_touched(tree, tmp_path, capsys):
    assert prepare_dataset.main(["digits", f"--output={tmp_path / 'digits'}"]) == 0
    prepare(tree, tmp_path / "digits", status=1)
    assert "holds another dataset" in capsys.readouterr().err
    assert dataset.open_records(tmp_path / "digits").num_records == 1797


def test_two_processes_that_join_and_overwrite(tree, pixels, tmp_path, run_python):
    """Real processes: one deletes, both wait for it, both write, both leave."""
    output = tmp_path / "set"
    prepare(tree, output, "--image_size=16")
    port = 20000 + os.getpid() % 20000
    command = [sys.executable, "-m", "scripts.prepare_dataset", "images", f"--input={tree}"]
    command += [f"--output={output}", f"--image_size={SIZE}", "--vae=none", SHARD_OF_FOUR]
    command += [f"--coordinator_address=localhost:{port}", "--num_processes=2", "--overwrite"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [*command, f"--process_id={p}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for p in range(2)
    ]
    for process in running:
        out, _ = process.communicate(timeout=100)
        assert process.returncode == 0, out
    assert contents(output) == contents(pixels)


def run_script(folder, **environment):
    """`prepare_data.sh` in a folder that stands for the repository, with nothing to install."""
    for part in ("scripts", "models", "metrics", "formats", "utils"):
        if not (folder / part).exists():
            (folder / part).symlink_to(ROOT / part)
    (folder / "install.sh").write_text(f"echo {sys.executable}")
    return subprocess.run(
        ["bash", "scripts/prepare_data.sh", SHARD_OF_FOUR],
        cwd=folder,
        env={**os.environ, "USER": "me", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_the_shell_script(tree, pixels, tmp_path):
    settings = {"IMAGENET_ROOT": str(tree), "OUTPUT_DIR": "set", "LOG_DIR": "logs"}
    settings |= {"IMAGE_SIZE": str(SIZE), "VAE": "none"}
    done = run_script(tmp_path, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "set") == contents(pixels)
    log = (tmp_path / "logs" / "me" / f"prepare_data_{SIZE}.log").read_text()
    assert "14 records in 4 shards" in log and "14 records in 4 shards" in done.stdout
    done = run_script(tmp_path, **settings | {"IMAGE_SIZE": "16"})
    assert done.returncode == 1 and "begun with other settings" in done.stdout


@pytest.mark.parametrize(
    "name,value", [("IMAGENET_ROOT", ""), ("OUTPUT_DIR", ""), ("COMPUTE_FID", "yes")]
)
def test_the_shell_script_names_a_wrong_setting(tree, tmp_path, name, value):
    settings = {"IMAGENET_ROOT": str(tree), "OUTPUT_DIR": "set", "LOG_DIR": "logs"}
    done = run_script(tmp_path, **settings | {name: value})
    assert done.returncode == 2 and name in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "set").exists() and not (tmp_path / "logs").exists()


# FID statistics


def test_statistics(tree, tmp_path, monkeypatch, capsys):
    def features(params, batch, resize):
        flat = batch.reshape(len(batch), -1) / 255 + params["offset"]
        return {"pool": flat[:, :2048], "spatial": flat[:, -2023:], "logits": flat[:, :8]}

    monkeypatch.setattr(inception, "features", features)
    monkeypatch.setattr(inception_weights, "find", lambda path: path)
    monkeypatch.setattr(inception_weights, "load", lambda path: {"offset": np.float32(0.5)})
    expected = np.stack([image for image, _ in crops(tree)]).reshape(14, -1) / 255 + 0.5
    more = ["--compute_latent=False", "--compute_fid=True", "--fid_resize=tf1"]
    for count in (1, 3):
        output = tmp_path / f"{count}"
        for p in range(count):
            prepare(tree, output, *more, f"--num_processes={count}", f"--process_id={p}")
        assert [path.name for path in output.iterdir()] == ["imagenet_32_fid_stats.npz"]
        reference = load_reference(output / "imagenet_32_fid_stats.npz")
        np.testing.assert_allclose(reference["mu"], expected[:, :2048].mean(0), atol=1e-6)
        np.testing.assert_allclose(reference["mu_s"], expected[:, -2023:].mean(0), atol=1e-6)
        sigma = np.cov(expected[:, :2048], rowvar=False)
        np.testing.assert_allclose(reference["sigma"], sigma, atol=1e-6)
        assert reference["resize"] == "tf1"
    prepare(tree, output, *more)
    assert "there already" in capsys.readouterr().out


def test_missing_feature_weights_are_told_first(tree, tmp_path, capsys):
    missing = f"--inception_weights={tmp_path / 'none.pth'}"
    prepare(tree, tmp_path / "set", "--compute_fid=True", missing, status=1)
    assert "none.pth" in capsys.readouterr().err and not (tmp_path / "set").exists()
