"""The backbone of improved MeanFlow (arXiv 2512.02012): conditions as tokens, two heads.

A trunk of blocks (models/imf_blocks.py) feeds two stacks of `aux_head_depth` blocks: one gives the
average velocity u, the other the instantaneous velocity v, which only training needs. Images are
NHWC. The blocks of each of the three stacks are one scanned module, see models/dit.py.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import conditions, hardware, layers
from models.dit import FREQUENCIES, KERNEL_OPTIONS, unpatchify
from models.imf_blocks import CONSTANTS, NUM_PREFIX, Block, Embedding, FinalLayer, mlp_size
from models.network import Network, Velocity, sides, sizes_of
from utils.conditions import Condition


class ImfDiT(Network):
    """The average velocity u(z, h, omega, t_min, t_max, y), and v; t itself is not asked for.

    The head of v is there where the parameters hold it, so that a network without one, smaller by
    a third, is sampled from as it is. Conditions that it does not get are constant: no guidance.

    Attributes:
      depth, hidden_size, num_heads, patch_size: the size; a pass through trunk and one head
        crosses `depth` blocks.
      aux_head_depth: blocks of each head.
      num_classes: labels are 0..num_classes-1, and num_classes is the null label.
      predicts_v: whether fresh parameters have a head of v.
      dtype, unroll, remat, fused_attention, half_residual, given: as in models/dit.py.
    """

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int | tuple[int, int]
    aux_head_depth: int
    num_classes: int
    predicts_v: bool = True
    dtype: jnp.dtype = jnp.float32
    unroll: int = 1
    remat: bool = False
    fused_attention: bool | None = False
    half_residual: bool = False
    given: tuple[Condition, ...] = ()

    conditions = tuple(CONSTANTS)
    kinds = ("vector", "tokens", "array")
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
    def patch_features(self):
        """Counts the features of a patch that conditions of its kind are added to."""
        return self.hidden_size

    @property
    def mlp_features(self):
        """Counts the hidden features of the MLP."""
        return mlp_size(self.hidden_size)

    @nn.compact
    def together(self, *batches, jvp=None, through=False):
        shape = batches[0][0].shape[1:]
        p, q = sides(self.patch_size)
        fused = hardware.fused_attention(self.fused_attention, self.dtype)
        unroll = self.unroll or hardware.unroll(self.depth, in_jvp=jvp is not None)
        grid = shape[0] // p, shape[1] // q
        embed = self.embedding(grid)
        residual = self.dtype if self.half_residual else jnp.float32
        embed_given = conditions.embedding(
            self.given, self.hidden_size, self.patch_features, (p, q), self.dtype
        )
        xs = [embed(z, c, embed_given(c)) for z, c in batches]
        if hardware.platform() == "gpu":  # a TPU's compiler moves more for it
            xs = map(layers.lying_in_order, xs)
        xs = tuple(x.astype(residual) for x in xs)
        fresh = self.predicts_v and self.is_initializing()
        both = fresh or self.has_variable("params", "v_blocks")
        in_all = self.depth + both * self.aux_head_depth
        policy = None if self.remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        block = hardware.remat(self.block, policy, xs, in_all, unroll < self.depth)

        size = self.hidden_size, self.num_heads
        before = conditions.num_tokens(self.given) + NUM_PREFIX

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
            final_layer = FinalLayer(p * q * shape[-1], self.dtype, name=f"{name}_final_layer")
            outs = [final_layer(x[:, before:]) for x in xs]
            return [unpatchify(x, (p, q), shape).astype(jnp.float32) for x in outs]

        xs, _ = stack(self.depth - self.aux_head_depth, "blocks")(xs)
        us = head("u", xs)
        vs = head("v", xs) if both else [None] * len(xs)
        return tuple(map(Velocity, us, vs))

    def serving(self, conditions, v):
        return self.clone(predicts_v=v)

    def cast(self, params):
        """Casts the kernels of the blocks to the type of their products, see models/dit.py."""

        def cast(path, p):
            return p.astype(self.dtype) if path[-1].key == "kernel" else p

        stacks = {name: params[name] for name in params if name in self.stacks}
        return params | jax.tree_util.tree_map_with_path(cast, stacks)

    def flops(self, image_shape, both=False):
        height, width, channels = image_shape
        area = math.prod(sides(self.patch_size))
        patches = height * width // area
        tokens = conditions.num_tokens(self.given) + NUM_PREFIX + patches
        D, patch = self.hidden_size, area * channels
        block = tokens * (4 * D + 3 * self.mlp_features) * D + 2 * tokens * tokens * D
        scalars = 4 * (FREQUENCIES * D + D * D)
        scalars += conditions.products(self.given, D, self.patch_features)
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
    """Builds an `ImfDiT` by name.

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
