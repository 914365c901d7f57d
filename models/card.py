"""What is fastest on the card at hand, where the options leave it open.

Asked only while a function is traced: by then the processes of a run have found each other, and
asking for a device harms nobody.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

# The own kernel for the tangent of attention (models/attention_kernel.py) compiles for cards and is
# right where it is interpreted, but has not run on one: `python -m benchmarks check` does.
TANGENT_KERNEL = False
COMPUTED = 19  # what a block of DiT computes, in the size of its input
SHARE = 0.75  # of a card's memory that this may take, in all blocks, so that all of it is kept

_absent = None  # platform, memory and number of devices that are compiled for


def compile_for(platform, memory, count):
    """From here on all is as is best for so many devices of so many bytes, which are not there."""
    global _absent
    _absent = platform, memory, count


def platform():
    """`gpu`, `tpu` or `cpu`."""
    return _absent[0] if _absent else jax.default_backend()


def memory():
    """Bytes of the first device that this process may use."""
    if _absent:
        return _absent[1]
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def count():
    """Devices of all processes."""
    return _absent[2] if _absent else jax.device_count()


def fused_attention(wanted, dtype):
    """Whether attention takes the kernels of an NVIDIA card, which are for half precision.

    Args:
      wanted: True, or None where it is left open.
    """
    if wanted is None:
        wanted = platform() == "gpu"
    return wanted and dtype == jnp.bfloat16


def unroll(depth, differentiated):
    """Blocks per iteration of the loop over them: all, or one.

    On a GPU the loop copies what the backward pass needs into stacks and out again, a tenth of a
    step. Unrolled, a step takes up to three times as long to compile.
    """
    return depth if differentiated and platform() == "gpu" else 1


def remat(block, kept, xs, depth, loop):
    """The class of a block, as `nn.scan` is to take it.

    In a loop the backward pass computes again what it does not find. Without one XLA sees that it
    has computed it before, and keeps that. On a card with memory for it, this is fastest, and the
    block is left as it is (what `nn.remat` marks as kept would stand between a product and the
    GELU that a card's products can take along); without, XLA is kept from it.

    Args:
      kept: a policy of `jax.checkpoint`, what the backward pass is to find; None: nothing.
      xs: the inputs of the first block, (B, N, D) each.
      depth: blocks of the network in all.
      loop: whether they are looped over.
    """
    if platform() != "gpu" or loop:
        return nn.remat(block, prevent_cse=False, policy=kept)
    computed = COMPUTED * depth * sum(x.size * x.dtype.itemsize for x in xs) / count()
    if kept and computed <= SHARE * memory():
        return block
    return nn.remat(block, prevent_cse=True, policy=kept)


def compiler_options(mesh):
    """For `jax.jit` of a train step on the devices of a mesh."""
    if mesh.devices.flat[0].platform in ("gpu", "cuda"):
        return {
            # XLA would leave out the rounding to bfloat16 between two operations, and so keep in
            # float32, at twice the bytes, what is meant to be kept in bfloat16.
            "xla_allow_excess_precision": False,
            # cuBLAS adds the bias and takes the GELU at the end of a product; Triton's products
            # leave both to kernels of their own, and take three times as long to compile.
            "xla_gpu_enable_triton_gemm": False,
            # Nor are the products of q, k and v made one, to be copied apart for the attention.
            "xla_gpu_dot_merger_threshold_mb": 0,
        }
    return {}
