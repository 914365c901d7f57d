"""What all objectives share: the path z_t, rows of two kinds, guidance, draws and the weight.

Convention: t = 1 is noise and t = 0 is data. Along z_t = (1 - t) x + t e the velocity is
v = e - x. A network gives the *average* velocity u(z_t, t, h, y) over [r, t], h = t - r; with
h = 0 it is the instantaneous one. Data are (B, ..., C), times float32 (B,), labels int32 (B,).

Rows of two kinds. Rows with r = t need no JVP, and no second prediction to be guided by. So the two
kinds are computed apart, and which rows are of which kind is fixed by the shape of the batch alone:
see `split_rows`.
"""

import math

import jax
import jax.numpy as jnp


def by_row(s, like):
    """Gives numbers s (B,) the rank of `like` (B, ...), to multiply it row by row."""
    return jnp.expand_dims(s, tuple(range(1, like.ndim)))


def z_t(x, noise, t):
    """Computes the point of the path at time t."""
    return (1 - by_row(t, x)) * x + by_row(t, x) * noise


def adaptive_weight(error, p, eps):
    """Computes 1 / (error + eps)^p by row, without gradient (arXiv 2505.13447, appendix B.2)."""
    return jax.lax.stop_gradient((error + eps) ** -p)


def norm_eps(method, shape):
    """Computes E of the weight (error + E)^-p, where the error is a sum over `shape[1:]`.

    Papers that take the mean over pixels name their constant by pixel: another size of image
    leaves it as it is.
    """
    return method.norm_eps_per_pixel * math.prod(shape[1:]) or method.norm_eps


def squared_error(a, b):
    """Sums (a - b)^2 over all axes but the first: float32 (B,)."""
    return jnp.sum((a - b) ** 2, axis=tuple(range(1, a.ndim)))


# Rows -----------------------------------------------------------------------------------------


def equal_count(batch_size, data_proportion):
    """Counts the rows of a batch that have r = t."""
    return int(batch_size * data_proportion)


def num_groups(batch_size, num_equal):
    """Counts the groups [r != t | r = t] of one size in a batch, see `split_rows`."""
    return math.gcd(batch_size, num_equal)


def split_rows(a, num_equal):
    """Splits an array (B, ...) into its rows with r != t and its `num_equal` rows with r = t.

    The two kinds alternate in as many groups of one size as possible, [r != t | r = t] in each. So
    a batch that is sharded over devices is split without moving a row from one to another, wherever
    the number of devices divides that of the groups (64 for a batch of 256 and a share of 0.75).
    """
    batch_size, rest = a.shape[0], a.shape[1:]
    count = num_groups(batch_size, num_equal)
    a = a.reshape(count, batch_size // count, *rest)
    first = (batch_size - num_equal) // count
    return a[:, :first].reshape(-1, *rest), a[:, first:].reshape(-1, *rest)


def merge_rows(a, b):
    """Inverts `split_rows`: also joins any two batches without moving rows far."""
    count = math.gcd(a.shape[0], b.shape[0])
    rest = a.shape[1:]
    parts = [x.reshape(count, x.shape[0] // count, *rest) for x in (a, b)]
    return jnp.concatenate(parts, axis=1).reshape(-1, *rest)


def split_tree(tree, num_equal):
    """Splits each array of a tree by `split_rows`: two trees."""
    pairs = jax.tree.map(lambda a: split_rows(a, num_equal), tree)
    return jax.tree.transpose(jax.tree.structure(tree), jax.tree.structure((0, 0)), pairs)


# Guidance by which the target is trained ------------------------------------------------------


def is_guided(method):
    """Tells whether the target takes predictions of the network."""
    return method.guidance_eq == "cfg" and (method.omega, method.kappa) != (1.0, 0.0)


def scales(method, t):
    """Computes omega and kappa at times t (B,): the options in [t_start, t_end], else 1 and 0."""
    inside = (method.t_start <= t) & (t <= method.t_end)
    return jnp.where(inside, method.omega, 1.0), jnp.where(inside, method.kappa, 0.0)


def guided_velocity(v, v_u, v_c, omega, kappa, drop):
    """Computes v_g = omega v + (1 - omega - kappa) v_u + kappa v_c (arXiv 2505.13447, B.1, 4.2).

    omega, kappa and drop by row; rows without a label have v_g = v. `v_c` may be None where
    kappa = 0.
    """
    omega, kappa = by_row(omega, v), by_row(kappa, v)
    v_g = omega * v + (1 - omega - kappa) * v_u
    if v_c is not None:
        v_g = v_g + kappa * v_c
    return jnp.where(by_row(drop, v), v, v_g)


# Draws ----------------------------------------------------------------------------------------


def draw_time(key, batch_size, noise_dist, P_mean, P_std):
    """Draws times in [0, 1], float32 (batch_size,); logit-normal: arXiv 2505.13447, section 4.3."""
    if noise_dist == "uniform":
        return jax.random.uniform(key, (batch_size,))
    return jax.nn.sigmoid(P_mean + P_std * jax.random.normal(key, (batch_size,)))


def order_times(first, second, num_equal):
    """Orders two times by row: t, the larger, and r, the smaller or in `num_equal` rows t; (B,)."""
    t, r = jnp.maximum(first, second), jnp.minimum(first, second)
    return t, equal_in(t, r, num_equal)


def equal_in(t, r, num_equal):
    """Sets r (B,) to t in the last `num_equal` rows of `split_rows`."""
    r_differ, _ = split_rows(r, num_equal)
    _, t_equal = split_rows(t, num_equal)
    return merge_rows(r_differ, t_equal)


def draw_dropped(key, batch_size, num_equal, probability):
    """Draws which rows lose their label, bool (B,).

    Their number is binomial; they are taken from the rows with r = t first, as in the published
    code of MeanFlow.
    """
    num_dropped = jnp.sum(jax.random.uniform(key, (batch_size,)) < probability)
    order = merge_rows(num_equal + jnp.arange(batch_size - num_equal), jnp.arange(num_equal))
    return order < num_dropped
