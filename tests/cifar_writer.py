"""Writes small sets in all the forms in which CIFAR-10 lies on disks, from random images."""

import io
import struct
import tarfile

import numpy as np
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2
from torch_writer import Raw, reference

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def random_set(per_batch=20):
    """{batch name: (images uint8 (N, 32, 32, 3), labels int64 (N,))}, as many of each class."""
    rng = np.random.default_rng(0)
    labels = np.arange(per_batch) % 10
    return {
        name: (rng.integers(0, 256, (per_batch, 32, 32, 3), np.uint8), rng.permutation(labels))
        for name in BATCHES
    }


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def string(text):
    """A string as Python 2 pickles it."""
    raw = text if isinstance(text, bytes) else text.encode()
    return Raw(b"T" + struct.pack("<i", len(raw)) + raw)


def python_batch(images, labels, name):
    """A batch as Python 2 and its numpy pickled it."""
    data = planes(images)

    def number(i):
        return b"J" + struct.pack("<i", i)

    empty = b"(" + reference("numpy", "ndarray") + number(0) + b"\x85" + string("b") + b"t"
    dtype = reference("numpy", "dtype") + b"(" + string("u1") + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + string("|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    shape = b"(" + b"".join(map(number, data.shape)) + b"t"
    array = reference("numpy.core.multiarray", "_reconstruct") + empty + b"R"
    array += b"(" + number(1) + shape + dtype + b"\x89" + string(data.tobytes()) + b"tb"
    items = string("data") + array
    items += string("labels") + b"](" + b"".join(number(int(i)) for i in labels) + b"e"
    items += string("batch_label") + string(f"batch {name}")
    return b"\x80\x02}(" + items + b"u."


def binary_batch(images, labels):
    return np.concatenate([labels[:, None].astype(np.uint8), planes(images)], axis=1).tobytes()


def batch_files(data, kind):
    """{file name: bytes} of the form `py` or `bin`."""
    if kind == "py":
        return {name: python_batch(*batch, name) for name, batch in data.items()}
    return {f"{name}.bin": binary_batch(*batch) for name, batch in data.items()}


def write_folder(folder, data, kind):
    folder.mkdir(parents=True)
    for name, content in batch_files(data, kind).items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(path, data, kind):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in batch_files(data, kind).items():
            member = tarfile.TarInfo(f"cifar-10-batches-{kind}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def split_of(name):
    return "test" if name == "test_batch" else "train"


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def write_pictures(folder, data):
    """SPLIT/CLASS/NUMBER.png."""
    for name, (images, labels) in data.items():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split_of(name) / CLASSES[label] / f"{name}_{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
    return folder


def write_tfrecords(folder, data):
    """As TensorFlow Datasets prepares the set, without true checksums."""
    folder.mkdir(parents=True)
    for name, batch in data.items():
        path = folder / f"cifar10-{split_of(name)}.tfrecord-00000-of-00001"
        with open(path, "ab") as file:
            for image, label in zip(*batch, strict=True):
                example = tf_example_pb2.Example()
                example.features.feature["image"].bytes_list.value.append(png(image))
                example.features.feature["label"].int64_list.value.append(int(label))
                record = example.SerializeToString()
                file.write(struct.pack("<QI", len(record), 0) + record + bytes(4))
    return folder
