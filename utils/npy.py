"""NumPy's files, `.npy` and `.npz`, as other people write them: no pickles, mapped and not read."""

import ast
import functools
import mmap
import shutil
import struct
import tempfile
import zipfile

import numpy as np

MAGIC = b"\x93NUMPY"
CHUNK = 2**20


def parse(content):
    """Reads the array in the bytes of a `.npy`; it shares their memory.

    Raises:
      ValueError: no array, one of Python's objects, or a cut one.
    """
    start, shape, fortran, dtype = header(content[: 2**16])
    count = int(np.prod(shape, dtype=np.int64))
    if len(content) - start < count * dtype.itemsize:
        raise ValueError(f"{len(content) - start} bytes of {count * dtype.itemsize}: cut short")
    array = np.frombuffer(content, dtype, count, start)
    return array.reshape(shape, order="F" if fortran else "C")


def header(head):
    """Reads the beginning of a `.npy`: (where numbers begin, shape, Fortran's order, dtype)."""
    if head[:6] != MAGIC:
        raise ValueError(f"no .npy but {_kind(head)}")
    if len(head) < 12:
        raise ValueError("cut short")
    size = 10 + int.from_bytes(head[8:10], "little")
    if head[6] > 1:
        size = 12 + int.from_bytes(head[8:12], "little")
    if len(head) < size:
        raise ValueError("cut short")
    return size, *_described(bytes(head[10 if head[6] == 1 else 12 : size]))


def _kind(head):
    """Says for people what a file is that begins with these bytes."""
    known = {MAGIC: "a .npy", b"PK": "a .npz or .zip", b"\x80": "a pickle"}
    return next((kind for first, kind in known.items() if head.startswith(first)),
                f"something that begins with {bytes(head[:6])!r}" if head else "empty")  # fmt: skip


@functools.lru_cache(1024)
def _described(text):
    entries = ast.literal_eval(text.decode("latin1").strip())
    dtype = np.lib.format.descr_to_dtype(entries["descr"])
    if dtype.hasobject:
        raise ValueError("it holds Python's objects, not numbers")
    return tuple(map(int, entries["shape"])), bool(entries["fortran_order"]), dtype


def mapped(path, offset=0):
    """Maps the array of a `.npy`, or of one that begins within a file, into memory.

    path: of a file, or one that is opened.
    """
    file = open(path, "rb") if not hasattr(path, "read") else path
    try:
        file.seek(offset)
        start, shape, fortran, dtype = header(file.read(2**16))
        if 0 in shape:
            return np.zeros(shape, dtype)
        order = "F" if fortran else "C"
        return np.memmap(file, dtype, "r", offset + start, shape, order).view(np.ndarray)
    finally:
        file.close()


def release(array):
    """Lets go of the memory that a mapped array has filled; it is read again from the file."""
    if isinstance(array.base, np.memmap):
        array.base._mmap.madvise(mmap.MADV_DONTNEED)


def load_npz(path):
    """Opens a `.npz` as `numpy.load`, without pickles; a ValueError says what else is there."""
    with open(path, "rb") as file:
        head = file.read(len(MAGIC))
    if not head.startswith(b"PK"):
        raise ValueError(f"no .npz but {_kind(head)}")
    return np.load(path, allow_pickle=False)


def names(path):
    """Lists the arrays of a `.npz`."""
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def member(path, name):
    """Maps an array of a `.npz`; a compressed one is inflated into a file without a name.

    Raises:
      KeyError: no such array; zipfile.BadZipFile: its checksum is another.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        packed = info.compress_type != zipfile.ZIP_STORED
        target = tempfile.TemporaryFile() if packed else None
        with archive.open(info) as source:  # checks what it reads
            if packed:
                shutil.copyfileobj(source, target, CHUNK)
                return mapped(target)
            while source.read(CHUNK):
                pass
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        lengths = struct.unpack("<26x2H", file.read(30))
    return mapped(path, info.header_offset + 30 + sum(lengths))


def header_of_member(path, name):
    """Reads shape and dtype of an array of a `.npz`, and no more."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        _, shape, _, dtype = header(file.read(2**16))
    return shape, dtype
