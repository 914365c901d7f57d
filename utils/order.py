"""The order in which the records of a set are drawn: every one once per epoch, each epoch anew.

It follows from the seed alone, so all processes know it, and a run goes on anywhere in it at once.
`spread` draws a few from all over a set.
"""

import functools
import math

import numpy as np

# Sets of more records than this are shuffled by `_keyed`, which needs no memory; below, the whole
# permutation of an epoch takes 0.2 s at most, and was there first.
LARGE = 4_000_000
_ROUNDS = 4


def shuffled_indices(start, stop, num_records, seed, keyed=False):
    """Returns the records of draws [start, stop), int64, each epoch in an order of its own."""
    permutation = _keyed if keyed else _stored
    parts = []
    for epoch in range(start // num_records, (stop - 1) // num_records + 1):
        first = epoch * num_records
        begin, end = max(start - first, 0), min(stop - first, num_records)
        parts.append(permutation(begin, end, num_records, _epoch_key(seed, epoch)))
    return np.concatenate(parts)


def spread(total, count):
    """Chooses `count` places below `total`, ascending: one, always the same, in each equal part.

    Equal steps would meet the same few classes where these come in turn.
    """
    if total <= count:
        return np.arange(total)
    edges = np.linspace(0, total, count + 1).astype(np.int64)
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


@functools.lru_cache(maxsize=4)
def _epoch_key(seed, epoch):
    return tuple(np.random.SeedSequence([seed, epoch]).generate_state(8))


def _stored(begin, end, num_records, key):
    return _permutation(num_records, key)[begin:end]


@functools.lru_cache(maxsize=2)  # batches read ahead may lie on both sides of an epoch's end
def _permutation(num_records, key):
    # A whole permutation takes 30 ms and 10 MB for ImageNet. RandomState is the generator whose
    # stream numpy promises never to change.
    return np.random.RandomState(np.array(key, np.uint32)).permutation(num_records)


def _keyed(begin, end, num_records, key):
    """Returns places [begin, end) of a permutation that is computed place by place.

    A Feistel network over pairs (i, j), i < a, j < b, with a b just above the number of records:
    in turn one of the two is moved around its circle by a hash of the other, which can be undone,
    so it is a permutation of all pairs. What falls behind the last record goes through it again
    until it does not (cycle walking).
    """
    a = math.isqrt(num_records - 1) + 1
    b = -(-num_records // a)
    keys = np.array(key, np.uint64) << np.uint64(32)

    def once(index):
        i, j = np.divmod(index, np.uint64(b))
        for first, second in keys.reshape(_ROUNDS, 2):
            i = (i + _hash(j + first) % np.uint64(a)) % np.uint64(a)
            j = (j + _hash(i + second) % np.uint64(b)) % np.uint64(b)
        return i * np.uint64(b) + j

    index = once(np.arange(begin, end, dtype=np.uint64))
    while (beyond := index >= num_records).any():
        index[beyond] = once(index[beyond])
    return index.astype(np.int64)


def _hash(x):
    """Mixes 64 bits into 64, every one of which depends on all (splitmix64, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
