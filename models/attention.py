"""Attention in half precision: a kernel of the card for the values, and the tangent beside it.

With s = c q k', c = d^-1/2, p = softmax(s) and O = p v, the derivative along (dq, dk, dv) is

    ds = c (dq k' + q dk'),  mu = rowsum(p ds),  dO = (p ds) v - mu O + p dv.

No kernel at hand takes a JVP, and plain differentiation writes several arrays (B, H, N, N). Here O
comes from whatever computes it fastest, with a backward pass of its own, and dO from a function
that holds such an array for a block of queries only, or not at all (models/attention_kernel.py).

**The tangent has no gradient.** In the MeanFlow objectives it stands under a stop_gradient; here it
does so in any case, and so does everything that feeds it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from models import attention_kernel, hardware

BLOCK = 256  # queries of which the plain tangent holds all weights at a time


def attention(q, k, v, *, fused=False, tangent=False, images=1):
    """Computes softmax(q k' / sqrt(d)) v for each head, (B, N, H, d) thrice -> (B, N, H, d).

    Args:
      q, k, v: of one type; the softmax is in float32.
      fused: take the kernels of an NVIDIA card, which want bfloat16 and d a multiple of 8.
      tangent: the call is inside a `jax.jvp` whose tangent is not differentiated any further;
        without one around it the gradient of the call would be zero.
      images: whose tokens lie one after the other in N; none heeds another's. Not with `fused`.
    """
    if tangent:
        return _with_tangent(q, k, v, fused, images)
    return _values(q, k, v, fused, images)


def weights(q, k, images=1):
    """Computes softmax(q k' / sqrt(d)), float32 (B, H, N, M); `images`: as of `attention`."""
    scores = _scores(q, k)
    if images > 1:
        image = np.arange(q.shape[1]) // (q.shape[1] // images)
        scores = jnp.where(image[:, None] == image, scores, -jnp.inf)
    return jax.nn.softmax(scores)


def _scores(q, k):
    """Computes q k' / sqrt(d) in float32; in half precision the product is scaled."""
    scale = q.shape[-1] ** -0.5
    if q.dtype == jnp.float32:
        return _products(q * scale, k)
    return _products(q, k) * scale


def _products(q, k):
    return jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)


def _values(q, k, v, fused, images=1):
    if fused:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return jnp.einsum("bhnm,bmhd->bnhd", weights(q, k, images).astype(v.dtype), v)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _with_tangent(q, k, v, fused, images):
    return _values(q, k, v, fused, images)


@_with_tangent.defjvp
def _jvp(fused, images, primals, tangents):
    # Not `_with_tangent`, so that a gradient goes through the values.
    return _values(*primals, fused, images), tangent_of(
        *map(stop_gradient, (*primals, *tangents)), fused=fused, images=images
    )


def tangent_of(q, k, v, dq, dk, dv, *, fused=False, images=1):
    """Computes dO, see above; all (B, N, H, d)."""
    if fused and hardware.TANGENT_KERNEL and attention_kernel.takes(q):
        return attention_kernel.tangent(q, k, v, dq, dk, dv)
    B, N, H, d = q.shape
    if N <= BLOCK or N % BLOCK or images > 1:
        return _block_of_tangent(q, dq, k, v, dk, dv, images)

    def block(queries):
        return _block_of_tangent(*queries, k, v, dk, dv)

    blocks = [x.reshape(B, N // BLOCK, BLOCK, H, d).swapaxes(0, 1) for x in (q, dq)]
    return jax.lax.map(block, tuple(blocks)).swapaxes(0, 1).reshape(B, N, H, d)


def _block_of_tangent(q, dq, k, v, dk, dv, images=1):
    """Computes dO of some queries: q, dq (B, n, H, d); the others (B, N, H, d)."""
    p = weights(q, k, images)  # (B, H, n, N)
    both = jnp.concatenate([dq, q], axis=-1), jnp.concatenate([k, dk], axis=-1)
    ds = _products(*both) * q.shape[-1] ** -0.5  # of dq k' + q dk', summed in one product
    dp = p * (ds - jnp.sum(p * ds, axis=-1, keepdims=True))
    return sum(jnp.einsum("bhnm,bmhd->bnhd", a.astype(b.dtype), b) for a, b in ((dp, v), (p, dv)))
