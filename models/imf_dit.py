"""The backbone of improved MeanFlow (arXiv 2512.02012): conditions as tokens, two heads.

The label, the guidance scale omega, its interval [t_min, t_max] and h = t - r are learned tokens in
front of the patches; positions are turned into the queries and keys (RoPE, arXiv 2104.09864), norms
are RMS (1910.07467), MLPs are gated (SwiGLU, 2002.05202). A trunk of blocks feeds two stacks of
`aux_head_depth` blocks: one gives the average velocity u, the other the instantaneous velocity v,
which only training needs. Images are NHWC. The blocks of each of the three stacks are one scanned
module, see models/dit.py.

What it shares with the Diffusion Transformer stands in models/dit.py and models/blocks.py. Builds
on models/network.py, models/attention.py, models/card.py and models/layers.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import card, layers
from models.attention import attention
from models.blocks import qkv
from models.dit import (
    FREQUENCIES,
    KERNEL_OPTIONS,
    MAX_PERIOD,
    TimeEmbedder,
    guidance_numbers,
    patchify,
    unpatchify,
    xavier,
    zeros,
)
from models.network import Network, Velocity, embed_labels, sizes_of

ones = nn.initializers.ones_init()
# Before the patches, in this order: what the tokens stand for, and how many there are.
PREFIX = {"class": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}
NUM_PREFIX = sum(PREFIX.values())
CONSTANTS = {"omega": 1.0, "t_min": 0.0, "t_max": 1.0}  # where an objective has no guidance to give


def scaled_normal(gain=1.0):
    """normal(0, gain / sqrt(fan_in)), not truncated."""
    return nn.initializers.variance_scaling(gain**2, "fan_in", "normal")


def rms_norm(x, scale, apart=False):
    """x / sqrt(mean of x^2 over the features) * scale, in float32.

    Args:
      apart: the mean is in memory before it is used, so that what follows reads x again instead of
        a float32 product that XLA would write beside the mean.
    """
    x = x.astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * (jax.lax.optimization_barrier(rstd) if apart else rstd) * scale


def rotate(x):
    """RoPE over the sequence: x (B, N, heads, d), the first token at position 0.

    Neighbouring channels (2j, 2j + 1) are turned by the angle position * 10000^(-2j/d).
    """
    N, d = x.shape[1], x.shape[-1]
    return turn(x, np.arange(N)[:, None] * MAX_PERIOD ** -(np.arange(0, d, 2) / d))


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

    What a condition is embedded into, (B, D), is added to each of its learned tokens.
    """

    hidden_size: int
    patch_size: int
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

    def __call__(self, z, c):
        given = guidance_numbers(
            {name: c.get(name, jnp.full_like(c["h"], value)) for name, value in CONSTANTS.items()}
        )
        vectors = {
            "class": embed_labels(self.y_embedder, c["y"]),
            "omega": self.omega_embedder(given["omega"]),
            "t_min": self.t_min_embedder(given["t_min"]),
            "t_max": self.t_max_embedder(given["t_max"]),
            "time": self.h_embedder(c["h"]),
        }
        prefix = [self.tokens[name] + vectors[name][:, None] for name in PREFIX]
        return jnp.concatenate([*prefix, self.patches(z).astype(jnp.float32)], axis=1)

    def setup_patches(self):
        # The kernel has the shape of the convolution it stands for, (p, p, C, D).
        patch = dict(axis=(-3, -2, -1), kernel_init=xavier, dtype=self.dtype)
        self.x_embedder = nn.DenseGeneral(self.hidden_size, **patch)

    def patches(self, z):
        """Embeds the patches of an image: (B, N, D)."""
        return self.x_embedder(patchify(z, self.patch_size))


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
        q, k, v = (a.reshape(B, N, H, d) for a in qkv(x, self.fused, **dense))

        def turned(a, name):
            scale = self.param(f"{name}_norm", ones, (d,))
            return rotate(rms_norm(a, scale, apart=self.fused)).astype(self.dtype)

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
    """Hidden features of the MLP."""
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
        """A tuple of batches (B, N, D) -> (the same, None), for `nn.scan`."""
        tangents = [i == self.jvp for i in range(len(xs))]
        return tuple(map(self.one, xs, tangents)), None

    def one(self, x, tangent):
        plain = self.dtype == jnp.float32 or (tangent and self.through)
        x = self.add(x, self.attn_scale, self.attn(rms_norm(x, self.norm1), tangent, plain))
        return self.add(x, self.mlp_scale, self.mlp(rms_norm(x, self.norm2)))

    def add(self, x, scale, branch):
        """x + scale * branch in float32, kept in the type of x."""
        return (x.astype(jnp.float32) + scale * branch.astype(jnp.float32)).astype(x.dtype)


class FinalLayer(nn.Module):
    """(B, N, D) -> (B, N, features)."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = rms_norm(x, self.param("norm", ones, (x.shape[-1],)))
        return nn.Dense(self.features, kernel_init=zeros, dtype=self.dtype, name="linear")(x)


class ImfDiT(Network):
    """The average velocity u(z, h, omega, t_min, t_max, y), and v; t itself is not asked for.

    The head of v is there where the parameters hold it, so that a network without one, smaller by
    a third, is sampled from as it is. Conditions that are not given are constant: no guidance.

    Attributes:
      depth, hidden_size, num_heads, patch_size: the size; a pass through trunk and one head
        crosses `depth` blocks.
      aux_head_depth: blocks of each head.
      num_classes: labels are 0..num_classes-1, and num_classes is the null label.
      predicts_v: whether fresh parameters have a head of v.
      dtype, unroll, remat, fused_attention, half_residual: as in models/dit.py.
    """

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    aux_head_depth: int
    num_classes: int
    predicts_v: bool = True
    dtype: jnp.dtype = jnp.float32
    unroll: int = 1
    remat: bool = False
    fused_attention: bool | None = False
    half_residual: bool = False

    conditions = tuple(CONSTANTS)
    only_for_training = ("v_blocks", "v_final_layer")
    stacks = ("blocks", "u_blocks", "v_blocks")
    takes_t = False
    label_table = "embedding/y_embedder/embedding"

    block = Block

    def __call__(self, z, c):
        return self.together((z, c))[0]

    def embedding(self, grid):
        """Makes the module that embeds images of so many patches, `grid` (rows, columns)."""
        sizes = self.hidden_size, self.patch_size, self.num_classes
        return Embedding(*sizes, self.dtype, name="embedding")

    @property
    def mlp_features(self):
        """Hidden features of the MLP."""
        return mlp_size(self.hidden_size)

    @nn.compact
    def together(self, *batches, jvp=None, through=False):
        shape = batches[0][0].shape[1:]
        p = self.patch_size
        fused = card.fused_attention(self.fused_attention, self.dtype)
        unroll = self.unroll or card.unroll(self.depth, differentiated=jvp is not None)
        grid = shape[0] // p, shape[1] // p
        embed = self.embedding(grid)
        residual = self.dtype if self.half_residual else jnp.float32
        xs = [embed(*batch) for batch in batches]
        if card.platform() == "gpu":  # a TPU's compiler moves more for it
            xs = map(layers.lying_in_order, xs)
        xs = tuple(x.astype(residual) for x in xs)
        fresh = self.predicts_v and self.is_initializing()
        both = fresh or self.has_variable("params", "v_blocks")
        in_all = self.depth + both * self.aux_head_depth
        policy = None if self.remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        block = card.remat(self.block, policy, xs, in_all, unroll < self.depth)

        size = self.hidden_size, self.num_heads

        def stack(length, name):
            return nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=length,
                unroll=min(unroll, length),
            )(*size, self.dtype, fused, jvp, through, grid, self.mlp_features, name=name)

        def head(name, xs):
            xs, _ = stack(self.aux_head_depth, f"{name}_blocks")(xs)
            final_layer = FinalLayer(p * p * shape[-1], self.dtype, name=f"{name}_final_layer")
            outs = [final_layer(x[:, NUM_PREFIX:]) for x in xs]
            return [unpatchify(x, p, shape).astype(jnp.float32) for x in outs]

        xs, _ = stack(self.depth - self.aux_head_depth, "blocks")(xs)
        us = head("u", xs)
        vs = head("v", xs) if both else [None] * len(xs)
        return tuple(map(Velocity, us, vs))

    def serving(self, conditions, v):
        return self.clone(predicts_v=v)

    def cast(self, params):
        """The kernels of the blocks in the type of their products, see models/dit.py."""

        def cast(path, p):
            return p.astype(self.dtype) if path[-1].key == "kernel" else p

        stacks = {name: params[name] for name in params if name in self.stacks}
        return params | jax.tree_util.tree_map_with_path(cast, stacks)

    def flops(self, image_shape, both=False):
        height, width, channels = image_shape
        patches = height * width // self.patch_size**2
        tokens = NUM_PREFIX + patches
        D, patch = self.hidden_size, self.patch_size**2 * channels
        block = tokens * (4 * D + 3 * self.mlp_features) * D + 2 * tokens * tokens * D
        scalars = 4 * (FREQUENCIES * D + D * D)
        blocks = self.depth + (self.aux_head_depth if both else 0)
        return 2 * (blocks * block + scalars + (2 + both) * patches * patch * D)

    def unrolled(self):
        return self.clone(unroll=self.depth, fused_attention=False)


# depth, hidden_size, num_heads
SIZES = {"B": (12, 768, 12), "M": (24, 768, 12), "L": (32, 1024, 16), "XL": (48, 1024, 16)}
NAMES = {
    f"imfDiT_{size}_2": dict(
        depth=depth, hidden_size=width, num_heads=heads, patch_size=2, aux_head_depth=8
    )
    for size, (depth, width, heads) in SIZES.items()
}
NAMES["imfDiT"] = {}  # all five sizes are options
SIZE_OPTIONS = ("depth", "hidden_size", "num_heads", "patch_size", "aux_head_depth")
OPTIONS = (*SIZE_OPTIONS, *KERNEL_OPTIONS)


def build(cls, *, image_shape, num_classes, dtype, **options):
    """An `ImfDiT` by name.

    Args:
      cls: of NAMES.
      image_shape: (h, w, c) of z; h and w a multiple of the patch size.
      options: of OPTIONS; a size that is 0 is that of `cls`.

    Raises:
      ValueError: a missing size, or sizes that do not fit together.
    """
    options |= sizes_of(cls, NAMES[cls], SIZE_OPTIONS, options, image_shape)
    check_sizes(options, 2)
    if options["half_residual"] is None:
        options["half_residual"] = dtype == jnp.bfloat16
    return ImfDiT(**options, num_classes=num_classes, dtype=dtype)


def check_sizes(options, channels):
    """Raises ValueError where sizes do not fit together; a head's width divides by `channels`."""
    depth, D, heads, _, head_depth = (options[name] for name in SIZE_OPTIONS)
    if D % (channels * heads):
        kind = "an even multiple" if channels == 2 else f"a multiple of {channels} times"
        raise ValueError(f"model.hidden_size ({D}) must be {kind} of model.num_heads ({heads})")
    if head_depth >= depth:
        raise ValueError(
            f"model.aux_head_depth ({head_depth}) must be below model.depth ({depth}), which "
            "counts the blocks of the trunk and of one head"
        )
