"""What people's folders hold beside classes and pictures, and what pictures hold beside 8 bits."""

import logging
import os

import numpy as np
import plain_score
import pytest
from PIL import Image

from scripts import evaluate_images, prepare_dataset
from scripts.prepare import class_folders, pt
from utils import dataset, images, pictures

RNG = np.random.default_rng(0)
SIZE = 8

NOTES = pictures.Notes(logging.warning)


def save(path, **how):
    """A picture of random numbers at a path, whatever its ending; returns them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = RNG.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    Image.fromarray(array).save(path, format="PNG", **how)
    return array


def folder(root, **counts):
    for name, count in counts.items():
        for i in range(count):
            save(root / name / f"im{i}.png")
    return root


def prepare(source, output, *more):
    argv = ["images", f"--input={source}", f"--output={output}", f"--image_size={SIZE}"]
    return prepare_dataset.main([*argv, "--vae=none", "--workers=2", *more])


def read(output):
    records = dataset.open_records(output)
    found = records.read(np.arange(records.num_records))
    return found["image"], found["label"].tolist(), (output / "label.labels.txt").read_text()


def test_what_systems_leave_behind_is_left_out(tmp_path, capsys):
    root = folder(tmp_path / "set" / "train", cat=2, dog=3).parent
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".Trash"):
        folder(root / "train", **{name: 1})
    (root / "train" / "cat" / "._im0.png").write_text("x")
    (root / "train" / "dog" / "Thumbs.db").write_text("x")
    (root / "train" / ".DS_Store").write_text("x")
    assert prepare(root, tmp_path / "out") == 0
    _, labels, names = read(tmp_path / "out")
    assert labels == [0, 0, 1, 1, 1] and names.split() == ["cat", "dog"]
    assert "2 classes; 5 train images; left out 7: 7 hidden" in capsys.readouterr().out


def test_what_is_left_out_is_counted_with_its_reason(tmp_path, capsys):
    root = folder(tmp_path / "set" / "train", cat=2, dog=1).parent
    folder(root / "train" / "dog", golden=2)
    save(root / "train" / "cat" / "im9.jfif")
    save(root / "train" / "loose.png")
    folder(root, test=1)
    assert prepare(root, tmp_path / "out") == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "left out" in x]
    assert "3 train images; left out 5: " in line
    for words in (
        f"2 in deeper folders ({root}/train/dog/golden/im0.png)",
        "1 with the ending .jfif (",
        f"1 beside the class folders ({root}/train/loose.png)",
        f"1 folders that are not among the splits ({root}/test)",
    ):
        assert words in line
    assert read(tmp_path / "out")[1] == [0, 0, 1]


def dangling_class(root):
    (root / "train" / "a").symlink_to(root / "gone")


def dangling_split(root):
    (root / "train").rename(root / "kept")
    (root / "train").symlink_to(root / "gone")


def empty_class(root):
    (root / "train" / "a").mkdir()
    (root / "train" / "a" / "notes.txt").write_text("x")


def name_of_bytes(root):
    os.mkdir(os.fsencode(root / "train") + b"/caf\xe9")


def file_of_bytes(root):
    os.rename(root / "train" / "b" / "im0.png", os.fsencode(root / "train/b") + b"/caf\xe9.png")


def broken_line(root):
    (root / "train" / "b\nc").mkdir()


@pytest.mark.parametrize(
    "harm, said",
    [
        (dangling_class, "train/a links to"),
        (dangling_split, "train links to"),
        (empty_class, "train/a is a class folder without images"),
        (name_of_bytes, r"train: the name b'caf\xe9' is not UTF-8"),
        (file_of_bytes, r"train/b: the name b'caf\xe9.png' is not UTF-8"),
        (broken_line, r"train: the name 'b\nc' holds a line break"),
    ],
)
def test_what_would_move_labels_is_refused_by_name(tmp_path, harm, said, capsys):
    root = folder(tmp_path / "set" / "train", b=2, c=1).parent
    harm(root)
    assert prepare(root, tmp_path / "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (tmp_path / "out").exists()


def test_a_class_without_validation_images_is_none_of_these(tmp_path):
    root = folder(tmp_path / "set" / "train", a=1, b=1).parent
    folder(root / "val", a=0, b=1)
    (root / "val" / "a").mkdir(exist_ok=True)
    listing = pictures.Listing()
    _, items = class_folders.list_images(root, listing=listing)
    assert items["val"] == [("val/b/im0.png", 1)]
    assert str(listing) == f"; left out 1: 1 class folders without images ({root}/val/a)"


def test_numbers_are_sorted_as_text_which_is_said(tmp_path, capsys):
    root = folder(tmp_path / "set", **{str(n): 1 for n in (2, 9, 10)})
    assert prepare(root, tmp_path / "out") == 0
    assert "sorted as text: label 0 is 10" in capsys.readouterr().out
    assert read(tmp_path / "out")[2].split() == ["10", "2", "9"]
    folder(tmp_path / "even", **{"0": 1, "1": 1})
    assert prepare(tmp_path / "even", tmp_path / "out2") == 0
    assert "sorted as text" not in capsys.readouterr().out


def test_sixteen_bits_become_eight(tmp_path, capsys):
    values = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    (tmp_path / "set" / "a").mkdir(parents=True)
    Image.fromarray(values).save(tmp_path / "set" / "a" / "0.png")
    Image.fromarray(values).save(tmp_path / "set" / "a" / "1.tif")
    pgm = b"P5 8 8 65535\n" + values.astype(">u2").tobytes()
    (tmp_path / "set" / "a" / "2.ppm").write_bytes(pgm)
    assert prepare(tmp_path / "set", tmp_path / "out") == 0
    found, *_ = read(tmp_path / "out")
    for image in found:
        np.testing.assert_array_equal(image, np.round(values / 257)[..., None].repeat(3, -1))
    assert "3 images have 16 bits a pixel, made 8 by 1 / 257" in capsys.readouterr().out


@pytest.mark.parametrize("dtype, said", [(np.float32, "floats"), (np.int32, "32 bits")])
def test_ranges_that_no_one_knows_are_refused(tmp_path, dtype, said, capsys):
    (tmp_path / "set" / "a").mkdir(parents=True)
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "set" / "a" / "0.tif")
    assert prepare(tmp_path / "set", tmp_path / "out") == 1
    assert said in (line := capsys.readouterr().err) and "a/0.tif" in line


def test_orientation_counts_where_it_is_asked_for(tmp_path, capsys):
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6  # turned by a quarter
    array = save(tmp_path / "set" / "a" / "0.png", exif=exif)
    assert prepare(tmp_path / "set", tmp_path / "out") == 0
    np.testing.assert_array_equal(read(tmp_path / "out")[0][0], array)
    assert "1 images carry an EXIF orientation, which is ignored" in capsys.readouterr().out
    assert prepare(tmp_path / "set", tmp_path / "turned", "--exif_orientation=True") == 0
    np.testing.assert_array_equal(read(tmp_path / "turned")[0][0], np.rot90(array, -1))
    assert prepare(tmp_path / "set", tmp_path / "out", "--exif_orientation=True") == 1
    assert "exif_orientation: None, now True" in capsys.readouterr().err


@pytest.mark.parametrize("width, height", [(1, 300), (300, 2), (40, 41), (9, 170), (1000, 17)])
def test_long_pictures_are_cropped_before_they_are_scaled(monkeypatch, width, height):
    ramp = np.add.outer(np.arange(height) * 200 / height, np.arange(width) * 50 / width)
    picture = Image.fromarray(np.uint8(ramp)).convert("RGB")
    monkeypatch.setattr(images, "LONG", 10**9)
    expected = np.asarray(images.center_crop(picture, 16)).astype(int)
    monkeypatch.setattr(images, "LONG", 0)
    found = np.asarray(images.center_crop(picture, 16))
    assert np.abs(found - expected).max() <= 1


def test_a_thread_of_a_picture_does_not_fill_the_memory(monkeypatch):
    made, resize = [], Image.Image.resize

    def noted(self, size, *more, **others):
        made.append(size)
        return resize(self, size, *more, **others)

    monkeypatch.setattr(Image.Image, "resize", noted)
    assert images.center_crop(Image.new("RGB", (1, 2000)), 256).size == (256, 256)
    assert made == [(256, 256)]


def test_limits_of_the_system_are_not_bad_pictures(tmp_path, monkeypatch, capsys):
    folder(tmp_path / "set", a=2)

    def refuse(path):
        raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    assert prepare(tmp_path / "set", tmp_path / "out", "--on_bad_image=skip") == 1
    assert "im0.png cannot be read: Too many open files" in capsys.readouterr().err


# Scoring images that lie on disk ---------------------------------------------------------------


def test_scored_folders_follow_the_same_rules(tmp_path, caplog):
    root = folder(tmp_path / "set", a=2, b=1)
    (root / "a" / "._im0.png").write_text("x")
    folder(root, **{".hidden": 1})
    save(root / "grid.png")
    (root / "notes.txt").write_text("x")
    read_images, count, shape = evaluate_images.open_images(root, NOTES)
    assert (count, shape) == (3, (SIZE, SIZE, 3))
    with Image.open(root / "b" / "im0.png") as file:
        np.testing.assert_array_equal(read_images([2])[0], np.asarray(file))
    assert "3 pictures; left out 4: 2 hidden" in caplog.text and "1 grids" in caplog.text
    (root / "c").symlink_to(root / "gone")
    with pytest.raises(ValueError, match="c links to"):
        evaluate_images.open_images(root, NOTES)


def write_npy(path):
    np.save(path, np.zeros((2, 4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    "name, write, said",
    [
        ("a.npy", write_npy, "an npy, one array without a name"),
        ("a.txt", lambda path: path.write_text("1 2 3"), "is no npz with arr_0"),
        ("a.npz", lambda p: np.savez(p, np.zeros((2, 3, 8, 8), np.uint8)), "is NCHW"),
        ("a.npz", lambda p: np.savez(p, np.zeros((2, 8, 8, 3))), "arr_0 is float64"),
        ("a.npz", lambda p: np.savez(p, np.zeros((0, 8, 8, 3), np.uint8)), "no images"),
        ("a.npz", lambda p: np.savez(p, samples=np.zeros(3)), "it holds samples"),
        ("a.npz", lambda p: p.write_bytes(b"PK\x03\x04 cut"), "is no npz with arr_0"),
    ],
)
def test_what_is_no_set_of_images_is_told_in_one_line(tmp_path, name, write, said):
    write(tmp_path / name)
    with pytest.raises(ValueError) as error:
        evaluate_images.open_images(tmp_path / name, NOTES)
    assert said in str(error.value) and str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_inception_score_does_not_see_the_order_of_classes():
    """Ten classes of ten, sorted: each tenth has one class, and the score would be 1."""
    logits = np.repeat(20.0 * np.eye(10), 10, axis=0)
    assert plain_score.inception_score(logits)[0] < 1.01
    order = np.random.RandomState(2020).permutation(100)  # as torch-fidelity shuffles
    read_logits = evaluate_images.shuffled(lambda index: logits[index], 100)
    np.testing.assert_array_equal(read_logits(np.arange(100)), logits[order])
    assert plain_score.inception_score(read_logits(np.arange(100)))[0] > 5


# Folders of latents ----------------------------------------------------------------------------


def test_folders_of_latents_follow_the_same_rules(tmp_path):
    for name in ("train/0.pt", "train/._0.pt", "train/more/1.pt", "train/a.txt", "test/2.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    listing = pictures.Listing()
    assert pt.list_files(tmp_path, listing) == {"train": ["train/0.pt"]}
    for words in ("left out 4", "1 hidden", "1 deeper folders", "1 with the ending .txt", "/test"):
        assert words in str(listing)
    (tmp_path / "val").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="val links to"):
        pt.list_files(tmp_path)
