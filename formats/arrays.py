"""Reads named arrays from a file of weights of any form that people have: safetensors, HDF5, torch.

The form is told by the content, not by the ending of the name. Nothing is executed.
"""

from safetensors.numpy import load_file

from formats import state_dicts, torch_files
from utils import files


def read(path):
    """Reads a file of weights: {name: array}, the names of HDF5 groups joined by `/`.

    Raises:
      FileNotFoundError, ValueError: nothing there, damaged, or no weights by name.
    """
    if is_safetensors(path):
        with files.reading(path, "damaged safetensors file"):
            return load_file(path)
    if _start(path).startswith(b"\x89HDF"):
        return _hdf5(path)
    return state_dicts.find(torch_files.load(path), path)[0]


def is_safetensors(path):
    """Tells by its content whether a file is in the form of safetensors."""
    return _start(path)[8:9] == b"{"


def _start(path):
    with open(path, "rb") as file:
        return file.read(9)


def _hdf5(path):
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path} is an HDF5 file: pip install h5py, which reads it") from None
    arrays = {}

    def collect(name, item):
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    with files.reading(path, "damaged HDF5 file"), h5py.File(path) as file:
        file.visititems(collect)
    return arrays
