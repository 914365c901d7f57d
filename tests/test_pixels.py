"""What pictures hold beside colours of 8 bits: transparency, 16 bits, palettes; whole npz files."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from scripts import evaluate_images, prepare_dataset
from utils import dataset, npy, pictures

SIZE = 8
RED = np.full((SIZE, SIZE, 3), (200, 30, 40), np.uint8)
SEEN = np.arange(SIZE * SIZE).reshape(SIZE, SIZE) < 20


def transparent(array=RED):
    """Colours where `SEEN`, of which nothing is to be seen elsewhere."""
    return Image.fromarray(np.dstack([array, np.uint8(255 * SEEN)]))


def prepare(root, output, *more):
    argv = ["images", f"--input={root}", f"--output={output}", f"--image_size={SIZE}"]
    return prepare_dataset.main([*argv, "--vae=none", "--preview=0", *more])


def read(output):
    records = dataset.open_records(output)
    return records.read(np.arange(records.num_records))["image"]


@pytest.mark.parametrize("background", ["keep", "white", "black"])
def test_what_lies_behind_transparent_pictures(tmp_path, background, capsys):
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    transparent().save(folder / "0.png")
    transparent().save(folder / "1.webp", lossless=True, exact=True)
    palette = Image.fromarray(np.uint8(SEEN), "P")
    palette.putpalette([9, 9, 9, 200, 30, 40])
    palette.save(folder / "2.png", transparency=0)
    Image.fromarray(RED).convert("RGBA").save(folder / "3.png")  # nothing to be seen through
    assert prepare(tmp_path / "set", tmp_path / "out", f"--background={background}") == 0
    hidden = {"keep": [RED[0, 0], RED[0, 0], [9] * 3], "white": [[255] * 3] * 3}
    behind = hidden.get(background, [[0] * 3] * 3)
    for image, colour in zip(read(tmp_path / "out")[:3], behind, strict=True):
        expected = np.where(SEEN[..., None], RED, np.uint8(colour))
        np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(read(tmp_path / "out")[3], RED)
    said = capsys.readouterr().out
    assert "3 images have transparent parts" in said
    if background == "white":
        assert prepare(tmp_path / "set", tmp_path / "out") == 1  # other records
        assert "background: white, now None" in capsys.readouterr().err


def png16(array):
    """A PNG of 16 bits, (h, w, 3), which Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


@pytest.mark.parametrize("colour", [False, True])
def test_the_largest_value_of_sixteen_bits_is_told(tmp_path, colour, capsys):
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    for i, top in enumerate((4095, 1000)):
        values = np.full((SIZE, SIZE), top, np.uint16)
        if colour:
            (folder / f"{i}.png").write_bytes(png16(np.dstack([values] * 3)))
        else:
            Image.fromarray(values).save(folder / f"{i}.png")
    assert prepare(tmp_path / "set", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "2 images have 16 bits" in said
    assert "the largest value is 4095 of 65535: 12 bits, so they are dark" in said


def prepared_by_tfds(root, *encoded):
    """A set as TFDS leaves it: pictures as files, in ArrayRecord."""
    root.mkdir(parents=True)
    image = tfds.features.Image(shape=(None, None, 3))
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name="mine", version=tfds.core.Version("1.0.0"), data_dir=str(root), module_name=""
        ),
        features=tfds.features.FeaturesDict(
            {"image": image, "label": tfds.features.ClassLabel(num_classes=2)}
        ),
        supervised_keys=("image", "label"),
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    path = root / "mine-train.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for i, content in enumerate(encoded):
        feature = {
            "image": tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[content])),
            "label": tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[i % 2])),
        }
        features = tf_feature_pb2.Features(feature=feature)
        writer.write(tf_example_pb2.Example(features=features).SerializeToString())
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=root, dataset_name="mine", split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo("train", [len(encoded)], 100, template)
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(root)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_a_set_of_tfds_is_decoded_as_pictures_are(tmp_path, capsys):
    red = Image.fromarray(RED)
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    kinds = [encoded(palette), encoded(red.convert("CMYK"), "JPEG"), encoded(transparent())]
    prepared_by_tfds(tmp_path / "mine" / "1.0.0", encoded(red), *kinds)
    argv = ["tfds", "--name=mine", f"--data_dir={tmp_path}", f"--output={tmp_path / 'out'}"]
    argv += [f"--image_size={SIZE}", "--background=white", "--preview=0"]
    assert prepare_dataset.main(argv) == 0
    found = read(tmp_path / "out").astype(int)
    for image in found[:3]:
        assert np.abs(image - RED).max() <= 4  # JPEG
    assert (found[3][~SEEN] == 255).all() and (found[3][SEEN] == RED[0, 0]).all()
    assert "1 images have transparent parts, laid on white" in capsys.readouterr().out


# Pictures that are scored ----------------------------------------------------------------------

NOTES = pictures.Notes(logging.warning)


def test_gray_pictures_among_colour_are_known_first(tmp_path, caplog):
    Image.fromarray(RED[..., 0]).save(tmp_path / "0.png")
    Image.fromarray(RED).save(tmp_path / "1.png")
    read_images, count, shape = evaluate_images.open_images(tmp_path, NOTES)
    assert (count, shape) == (2, (SIZE, SIZE, 3))
    gray, colour = read_images(np.array([0, 1]))
    assert (gray == 200).all() and (colour == RED).all()
    assert "1 of 2 pictures are gray, and read as colour" in caplog.text
    Image.fromarray(RED[:4]).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"2.png is 4x8, .*0.png 8x8 \(height x width\)"):
        evaluate_images.open_images(tmp_path, NOTES)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_an_npz_of_images_is_not_read_whole(tmp_path, write):
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    write(tmp_path / "a.npz", images, np.arange(5))
    read_images, count, shape = evaluate_images.open_images(tmp_path / "a.npz", NOTES)
    found = npy.member(tmp_path / "a.npz", "arr_0")
    assert isinstance(found.base, np.memmap) and (count, shape) == (5, (SIZE, SIZE, 3))
    np.testing.assert_array_equal(read_images(np.array([3, 0])), images[[3, 0]])


@pytest.mark.parametrize("dtype", ["<f4", ">f2", "u1", "U3", "?"])
@pytest.mark.parametrize("order", "CF")
def test_npy_is_read_as_numpy_does(tmp_path, dtype, order):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    for found in (npy.parse((tmp_path / "a.npy").read_bytes()), npy.mapped(tmp_path / "a.npy")):
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype
    cut = (tmp_path / "a.npy").read_bytes()[:-1]
    with pytest.raises(ValueError, match="cut short"):
        npy.parse(cut)
