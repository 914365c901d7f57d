"""The backbone: a Diffusion Transformer (Peebles & Xie, arXiv 2212.09748) with two times.

`u(z, t, h, y)` is conditioned on the time `t`, on the length `h = t - r` of the interval over
which the velocity is averaged, and on a class label. Images are NHWC.

The blocks are one scanned module, so their parameters carry a leading axis of length `depth` and
the time to compile does not grow with the depth. Several batches can go through them side by side
(`DiT.together`), in one pass over the parameters.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import conditions, hardware, layers
from models.blocks import Block, layer_norm, modulate, xavier, zeros
from models.network import Network, Velocity, embed_labels, sides, sizes_of
from utils.conditions import Condition

FREQUENCIES = 256  # of the sinusoidal time embedding
MAX_PERIOD = 10000.0
normal = nn.initializers.normal(0.02)


def position_embedding(hidden_size, height, width):
    """Computes the sin-cos embedding of a grid of patches, float32 (height * width, hidden_size).

    The first half of the features encodes the column, the second half the row.
    """
    omega = MAX_PERIOD ** -(np.arange(hidden_size // 4) / (hidden_size / 4))  # (D/4,)

    def line(length):
        angle = np.arange(length)[:, None] * omega  # (length, D/4)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # (length, D/2)

    column = np.tile(line(width), (height, 1))
    row = np.repeat(line(height), width, axis=0)
    return np.concatenate([column, row], axis=1).astype(np.float32)


def patchify(x, size):
    """Cuts (B, h, w, C) into patches (B, N, p, q, C), row by row; `size`: p = q, or (p, q)."""
    (B, h, w, C), (p, q) = x.shape, sides(size)
    x = x.reshape(B, h // p, p, w // q, q, C).swapaxes(2, 3)  # (B, h/p, w/q, p, q, C)
    return x.reshape(B, (h // p) * (w // q), p, q, C)


def unpatchify(x, size, shape):
    """Joins patches (B, N, p q C) to (B, *shape) with `shape` = (h, w, C): the inverse."""
    B, (h, w, C), (p, q) = len(x), shape, sides(size)
    x = x.reshape(B, h // p, w // q, p, q, C).swapaxes(2, 3)  # (B, h/p, p, w/q, q, C)
    return x.reshape(B, h, w, C)


class TimeEmbedder(nn.Module):
    """A time in [0, 1], (B,) -> (B, D). In float32: its derivative enters the JVP."""

    hidden_size: int
    kernel_init: Callable = normal

    @nn.compact
    def __call__(self, t):
        half = FREQUENCIES // 2
        angle = t[:, None] * MAX_PERIOD ** -(np.arange(half, dtype=np.float32) / half)
        x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)  # (B, 256)
        dense = dict(features=self.hidden_size, kernel_init=self.kernel_init, precision="highest")
        x = nn.Dense(**dense, name="fc1")(x)
        return nn.Dense(**dense, name="fc2")(nn.silu(x))


GUIDANCE = ("omega", "t_min", "t_max")


def guidance_numbers(c):
    """Returns the guidance of c as it is embedded (arXiv 2512.02012): name -> (B,)."""
    numbers = {name: c[name] for name in GUIDANCE if name in c}
    if "omega" in c:
        numbers["omega"] = 1 - 1 / c["omega"]
    return numbers


class Linear(nn.Module):
    """A product in `dtype` over the last axes of x, float32 (B, N, D).

    Neither the result nor the bias is rounded to half precision: that would shift all rows alike,
    and their gradients, large and of all directions, have a small mean.
    """

    features: int
    kernel_init: Callable
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        axes = x.shape[2:]

        def flat(key, shape):  # one row for each number that comes in
            return self.kernel_init(key, (math.prod(axes), self.features)).reshape(shape)

        kernel = self.param("kernel", flat, (*axes, self.features))
        bias = self.param("bias", zeros, (self.features,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return jnp.tensordot(x, kernel, len(axes), preferred_element_type=jnp.float32) + bias


class FinalLayer(nn.Module):
    """(B, N, D) -> (B, N, features)."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, c):
        D = x.shape[-1]
        modulation = nn.Dense(2 * D, kernel_init=zeros, dtype=self.dtype, name="adaLN")(c)
        shift, scale = jnp.split(modulation, 2, axis=-1)
        x = modulate(layer_norm(x), shift, scale)
        return Linear(self.features, zeros, self.dtype, name="linear")(x)


class DiT(Network):
    """The average velocity u(z, t, h, y).

    Attributes:
      depth, hidden_size, num_heads, patch_size: the size of the transformer; a patch has one side,
        or (height, width).
      num_classes: labels are 0..num_classes-1, and num_classes is the null label.
      time_cond: which times are embedded, of `t`, `r` and `h = t - r` (Table 1c of the paper).
      conditions: what is embedded beside them, of GUIDANCE.
      given: conditions that come with the data, of `utils.conditions.Condition`.
      predicts_v: a second final layer, which gives the instantaneous velocity; where parameters
        hold none, v is None.
      dtype: of the matrix products; parameters stay float32. In float32 every operation is the
        plain one; in bfloat16 some have derivatives of their own, by which the tangent of a batch
        in a JVP (`together`) is not differentiated any further.
      unroll: blocks per iteration of the scan; 0: as models/hardware.py chooses.
      remat: save nothing of a block for the backward pass, and compute it there again.
      fused_attention: the attention kernels of an NVIDIA card, for bfloat16; None: where they are.
      half_residual: keep the residual stream in `dtype` too, not in float32.
    """

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int | tuple[int, int]
    num_classes: int
    time_cond: tuple[str, ...] = ("t", "h")
    dtype: jnp.dtype = jnp.float32
    unroll: int = 1
    remat: bool = False
    fused_attention: bool | None = False
    half_residual: bool = False
    conditions: tuple[str, ...] = ()
    predicts_v: bool = False
    given: tuple[Condition, ...] = ()

    kinds = ("vector", "tokens", "array")
    only_for_training = ("v_final_layer",)
    stacks = ("blocks",)
    label_table = "y_embedder/embedding"

    def __call__(self, z, c):
        return self.together((z, c))[0]

    @nn.compact
    def together(self, *batches, jvp=None, through=False):
        shape = h, w, C = batches[0][0].shape[1:]
        (p, q), D = sides(self.patch_size), self.hidden_size

        # The kernel has the shape of the convolution it stands for, (p, q, C, D).
        x_embedder = Linear(D, xavier, self.dtype, name="x_embedder")
        embedded = (*self.time_cond, *self.conditions)
        embedders = {name: TimeEmbedder(D, name=f"{name}_embedder") for name in embedded}
        y_embedder = nn.Embed(self.num_classes + 1, D, embedding_init=normal, name="y_embedder")
        embed_given = conditions.embedding(self.given, D, D, (p, q), self.dtype)
        residual = self.dtype if self.half_residual else jnp.float32

        def embed(z, c):
            given = embed_given(c)
            x = given.on_patches(x_embedder(patchify(z, (p, q))))  # (B, N, D)
            numbers = {"t": c["t"], "r": c["t"] - c["h"], "h": c["h"], **guidance_numbers(c)}
            vector = sum(embedder(numbers[name]) for name, embedder in embedders.items())
            vector = given.on_vector(vector + embed_labels(y_embedder, c["y"]))  # (B, D)
            x = given.before(x + position_embedding(D, h // p, w // q))
            # each adaLN begins with silu
            return x.astype(residual), nn.silu(vector)

        xs, cs = zip(*[embed(*batch) for batch in batches], strict=True)
        fused = hardware.fused_attention(self.fused_attention, self.dtype)
        unroll = self.unroll or hardware.unroll(self.depth, jvp is not None, D)
        # Only the products with parameters are saved for the backward pass; what lies between them
        # (norms, activations, attention weights) takes more memory than time to compute again.
        policies = jax.checkpoint_policies
        policy = policies.dots_with_no_batch_dims_saveable
        if self.dtype != jnp.float32:
            # with the bias: it is not added again
            policy = policies.save_only_these_names(layers.SAVED)
        blocks = nn.scan(
            hardware.remat(
                Block, None if self.remat else policy, xs, self.depth, unroll < self.depth
            ),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=unroll,
        )(D, self.num_heads, self.dtype, fused, jvp, through, name="blocks")
        xs, _ = blocks(xs, cs)
        before = conditions.num_tokens(self.given)
        xs = [x[:, before:] for x in xs] if before else xs

        def images(name):
            final_layer = FinalLayer(p * q * C, self.dtype, name=name)
            outs = [final_layer(x, c) for x, c in zip(xs, cs, strict=True)]
            return [unpatchify(x, (p, q), shape).astype(jnp.float32) for x in outs]

        us, vs = images("final_layer"), [None] * len(xs)
        if (
            self.predicts_v
            and self.is_initializing()
            or self.has_variable("params", "v_final_layer")
        ):
            vs = images("v_final_layer")
        return tuple(map(Velocity, us, vs))

    def serving(self, conditions, v):
        known = tuple(name for name in conditions if name in GUIDANCE)
        return self.clone(conditions=known, predicts_v=v)

    def cast(self, params):
        """Casts the blocks to the type of their products.

        In half precision their copies, the gradients of the blocks and what `fsdp` exchanges take
        half the bytes.
        """
        return params | {"blocks": jax.tree.map(lambda p: p.astype(self.dtype), params["blocks"])}

    @property
    def takes_t(self):
        return self.time_cond != ("h",)

    def flops(self, image_shape, both=False):
        height, width, channels = image_shape
        area = math.prod(sides(self.patch_size))
        tokens, D, patch = height * width // area, self.hidden_size, area * channels
        long = tokens + conditions.num_tokens(self.given)
        block = long * (4 + 8) * D * D + 2 * long * long * D + 6 * D * D
        times = len(self.time_cond + self.conditions) * (FREQUENCIES * D + D * D)
        final = tokens * patch * D + 2 * D * D
        times += conditions.products(self.given, D, D)
        return 2 * (self.depth * block + times + tokens * patch * D + (1 + both) * final)

    def unrolled(self):
        return self.clone(unroll=self.depth, fused_attention=False)


# depth, hidden_size, num_heads
SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "M": (16, 1024, 16),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
NAMES = {
    f"DiT_{size}_{p}": dict(depth=depth, hidden_size=width, num_heads=heads, patch_size=p)
    for size, (depth, width, heads) in SIZES.items()
    for p in (2, 4, 8)
}
NAMES["DiT"] = {}  # all four sizes are options
SIZE_OPTIONS = ("depth", "hidden_size", "num_heads", "patch_size")
KERNEL_OPTIONS = ("unroll", "remat", "fused_attention", "half_residual")
OPTIONS = (*SIZE_OPTIONS, "time_cond", *KERNEL_OPTIONS)


def build(cls, *, image_shape, num_classes, dtype, time_cond, **options):
    """Builds a `DiT` by name.

    Args:
      cls: of NAMES.
      image_shape: (h, w, c) of z; h and w a multiple of the patch size.
      options: the others of OPTIONS; a size that is 0 is that of `cls`.

    Raises:
      ValueError: a missing size, or sizes that do not fit together.
    """
    options |= sizes_of(cls, NAMES[cls], SIZE_OPTIONS, options, image_shape)
    D, heads = options["hidden_size"], options["num_heads"]
    if D % heads or D % 4:
        raise ValueError(
            f"model.hidden_size ({D}) must be a multiple of 4 and of model.num_heads ({heads})"
        )
    time_cond = tuple(name.strip() for name in time_cond.split(","))
    if time_cond not in (("t", "r"), ("t", "h"), ("t", "r", "h"), ("h",)):
        raise ValueError(
            f"model.time_cond is one of t,r | t,h | t,r,h | h, not {','.join(time_cond)!r}"
        )
    if options["half_residual"] is None:
        options["half_residual"] = dtype == jnp.bfloat16
    return DiT(**options, num_classes=num_classes, time_cond=time_cond, dtype=dtype)
