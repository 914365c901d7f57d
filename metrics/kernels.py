"""Distances of two sets of features beyond their first two moments: KID and MIND.

Both take the features themselves, (N, D), and compute on the default device in their dtype, with
sums over blocks in float64 on the host.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST
SEED = 2020  # of torch-fidelity's subsets
SUBSETS, SUBSET_SIZE = 100, 1000
DIRECTIONS = 1000


# ------------------------------------------------------------------------------------------- KID


def kid(generated, reference, subsets=SUBSETS, subset_size=SUBSET_SIZE, seed=SEED):
    """Returns `(mean, std)` of KID over random subsets (Binkowski et al., arXiv 1801.01401).

    The subsets are torch-fidelity's: for each, `subset_size` rows of `generated` (N, D) without
    replacement, then of `reference` (M, D), from `numpy.random.RandomState(seed)`. The std is the
    population's, of a single subset and not of the mean. Raises ValueError where a set is smaller
    than a subset.
    """
    rows = subset_rows(len(generated), len(reference), subsets, subset_size, seed)
    values = kid_values(generated, reference, rows)
    return float(values.mean()), float(values.std())


def check_subsets(count, what, subset_size=SUBSET_SIZE):
    """Raises ValueError where a set of `count` samples is smaller than a subset."""
    if count < subset_size:
        raise ValueError(
            f"KID: {count} {what} are fewer than a subset of {subset_size}; take more, or kid_all, "
            "the value of the whole sets"
        )


def subset_rows(num_generated, num_reference, subsets, subset_size, seed):
    """Yields pairs of rows of the two sets, a pair for each subset; see `kid`."""
    check_subsets(num_generated, "generated samples", subset_size)
    check_subsets(num_reference, "reference samples", subset_size)
    random = np.random.RandomState(seed)
    for _ in range(subsets):
        first = random.choice(num_generated, subset_size, replace=False)
        yield first, random.choice(num_reference, subset_size, replace=False)


def kid_values(generated, reference, rows):
    """Returns KID of each pair of rows of the two sets, float64 (subsets,)."""
    origin = _origin(reference)
    return np.array([_mmd(generated[a], reference[b], origin, len(a)) for a, b in rows])


def kid_all(generated, reference, rows=5000):
    """Returns KID of two whole sets (N, D), (M, D): no randomness, `rows` by `rows` at a time."""
    return _mmd(generated, reference, _origin(reference), rows)


def _origin(reference):
    return np.mean(reference, axis=0, dtype=np.float64).astype(reference.dtype)


def _mmd(x, y, origin, rows):
    """Returns the unbiased squared MMD of x (N, D) and y (M, D): Gretton et al. 2012, eq. 3."""
    within = _within(x, origin, rows) + _within(y, origin, rows)
    return within - 2 * _total(x, y, origin, rows) / (len(x) * len(y))


def _within(x, origin, rows):
    """Returns the mean of the kernel over the pairs of different rows of x."""
    own = _sum(_own(x[i : i + rows], origin) for i in range(0, len(x), rows))
    return (_total(x, x, origin, rows) - own) / (len(x) * (len(x) - 1))


def _total(x, y, origin, rows):
    """Returns the sum of the kernel over all pairs of rows of x and y."""
    starts = itertools.product(range(0, len(x), rows), range(0, len(y), rows))
    return _sum(_row_sums(x[i : i + rows], y[j : j + rows], origin) for i, j in starts)


def _sum(parts):
    return sum(float(np.asarray(part).sum(dtype=np.float64)) for part in parts)


@jax.jit
def _row_sums(x, y, origin):
    """Sums over all y of the centred kernel of each x."""
    p, q = (_dot(a - origin, origin) for a in (x, y))
    s = _dot(x - origin, (y - origin).T)
    return _centred(_dot(origin, origin) + 1, p[:, None], q, s).sum(1)


@jax.jit
def _own(x, origin):
    """Returns the centred kernel of each row with itself."""
    p = _dot(x - origin, origin)
    s = jnp.sum((x - origin) ** 2, axis=1) / len(origin)
    return _centred(_dot(origin, origin) + 1, p, p, s)


def _dot(a, b):
    return jnp.matmul(a, b, precision=HIGHEST) / a.shape[-1]


def _centred(alpha, p, q, s):
    """Returns k(x, y) - k(x, o) - k(o, y) + k(o, o), k(x, y) = (x.y / D + 1)^3, o an origin.

    The unbiased MMD is the same for both kernels: what depends on one row alone cancels. But in
    float32 the values of the first are large and equal, and their differences lost.
    alpha = k(o, o)^1/3, alpha + p = k(x, o)^1/3, alpha + q = k(o, y)^1/3, alpha + p + q + s =
    k(x, y)^1/3; the cubes are multiplied out.
    """
    w = p + q
    linear = 3 * alpha**2 * s
    square = 3 * alpha * (2 * p * q + s * (2 * w + s))
    return linear + square + 3 * p * q * w + s * (3 * w * (w + s) + s**2)


# ------------------------------------------------------------------------------------------ MIND


def directions(dim):
    """Returns random unit rows, float64 (DIRECTIONS, dim)."""
    rows = np.random.RandomState(SEED).standard_normal((DIRECTIONS, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def mind(generated, reference, unit_rows=None, chunk=50):
    """Returns MIND of two sets (N, D) of equal size (arXiv 2605.06797): 3 D times the mean squared
    difference of their sorted projections on `unit_rows` (M, D), by default 1000 random ones.

    A squared sliced 2-Wasserstein distance; the factor 3 D is the paper's. `chunk` directions are
    projected at a time. Raises ValueError where the sets differ in size.
    """
    if len(generated) != len(reference):
        raise ValueError(
            f"MIND compares sets of the same size, not {len(generated)} and {len(reference)}"
        )
    dim = generated.shape[1]
    unit_rows = directions(dim) if unit_rows is None else unit_rows
    # The distance does not change with the origin; near it fewer digits are lost.
    origin = _origin(reference)
    x, y = jnp.asarray(generated) - origin, jnp.asarray(reference) - origin
    parts = [
        np.asarray(_sorted_distance(x, y, jnp.asarray(unit_rows[i : i + chunk], x.dtype)))
        for i in range(0, len(unit_rows), chunk)
    ]
    return 3 * dim * float(np.concatenate(parts).mean(dtype=np.float64))


@jax.jit
def _sorted_distance(x, y, unit_rows):
    """Returns the mean squared difference of the sorted projections, by direction."""

    def project(a):
        return jnp.sort(jnp.einsum("md,nd->mn", unit_rows, a, precision=HIGHEST), axis=1)

    return ((project(x) - project(y)) ** 2).mean(1)
