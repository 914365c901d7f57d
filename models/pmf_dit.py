"""The backbone of pixel MeanFlow (arXiv 2601.22158): improved MeanFlow's, for pixels.

Patches pass a bottleneck, positions are learned for all tokens and turned into the queries and keys
of the patches, row and column apart. The heads predict clean images x_u and x_v; the velocities are
u = (z_t - x_u) / c(t) and v = (z_t - x_v) / c(t) with c(t) = clip(t, 0.05, 1), which is part of
what a JVP differentiates. The time enters nowhere else.

Each matrix of the published network is one here too (q, k and v, or the two halves of a gate, lie
side by side along an axis of their own), as Muon goes by matrix.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import imf_blocks, imf_dit
from models.attention import attention
from models.dit import MAX_PERIOD, patchify, xavier
from models.imf_blocks import NUM_PREFIX, ones, rms_norm, scaled_normal, turn
from models.network import Axes, sides, sizes_of

CLIP = 0.05  # the smallest time that is divided by


def angles(grid, d, before=NUM_PREFIX):
    """Returns the angles of queries and keys of a sequence, float32 (before + patches, d / 2).

    The first half of the pairs of channels is turned by the row, the second by the column; what
    stands before the patches is not turned.
    """
    frequencies = MAX_PERIOD ** -(2 * np.arange(d // 4) / (d // 2))
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    patches = np.concatenate([rows[:, None] * frequencies, columns[:, None] * frequencies], axis=1)
    return np.pad(patches, ((before, 0), (0, 0)))


class Embedding(imf_blocks.Embedding):
    """An image and its conditions as one sequence: (B, 20 + patches, D)."""

    bottleneck: int = 128
    grid: tuple[int, int] = ()  # patches by row and column

    def setup_patches(self):
        patch = dict(axis=(-3, -2, -1), kernel_init=xavier, dtype=self.dtype)
        self.x_embedder = nn.DenseGeneral(self.bottleneck, **patch)
        self.x_embedder2 = nn.DenseGeneral(self.hidden_size, **patch)  # a convolution of 1 x 1
        shape = NUM_PREFIX + self.grid[0] * self.grid[1], self.hidden_size
        self.positions = self.param("positions", nn.initializers.normal(0.02), shape)

    def patches(self, z, given):
        x = given.on_patches(self.x_embedder(patchify(z, self.patch_size)))  # (B, N, bottleneck)
        return self.x_embedder2(x[:, :, None, None])

    def __call__(self, z, c, given):
        x = super().__call__(z, c, given._replace(tokens=None)) + self.positions
        return given.before(x)


class Attention(nn.Module):
    """Multi-head self-attention with positions in queries and keys, (B, N, D) -> (B, N, D)."""

    num_heads: int
    dtype: jnp.dtype
    fused: bool
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, x, tangent, plain):
        B, N, D = x.shape
        H, d = self.num_heads, D // self.num_heads
        before = N - self.grid[0] * self.grid[1]
        dense = dict(use_bias=False, kernel_init=scaled_normal(0.32), dtype=self.dtype)
        products = nn.DenseGeneral((3, D), **dense, name="qkv")(x)  # kernel (D, 3, D)
        q, k, v = (products[:, :, i].reshape(B, N, H, d) for i in range(3))

        def turned(a, name):
            scale = self.param(f"{name}_norm", ones, (d,))
            normed = rms_norm(a, scale, apart=self.fused)
            return turn(normed, angles(self.grid, d, before)).astype(self.dtype)

        q, k = turned(q, "q"), turned(k, "k")
        x = attention(q, k, v, fused=self.fused and not plain, tangent=tangent and not plain)
        return nn.Dense(D, **dense, name="proj")(x.reshape(B, N, D))


class Mlp(nn.Module):
    """SwiGLU, (B, N, D) -> (B, N, D) through `features` gated features."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        D = x.shape[-1]
        dense = dict(use_bias=False, kernel_init=scaled_normal(0.32), dtype=self.dtype)
        both = nn.DenseGeneral((2, self.features), **dense, name="w13")(
            x
        )  # kernel (D, 2, features)
        return nn.Dense(D, **dense, name="w2")(nn.silu(both[:, :, 0]) * both[:, :, 1])


class Block(imf_blocks.Block):
    """One transformer block, the identity at the start."""

    def branches(self):
        attention = Attention(self.num_heads, self.dtype, self.fused, self.grid)
        return attention, Mlp(self.mlp_features, self.dtype)


class PmfDiT(imf_dit.ImfDiT):
    """The average velocity u(z, t, h, omega, t_min, t_max, y), and v, by clean images.

    Attributes:
      bottleneck: features of a patch before they are widened.
      mlp_multiple: the MLP's 8/3 D features are rounded up to a multiple of it.
      The others as in models/imf_dit.py.
    """

    bottleneck: int = 128
    mlp_multiple: int = 1

    block = Block

    def embedding(self, grid):
        return Embedding(
            self.hidden_size, self.patch_size, self.num_classes, self.dtype, self.bottleneck, grid,
            name="embedding",
        )  # fmt: skip

    @property
    def patch_features(self):
        return self.bottleneck

    @property
    def mlp_features(self):
        return -(-(self.hidden_size * 8 // 3) // self.mlp_multiple) * self.mlp_multiple

    def flops(self, image_shape, both=False):
        (height, width, channels), D = image_shape, self.hidden_size
        area = math.prod(sides(self.patch_size))
        direct = area * channels * D  # what a patch costs without a bottleneck
        more = self.bottleneck * (area * channels + D) - direct
        return super().flops(image_shape, both) + 2 * height * width // area * more

    def axes(self, params):
        """Tells the axes of every array; q, k, v and the halves of a gate are several matrices."""

        def several(path, axes):
            names = [key.key for key in path[-2:]]
            apart = names in (["qkv", "kernel"], ["w13", "kernel"])
            return Axes((0, 2), (1,), (3,)) if apart else axes

        return jax.tree_util.tree_map_with_path(
            several, super().axes(params), is_leaf=lambda a: isinstance(a, Axes)
        )

    def together(self, *batches, **how):
        pairs = zip(batches, super().together(*batches, **how), strict=True)
        return tuple(velocity(z, c["t"], images) for (z, c), images in pairs)


def velocity(z, t, images):
    """Returns the `Velocity` that leads from z_t at t (B,) to the clean images of both heads."""
    c = jnp.clip(t, CLIP, 1)[:, None, None, None]
    return type(images)(*(None if x is None else (z - x) / c for x in images))


# depth, hidden_size, num_heads, bottleneck, mlp_multiple
SIZES = {
    "B": (16, 768, 12, 128, 1),
    "L": (32, 1024, 16, 128, 1),
    "H": (48, 1280, 16, 256, 8),
}
NAMES = {
    f"pmfDiT_{size}_{p}": dict(
        depth=depth, hidden_size=width, num_heads=heads, patch_size=p, aux_head_depth=8,
        bottleneck=bottleneck, mlp_multiple=multiple,
    )
    for size, (depth, width, heads, bottleneck, multiple) in SIZES.items()
    for p in (16, 32)
}  # fmt: skip
NAMES["pmfDiT"] = {}  # the five sizes of models/imf_dit.py are options
OPTIONS = imf_dit.OPTIONS


def build(cls, *, image_shape, num_classes, dtype, **options):
    """Builds a `PmfDiT` by name; arguments and errors as of `models.imf_dit.build`."""
    sizes = dict(NAMES[cls])
    more = {name: sizes.pop(name) for name in ("bottleneck", "mlp_multiple") if name in sizes}
    options |= sizes_of(cls, sizes, imf_dit.SIZE_OPTIONS, options, image_shape)
    imf_dit.check_sizes(options, 4)
    if options["half_residual"] is None:
        options["half_residual"] = dtype == jnp.bfloat16
    return PmfDiT(**options, **more, num_classes=num_classes, dtype=dtype)
