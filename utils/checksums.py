"""Checksums of what a checkpoint holds, wherever its arrays lie."""

import json
import zlib

import jax

from utils import sharding


def _sums_of_bits(leaves):
    # Sums modulo 2**32 depend neither on an order nor on how the arrays lie on devices.
    return [x.view(f"uint{8 * x.dtype.itemsize}").sum(dtype="uint32") for x in leaves]


_sums_on_device = jax.jit(_sums_of_bits)


def begin(arrays, plain):
    """Begins the checksums of the items of a checkpoint; what it returns ends them.

    The arrays may be given away (donated) in between.

    Args:
      arrays: trees of arrays of 16 or 32 bits per number, all on devices or all numpy.
      plain: what JSON holds; `checksums` among it do not count.

    Returns:
      Function () -> {name: int}, which may be called in another thread.
    """
    trees = {name: jax.tree.leaves(tree) for name, tree in arrays.items()}
    # numpy adds ten times as fast as what XLA makes for a CPU, and need not be compiled.
    views = {name: sharding.on_host(leaves) for name, leaves in trees.items()}
    begun = {name: _sums_on_device(trees[name]) for name, own in views.items() if own is None}
    texts = {name: json.dumps(value, sort_keys=True) for name, value in plain.items()
             if name != "checksums"}  # fmt: skip

    def end():
        every = {name: begun.get(name) or _sums_of_bits(own) for name, own in views.items()}
        sums = {name: sum(map(int, parts)) % 2**32 for name, parts in every.items()}
        return sums | {name: zlib.crc32(text.encode()) for name, text in texts.items()}

    return end


def checksums(arrays, plain):
    """Computes the checksums of `begin` at once: name -> int."""
    return begin(arrays, plain)()
