"""Writes files in the formats of torch as people have them, opcode by opcode, without torch.

A value is a nested dict, list or tuple of str, int, float, bool, None and numpy arrays; `Strided`
is a window into a storage, `Raw` opcodes as they are.
"""

import pickle
import struct
import zipfile
from typing import NamedTuple

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


class Strided(NamedTuple):
    data: np.ndarray  # one-dimensional: the storage
    offset: int
    shape: tuple
    strides: tuple  # in elements


class Parameter(NamedTuple):
    data: np.ndarray


class Raw(bytes):
    """Opcodes that leave one object on the stack."""


def reference(module, name):
    return f"c{module}\n{name}\n".encode()


class _Writer:
    def __init__(self, legacy):
        self.legacy, self.storages = legacy, []

    def pickle(self, value):
        return b"\x80\x02" + self.value(value) + b"."

    def value(self, value):
        if isinstance(value, Raw):
            return bytes(value)
        if value is None or isinstance(value, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        if isinstance(value, int):
            return pickle.dumps(value, 2)[2:-1]
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str):
            return b"X" + struct.pack("<i", len(value.encode())) + value.encode()
        if isinstance(value, np.ndarray):
            return self.array(value)
        if isinstance(value, Strided):
            return self.tensor(*value)
        if isinstance(value, Parameter):
            function = reference("torch._utils", "_rebuild_parameter")
            return function + self.tuple([value.data, True, {}]) + b"R"
        if isinstance(value, dict):
            items = b"".join(self.value(k) + self.value(v) for k, v in value.items())
            return reference("collections", "OrderedDict") + b")R(" + items + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(self.value(v) for v in value) + b"e"
        return self.tuple(value)

    def tuple(self, values):
        return b"(" + b"".join(self.value(v) for v in values) + b"t"

    def array(self, array):
        strides = [s // array.itemsize for s in np.empty(array.shape, array.dtype).strides]
        return self.tensor(array.reshape(-1), 0, array.shape, strides)

    def tensor(self, data, offset, shape, strides):
        key, kind = str(len(self.storages)), STORAGES[data.dtype.name]
        self.storages.append(data)
        identity = ["storage", Raw(reference("torch", kind)), key, "cpu", len(data)]
        identity += [None] if self.legacy else []
        storage = Raw(self.tuple(identity) + b"Q")
        hooks = Raw(reference("collections", "OrderedDict") + b")R")
        arguments = [storage, offset, tuple(map(int, shape)), tuple(map(int, strides)), False]
        return (
            reference("torch._utils", "_rebuild_tensor_v2") + self.tuple([*arguments, hooks]) + b"R"
        )


def write_zip(path, value):
    """As `torch.save` writes since 1.6."""
    writer = _Writer(legacy=False)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", writer.pickle(value))
        archive.writestr("archive/byteorder", "little")
        for key, data in enumerate(writer.storages):
            archive.writestr(f"archive/data/{key}", data.tobytes())
        archive.writestr("archive/version", "3\n")


def write_legacy(path, value):
    """As `torch.save` wrote before 1.6."""
    writer = _Writer(legacy=True)
    body = writer.pickle(value)
    header = [MAGIC, VERSION, {"protocol_version": VERSION, "little_endian": True}]
    with open(path, "wb") as file:
        for part in header:
            pickle.dump(part, file, protocol=2)
        file.write(body)
        pickle.dump([str(i) for i in range(len(writer.storages))], file, protocol=2)
        for data in writer.storages:
            file.write(struct.pack("<q", len(data)) + data.tobytes())
