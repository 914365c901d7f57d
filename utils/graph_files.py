"""Reads a frozen TensorFlow graph (GraphDef, `.pb`), without TensorFlow.

The file is one protobuf message; of its schema (graph.proto, node_def.proto, attr_value.proto,
tensor.proto, tensor_shape.proto of TensorFlow) only what constants need is known here.
"""

import pathlib
import struct
from typing import NamedTuple

import numpy as np

_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}  # of DataType in types.proto
_VALUE_FIELDS = {5: "<f4", 6: "<f8", 7: "varint", 10: "varint"}  # float_val, double_val, ...


class Node(NamedTuple):
    """One operation; `attrs` holds its numbers, booleans, bytes and numpy arrays by name."""

    kind: str
    attrs: dict


def load(path):
    """The nodes of the graph in `path`, by name.

    Attributes of other types (shapes, lists, element types) are left out, and so are tensors
    that are not of float32, float64, int32 or int64. Raises ValueError with one line for a file
    that is no such graph, or is truncated.
    """
    data = memoryview(pathlib.Path(path).read_bytes())
    try:
        return dict(_node(value) for field, value in _fields(data) if field == 1)
    except (LookupError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"{path}: damaged, or not a TensorFlow graph ({error})") from error


def _node(data):
    name, kind, attrs = "", "", {}
    for field, value in _fields(data):
        if field == 1:
            name = str(value, "utf-8")
        elif field == 2:
            kind = str(value, "utf-8")
        elif field == 5:
            entry = dict(_fields(value))
            attrs[str(entry[1], "utf-8")] = _attribute(entry[2])
    return name, Node(kind, {key: value for key, value in attrs.items() if value is not None})


def _attribute(data):
    for field, value in _fields(data):
        if field == 2:
            return bytes(value)
        if field == 3:
            return value
        if field == 4:
            return struct.unpack("<f", value)[0]
        if field == 5:
            return bool(value)
        if field == 8:
            return _tensor(value)
    return None


def _tensor(data):
    shape, dtype, content, values = [], None, None, []
    for field, value in _fields(data):
        if field == 1:
            dtype = _DTYPES.get(value)
        elif field == 2:
            shape = [dict(_fields(dim)).get(1, 0) for f, dim in _fields(value) if f == 2]
        elif field == 4:
            content = value
        elif field in _VALUE_FIELDS:
            values += _numbers(_VALUE_FIELDS[field], value)
    if dtype is None:
        return None
    if content is not None:
        return np.frombuffer(content, dtype).reshape(shape)
    if len(values) == 1:  # a tensor of equal numbers may be stored as one of them
        return np.full(shape, values[0], dtype)
    return np.array(values, dtype).reshape(shape)


def _numbers(kind, value):
    """A repeated field, packed or one by one, as a list."""
    if kind != "varint":
        return np.frombuffer(value, kind).tolist()
    if isinstance(value, int):
        return [value]
    numbers, position = [], 0
    while position < len(value):
        number, position = _varint(value, position)
        numbers.append(number)
    return numbers


def _fields(data):
    """(field number, value) of a protobuf message: int, or the bytes of every other wire type."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} in a protobuf message")
        if position + size > len(data):
            raise ValueError("a protobuf message ends too early")
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data, position):
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            # Negative numbers are stored as 64-bit two's complement.
            return (value if value < 1 << 63 else value - (1 << 64)), position
    raise ValueError("a number of more than 64 bits in a protobuf message")
