"""Pickles read without running anything, for files of torch and numpy.

A pickle may call any function of the reader's Python, so only the names listed here are known, each
stands for a record of our own that does nothing but hold its arguments, and every other name is
refused. Tensors become numpy arrays, ordered dictionaries plain dictionaries.
"""

import math
import pickle

import ml_dtypes  # noqa: F401, makes bfloat16 and float8 known to numpy
import numpy as np

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
# Types that a tensor may name itself; for some there is no storage class.
_DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz "
    "float8_e8m0fnu int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64 complex128"
).split()


class RefusedError(ValueError):
    """A message that is already complete: not to be wrapped as damage."""


# Records that stand for globals ------------------------------------------------------------------

# Each takes what the pickle gives, checks nothing and does nothing; `plain` does the checking.
# A `__setstate__` everywhere keeps a pickle from writing attributes of ours.


class _Dict(dict):
    def __setstate__(self, state):
        """Drops the attributes of an OrderedDict (`_metadata` of a state dict): no data."""


class _Namespace(dict):
    """Options that a training script kept, such as an argparse.Namespace: names and values."""

    def __setstate__(self, state):
        self.update(state)


class _Storage:
    def __init__(self, key, dtype, numel, offset=0):
        self.key, self.dtype, self.numel, self.offset = key, np.dtype(dtype), numel, offset

    def __setstate__(self, state):
        raise ValueError("state for a storage")


class _Tensor:
    def __init__(self, storage, offset, shape, strides, dtype=None):
        self.storage, self.offset, self.dtype = storage, offset, dtype
        self.shape, self.strides = tuple(shape), tuple(strides)

    def __setstate__(self, state):
        raise ValueError("state for a tensor")


class _DtypeRecord:
    def __init__(self, name, *_):
        self.name, self.order = name, "="

    def __setstate__(self, state):
        self.order = state[1]

    def numpy(self):
        dtype = np.dtype(self.name if isinstance(self.name, str) else "O")
        if dtype.kind not in "biufcSU":
            raise ValueError(f"arrays of {self.name!r} are not read")
        return dtype if self.order == "|" else dtype.newbyteorder(self.order)


class _Array:
    """A numpy array: made empty, filled by its state (version, shape, dtype, fortran, bytes)."""

    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state):
        self.state = state

    def numpy(self):
        _, shape, dtype, fortran, raw = self.state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        data = np.frombuffer(raw, dtype.numpy())
        data = data.reshape(shape, order="F" if fortran else "C")
        return data.astype(data.dtype.newbyteorder("="), copy=False)


class _Function:
    """Wraps a function of ours so that a pickle can call it and nothing else."""

    __slots__ = ("call",)

    def __init__(self, call):
        self.call = call

    def __call__(self, *args):
        return self.call(*args)

    def __setstate__(self, state):
        raise ValueError("state for a function")


def _tensor_v3(storage, offset, shape, strides, _grad, _hooks, dtype, *_):
    return _Tensor(storage, offset, shape, strides, np.dtype(dtype))


def _scalar(dtype, raw):
    array = _Array()
    array.state = (1, (), dtype, False, raw)
    return array


def _from_buffer(raw, dtype, shape, order):
    array = _Array()
    array.state = (1, shape, dtype, order == "F", raw)
    return array


def _encode(text, encoding):
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes encoded as {encoding}")
    return text.encode("latin1")


def _known_globals():
    first = _Function(lambda value, *_: value)
    known = {
        ("collections", "OrderedDict"): _Dict,
        ("argparse", "Namespace"): _Namespace,
        ("types", "SimpleNamespace"): _Namespace,
        ("_codecs", "encode"): _Function(_encode),
        ("torch", "Size"): _Function(tuple),
        ("pathlib", "PosixPath"): _Function(lambda *parts: "/".join(parts)),
        ("pathlib._local", "PosixPath"): _Function(lambda *parts: "/".join(parts)),
        ("torch", "device"): _Function(lambda *args: args),
        ("torch._utils", "_rebuild_tensor"): _Function(_Tensor),
        ("torch._utils", "_rebuild_tensor_v2"): _Function(lambda *args: _Tensor(*args[:4])),
        ("torch._utils", "_rebuild_tensor_v3"): _Function(_tensor_v3),
        ("torch._utils", "_rebuild_parameter"): first,
        ("torch._utils", "_rebuild_parameter_with_state"): first,
        ("torch.storage", "UntypedStorage"): "uint8",
    }
    for name, dtype in (_STORAGES | {name: name for name in _DTYPES}).items():
        known["torch", name] = dtype
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        known[module, "_reconstruct"] = _Function(_Array)
        known[module, "scalar"] = _Function(_scalar)
        known[module.replace("multiarray", "numeric"), "_frombuffer"] = _Function(_from_buffer)
    known["numpy", "dtype"] = _Function(_DtypeRecord)
    known["numpy", "ndarray"] = None  # only ever an argument, of _reconstruct
    return known


_GLOBALS = _known_globals()


class Unpickler(pickle.Unpickler):
    """Reads a pickle whose globals are among the known ones; `path` is for the error lines.

    Args:
      allowed: which of the known ones, (module, name), are allowed; all by default.

    Raises:
      RefusedError: it asks for another global.
    """

    def __init__(self, file, path, allowed=_GLOBALS):
        super().__init__(file, encoding="latin1")
        self.path, self.allowed = path, allowed
        self.storages = {}

    def find_class(self, module, name):
        if (module, name) in self.allowed:
            return _GLOBALS[module, name]
        raise RefusedError(f"{self.path}: refused, its pickle asks for {module}.{name}")

    def persistent_load(self, pid):
        kind, dtype, key, _device, numel = pid[:5]
        if kind != "storage":
            raise ValueError(f"a {kind} where a storage was expected")
        # Before torch 0.4 a storage could be a window (key, offset, length) of another.
        view = pid[5] if len(pid) > 5 else None
        self.storages.setdefault(key, _Storage(key, dtype, numel))
        return _Storage(key, dtype, numel, view[1]) if view else self.storages[key]


# Records to arrays -----------------------------------------------------------------------------


def plain(value, fetch):
    """Replaces every record in a nested value; `fetch` gives the elements of a storage."""
    if isinstance(value, _Tensor):
        return _array(value, fetch)
    if isinstance(value, _Array):
        array = value.numpy()
        return array[()] if array.ndim == 0 else array
    if isinstance(value, dict):
        return {key: plain(item, fetch) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item, fetch) for item in value)
    if isinstance(value, _Storage):
        return fetch(value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    raise ValueError(f"a {type(value).__name__} where data was expected")


def _array(tensor, fetch):
    data = fetch(tensor.storage)
    data = data if tensor.dtype is None else data.view(tensor.dtype)
    offset = tensor.offset + tensor.storage.offset
    shape, strides = tensor.shape, tensor.strides
    if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
        raise ValueError(f"a tensor of shape {shape}, strides {strides}, offset {offset}")
    if math.prod(shape) == 0:
        return np.zeros(shape, data.dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if last >= len(data):
        raise ValueError(f"a tensor reaches element {last} of a storage of {len(data)}")
    item = data.dtype.itemsize
    strides = [stride * item for stride in strides]
    array = np.ndarray(shape, data.dtype, data.view(np.uint8), offset * item, strides)
    array.flags.writeable = False  # elements may share memory
    # A few numbers of a large storage need not keep all of it in memory.
    return array.copy() if 4 * array.nbytes < data.nbytes else array
