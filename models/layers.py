"""Layers in half precision with derivatives of their own: less to save, less to read.

Each computes in float32 and returns the type of its input or the one asked for. The derivatives
are the exact ones of the plain forms; only where values are rounded differs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import linear_call
from jax.experimental.layout import Layout, with_layout_constraint
from jax.lax import stop_gradient

from models import hardware

SAVED = "product"  # the name of what the backward pass is to find, in half precision
save = partial(checkpoint_name, name=SAVED)
EPS = 1e-6
_C, _CUBIC = 2 * (2 / jnp.pi) ** 0.5, 0.044715


def gelu(x, in_product=False, tangent=False):
    """Computes GELU in its tanh form, x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)).

    The backward pass needs x alone. Source: arXiv 1606.08415.

    Args:
      in_product: write it as the compiler for NVIDIA cards knows it: at the end of the product that
        gives x, before x is rounded (with the options of models/hardware.py).
      tangent: as of `norm_modulate`.
    """
    if tangent:
        return _gelu_with_tangent(x, in_product)
    return _gelu(x, in_product, hardware.platform() == "tpu")


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _gelu(x, in_product, apart=False):
    """Computes GELU; `apart`: before the product behind it, where nothing is differentiated.

    A TPU's compiler would compute it anew for each tile of that product.
    """
    if in_product:
        return jax.nn.gelu(x)
    y = x.astype(jnp.float32)
    y = (y * _sigmoid(y)).astype(x.dtype)
    return jax.lax.optimization_barrier(y) if apart else y


def _sigmoid(y):
    return jax.nn.sigmoid(_C * (y + _CUBIC * y**3))


def _slope(x):
    """Computes the derivative of GELU, float32."""
    y = x.astype(jnp.float32)
    s = _sigmoid(y)
    return s + y * s * (1 - s) * _C * (1 + 3 * _CUBIC * y**2)


@_gelu.defjvp
def _gelu_jvp(in_product, _, primals, tangents):
    (x,), (dx,) = primals, tangents
    return _gelu(x, in_product), (_slope(x) * dx).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _gelu_with_tangent(x, in_product):
    return _gelu(x, in_product)


@_gelu_with_tangent.defjvp
def _gelu_with_tangent_jvp(in_product, primals, tangents):
    (x,), (dx,) = primals, tangents
    # The barrier keeps XLA from sharing one slope between tangent and backward pass, which it would
    # store in float32.
    slope = _slope(jax.lax.optimization_barrier(stop_gradient(x)))
    return _gelu(x, in_product), (slope * stop_gradient(dx)).astype(x.dtype)


def norm_modulate(x, shift, scale, dtype, tangent=False):
    """Computes LayerNorm(x) (1 + scale) + shift, in `dtype`.

    Args:
      x: (B, N, D), normalised over D without weights.
      shift, scale: (B, D).
      tangent: the call is inside a `jax.jvp` whose tangent is not differentiated any further, see
        `models.attention.attention`.
    """
    return (_with_tangent if tangent else _norm_modulate)(x, shift, scale, dtype)


def _statistics(x):
    """Computes mean and 1 / deviation over the last axis in one reading, float32 (B, N, 1)."""
    x = x.astype(jnp.float32)
    mean, square = (jnp.mean(a, axis=-1, keepdims=True) for a in (x, x * x))
    return mean, jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + EPS)


def _normalised(x, mean, rstd):
    return (x.astype(jnp.float32) - mean) * rstd


def _through_norm(n, rstd, g):
    """Computes the derivative of LayerNorm at n along g; it is its own transpose."""
    mean = jnp.mean(g, axis=-1, keepdims=True)
    return rstd * (g - mean - n * jnp.mean(g * n, axis=-1, keepdims=True))


def _float32(*arrays):
    return [a.astype(jnp.float32) for a in arrays]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm_modulate(x, shift, scale, dtype):
    if hardware.platform() == "tpu":  # the sums end the product that gives x
        return _modulated(x, *_statistics(x), shift, scale, dtype)
    # Without a derivative XLA makes one kernel of the two passes for NVIDIA cards, and not of one.
    y = x.astype(jnp.float32)
    mean = jnp.mean(y, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean((y - mean) ** 2, axis=-1, keepdims=True) + EPS)
    return _modulated(x, mean, rstd, shift, scale, dtype)


def _modulated(x, mean, rstd, shift, scale, dtype):
    shift, scale = _float32(shift[:, None], scale[:, None])
    return (_normalised(x, mean, rstd) * (1 + scale) + shift).astype(dtype)


def _forward(x, shift, scale, dtype):
    statistics, saved = _statistics(x), None
    if hardware.platform() == "tpu":  # two numbers a token: less than one more reading of x
        statistics = saved = tuple(map(save, statistics))
    return _modulated(x, *statistics, shift, scale, dtype), (x, shift, scale, saved)


def _backward(dtype, saved, g):
    x, shift, scale, statistics = saved
    # With statistics at hand, each sum reads x and g as they are; otherwise XLA writes g * n in
    # float32 beside the one sum, to read it again for the other.
    mean, rstd = statistics or jax.lax.optimization_barrier(_statistics(x))
    n, g = _normalised(x, mean, rstd), g.astype(jnp.float32)
    d_x = _through_norm(n, rstd, g * (1 + scale[:, None].astype(jnp.float32)))
    d_shift, d_scale = jnp.sum(g, axis=1), jnp.sum(g * n, axis=1)
    return d_x.astype(x.dtype), d_shift.astype(shift.dtype), d_scale.astype(scale.dtype)


_norm_modulate.defvjp(_forward, _backward)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _with_tangent(x, shift, scale, dtype):
    return _norm_modulate(x, shift, scale, dtype)


@_with_tangent.defjvp
def _jvp(dtype, primals, tangents):
    value = _norm_modulate(*primals, dtype)
    x, _, scale = map(stop_gradient, primals)
    d_x, d_shift, d_scale = _float32(*map(stop_gradient, tangents))
    mean, rstd = _statistics(x)
    n = _normalised(x, mean, rstd)
    d_n = _through_norm(n, rstd, d_x)
    d_y = d_n * (1 + scale[:, None].astype(jnp.float32)) + n * d_scale[:, None] + d_shift[:, None]
    return value, d_y.astype(dtype)


def spread(vector, x, dtype):
    """Repeats a vector (D,) or (B, D) for the rows of x (B, N, D), float32.

    On a TPU, in half precision, its gradient is a product with ones, summed in float32: as a sum
    over rows it is a pass over arrays, which costs there as much as a product.

    Args:
      dtype: of the products.
    """
    if dtype == jnp.float32 or hardware.platform() != "tpu":
        return vector[..., None, :].astype(jnp.float32)

    def total(_, g):
        rows = tuple(range(vector.ndim - 1, 2))
        ones = jnp.ones((8, *(x.shape[n] for n in rows)), dtype)  # one row XLA would sum again
        axes = tuple(range(1, 1 + len(rows))), rows
        return jnp.tensordot(ones, g.astype(dtype), axes, preferred_element_type=jnp.float32)[0]

    def wide(_, vector):
        return jnp.broadcast_to(vector[..., None, :], x.shape)

    return linear_call(wide, total, (), vector.astype(jnp.float32))


def lying_in_order(x):
    """Returns x; its gradient lies in memory in the order of the axes, the last one innermost.

    XLA lays an array out as its users would have it. A sum over the batch alone (as for the
    gradient of learned tokens) would have the batch innermost, which turns the residual stream and
    all gradients through the blocks, with copies before each product.
    """
    in_order = Layout(range(x.ndim))
    return linear_call(lambda _, x: x, lambda _, g: with_layout_constraint(g, in_order), (), x)
