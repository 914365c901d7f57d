"""What a train step needs in FLOPs, by hand, and what chips offer; so MFU = needed / offered.

Builds on models/meanflow.py.
"""

from typing import NamedTuple

from models import meanflow


class Chip(NamedTuple):
    """One device as jax counts them."""

    name: str
    peak: float  # FLOP/s, dense bfloat16 products with float32 sums
    memory: float  # bytes


# The first whose key begins `device_kind`; figures of the makers' data sheets.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * 2**30),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * 2**30),
    "TPU v5": Chip("v5p", 459e12, 95 * 2**30),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * 2**30),
    "NVIDIA A100-SXM4-40GB": Chip("A100", 312e12, 40 * 2**30),
    "NVIDIA A100": Chip("A100", 312e12, 80 * 2**30),
    "NVIDIA H100": Chip("H100", 989e12, 80 * 2**30),
    "NVIDIA H200": Chip("H200", 989e12, 141 * 2**30),
}


def chip(device):
    """The `Chip` of a device, or None where it is not known."""
    return next((c for kind, c in CHIPS.items() if device.device_kind.startswith(kind)), None)


# FLOPs by hand --------------------------------------------------------------------------------


def forward_flops(net, image_shape):
    """FLOPs of the matrix products of one pass of a `dit.DiT` on one image of shape (h, w, c)."""
    height, width, channels = image_shape
    tokens = height * width // net.patch_size**2
    D, patch = net.hidden_size, net.patch_size**2 * channels
    block = tokens * (4 + 8) * D * D + 2 * tokens * tokens * D + 6 * D * D
    times = len(net.time_cond) * (256 * D + D * D)
    return 2 * (net.depth * block + times + 2 * tokens * patch * D + 2 * D * D)


def forward_passes(method, batch_size):
    """Forward passes F that a step takes, by row of the batch; a backward pass counts as two.

    4.5 for the published recipe, where a step without the shortcuts of `meanflow.loss` takes 6.
    """
    equal = meanflow.equal_count(batch_size, method.data_proportion)
    differ = batch_size - equal
    guidance = 0
    if method.guidance_eq == "cfg" and (method.omega, method.kappa) != (1.0, 0.0):
        guidance = batch_size + (differ if method.kappa else 0)
    return (guidance + 3 * equal + 4 * differ) / batch_size
