"""What accelerators offer, by their makers' data sheets."""

from typing import NamedTuple


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
