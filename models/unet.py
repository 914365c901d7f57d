"""The backbone of CIFAR-10: the U-Net of score models (Song et al., arXiv 2011.13456, "DDPM++").

With the settings of MeanFlow's experiments (arXiv 2505.13447, appendix A): two times, a noise
embedding of double width, resampling by the filter [1, 3, 3, 1]. Images are NHWC.

An encoder halves the sides from level to level; a decoder goes back up and takes the outputs of all
layers of the encoder in again, newest first. `layers` lists both. Signals are images of height 1,
which is not halved; their convolutions are 1-D.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from models import conditions
from models.augment import LABELS
from models.filters import SPACE, double, half
from models.network import Network, Velocity, embed_labels
from models.unet_layers import Layer, layers, products, window
from utils.conditions import Condition

MAX_PERIOD = 10000.0
HALF = np.sqrt(0.5)  # keeps the variance of a sum of two
MASK = "dropout mask"  # its name among what a block keeps for its backward pass


def scaled_xavier(factor):
    """Makes the initializer of Xavier-uniform weights times a factor."""
    return nn.initializers.variance_scaling(factor**2, "fan_avg", "uniform")


xavier = scaled_xavier(1.0)
nearly_zero = scaled_xavier(1e-5)  # of the last product of each branch: a network begins at 0


def time_embedding(s, width):
    """Computes sines, then cosines, of times s (B,) in [0, 1]: float32 (B, width)."""
    k = width // 2
    angle = s[:, None] * MAX_PERIOD ** -(np.arange(k, dtype=np.float32) / (k - 1))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def groups(channels):
    """Counts the groups of consecutive channels of the normalisation."""
    return min(32, channels // 4)


def group_norm(channels):
    """Makes a GroupNorm in float32."""
    return nn.GroupNorm(groups(channels), epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False)


def attention(q, k, v):
    """Computes one head over all positions, (B, N, D) thrice -> (B, N, D), softmax in float32."""
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bnd,bmd->bnm", q * scale, k, preferred_element_type=jnp.float32)
    return jnp.einsum("bnm,bmd->bnd", nn.softmax(logits).astype(v.dtype), v)


class Dropout(nn.Module):
    """Each activation left out with a probability, the others scaled; needs the stream "dropout".

    The mask is an array of its own, which a block keeps: the compiler for TPUs would draw its
    numbers anew inside of every convolution that reads the product, and take minutes for each.
    """

    rate: float

    @nn.compact
    def __call__(self, x):
        if not self.rate or not self.has_rng("dropout"):
            return x
        mask = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape)
        mask = checkpoint_name(jax.lax.optimization_barrier(mask), MASK)
        return jnp.where(mask, x / (1 - self.rate), 0)


class Block(nn.Module):
    """A residual block, (B, H, W, C), (B, E) -> (B, H', W', width); float32 between blocks."""

    layer: Layer
    dropout: float
    taps: tuple[float, ...]
    dtype: jnp.dtype

    def setup(self):
        layer, width = self.layer, self.layer.width
        conv = dict(features=width, **window(layer.signal), dtype=self.dtype)
        dense = dict(dtype=self.dtype, kernel_init=xavier)
        self.norm0, self.norm1 = group_norm(layer.width_in), group_norm(width)
        self.conv0 = nn.Conv(**conv, kernel_init=xavier)
        self.affine = nn.Dense(width, **dense)
        self.drop = Dropout(self.dropout)
        self.conv1 = nn.Conv(**conv, kernel_init=nearly_zero)
        if layer.has_skip:
            self.skip = nn.Dense(width, **dense)
        if layer.attention:
            self.norm2 = group_norm(width)
            self.qkv = nn.Dense(3 * width, dtype=self.dtype, kernel_init=scaled_xavier(0.2**0.5))
            self.proj = nn.Dense(width, dtype=self.dtype, kernel_init=nearly_zero)

    def __call__(self, x, e):
        layer = self.layer
        resample = {"": lambda x, *_: x, "down": half, "up": double}[layer.resample]
        how = self.taps, SPACE[layer.signal :]
        y = self.conv0(resample(nn.silu(self.norm0(x)), *how))
        y = nn.silu(self.norm1(y + self.affine(e)[:, None, None]))
        y = self.conv1(self.drop(y))
        if layer.has_skip:
            x = self.skip(resample(x, *how))
        x = (y + x).astype(jnp.float32) * HALF
        if layer.attention:
            B, H, W, D = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(B, H * W, 3 * D)
            y = attention(*jnp.split(qkv, 3, axis=-1)).reshape(x.shape)
            x = (self.proj(y) + x).astype(jnp.float32) * HALF
        return x


def _is_saved(primitive, *_, **params):
    """Tells what is saved for the backward pass: convolutions, products with parameters, masks."""
    is_product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    saved = primitive.name == "conv_general_dilated" or params.get("name") == MASK
    return saved or is_product(primitive, *_, **params)


class UNet(Network):
    """The average velocity u(z, t, h), of a class or without.

    `c["augment"]`, float32 (B, augment_dim), tells how the images were augmented
    (models/augment.py); without it, as in sampling, they were not. Dropout has the same mask for u
    and for du/dt, since both are of one pass.

    Attributes:
      num_classes: 0: without classes; else labels are 0..num_classes-1, and num_classes is none.
      model_channels: the unit M of all widths.
      channel_mult: by level, of its width M * mult.
      channel_mult_emb: of the width of the embedding; channel_mult_noise: of that of a time.
      num_blocks, attn_resolutions: see `layers`.
      dropout: probability that an activation is left out.
      resample_filter: taps of the filter between two levels.
      augment_dim: number of augmentation labels; 0: none are taken.
      remat: save nothing of a block for the backward pass, and compute it there again.
      given: conditions that come with the data, of `utils.conditions.Condition`.
      dtype: of the products; parameters, norms and what goes from block to block stay float32.
    """

    num_classes: int
    model_channels: int
    channel_mult: tuple[int, ...]
    channel_mult_emb: int
    channel_mult_noise: int
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float
    resample_filter: tuple[float, ...]
    augment_dim: int
    remat: bool = False
    dtype: jnp.dtype = jnp.float32
    given: tuple[Condition, ...] = ()

    kinds = ("vector", "array")
    label_table = "label/embedding"

    @property
    def conditions(self):
        return ("augment",) if self.augment_dim else ()

    def blank(self, name):
        return jnp.zeros((1, self.augment_dim))

    @nn.compact
    def __call__(self, z, c):
        M, width = self.model_channels, 2 * self.model_channels * self.channel_mult_noise
        given = conditions.embedding(self.given, width, M, (), self.dtype)(c)
        e = nn.silu(self.embedding(c, given))  # (B, E)
        encoder, decoder = self.layers(z.shape[1:3])
        conv = dict(**window(z.shape[1] == 1), dtype=self.dtype)
        block = nn.remat(Block, policy=None if self.remat else _is_saved)

        def apply(layer, x):
            options = (self.dropout, self.resample_filter, self.dtype)
            return block(layer, *options, name=layer.name)(x, e)

        first, last = (f"{part}_{z.shape[1]}x{z.shape[2]}" for part in ("enc", "dec"))
        x = nn.Conv(M, kernel_init=xavier, **conv, name=f"{first}_conv")(z)
        skips = [x := given.on_patches(x.astype(jnp.float32))]
        for layer in encoder:
            skips.append(x := apply(layer, x))
        for layer in decoder:
            x = apply(layer, jnp.concatenate([x, skips.pop()], axis=-1) if layer.joins else x)
        exact = dict(dtype=jnp.float32, use_fast_variance=False, name=f"{last}_aux_norm")
        x = nn.silu(nn.GroupNorm(groups(x.shape[-1]), epsilon=1e-6, **exact)(x))
        x = nn.Conv(z.shape[-1], kernel_init=nearly_zero, **conv, name=f"{last}_aux_conv")(x)
        return Velocity(x.astype(jnp.float32))

    def embedding(self, c, given):
        """Embeds c, and of the data's conditions `given`, for all blocks: (B, E) before silu."""
        width = self.model_channels * self.channel_mult_noise
        E = self.model_channels * self.channel_mult_emb
        exact = dict(kernel_init=xavier, precision="highest")  # its derivative enters the JVP
        e = jnp.concatenate([time_embedding(c[name], width) for name in ("t", "h")], axis=-1)
        if self.num_classes:
            table = nn.Embed(self.num_classes + 1, 2 * width, embedding_init=xavier, name="label")
            e = e + embed_labels(table, c["y"])
        if self.augment_dim:
            labels = c.get("augment", jnp.zeros((len(e), self.augment_dim)))
            e += nn.Dense(2 * width, use_bias=False, **exact, name="map_augment")(labels)
        e = nn.silu(nn.Dense(E, **exact, name="map_layer0")(given.on_vector(e)))
        return nn.Dense(E, **exact, name="map_layer1")(e)

    def layers(self, size):
        widths = [self.model_channels * mult for mult in self.channel_mult]
        return layers(size, self.model_channels, widths, self.num_blocks, self.attn_resolutions)

    def cast(self, params):
        """Casts the products of the blocks to their type, once for all passes, not the norms."""

        def cast(name, tree):
            if isinstance(tree, dict):
                return {inner: cast(inner, leaf) for inner, leaf in tree.items()}
            return tree.astype(self.dtype)

        def of_block(tree):
            return {k: v if k.startswith("norm") else cast(k, v) for k, v in tree.items()}

        return {k: of_block(v) if "norm0" in v else v for k, v in params.items()}

    def flops(self, image_shape, both=False):
        *size, channels = image_shape
        M, E = self.model_channels, self.model_channels * self.channel_mult_emb
        encoder, decoder = self.layers(size)
        taps, width = (
            math.prod(window(size[0] == 1)["kernel_size"]),
            2 * M * self.channel_mult_noise,
        )
        total = 2 * taps * math.prod(size) * M * channels  # the first and the last convolution
        total += (width + E) * E + conditions.products(self.given, width, taps * M)
        return 2 * (total + sum(products(layer, E) for layer in encoder + decoder))


# The published network of CIFAR-10: 55,932,419 parameters.
NAMES = {"UNet": {}}
OPTIONS = (
    "model_channels channel_mult channel_mult_emb channel_mult_noise num_blocks attn_resolutions "
    "dropout resample_filter augment_dim remat"
).split()


def build(cls, *, image_shape, num_classes, dtype, **options):
    """Builds a `UNet`.

    Args:
      cls: of NAMES.
      image_shape: (h, w, c) of z, of which h, if it is not 1, and w are multiples of
        2 ** (levels - 1).
      options: those of OPTIONS.

    Raises:
      ValueError: sizes that do not fit together.
    """
    lists = ("channel_mult", "attn_resolutions", "resample_filter")
    options |= {name: tuple(options[name]) for name in lists}
    module = UNet(**options, num_classes=num_classes, dtype=dtype)
    mult, M = module.channel_mult, module.model_channels
    if not mult or min(mult) < 1:
        raise ValueError(f"model.channel_mult needs numbers of 1 or more, got {mult}")
    height, width = image_shape[:2]
    if (height > 1 and height % 2 ** (len(mult) - 1)) or width % 2 ** (len(mult) - 1):
        raise ValueError(
            f"dataset.image_size ({height if height == width else f'{height} x {width}'}) must be "
            f"a multiple of 2 ** {len(mult) - 1}, as model.channel_mult has {len(mult)} levels"
        )
    if module.dropout == 1:
        raise ValueError("model.dropout must be below 1: nothing would be left")
    if module.augment_dim not in (0, LABELS):
        raise ValueError(f"model.augment_dim is {LABELS}, or 0 for none, got {module.augment_dim}")
    taps = module.resample_filter
    if not taps or len(taps) % 2 or sum(taps) == 0:
        raise ValueError(
            f"model.resample_filter needs an even number of taps of a sum other than 0, got {taps}"
        )
    encoder, decoder = module.layers(image_shape[:2])
    for width in sorted({M} | {w for layer in encoder + decoder for w in layer[2:4]}):
        if width < 4 or width % groups(width):
            raise ValueError(
                f"model.model_channels ({M}) and model.channel_mult {mult} give a layer of {width} "
                f"channels, which do not divide into {max(groups(width), 1)} equal groups"
            )
    return module
