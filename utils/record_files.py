"""Readers of the shards of a dataset, each an ArrayRecord file, and what lies around them."""

import collections
import threading

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from utils import files

_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # the fastest for random access


class Readers:
    """Readers of shards, opened when asked for. The latest `most` of them stay open.

    One that is let go of while a thread reads from it closes when that thread is done.
    """

    def __init__(self, paths, most):
        self._paths, self._most = paths, max(most, 1)
        self._open, self._lock = collections.OrderedDict(), threading.Lock()

    def get(self, shard):
        """Returns the reader of shard number `shard`."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        reader = open_shard(self._paths[shard])
        with self._lock:
            self._open[shard] = reader
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        return reader

    def length(self, shard):
        """Returns the number of records of a shard."""
        return self.get(shard).num_records()


def open_shard(path):
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; run the preparation again to make it")
    reader = array_record_module.ArrayRecordReader(
        str(path), _READ_OPTIONS, file_reader_buffer_size=32768
    )
    if not reader.ok():
        try:
            reader.read([0])  # only reading tells why
        except Exception as error:
            raise unreadable(path, error) from error
        raise ValueError(damaged(path, "cannot be opened"))
    return reader


def unreadable(path, error):
    """Returns the exception for a shard that is damaged, or kept from us by the system."""
    if reason := files.system_reason(error):
        return OSError(f"{path} cannot be read: {reason}; the shard itself may be whole")
    return ValueError(damaged(path, error))


def damaged(path, reason):
    mend = "delete the file and run the preparation again"
    return f"damaged shard {path}: {files.first_line(reason)}; {mend}"


def staged(root, name, split, folder):
    """Copies a dataset in a bucket to this machine, without the shards of other splits."""
    from utils import processes  # late: it brings jax, which readers of a folder do not need

    def wanted(file):
        return not file.startswith(f"{name}-") or file.startswith(f"{name}-{split}.")

    def bar(done, total):
        return processes.progress(done, total, "files", f"copy {root}")

    return files.local(root, folder, wanted, bar)


def no_dataset(root, name):
    """Says what is wrong where `root` holds no finished dataset."""
    if not root.is_dir():
        return f"no dataset at {root}: the folder does not exist; set dataset.root, or prepare it"
    if any(root.glob(f"{name}-*.array_record-*")):
        return f"the dataset at {root} is not finished; run its preparation again to complete it"
    if any(root.glob("*.pt")) or any(root.glob("train/*.pt")):
        command = f"python -m scripts.prepare_dataset pt --input {root} --output NEW_FOLDER"
        return f"{root} holds .pt files; turn them into records first: {command}"
    return f"no dataset at {root}: no dataset_info.json in it; set dataset.root, or prepare it"


def further(features, key):
    """Returns {name: (shape, dtype)} of the tensors beside the sample `key`."""
    return {
        name: (tuple(tensor.shape), np.dtype(tensor.np_dtype))
        for name, tensor in features.items()
        if name not in (key, "moments_flipped") and type(tensor) is tfds.features.Tensor
    }
