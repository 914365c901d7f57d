"""The transformer block of DiT (Peebles & Xie, arXiv 2212.09748), with adaLN-Zero.

In float32 every operation is the plain one. In bfloat16 attention, norms and GELU have derivatives
of their own (models/attention.py, models/layers.py): the tangent of a batch that is inside of a
`jax.jvp` is not differentiated any further, unless its gradient is asked for (`through`): then the
operations on it are the plain ones too.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import hardware, layers
from models.attention import attention
from models.layers import save

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


def layer_norm(x):
    """Computes LayerNorm without scale and bias, in float32."""
    x = x.astype(jnp.float32)
    mean, var = jnp.mean(x, axis=-1, keepdims=True), jnp.var(x, axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-6)


def modulate(x, shift, scale):
    """Computes x (1 + scale) + shift for x (B, N, D), shift and scale (B, D)."""
    shift, scale = shift[:, None].astype(jnp.float32), scale[:, None].astype(jnp.float32)
    return x * (1 + scale) + shift


class Qkv(nn.Module):
    """(B, N, D) -> q, k, v, each (B, N, D): three products with parts of one kernel, or one.

    The parameters are those of `nn.Dense(3 * D)`.
    """

    dtype: jnp.dtype
    kernel_init: Callable = xavier
    use_bias: bool = True
    count: int = 3  # of products
    arrange: Callable | None = None  # of three, changes the order of the columns of q and k

    @nn.compact
    def __call__(self, x):
        D = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (D, 3 * D)).astype(self.dtype)
        parts = jnp.split(kernel, self.count, axis=1)
        if self.arrange:
            parts = [*map(self.arrange, parts[:2]), parts[2]]
        products = [x.astype(self.dtype) @ part for part in parts]
        if self.use_bias:
            bias = jnp.split(self.param("bias", zeros, (3 * D,)).astype(self.dtype), self.count)
            if self.count == 1:
                bias = [layers.spread(*bias, *products, self.dtype)]
            products = [(y + b).astype(self.dtype) for y, b in zip(products, bias, strict=True)]
        products = list(map(save, products))
        return products if self.count == 3 else jnp.split(*products, 3, axis=-1)


def qkv(x, fused, arrange=None, **dense):
    """Computes q, k, v, each like x (B, N, D), by a `nn.Dense(**dense)` named qkv.

    Three products for the kernels of a card, so that none of them has to be copied out of a product
    of all three for these; and on a TPU where the tokens fill its lanes: they are laid out side by
    side then, and heads are cut apart without a copy (docs/speed.md). One elsewhere.

    Args:
      arrange: where it is not None, changes the order of the columns of q and k.
    """
    if fused or arrange:
        return Qkv(**dense, arrange=arrange, name="qkv")(x)
    if hardware.platform() == "tpu" and dense["dtype"] == jnp.bfloat16:
        count = 3 if x.shape[1] > hardware.LANES else 1
        return Qkv(**dense, count=count, name="qkv")(x)
    return jnp.split(save(nn.Dense(3 * x.shape[-1], **dense, name="qkv")(x)), 3, axis=-1)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D). The softmax is in float32."""

    num_heads: int
    dtype: jnp.dtype
    fused: bool
    in_jvp: bool

    @nn.compact
    def __call__(self, x, tangent, plain):
        B, N, D = shape = x.shape
        images = 1
        if self.dtype != jnp.float32:
            images = hardware.images_in_lanes(B, N, self.in_jvp)
        x = x.reshape(B // images, images * N, D)
        parts = qkv(x, self.fused, kernel_init=xavier, dtype=self.dtype)
        H = self.num_heads
        heads = [a.reshape(*a.shape[:2], H, D // H) for a in parts]
        how = dict(fused=self.fused and not plain, tangent=tangent and not plain, images=images)
        x = attention(*heads, **how).reshape(x.shape)
        proj = nn.Dense(D, kernel_init=xavier, dtype=self.dtype, name="proj")
        return save(proj(x)).reshape(shape)


class Mlp(nn.Module):
    """(B, N, D) -> (B, N, D) through 4 D features."""

    dtype: jnp.dtype
    fused: bool

    @nn.compact
    def __call__(self, x, tangent, plain):
        D = x.shape[-1]
        x = save(nn.Dense(4 * D, kernel_init=xavier, dtype=self.dtype, name="fc1")(x))
        x = nn.gelu(x) if plain else layers.gelu(x, self.fused, tangent)
        return save(nn.Dense(D, kernel_init=xavier, dtype=self.dtype, name="fc2")(x))


class Block(nn.Module):
    """One transformer block with adaLN-Zero."""

    hidden_size: int
    num_heads: int
    dtype: jnp.dtype
    fused: bool
    jvp: int | None  # which of the batches is inside of a `jax.jvp`
    through: bool  # whether a gradient flows through its tangent

    def setup(self):
        self.adaLN = nn.Dense(6 * self.hidden_size, kernel_init=zeros, dtype=self.dtype)
        in_jvp = self.jvp is not None
        self.attn = Attention(self.num_heads, self.dtype, self.fused, in_jvp)
        self.mlp = Mlp(self.dtype, self.fused)

    def __call__(self, xs, cs):
        """Computes (a tuple of (B, N, D), None) of tuples (B, N, D), (B, D), for `nn.scan`."""
        tangents = [i == self.jvp for i in range(len(xs))]
        return tuple(map(self.one, xs, cs, tangents)), None

    def one(self, x, c, tangent):
        how = tangent, self.dtype == jnp.float32 or (tangent and self.through)
        modulation = jnp.split(save(self.adaLN(c)), 6, axis=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x = self.add(x, gate_a, self.attn(self.norm(x, shift_a, scale_a, *how), *how))
        return self.add(x, gate_m, self.mlp(self.norm(x, shift_m, scale_m, *how), *how))

    def norm(self, x, shift, scale, tangent, plain):
        if plain:
            return modulate(layer_norm(x), shift, scale)
        return layers.norm_modulate(x, shift, scale, self.dtype, tangent)

    def add(self, x, gate, branch):
        """Computes x + gate * branch in float32, and returns the type of x."""
        gate, branch = layers.spread(gate, x, self.dtype), branch.astype(jnp.float32)
        return (x.astype(jnp.float32) + gate * branch).astype(x.dtype)
