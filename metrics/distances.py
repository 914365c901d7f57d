"""Arithmetic of FID and its relatives, on features and on their moments.

Nothing here knows the network that made the features. FID and sFID (Heusel et al.,
arXiv 1706.08500; Nash et al., arXiv 2103.03841) need only the mean and the covariance of the
features, which are gathered on the device as a stream. The Inception score (Salimans et al.,
arXiv 1606.03498) can be gathered likewise. Precision and recall (Kynkaanniemi et al.,
arXiv 1904.06991) need the features themselves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # whose parts are imported when they are first used

HIGHEST = jax.lax.Precision.HIGHEST
ROUNDING = 1e-6  # of a covariance from products in float32, in its largest number


# ------------------------------------------------------------------------- moments as a stream


class Moments(NamedTuple):
    """Running sums over samples; every float32 sum is a pair whose exact value is hi + lo."""

    count: jax.Array  # int32 ()
    shift: jax.Array  # float32 (D,), subtracted from every sample: the mean of the first batch
    sum_hi: jax.Array  # float32 (D,)
    sum_lo: jax.Array
    outer_hi: jax.Array  # float32 (D, D)
    outer_lo: jax.Array


def init_moments(dim):
    """Returns the empty accumulator for features of `dim` numbers."""
    # No array twice: the buffers may be donated.
    vectors = [jnp.zeros(dim, jnp.float32) for _ in range(3)]
    matrices = [jnp.zeros((dim, dim), jnp.float32) for _ in range(2)]
    return Moments(jnp.zeros((), jnp.int32), *vectors, *matrices)


def add_moments(acc, features, weight):
    """Adds a batch: `features` (N, D) float32, `weight` (N,) of 1 (count this row) and 0 (do not).

    To be called inside jit, over one device or a mesh with the rows of `features` sharded: the
    accumulator may be replicated or sharded, and what is added is the sum over all devices.

    The covariance is the small difference of large sums, so the samples are first moved near
    zero by a fixed shift, and the sums over batches are carried as pairs of float32 (TwoSum,
    Knuth, TAOCP 2, 4.2.2), since a TPU has no float64. Products within a batch are float32.
    """
    counted = weight[:, None] > 0
    count = jnp.sum(weight > 0, dtype=jnp.int32)
    mean = jnp.where(counted, features, 0).sum(0) / jnp.maximum(count, 1)
    shift = jnp.where(acc.count == 0, mean, acc.shift)
    centred = jnp.where(counted, features - shift, 0)  # (N, D)
    outer = jnp.einsum("nd,ne->de", centred, centred, precision=HIGHEST)
    return Moments(
        acc.count + count,
        shift,
        *_add_to_pair(acc.sum_hi, acc.sum_lo, centred.sum(0)),
        *_add_to_pair(acc.outer_hi, acc.outer_lo, outer),
    )


def _add_to_pair(hi, lo, value):
    """Adds a value to hi + lo: hi takes the rounded sum, lo what the rounding lost."""
    total = hi + value
    virtual = total - hi
    lost = (hi - (total - virtual)) + (value - virtual)
    return total, lo + lost


def finish_moments(acc):
    """Returns `(mu (D,), sigma (D, D))`, float64 numpy, sigma with the divisor n - 1.

    Raises ValueError below two samples and where a feature was not finite.
    """
    acc = jax.device_get(acc)
    count = int(acc.count)
    if count < 2:
        raise ValueError(f"moments of {count} samples: at least 2 are needed")
    mean = (acc.sum_hi.astype(np.float64) + acc.sum_lo) / count
    outer = acc.outer_hi.astype(np.float64) + acc.outer_lo
    sigma = (outer - count * np.outer(mean, mean)) / (count - 1)
    if not (np.isfinite(mean).all() and np.isfinite(sigma).all()):
        raise ValueError(f"moments of {count} samples: some features are not finite")
    return acc.shift.astype(np.float64) + mean, (sigma + sigma.T) / 2


# ---------------------------------------------------------------------------------- FID, sFID


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Returns |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2): Frechet's squared distance of Gaussians.

    FID on pool features, sFID on spatial ones. The trace of the root is the sum of the singular
    values of `R1^T R2`, where `R R^T = S`: unlike the root of the product `S1 S2` it is
    real, and it stays exact where a covariance is singular (fewer samples than dimensions).
    Arithmetic in float64; `mu` (D,), `sigma` (D, D). Raises ValueError if the shapes differ.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if not (mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == mu1.shape * 2):
        shapes = ", ".join(str(a.shape) for a in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"moments that cannot be compared: mu, sigma, mu, sigma are {shapes}")
    cross = scipy.linalg.svdvals(_root(sigma1).T @ _root(sigma2)).sum()
    mean = np.sum((mu1 - mu2) ** 2)
    return float(mean + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def _root(sigma):
    """Returns a matrix (D, R) with `root @ root.T == sigma`; R counts the directions with variance.

    Cholesky's, with the largest variance that is left first: a tenth of the time of eigenvectors.
    Those where it is not exact, as rounding has made a singular covariance an indefinite one; of
    few samples those within its span, which leaves out most of what is rounding alone.
    """
    factor, order, rank, _ = scipy.linalg.lapack.dpstrf(np.asarray_chkfinite(sigma), lower=1)
    root, largest = np.zeros((len(sigma), rank)), np.abs(sigma).max(initial=0)
    root[order - 1] = np.tril(factor)[:, :rank]
    if np.abs(root @ root.T - sigma).max(initial=0) <= 1e-13 * largest:
        return root
    if 2 * rank < len(sigma):
        span = np.linalg.qr(root)[0]
        root = span @ _eigen_root(span.T @ sigma @ span)
        if np.abs(root @ root.T - sigma).max() <= ROUNDING * largest:
            return root
    return _eigen_root(sigma)


def _eigen_root(sigma):
    """Returns the matrix of `_root` by eigenvectors, without those that are rounding alone."""
    values, vectors = scipy.linalg.eigh(sigma)
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


# -------------------------------------------------------------------------------- Inception score


class Scores(NamedTuple):
    """Running sums of the Inception score, one row for each split."""

    count: jax.Array  # int32 (splits,)
    probs_hi: jax.Array  # float32 (splits, classes)
    probs_lo: jax.Array
    entropy_hi: jax.Array  # float32 (splits,), sum of p log p
    entropy_lo: jax.Array


def init_scores(splits=10, classes=1008):
    """Returns the empty accumulator of the Inception score."""
    tables = [jnp.zeros((splits, classes), jnp.float32) for _ in range(2)]
    rows = [jnp.zeros(splits, jnp.float32) for _ in range(2)]
    return Scores(jnp.zeros(splits, jnp.int32), *tables, *rows)


def add_scores(acc, logits, split, weight):
    """Adds a batch; inside jit, as `add_moments`.

    `logits` (N, classes) float32 without the bias of the last layer; `split` (N,) int32, which
    split each sample belongs to (sample i of n: `((i + 1) * splits - 1) // n`); `weight` (N,) is
    1 or 0.
    """
    kept = weight[:, None] > 0
    member = jax.nn.one_hot(split, len(acc.count)) * kept  # (N, splits)
    log_probs = jax.nn.log_softmax(jnp.where(kept, logits.astype(jnp.float32), 0))
    probs = jnp.exp(log_probs)
    table = jnp.einsum("ns,nc->sc", member, probs, precision=HIGHEST)
    entropy = jnp.einsum("ns,n->s", member, (probs * log_probs).sum(1), precision=HIGHEST)
    return Scores(
        acc.count + member.sum(0).astype(jnp.int32),
        *_add_to_pair(acc.probs_hi, acc.probs_lo, table),
        *_add_to_pair(acc.entropy_hi, acc.entropy_lo, entropy),
    )


def finish_scores(acc):
    """Returns `(mean, std)` of the Inception score over the splits."""
    acc = jax.device_get(acc)
    if acc.count.min() < 1:
        raise ValueError(f"Inception score: a split without samples, counts {acc.count.tolist()}")
    probs = acc.probs_hi.astype(np.float64) + acc.probs_lo
    return _score(acc.count, probs, acc.entropy_hi.astype(np.float64) + acc.entropy_lo)


def _score(count, probs, entropy):
    """Returns mean and deviation of exp E[KL(p(y|x) || p(y))] by split, from counts and sums."""
    marginal = probs / count[:, None]
    log_marginal = np.log(np.where(marginal > 0, marginal, 1))
    divergence = entropy / count - (marginal * log_marginal).sum(1)
    scores = np.exp(divergence)
    return float(scores.mean()), float(scores.std())
