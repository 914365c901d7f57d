"""Writes state dicts in the format of torch, opcode by opcode, without torch."""

import struct
import zipfile

import numpy as np


def write_zip(path, tree):
    """Writes a nested dict of float32 arrays as `torch.save` has done since 1.6."""
    storages = []
    body = b"\x80\x02" + _pickled(tree, storages) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(storages):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")


def _pickled(value, storages):
    """Returns the opcodes of a dict or an array, which is appended to `storages`."""
    if isinstance(value, dict):
        items = (_text(name) + _pickled(item, storages) for name, item in value.items())
        return _ORDERED_DICT + b"(" + b"".join(items) + b"u"
    array = np.ascontiguousarray(value, "<f4").reshape(np.shape(value))
    storages.append(array)
    strides = [stride // array.itemsize for stride in array.strides]
    storage = _text("storage") + b"ctorch\nFloatStorage\n" + _text(str(len(storages) - 1))
    storage = b"(" + storage + _text("cpu") + _integer(array.size) + b"tQ"  # Q: a persistent id
    arguments = storage + _integer(0) + _integers(array.shape) + _integers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89" + _ORDERED_DICT + b"tR"


_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def _text(word):
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def _integer(value):
    return b"J" + struct.pack("<i", value)


def _integers(values):
    return b"(" + b"".join(map(_integer, values)) + b"t"
