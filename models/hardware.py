"""Chooses what is fastest on the GPU, TPU or CPU at hand, where the options leave it open.

Asked only while a function is traced: by then the processes of a run have found each other, and
asking for a device harms nobody.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from utils import compiling

# The own kernel for the tangent of attention (models/attention_kernel.py) compiles for cards and is
# right where it is interpreted, but has not run on one: `python -m benchmarks check` does.
TANGENT_KERNEL = False
WIDE = 768  # from where on a CPU loops over no blocks; of 128 and 256 a loop is faster
LANES = 128  # numbers side by side in a register of a TPU
# In which passes images lie side by side in attention on chips whose units multiply 256 x 256: in
# those with a tangent, or in the others. On other TPUs in all.
SIDE_BY_SIDE = {"TPU v6 lite": True, "TPU v6e": True, "TPU7x": False}
COMPUTED = 19  # what a block of DiT computes, in the size of its input
SHARE = 0.75  # of a device's memory that this may take, in all blocks, so that all of it is saved

_absent = None  # platform, memory, number and kind of the devices that are compiled for


def compile_for(platform, memory, count, kind):
    """Makes the choices below for this hardware, which need not be attached.

    Args:
      platform: as of `platform`.
      memory: bytes of a device.
      count: devices.
      kind: jax's name of one of them.
    """
    global _absent
    _absent = platform, memory, count, kind


def platform():
    """Returns `gpu`, `tpu` or `cpu`."""
    return _absent[0] if _absent else jax.default_backend()


def memory():
    """Returns the bytes of the first device that this process may use; 0: not known."""
    if _absent:
        return _absent[1]
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def count():
    """Counts the devices of all processes."""
    return _absent[2] if _absent else jax.device_count()


def kind():
    """Returns jax's name of a device."""
    return _absent[3] if _absent else jax.local_devices()[0].device_kind


def fused_attention(wanted, dtype):
    """Decides whether attention takes the kernels of an NVIDIA card, which want half precision.

    Args:
      wanted: True, or None where it is left open.
    """
    if wanted is None:
        wanted = platform() == "gpu"
    return wanted and dtype == jnp.bfloat16


def images_in_lanes(rows, tokens, in_jvp):
    """Counts the images of which attention takes the tokens as those of one, each for itself.

    Side by side in the lanes of a TPU, the tokens of one image would leave some empty, and so would
    the features of a head, which is what XLA puts there otherwise, with copies around attention.

    Args:
      rows: images in all.
      tokens: of each.
      in_jvp: whether the pass has a tangent.
    """
    images = LANES // tokens if platform() == "tpu" else 1
    if images < 2 or rows % (images * count()):
        return 1
    return images if SIDE_BY_SIDE.get(kind(), in_jvp) == in_jvp else 1


def unroll(depth, in_jvp, width=0):
    """Chooses how many blocks an iteration of the loop over them has: all, or one.

    The loop copies what the backward pass needs into stacks and out again: a tenth of a step on a
    GPU, where unrolled it takes up to three times as long to compile. On a TPU it is a fifth, but
    compiling grows by each block (docs/speed.md), so there it is left to `model.unroll`. On a CPU
    it is a tenth of a step of B/4, which makes up for compiling within twenty steps; narrow blocks
    are faster in a loop.
    """
    wide = platform() == "gpu" or (platform() == "cpu" and width >= WIDE)
    return depth if in_jvp and wide else 1


def remat(block, policy, xs, depth, loop):
    """Wraps the class of a block for `nn.scan`: what its backward pass computes again.

    In a loop the backward pass computes again what is not saved. Without one XLA sees that it has
    computed it before, and saves that. On an accelerator with memory for it, this is fastest, and
    the block is left as it is (what `nn.remat` marks as saved would stand between a product and the
    GELU that a GPU's products can take along); else `prevent_cse` forbids it.

    Args:
      policy: of `jax.checkpoint`: what is saved for the backward pass; None: nothing.
      xs: the inputs of the first block, (B, N, D) each.
      depth: blocks of the network in all.
      loop: whether they are looped over.
    """
    if platform() == "cpu" or loop:
        return nn.remat(block, prevent_cse=False, policy=policy)
    computed = COMPUTED * depth * sum(x.size * x.dtype.itemsize for x in xs) / count()
    if policy and computed <= SHARE * memory():
        return block
    return nn.remat(block, prevent_cse=True, policy=policy)


def norm(tree, small):
    """Computes the norm of a tree of arrays, float32 ().

    The arrays of a small network are joined first on a CPU, where XLA compiles the sum of each
    apart: half of what the norms of a step take to compile and to compute.
    """
    if small and platform() == "cpu" and count() == 1:
        tree = jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    return optax.tree.norm(tree)


def compiler_options(mesh, small=False):
    """Returns XLA's options for a train step on the devices of a mesh.

    Args:
      small: whether the network is, see utils/compiling.py.
    """
    kind = mesh.devices.flat[0].platform
    if kind == "tpu":
        # XLA would cut a product whose sum is scattered into pieces of a few rows, each sent while
        # the next is computed, and pieces fill no unit: cycles of B/4 on 16 chips 62.9 to 40.6.
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
    if kind in ("gpu", "cuda"):
        return {
            # XLA would leave out the rounding to bfloat16 between two operations, and so store in
            # float32, at twice the bytes, what is meant for bfloat16.
            "xla_allow_excess_precision": False,
            # cuBLAS adds the bias and takes the GELU at the end of a product; Triton's products
            # leave both to kernels of their own, and take three times as long to compile.
            "xla_gpu_enable_triton_gemm": False,
            # Nor are the products of q, k and v made one, to be copied apart for the attention.
            "xla_gpu_dot_merger_threshold_mb": 0,
        }
    return compiling.quick(mesh) if small else {}
