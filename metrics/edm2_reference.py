"""Reads EDM2's reference statistics (`img512.pkl`, `img64.pkl`) without running their pickle.

Such a file is a pickle of {"num_images": int, "fid": {"mu", "sigma"}, "fd_dinov2": {"mu",
"sigma"}}, numpy arrays. It needs three globals; each stands here for a record that does nothing
but hold its arguments, and every other is refused by name.
"""

import pickle

import numpy as np

METRICS = {"fid": 2048, "fd_dinov2": 1024}  # and the features of the published files


class _RefusedError(ValueError):
    """A message that is already complete."""


class _Dtype:
    def __init__(self, name, *_):
        self.name, self.order = name, "="

    def __setstate__(self, state):
        self.order = state[1]

    def numpy(self):
        if self.name not in ("f8", "f4"):
            raise ValueError(f"an array of {self.name!r}, not of f8 or f4")
        return np.dtype(self.name).newbyteorder(self.order)


class _Array:
    """A numpy array: made empty, filled by its state (version, shape, dtype, fortran, bytes)."""

    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state):
        self.state = state

    def numpy(self):
        _, shape, dtype, fortran, raw = self.state
        data = np.frombuffer(raw, dtype.numpy())
        return data.reshape(shape, order="F" if fortran else "C").astype(np.float64)


class _Call:
    """A record as a pickle may call it; without attributes that it could write."""

    __slots__ = ("record",)

    def __init__(self, record):
        self.record = record

    def __call__(self, *args):
        return self.record(*args)

    def __setstate__(self, state):
        raise ValueError("state for a function")


_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): _Call(_Array),
    ("numpy._core.multiarray", "_reconstruct"): _Call(_Array),  # numpy 2
    ("numpy", "ndarray"): None,  # only ever an argument, of _reconstruct
    ("numpy", "dtype"): _Call(_Dtype),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, path):
        super().__init__(file)
        self.path = path

    def find_class(self, module, name):
        if (module, name) not in _GLOBALS:
            raise _RefusedError(f"{self.path}: refused, its pickle asks for {module}.{name}")
        return _GLOBALS[module, name]


def load(path):
    """The statistics of a file: {"fid": (mu (D,), sigma (D, D)), "fd_dinov2": ...}, float64.

    A metric that the file lacks is left out.

    Returns:
      The statistics, and the number of images, or None where the file does not say.

    Raises:
      ValueError: in one line, a global that is not allowed, damage, or another content.
    """
    with open(path, "rb") as file:
        try:
            found = _Unpickler(file, path).load()
            moments = {name: _moments(found[name]) for name in METRICS if name in found}
            if not moments:
                raise ValueError(f"it holds {', '.join(map(str, found))}")
            return moments, found.get("num_images")
        except _RefusedError:
            raise
        except Exception as error:  # unpickling raises nearly all kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path}: not EDM2's reference statistics ({reason})") from error


def _moments(part):
    mu, sigma = part["mu"].numpy(), part["sigma"].numpy()
    if mu.ndim != 1 or sigma.shape != mu.shape * 2:
        raise ValueError(f"mu {mu.shape} and sigma {sigma.shape}")
    return mu, sigma
