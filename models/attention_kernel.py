"""The tangent of attention as one kernel for NVIDIA cards: no array (B, H, N, N) anywhere.

In Pallas' Triton form, one program for each block of queries of each head. The sums of p, p ds, p v
and (p ds) v + p dv run over blocks of keys, rescaled where a larger score turns up, as in
FlashAttention (arXiv 2205.14135); models/attention.py has the formulas.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec

SIDE = 64  # of a block of queries and of a block of keys
LARGEST_HEAD = 128  # beyond that the sums do not fit the registers


def takes(q):
    """Tells whether the kernel takes queries, keys and values of this shape (B, N, H, d)."""
    return q.shape[1] % SIDE == 0 and q.shape[3] <= LARGEST_HEAD


def tangent(q, k, v, dq, dk, dv):
    """Computes dO along (dq, dk, dv), all bfloat16 (B, N, H, d); on several devices by rows."""
    return _by_rows(q, k, v, dq, dk, dv)


def call(q, k, v, dq, dk, dv, *, interpret=False):
    """Calls the kernel itself.

    Args:
      interpret: compute it without a card.
    """
    B, N, H, d = q.shape
    width = pl.next_power_of_2(d)
    warps = 4 if width <= 64 else 8  # as many as its sums need for their registers
    block = pl.BlockSpec((None, SIDE, None, width), lambda i, b, h: (b, i, h, 0))
    whole = pl.BlockSpec((None, N, None, width), lambda i, b, h: (b, 0, h, 0))
    return pl.pallas_call(
        partial(_kernel, head=d, scale=d**-0.5),
        grid=(N // SIDE, B, H),
        in_specs=[block, whole, whole, block, whole, whole],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name="attention_tangent",
    )(q, k, v, dq, dk, dv)


def _kernel(q_ref, k_ref, v_ref, dq_ref, dk_ref, dv_ref, out_ref, *, head, scale):
    rows, width = q_ref.shape
    inside = (jnp.arange(width) < head)[None, :]  # heads are padded to a power of two
    load = partial(triton.load, mask=inside, other=0.0)
    q, dq = load(q_ref), load(dq_ref)
    dot = partial(jnp.dot, preferred_element_type=jnp.float32)

    def step(j, sums):
        largest, p_sum, pds_sum, o, t = sums
        keys = pl.dslice(j * SIDE, SIDE)
        k, v, dk, dv = (load(ref.at[keys, :]) for ref in (k_ref, v_ref, dk_ref, dv_ref))
        s = dot(q, k.T) * (scale * math.log2(math.e))  # (rows, SIDE), for exp2
        ds = (dot(dq, k.T) + dot(q, dk.T)) * scale
        larger = jnp.maximum(largest, jnp.max(s, axis=-1))
        before = jnp.exp2(largest - larger)
        p = jnp.exp2(s - larger[:, None])
        pds = p * ds
        p_half, pds_half = p.astype(v.dtype), pds.astype(v.dtype)
        return (
            larger,
            before * p_sum + jnp.sum(p, axis=-1),
            before * pds_sum + jnp.sum(pds, axis=-1),
            before[:, None] * o + dot(p_half, v),
            before[:, None] * t + dot(pds_half, v) + dot(p_half, dv),
        )

    zero, zeros = jnp.zeros(rows, jnp.float32), jnp.zeros((rows, width), jnp.float32)
    start = (jnp.full(rows, -jnp.inf, jnp.float32), zero, zero, zeros, zeros)
    _, p_sum, pds_sum, o, t = jax.lax.fori_loop(0, k_ref.shape[0] // SIDE, step, start)
    mu = pds_sum / p_sum
    d_o = (t - mu[:, None] * o) / p_sum[:, None]
    triton.store(out_ref, d_o.astype(out_ref.dtype), mask=inside)


# A compiler that spreads a program over devices knows nothing of the kernel: by rows, it is told.


@custom_partitioning
def _by_rows(q, k, v, dq, dk, dv):
    return call(q, k, v, dq, dk, dv)


def _rows(mesh, arguments):
    spec = arguments[0].sharding.spec
    return NamedSharding(mesh, PartitionSpec(*spec[:1]))


def _partition(mesh, arguments, result):
    rows = _rows(mesh, arguments)
    return mesh, call, rows, (rows,) * len(arguments)


_by_rows.def_partition(
    partition=_partition,
    infer_sharding_from_operands=lambda mesh, arguments, result: _rows(mesh, arguments),
    sharding_rule="b n h d, b m h d, b m h d, b n h d, b m h d, b m h d -> b n h d",
)
