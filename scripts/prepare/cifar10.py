"""CIFAR-10 as people have it on their disks -> records of pixels, without TensorFlow.

Its own archives (cifar-10-python.tar.gz, cifar-10-binary.tar.gz), what is in them unpacked, a
folder that holds one of these (what torchvision and TensorFlow Datasets download), the set as
TensorFlow Datasets prepares it, or a folder of PNG files.
"""

import hashlib
import io
import struct
import tarfile
from typing import NamedTuple

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from formats import torch_files
from scripts.prepare import class_folders, shards, statistics
from utils import files, pictures

SIDE = 32
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
COUNTS = {"train": 50_000, "test": 10_000}
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")

# Name, bytes, sha256: of the archive for Python as in Keras (keras/datasets/cifar10.py), of the
# binary one as in TensorFlow Datasets (url_checksums/cifar10.txt). Their md5 are on the page of the
# set (cs.toronto.edu/~kriz/cifar.html): c58f30108f718f92721af3b95e74349a and
# c32a1d4ab5d03f1284b67883e8d87530.
ARCHIVES = (
    ("cifar-10-python.tar.gz", 170_498_071,
     "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
    ("cifar-10-binary.tar.gz", 170_052_171,
     "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
)  # fmt: skip
# md5 of the unpacked files for Python, as in torchvision (datasets/cifar.py).
PYTHON_FILES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


class Split(NamedTuple):
    images: np.ndarray  # uint8 (N, 32, 32, 3)
    labels: np.ndarray  # int64 (N,), 0..9


def run(args):
    """Runs `prepare_dataset cifar10`: records, and statistics where asked for."""
    splits = load(files.local(args.input), args.check)
    counts = ", ".join(f"{len(split.labels)} {name}" for name, split in splits.items())
    print(f"{args.input}: {counts} images", flush=True)

    def examples(items):
        for name, i in items:
            yield {"image": splits[name].images[i], "label": int(splits[name].labels[i])}

    digests = {name: digest(split) for name, split in splits.items()}
    complete = shards.make(
        args,
        examples,
        key="image",
        shape=(SIDE, SIDE, 3),
        classes=CLASSES,
        items={name: [(name, i) for i in range(len(s.labels))] for name, s in splits.items()},
        names={name: [digests[name]] for name in splits},
        settings={"set": "cifar10"},
    )
    if args.compute_fid:
        args.fid_stats = args.fid_stats or f"{args.output}/cifar10_fid_stats.npz"
        args.image_size = SIDE
        train = splits["train"]
        items = [(digests["train"], i) for i in range(len(train.labels))]
        statistics.check(args, "train", items)
        images = lambda items: ((train.images[i], None) for _, i in items)  # noqa: E731
        statistics.write(args, "train", items, images)
    return complete


def digest(split):
    """Digests the images and labels of a split in their order."""
    content = hashlib.sha256(split.images.tobytes())
    content.update(split.labels.astype(np.int64).tobytes())
    return content.hexdigest()


def load(path, check=True):
    """Reads CIFAR-10 from whatever is there.

    Args:
      path: `Path` of an archive or a folder, see the module.
      check: hold archives and files for Python against their known checksums, and every form
        against the size of the set: 50,000 and 10,000 images, a tenth of each class.

    Returns:
      {"train": Split, "test": Split}; a folder of PNG files may lack the latter.

    Raises:
      FileNotFoundError, or ValueError with one line: another file, or a damaged one.
    """
    if not path.exists():
        raise FileNotFoundError(f"no CIFAR-10 at {path}: name an archive or a folder")
    splits = _from_archive(path, check) if path.is_file() else _from_folder(path, check)
    for name, (images, labels) in splits.items():
        if not len(labels) or labels.min() < 0 or labels.max() >= len(CLASSES):
            raise ValueError(f"{path}: the labels of '{name}' are not those of CIFAR-10")
        counts = np.bincount(labels, minlength=len(CLASSES))
        if check and (len(images) != COUNTS[name] or counts.min() != counts.max()):
            raise ValueError(
                f"{path}: {len(images)} images of '{name}' ({counts.min()} to {counts.max()} of "
                f"a class) where CIFAR-10 has {COUNTS[name]}; --check=False takes them as they are"
            )
    return splits


def _from_archive(path, check):
    if check:
        _check_archive(path)
    batches = {}
    with files.reading(path, "damaged, cut or not an archive"), tarfile.open(path) as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            if member.isfile() and folder.rpartition("/")[2] in FOLDERS:
                batches[name] = archive.extractfile(member).read()
    return _from_batches(batches, path)


def _check_archive(path):
    size = path.stat().st_size
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in [known for *_, known in ARCHIVES]:
        known = " nor ".join(f"{name} ({size:,} bytes, {sha})" for name, size, sha in ARCHIVES)
        raise ValueError(
            f"{path}: {size:,} bytes with sha256 {sha256} are neither {known}: another file, or "
            "damaged or cut on its way; fetch it again, or take it as it is with --check=False"
        )


def _from_folder(path, check):
    first = BATCHES["train"][0]
    for name, verify in ((first, check), (f"{first}.bin", False)):
        # As it is, or somewhere below, as in the folders of downloads.
        if matches := sorted(path.rglob(name)):
            files = {file.name: file.read_bytes() for file in sorted(matches[0].parent.iterdir())
                     if file.name.removesuffix(".bin") in PYTHON_FILES}  # fmt: skip
            if verify:
                _check_files(files, matches[0].parent)
            return _from_batches(files, matches[0].parent)
    if matches := sorted(p for p in path.rglob("*.tar.gz") if "cifar-10-" in p.name):
        return _from_archive(matches[0], check)
    if matches := sorted(path.rglob("cifar10-*.tfrecord-*")):
        return _from_tfrecords(matches)
    return _from_pictures(path)


def _check_files(files, folder):
    for name, content in files.items():
        if hashlib.md5(content).hexdigest() != PYTHON_FILES[name]:
            raise ValueError(
                f"{folder / name}: not CIFAR-10's own file, or damaged or cut: fetch it again, or "
                "take it as it is with --check=False"
            )


def _from_batches(files, where):
    """Returns {file name: bytes} of the batches for Python or of the binary ones."""
    splits = {}
    for split, names in BATCHES.items():
        parts = []
        for name in names:
            if name in files:
                parts.append(_python_batch(files[name], f"{where}: {name}"))
            elif f"{name}.bin" in files:
                parts.append(_binary_batch(files[f"{name}.bin"], f"{where}: {name}.bin"))
            else:
                raise ValueError(f"{where}: no {name}, so it is not the whole of CIFAR-10")
        splits[split] = Split(*map(np.concatenate, zip(*parts, strict=True)))
    return splits


def _python_batch(content, where):
    batch = torch_files.read_pickle(io.BytesIO(content), where)
    data = batch.get("data") if isinstance(batch, dict) else None
    labels = batch.get("labels") if isinstance(batch, dict) else None
    data, labels = np.asarray(data), np.asarray(labels)
    if data.dtype != np.uint8 or data.shape != (labels.size, 3 * SIDE**2) or labels.ndim != 1:
        raise ValueError(f"{where}: not a batch of CIFAR-10: data {data.dtype} {data.shape}")
    return _planes(data), labels.astype(np.int64)


def _binary_batch(content, where):
    size = 1 + 3 * SIDE**2
    if not content or len(content) % size:
        raise ValueError(f"{where}: {len(content)} bytes are no whole number of images: cut short")
    rows = np.frombuffer(content, np.uint8).reshape(-1, size)
    return _planes(rows[:, 1:]), rows[:, 0].astype(np.int64)


def _planes(rows):
    """Turns rows (N, 3072), red, then green, then blue, into images (N, 32, 32, 3)."""
    return rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)


def _from_tfrecords(paths):
    """Reads what TensorFlow Datasets prepares: PNG files in tf.train.Examples, in TFRecords."""
    rows_of = {}
    for path in paths:
        split = path.name.split(".")[0].removeprefix("cifar10-")
        for record in _tfrecords(path):
            try:
                feature = tf_example_pb2.Example.FromString(record).features.feature
                image = _picture(io.BytesIO(feature["image"].bytes_list.value[0]), path)
                label = feature["label"].int64_list.value[0]
            except ValueError:
                raise
            except Exception as error:  # protobuf's own kinds, IndexError
                raise ValueError(f"{path}: a damaged record ({error})") from error
            rows_of.setdefault(split, []).append((image, label))
    return _stack(rows_of, paths[0].parent)


def _tfrecords(path):
    """Returns the records of a TFRecord file; lengths and their checksums are not looked at."""
    with open(path, "rb") as file:
        while header := file.read(12):
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else None
            record = b"" if length is None else file.read(length)
            if length is None or len(record) < length or len(file.read(4)) < 4:
                raise ValueError(f"{path}: cut short")
            yield record


def _from_pictures(path):
    """Reads PNG files below SPLIT/CLASS/, or CLASS/ for the training images alone."""
    names = [name for name in ("train", "test") if (path / name).is_dir()]
    classes, items = class_folders.list_images(path, names)
    if len(classes) != len(CLASSES):
        raise ValueError(f"{path}: {len(classes)} class folders where CIFAR-10 has {len(CLASSES)}")
    # Labels are in the order of the names, which for those of CIFAR-10 and for numbers is its own.
    rows_of = {
        split: [(_picture(path / file, path / file), label) for file, label in files]
        for split, files in items.items()
    }
    return _stack(rows_of, path)


def _picture(file, where):
    image = np.asarray(pictures.read(where, file=file).convert("RGB"))
    if image.shape != (SIDE, SIDE, 3):
        raise ValueError(f"{where}: a picture of {image.shape[1]}x{image.shape[0]}, not 32x32")
    return image


def _stack(rows_of, where):
    unknown = rows_of.keys() - COUNTS.keys()
    if unknown or "train" not in rows_of:
        raise ValueError(f"{where}: splits {sorted(rows_of)} where train and test were expected")
    return {
        split: Split(*(np.stack(column) for column in zip(*rows, strict=True)))
        for split, rows in rows_of.items()
    }
