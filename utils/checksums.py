"""Checksums of what a checkpoint holds, wherever its arrays lie."""

import json
import zlib

import jax
import numpy as np


def _sums_of_bits(tree):
    # Sums modulo 2**32 depend neither on an order nor on how the arrays lie on devices.
    leaves = jax.tree.leaves(tree)
    return [x.view(f"uint{8 * x.dtype.itemsize}").sum(dtype="uint32") for x in leaves]


_sums_on_device = jax.jit(_sums_of_bits)


def checksums(arrays, plain):
    """Checksums of the items of a checkpoint: name -> int.

    Args:
      arrays: trees of arrays of 16 or 32 bits per number, all on devices or all numpy.
      plain: what JSON holds; `checksums` among it do not count.
    """
    on_host = isinstance(jax.tree.leaves(arrays)[0], np.ndarray)
    sums_of = _sums_of_bits if on_host else _sums_on_device
    sums = {name: sum(map(int, sums_of(tree))) % 2**32 for name, tree in arrays.items()}
    texts = {name: json.dumps(value, sort_keys=True) for name, value in plain.items()
             if name != "checksums"}  # fmt: skip
    return sums | {name: zlib.crc32(text.encode()) for name, text in texts.items()}
