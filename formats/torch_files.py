"""Reads files written by `torch.save`, without torch.

Such a file is a pickle beside raw storages, either as members of a zip archive (`torch.save`
since 1.6) or one after the other in a stream (the legacy form). The pickles are read by
formats/pickles.py, which runs nothing.
"""

import io
import os
import zipfile

import numpy as np

from formats import pickles

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
INFLATION = 50  # times the size of a packed file, that what it holds may take,
SMALL = 2**26  # or so many bytes


def load(path):
    """Reads what `torch.save` stored, as nested dict, list, tuple and numpy arrays.

    Arrays have the shape and the strides of their tensors, in native byte order, and may be
    read-only views that share memory; bfloat16 and float8 have the dtypes of `ml_dtypes`.

    Raises FileNotFoundError, or ValueError with one line that names the file: a global that is
    not allowed, a damaged or truncated file, or a file of another kind.
    """
    with _open(path) as file:
        return read(file, path, os.path.getsize(path))


def read(file, path, size):
    """Reads the same from an open file of `size` bytes, whose name in errors is `path`."""
    try:
        return _load_stream(file, path, size)
    except pickles.RefusedError:
        raise
    except Exception as error:  # unpickling raises nearly all kinds
        raise ValueError(f"{path}: damaged or truncated torch file ({_line(error)})") from error


def load_pickle(path):
    """Reads a plain pickle made of numpy arrays, scalars, strings, dict, list and tuple.

    Raises as `load` does.
    """
    with _open(path) as file:
        return read_pickle(file, path)


def read_pickle(file, path):
    """Reads a plain pickle from an open file, whose name in errors is `path`."""
    try:
        return pickles.plain(pickles.Unpickler(file, path).load(), None)
    except pickles.RefusedError:
        raise
    except Exception as error:  # unpickling raises nearly all kinds
        raise ValueError(f"{path}: damaged or truncated pickle ({_line(error)})") from error


def _open(path):
    if os.path.isdir(path):
        raise FileNotFoundError(f"{path}: a folder in the place of a file")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    return open(path, "rb")


def _line(error):
    return " ".join(str(error).split()) or type(error).__name__


# ------------------------------------------------------------------------- the two containers


def _load_stream(file, path, size):
    if file.read(4) == b"PK\x03\x04":
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            return _load_zip(archive, path, size)
    file.seek(0)
    return _load_legacy(file, path, size)


def _load_zip(archive, path, size):
    members = {info.filename: info for info in archive.infolist()}
    _check_inflation(members.values(), path, size)
    roots = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise pickles.RefusedError(f"{path}: a zip archive without NAME/data.pkl is no torch file")
    folder = roots[0].split("/")[0]
    order = "little"
    if f"{folder}/byteorder" in members:
        order = archive.read(f"{folder}/byteorder").decode()
    cache = {}

    def fetch(storage):
        if storage.key not in cache:
            info = members[f"{folder}/data/{storage.key}"]
            need = storage.numel * storage.dtype.itemsize
            if info.file_size < need:
                raise ValueError(f"storage {storage.key} holds {info.file_size} of {need} bytes")
            cache[storage.key] = archive.read(info)
        return _elements(cache[storage.key], storage.dtype, storage.numel, order)

    root = pickles.Unpickler(io.BytesIO(archive.read(roots[0])), path).load()
    return pickles.plain(root, fetch)


def _check_inflation(members, path, size):
    """Refuses archives that would take far more memory than the file has bytes.

    torch stores its members as they are; people pack them again, which zeros take well.
    """
    if sum(info.compress_size for info in members) > size:
        raise pickles.RefusedError(f"{path}: a zip archive whose members overlap")
    total = sum(info.file_size for info in members)
    if total > max(INFLATION * size, SMALL):
        raise pickles.RefusedError(f"{path}: {size} bytes that would inflate to {total}")


def _load_legacy(file, path, size):
    """Reads header, pickle, list of storage keys, then per storage its length and its bytes."""
    try:
        magic = pickles.Unpickler(file, path).load()
    except Exception:  # as above
        magic = None
    if magic != _LEGACY_MAGIC:
        raise pickles.RefusedError(f"{path}: not a torch file (neither zip nor legacy stream)")
    if pickles.Unpickler(file, path).load() != _LEGACY_PROTOCOL:
        raise pickles.RefusedError(f"{path}: a torch legacy stream of an unknown version")
    system = pickles.Unpickler(file, path).load()
    order = "little" if system.get("little_endian", True) else "big"
    unpickler = pickles.Unpickler(file, path)
    root = unpickler.load()
    keys = pickles.Unpickler(file, path).load()
    cache = {}
    for key in keys:
        dtype = unpickler.storages[key].dtype
        numel = int.from_bytes(_read(file, 8, size), "little", signed=True)
        cache[key] = _elements(_read(file, numel * dtype.itemsize, size), dtype, numel, order)

    def fetch(storage):
        data = cache[storage.key]
        if len(data) < storage.numel:
            raise ValueError(f"storage {storage.key} holds {len(data)} of {storage.numel} numbers")
        return data

    return pickles.plain(root, fetch)


def _read(file, count, size):
    if not 0 <= count <= size - file.tell():
        raise ValueError(f"{count} bytes expected, {size - file.tell()} left")
    return file.read(count)


def _elements(raw, dtype, numel, order):
    data = np.frombuffer(raw, dtype=dtype, count=numel)
    # In a file of the other byte order a swapped copy has the right values.
    return data.byteswap() if order == "big" else data
