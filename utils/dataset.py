"""The record format: what writes a dataset, and what reads it.

A dataset is a TensorFlow Datasets folder in ArrayRecord (`tfds.builder_from_directory(root)
.as_data_source()` reads it, no TensorFlow needed): `dataset_info.json`, `features.json` and
shards `records-SPLIT.array_record-00000-of-00313`. Each record is a tf.train.Example with

- `moments` (h, w, 2c) float32, float16 or bfloat16: mean, then standard deviation, of the VAE's
  posterior, unscaled; beside it, where prepared so, `moments_flipped`, of the mirrored image
- or `image` (h, w, c) uint8, as bytes or a lossless picture (`compressed`); or floats, `values`
- `label`, an index into the sorted classes; not there where there are no classes
- any number of conditions by name, see utils/conditions.py.

Tensors are stored as raw bytes and shards uncompressed: latents hardly compress, and reading is
then one hash check and one copy. Pictures take half the bytes, and a millisecond to decode.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes  # noqa: F401, makes bfloat16 known to numpy
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from utils import contents, files, identity, limits, record_files

NAME = "records"
SPARE_FILES = 256  # open files that are left to everything else
_WRITE_OPTIONS = "group_size:1,uncompressed"  # group_size 1: random access record by record


# Writing


def shard_path(root, split, index, count):
    """Returns the final path of a shard; `index` of `count`."""
    return files.path(root) / f"{NAME}-{split}.array_record-{index:05d}-of-{count:05d}"


def example(label, picture=None, **tensors):
    """Makes one record for `write_shard`; the label None: without classes.

    picture: bytes from `compressed`, which are stored in the place of `image`.
    """
    tensors |= {} if picture is None else {"picture": picture}
    return tensors if label is None else tensors | {"label": label}


def compressed(image, encoding):
    """Encodes an image uint8 (h, w, 3) without loss: bytes of `webp` or `png`, the fastest way."""
    how = {"webp": {"lossless": True, "method": 0}, "png": {"compress_level": 1}}[encoding]
    file = io.BytesIO()
    Image.fromarray(image).save(file, encoding, **how)
    return file.getvalue()


def write_shard(path, examples):
    """Writes dicts of numpy arrays (see the module) as one shard; returns how many.

    The file appears under its name only when complete.
    """
    count, content = 0, identity.Sum()
    with files.complete(path) as unfinished:
        writer = array_record_module.ArrayRecordWriter(str(unfinished), _WRITE_OPTIONS)
        for one in examples:
            picture = one.pop("picture", None)
            record = _serialise(one)
            content.add(record)  # of the pixels, however they are stored
            if picture is not None:
                record = _serialise(one | {"image": np.frombuffer(picture, np.uint8)})
            with _writing(path):
                writer.write(record)
            count += 1
        with _writing(path):
            writer.close()
        contents.note(path, content)
    return count


@contextlib.contextmanager
def _writing(path):
    try:
        yield
    except RuntimeError as error:  # of ArrayRecord, whatever the system said
        reason = files.system_reason(error) or files.first_line(error)
        raise OSError(f"{path} cannot be written ({reason})") from error


def is_dataset(root):
    """Tells whether `root` holds a finished dataset."""
    return (files.path(root) / "dataset_info.json").exists()


def shard_length(path):
    """Counts the records of a shard. ValueError naming the file if it is damaged or cut short."""
    reader = record_files.open_shard(files.path(path))
    length = reader.num_records()
    reader.close()
    return length


def write_metadata(
    root, key, shape, dtype, classes, shard_lengths, flipped=False, settings=None, conditions=None
):
    """Writes features.json and dataset_info.json: from here on `root` is a dataset.

    Args:
      key: "moments", "image" or "values"; `shape` (h, w, channels) and `dtype` of that tensor.
      classes: the class names in the order of their labels, or their number, which may be 0.
      shard_lengths: {split: [records in shard 0, 1, ...]}.
      settings: what it is made from and how, for JSON; with a digest of the records they become the
        description, which `Records.identity` tells. `encoding`: see `compressed`.
      conditions: {name: (shape, dtype)} of further tensors.
    """
    root = files.path(root)
    tensors = {key: (shape, dtype), **(conditions or {})}
    if flipped:
        tensors["moments_flipped"] = (shape, dtype)
    features = {
        name: tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding="bytes")
        for name, (shape, dtype) in tensors.items()
    }
    if encoding := (settings or {}).get("encoding"):
        known = "png" if encoding == "png" else None  # to tfds, which goes by content otherwise
        features[key] = tfds.features.Image(shape=shape, encoding_format=known)
    if classes:
        label = {"num_classes": classes} if isinstance(classes, int) else {"names": list(classes)}
        features["label"] = tfds.features.ClassLabel(**label)
    builder = tfds.core.dataset_info.DatasetIdentity(
        name=NAME, version=tfds.core.Version("1.0.0"), data_dir=str(root), module_name=""
    )
    paths = {
        split: [shard_path(root, split, i, len(lengths)) for i in range(len(lengths))]
        for split, lengths in shard_lengths.items()
    }
    read = functools.partial(_raw_records, pictures=bool(encoding))
    content = {split: contents.of_shards(found, read) for split, found in paths.items()}
    info = tfds.core.DatasetInfo(
        builder=builder,
        features=tfds.features.FeaturesDict(features),
        description=json.dumps({**(settings or {}), "content": content}),
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    splits = []
    for split, lengths in shard_lengths.items():
        size = sum(files.size(path) for path in paths[split])
        template = tfds.core.ShardedFileTemplate(
            data_dir=root, dataset_name=NAME, split=split, filetype_suffix="array_record"
        )
        splits.append(tfds.core.SplitInfo(split, list(lengths), size, template))
    info.set_splits(tfds.core.splits.SplitDict(splits))
    # dataset_info.json makes the folder a dataset, so it comes last and at once.
    info.features.save_config(root)
    with files.complete(root / "dataset_info.json") as unfinished:
        with tempfile.TemporaryDirectory() as folder:
            info.write_dataset_info_json(folder)
            shutil.copyfile(Path(folder, "dataset_info.json"), unfinished)
    contents.forget(root, NAME)


def _raw_records(path, pictures=False):
    """Yields the records of a shard as bytes, pictures as pixels."""
    reader = record_files.open_shard(path)
    for i in range(reader.num_records()):
        record = reader.read([i])[0]
        if pictures:
            message = tf_example_pb2.Example.FromString(record)
            values = message.features.feature["image"].bytes_list.value
            values[0] = _pixels(values[0]).tobytes()
            record = message.SerializeToString(deterministic=True)
        yield record
    reader.close()


def _pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture)))


def _serialise(example):
    features = {}
    for key, value in example.items():
        if key == "label":
            content = {"int64_list": tf_feature_pb2.Int64List(value=[int(value)])}
        else:
            content = {"bytes_list": tf_feature_pb2.BytesList(value=[value.tobytes()])}
        features[key] = tf_feature_pb2.Feature(**content)
    message = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
    return message.SerializeToString(deterministic=True)


# Reading


@dataclasses.dataclass(frozen=True)
class Records:
    """An opened split. `shape` (h, w, c') and `dtype` are those of the tensor `key`."""

    root: Path
    split: str
    key: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    num_records: int
    num_classes: int
    has_flipped: bool
    shard_paths: tuple[Path, ...]
    shard_starts: np.ndarray = dataclasses.field(repr=False)  # (shards + 1,)
    readers: record_files.Readers = dataclasses.field(repr=False)
    description: str = dataclasses.field(default="", repr=False)  # in dataset_info.json
    pictures: bool = False  # whether each is encoded
    features: dict = dataclasses.field(default_factory=dict)  # further tensors: (shape, dtype)
    wanted: tuple[str, ...] = ()  # those of them that are read

    @functools.cached_property
    def identity(self):
        """Identifies the records, see `contents.of_records`; reads some of them."""
        return contents.of_records(self, self.description)

    def holding(self, wanted):
        """Returns the same records, read with the tensors `wanted` of `features`."""
        return dataclasses.replace(self, wanted=wanted)

    def read(self, indices, flipped=True):
        """Reads records number `indices` (n,): {key: (n, h, w, c'), "label": int32 (n,)}.

        Without classes all labels are 0. Safe to call from several threads. With `flipped`,
        `moments_flipped` too, where stored; and what is `wanted`. Raises ValueError naming the
        shard where a record is damaged, OSError where the system does not let it be read.
        """
        keys = [self.key] + ["moments_flipped"] * (flipped and self.has_flipped)
        tensors = dict.fromkeys(keys, (self.shape, self.dtype))
        tensors |= {name: self.features[name] for name in self.wanted}
        batch = {
            name: np.empty((len(indices), *shape), dtype)
            for name, (shape, dtype) in tensors.items()
        }
        batch["label"] = np.zeros(len(indices), np.int32)
        shards = np.searchsorted(self.shard_starts, indices, side="right") - 1
        rows_of = collections.defaultdict(list)
        for row, shard in enumerate(shards.tolist()):
            rows_of[shard].append(row)
        for shard, rows in rows_of.items():
            positions = [int(indices[row] - self.shard_starts[shard]) for row in rows]
            reader = self.readers.get(shard)
            try:
                for row, record in zip(rows, reader.read(positions), strict=True):
                    self._parse(record, row, batch)
            except Exception as error:  # a RuntimeError of the reader, a DecodeError of protobuf
                raise record_files.unreadable(self.shard_paths[shard], error) from error
        return batch

    def _parse(self, record, row, batch):
        features = tf_example_pb2.Example.FromString(record).features.feature
        for key, out in batch.items():
            if key == "label":
                if self.num_classes:
                    out[row] = features[key].int64_list.value[0]
            else:
                content = features[key].bytes_list.value[0]
                encoded = self.pictures and key == self.key
                values = _pixels(content) if encoded else np.frombuffer(content, out.dtype)
                out[row] = values.reshape(out.shape[1:])


STAGES = {"cache": None, "shm": "/dev/shm/meanflow"}  # by a word; other names are folders


def open_records(root, split="train", stage="cache"):
    """Opens a dataset and checks that every shard is there, whole, and as long as it should be.

    Of a dataset in a bucket a copy is read, which is made first: all shards of the split, on every
    host, since each epoch is shuffled as a whole. `stage` says where: `cache`, `shm`, or a folder;
    with `none` each record is read from the bucket, which sends a hundred times its size.

    Raises FileNotFoundError where there is no dataset, ValueError where it is damaged or of
    another kind, OSError where the system does not let it be read, in one line that names the file.
    """
    root = origin = files.path(root)
    if not is_dataset(root):
        raise FileNotFoundError(record_files.no_dataset(root, NAME))
    if files.is_remote(root) and stage != "none":
        root = record_files.staged(root, NAME, split, STAGES.get(stage, stage))
    try:
        info = tfds.builder_from_directory(root).info
        key, feature = _tensor_of(info.features)
        classes = info.features["label"].num_classes if "label" in info.features else 0
    except Exception as error:  # whatever tfds makes of foreign or damaged metadata
        if reason := files.system_reason(error):
            raise OSError(f"the dataset at {root} cannot be read: {reason}") from error
        raise ValueError(
            f"{root}: not a dataset of this project ({files.first_line(error)}); "
            "rewrite it with scripts/prepare_dataset.py"
        ) from error
    if split not in info.splits:
        raise ValueError(f"{root} has no split '{split}', only: {', '.join(info.splits)}")
    lengths = info.splits[split].shard_lengths
    paths = tuple(files.path(path) for path in info.splits[split].filepaths)
    allowed = limits.allow_open_files(len(paths) + SPARE_FILES)
    readers = record_files.Readers(paths, max(allowed - SPARE_FILES, allowed // 2))
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(readers.length, range(len(paths)))
        for path, length, expected in zip(paths, found, lengths, strict=True):
            if length != expected:
                raise ValueError(
                    record_files.damaged(path, f"{length} records instead of {expected}")
                )
    records = Records(
        root=origin,
        split=split,
        key=key,
        shape=tuple(feature.shape),
        dtype=np.dtype(feature.np_dtype),
        num_records=sum(lengths),
        num_classes=classes,
        has_flipped="moments_flipped" in info.features,
        shard_paths=paths,
        shard_starts=np.concatenate([[0], np.cumsum(lengths)]),
        readers=readers,
        description=info.description,
        pictures=isinstance(feature, tfds.features.Image),
        features=record_files.further(info.features, key),
    )
    if records.num_records == 0:
        raise ValueError(f"{root}: the split '{split}' is empty")
    records.read(np.zeros(1, np.int64))
    return records


def _tensor_of(features):
    for key in ("moments", "image", "values"):
        if key in features:
            if None in features[key].shape:
                raise ValueError(f"'{key}' holds pictures of several sizes")
            return key, features[key]
    raise ValueError(f"has the features {', '.join(features)}, not moments, image or values")
