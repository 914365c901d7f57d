"""What improved MeanFlow's network is made of (arXiv 2512.02012): conditions as tokens, blocks.

The label, the guidance scale omega, its interval [t_min, t_max] and h = t - r are learned tokens in
front of the patches; positions are turned into the queries and keys (RoPE, arXiv 2104.09864), norms
are RMS (1910.07467), MLPs are gated (SwiGLU, 2002.05202).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import hardware
from models.attention import attention
from models.blocks import qkv, xavier, zeros
from models.dit import MAX_PERIOD, TimeEmbedder, guidance_numbers, patchify
from models.network import embed_labels

ones = nn.initializers.ones_init()
# Before the patches, in this order: what the tokens stand for, and how many there are.
PREFIX = {"class": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}
NUM_PREFIX = sum(PREFIX.values())
CONSTANTS = {"omega": 1.0, "t_min": 0.0, "t_max": 1.0}  # where an objective has no guidance to give


def scaled_normal(gain=1.0):
    """Makes the initializer normal(0, gain / sqrt(fan_in)), not truncated."""
    return nn.initializers.variance_scaling(gain**2, "fan_in", "normal")


def rms_norm(x, scale, apart=False):
    """Computes x / sqrt(mean of x^2 over the features) * scale, in float32.

    Args:
      apart: the mean is in memory before it is used, so that what follows reads x again instead of
        a float32 product that XLA would write beside the mean.
    """
    x = x.astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * (jax.lax.optimization_barrier(rstd) if apart else rstd) * scale


def rotate(x, halves=False):
    """Turns x (B, N, heads, d) by RoPE over the sequence, the first token at position 0.

    Neighbouring channels (2j, 2j + 1) are turned by the angle position * 10000^(-2j/d).

    Args:
      halves: the channels are in the order of `in_halves`.
    """
    N, d = x.shape[1], x.shape[-1]
    angle = np.arange(N)[:, None] * MAX_PERIOD ** -(np.arange(0, d, 2) / d)
    if not halves:
        return turn(x, angle)
    cos, sin = (f(angle).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def in_halves(w, d):
    """Puts in each head of d channels, last axis of w, the even channels before the odd ones.

    Queries and keys in one order have the same products in any, and a TPU turns halves for less
    than neighbours. By a product with ones and zeros, as it would move columns one by one.
    """
    order = np.eye(d, dtype=np.float32)[:, [*range(0, d, 2), *range(1, d, 2)]]
    heads = w.reshape(*w.shape[:-1], -1, d)
    return jnp.matmul(heads, order.astype(w.dtype), precision="highest").reshape(w.shape)


def turn(x, angle):
    """Turns neighbouring channels of x (B, N, heads, d) as pairs by angles, numpy (N, d / 2)."""
    d = x.shape[-1]
    angle = np.repeat(angle, 2, axis=1)[:, None]  # (N, 1, d)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    even = np.arange(d) % 2 == 0
    # Shifted rather than cut into pairs, which would leave a last axis of length 2.
    other = jnp.where(even, -jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))
    return x * cos + other * sin


class Embedding(nn.Module):
    """An image and its conditions as one sequence: (B, 20 + patches, D).

    What a condition is embedded into, (B, D), is added to each of its learned tokens. Those of the
    data (`models.conditions.Embedded`) come on top, their tokens in front of all.
    """

    hidden_size: int
    patch_size: int | tuple[int, int]
    num_classes: int
    dtype: jnp.dtype

    def setup(self):
        D = self.hidden_size
        self.setup_patches()
        # a table's own default counts its features as fan_in
        self.y_embedder = nn.Embed(self.num_classes + 1, D)
        self.h_embedder = TimeEmbedder(D, scaled_normal())
        self.omega_embedder = TimeEmbedder(D, scaled_normal())
        self.t_min_embedder = TimeEmbedder(D, scaled_normal())
        self.t_max_embedder = TimeEmbedder(D, scaled_normal())
        init = nn.initializers.normal(D**-0.5)
        self.tokens = {
            name: self.param(f"{name}_tokens", init, (number, D)) for name, number in PREFIX.items()
        }

    def __call__(self, z, c, given):
        numbers = guidance_numbers(
            {name: c.get(name, jnp.full_like(c["h"], value)) for name, value in CONSTANTS.items()}
        )
        vectors = {
            "class": embed_labels(self.y_embedder, c["y"]),
            "omega": self.omega_embedder(numbers["omega"]),
            "t_min": self.t_min_embedder(numbers["t_min"]),
            "t_max": self.t_max_embedder(numbers["t_max"]),
            "time": given.on_vector(self.h_embedder(c["h"])),
        }
        prefix = [self.tokens[name] + vectors[name][:, None] for name in PREFIX]
        patches = self.patches(z, given).astype(jnp.float32)
        return given.before(jnp.concatenate([*prefix, patches], axis=1))

    def setup_patches(self):
        # The kernel has the shape of the convolution it stands for, (p, q, C, D).
        patch = dict(axis=(-3, -2, -1), kernel_init=xavier, dtype=self.dtype)
        self.x_embedder = nn.DenseGeneral(self.hidden_size, **patch)

    def patches(self, z, given):
        """Embeds the patches of an image, with those of arrays that are given: (B, N, D)."""
        return given.on_patches(self.x_embedder(patchify(z, self.patch_size)))


class Attention(nn.Module):
    """Multi-head self-attention with RoPE and normed queries and keys, (B, N, D) -> (B, N, D)."""

    num_heads: int
    dtype: jnp.dtype
    fused: bool

    @nn.compact
    def __call__(self, x, tangent, plain):
        B, N, D = x.shape
        H, d = self.num_heads, D // self.num_heads
        dense = dict(use_bias=False, kernel_init=scaled_normal(0.32), dtype=self.dtype)
        halves = hardware.platform() == "tpu" and self.dtype == jnp.bfloat16
        order = partial(in_halves, d=d) if halves else None
        q, k, v = (a.reshape(B, N, H, d) for a in qkv(x, self.fused, order, **dense))

        def turned(a, name):
            scale = self.param(f"{name}_norm", ones, (d,))
            scale = order(scale) if halves else scale
            return rotate(rms_norm(a, scale, apart=self.fused), halves).astype(self.dtype)

        q, k = turned(q, "q"), turned(k, "k")
        x = attention(q, k, v, fused=self.fused and not plain, tangent=tangent and not plain)
        return nn.Dense(D, **dense, name="proj")(x.reshape(B, N, D))


class Mlp(nn.Module):
    """SwiGLU, (B, N, D) -> (B, N, D) through 8/3 D gated features."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        D = x.shape[-1]
        dense = dict(use_bias=False, kernel_init=scaled_normal(0.32), dtype=self.dtype)
        gate, x = jnp.split(nn.Dense(2 * mlp_size(D), **dense, name="w13")(x), 2, axis=-1)
        return nn.Dense(D, **dense, name="w2")(nn.silu(gate) * x)


def mlp_size(hidden_size):
    """Counts the hidden features of the MLP."""
    return hidden_size * 8 // 3


class Block(nn.Module):
    """One transformer block, the identity at the start."""

    hidden_size: int
    num_heads: int
    dtype: jnp.dtype
    fused: bool
    jvp: int | None  # which of the batches is inside of a `jax.jvp`
    through: bool  # whether a gradient flows through its tangent
    grid: tuple[int, int]  # patches by column and by row
    mlp_features: int

    def setup(self):
        D = (self.hidden_size,)
        self.norm1, self.norm2 = self.param("norm1", ones, D), self.param("norm2", ones, D)
        self.attn_scale = self.param("attn_scale", zeros, D)
        self.mlp_scale = self.param("mlp_scale", zeros, D)
        self.attn, self.mlp = self.branches()

    def branches(self):
        """Makes attention and MLP."""
        return Attention(self.num_heads, self.dtype, self.fused), Mlp(self.dtype)

    def __call__(self, xs):
        """Computes (a tuple of (B, N, D), None) of such a tuple, for `nn.scan`."""
        tangents = [i == self.jvp for i in range(len(xs))]
        return tuple(map(self.one, xs, tangents)), None

    def one(self, x, tangent):
        plain = self.dtype == jnp.float32 or (tangent and self.through)
        x = self.add(x, self.attn_scale, self.attn(rms_norm(x, self.norm1), tangent, plain))
        return self.add(x, self.mlp_scale, self.mlp(rms_norm(x, self.norm2)))

    def add(self, x, scale, branch):
        """Computes x + scale * branch in float32, and returns the type of x."""
        return (x.astype(jnp.float32) + scale * branch.astype(jnp.float32)).astype(x.dtype)


class FinalLayer(nn.Module):
    """(B, N, D) -> (B, N, features)."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = rms_norm(x, self.param("norm", ones, (x.shape[-1],)))
        return nn.Dense(self.features, kernel_init=zeros, dtype=self.dtype, name="linear")(x)
