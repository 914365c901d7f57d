"""What is fastest on the card at hand, where the options leave it open.

Asked only while a function is traced: by then the processes of a run have found each other, and
asking for a device harms nobody.
"""

import jax
import jax.numpy as jnp

# The own kernel for the tangent of attention (models/attention_kernel.py) compiles for cards and is
# right where it is interpreted, but has not run on one: `python -m scripts.measure check` does.
TANGENT_KERNEL = False
ROOMY = 100e9  # bytes of a card on which the largest networks are unrolled too
NARROW = 24 * 1024  # blocks times width of those that are unrolled on any card


def fused_attention(wanted, dtype):
    """Whether attention takes the kernels of an NVIDIA card, which are for half precision.

    Args:
      wanted: True, or None where it is left open.
    """
    if wanted is None:
        wanted = jax.default_backend() == "gpu"
    return wanted and dtype == jnp.bfloat16


def unroll(depth, hidden_size, differentiated):
    """Blocks per iteration of the loop over them: all, or one.

    On a GPU the loop copies what the backward pass needs into stacks and out again, a tenth of a
    step. Unrolled, a step takes half as much memory again and three times as long to compile.
    """
    if not differentiated or jax.default_backend() != "gpu":
        return 1
    return blocks_at_once(depth, hidden_size, memory())


def blocks_at_once(depth, hidden_size, memory):
    """The same on a GPU of so many bytes."""
    return depth if depth * hidden_size <= NARROW or memory >= ROOMY else 1


def memory():
    """Bytes of the first device that this process may use."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


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
        }
    return {}
