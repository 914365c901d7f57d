"""Containers in which other projects keep latents: one an image, or many rows in a file.

Every item or file is given as a dict of arrays and numbers by their names there. Pickles are read
by formats/pickles.py, which runs nothing; lmdb and h5py are extras (requirements-data.txt).
"""

import io
import threading
import zipfile
from pathlib import Path

from safetensors import safe_open

from formats import torch_files
from utils import files, npy

ITEMS = (".npy", ".npz", ".pt", ".latent")  # what may hold one latent
BLOCK = 64  # rows of HDF5 that are read at once
COUNT = "num_samples"  # the key of an LMDB that says how many there are


def parse(name, content, where):
    """Reads the bytes of a file of one latent, with an ending of `ITEMS`: {name: value}.

    An array alone has the name "". Raises ValueError in a line that begins with `where`.
    """
    if name.endswith(".npy"):
        with files.reading(where, "not an array of numbers, or damaged"):
            return {"": npy.parse(content)}
    if name.endswith(".npz"):
        with files.reading(where, "not a .npz, or damaged"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = {n.removesuffix(".npy"): archive.read(n) for n in archive.namelist()}
            return {key: npy.parse(member) for key, member in members.items()}
    file = io.BytesIO(content)
    if name.endswith(".pt"):
        item = torch_files.read(file, where, len(content))
    else:
        item = torch_files.read_pickle(file, where)
    return item if isinstance(item, dict) else {"": item}


def safetensors(path):
    """Opens the tensors of a file: {name: array or `Slices`}."""
    file = safe_open(path, "numpy")
    tensors = {name: file.get_slice(name) for name in file.keys()}
    return {
        name: Slices(tensor) if len(tensor.get_shape()) > 2 else file.get_tensor(name)
        for name, tensor in tensors.items()
    }


class Slices:
    """A tensor of a safetensors file of which rows are read."""

    def __init__(self, tensor):
        self._tensor, self.shape = tensor, tuple(tensor.get_shape())

    def __getitem__(self, row):
        return self._tensor[row]


class Hdf5:
    """The datasets of an HDF5 file: {name: array or `Rows`}."""

    def __init__(self, path):
        h5py = _extra("h5py", path)
        self._file = h5py.File(path, "r")
        self.arrays = {
            name: Rows(item, threading.Lock()) if item.ndim > 2 else item[()]
            for name, item in self._file.items()
            if isinstance(item, h5py.Dataset)
        }


class Rows:
    """An array of which rows are read in blocks, in any order; the latest block is kept."""

    def __init__(self, dataset, lock):
        self._dataset, self._lock, self._block = dataset, lock, (None, None)
        self.shape, self.dtype = dataset.shape, dataset.dtype

    def __getitem__(self, row):
        start = row - row % BLOCK
        with self._lock:
            if self._block[0] != start:
                self._block = start, self._dataset[start : start + BLOCK]
            return self._block[1][row - start]


class Lmdb:
    """Pickled dicts under the keys "0", "1", ... of an LMDB, in a folder or a file."""

    def __init__(self, path):
        lmdb = _extra("lmdb", path)
        self.path = Path(path)
        with files.reading(path, "not an LMDB, or damaged"):
            options = {"readonly": True, "lock": False, "readahead": False, "max_spare_txns": 64}
            self._env = lmdb.open(str(path), subdir=self.path.is_dir(), **options)
            with self._env.begin() as transaction:
                said, there = transaction.get(COUNT.encode()), transaction.stat()["entries"]
            if said is None:
                raise ValueError(f"it has no key {COUNT}")
            text = said.decode("latin1").strip()
            count = text if text.isdecimal() else torch_files.read_pickle(io.BytesIO(said), path)
            self.count = int(count)
            if there - 1 < self.count:
                raise ValueError(f"{COUNT} is {self.count}, and {there - 1} records are there")

    def read(self, number):
        """Reads record `number`, a dict. Safe to call from several threads."""
        where = f"{self.path}, record {number}"
        with files.reading(where, "damaged"), self._env.begin() as transaction:
            content = transaction.get(str(number).encode())
        if content is None:
            raise ValueError(f"{where}: it is not there")
        return torch_files.read_pickle(io.BytesIO(content), where)


def _extra(name, path):
    try:
        return __import__(name)
    except ImportError as error:
        raise ValueError(
            f"{path} is read by {name}, which is not there: pip install -r requirements-data.txt"
        ) from error
