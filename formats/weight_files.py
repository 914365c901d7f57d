"""Where the weights of feature networks are looked for. Nothing is downloaded."""

import hashlib
import os

import numpy as np

from utils import files


def find(value, option, variable, names, advice):
    """Returns the weight file to read, as a pathlib.Path.

    Args:
      value: what the option `option` says; else the environment variable `variable` counts, else
        the first file of `names` in `files.cache_folder()`.
      advice: what the error says where there is none.

    Raises:
      FileNotFoundError: no such file, or none at all.
    """
    for path, origin in ((value, option), (os.environ.get(variable), variable)):
        if path:
            path = files.local(files.user_path(path))
            if not path.is_file():
                what = "a folder in the place of a file" if path.is_dir() else "no such file"
                raise FileNotFoundError(f"{origin}: {what}: {path}")
            return path
    for name in names:
        if (files.cache_folder() / name).is_file():
            return files.cache_folder() / name
    raise FileNotFoundError(advice)


def digest(tree):
    """Returns the SHA-256 (hex) of a nested dict of arrays, whatever file they come from."""
    total = hashlib.sha256()
    for name, value in sorted(flatten(tree).items()):
        value = np.ascontiguousarray(value, np.float32)
        total.update(f"{name}{value.shape}".encode())
        total.update(value.tobytes())
    return total.hexdigest()


def flatten(tree, prefix=""):
    """Returns the arrays of a nested dict under dotted names; everything else is left out."""
    flat = {}
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif isinstance(value, np.ndarray):
            flat[f"{prefix}{key}"] = value
    return flat
