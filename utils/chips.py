"""What accelerators offer, by their makers' data sheets."""

from typing import NamedTuple


class Chip(NamedTuple):
    """An accelerator; `chip` gives the part of it that is one device of jax."""

    name: str
    peak: float  # FLOP/s, dense bfloat16 products with float32 sums
    memory: float  # bytes
    devices: int = 1  # of jax, where the device itself does not tell


V5E = Chip("v5e", 197e12, 16 * 2**30)
V5P = Chip("v5p", 459e12, 95 * 2**30)
V6E = Chip("v6e", 918e12, 32 * 2**30)
A100_40, A100_80 = (Chip("A100", 312e12, size * 2**30) for size in (40, 80))
H200 = Chip("H200", 989e12, 141 * 2**30)

# By the whole of `device_kind`: a card of almost the same name has other rates, and a slice of one
# (MIG) a part of them. One that is not named here has no MFU.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * 2**30),
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU7x": Chip("7x", 2307e12, 192 * 2**30, devices=2),
    "NVIDIA A100-SXM4-40GB": A100_40,
    "NVIDIA A100-PCIE-40GB": A100_40,
    "NVIDIA A100-SXM4-80GB": A100_80,
    "NVIDIA A100-PCIE-80GB": A100_80,
    "NVIDIA A100 80GB PCIe": A100_80,
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80 * 2**30),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 80 * 2**30),
    "NVIDIA H100 NVL": Chip("H100 NVL", 835e12, 94 * 2**30),
    "NVIDIA H200": H200,
    "NVIDIA H200 141GB HBM3e": H200,
    "NVIDIA H200 NVL": Chip("H200 NVL", 835e12, 141 * 2**30),
    "NVIDIA GH200 480GB": Chip("GH200", 989e12, 96 * 2**30),
    "NVIDIA B200": Chip("B200", 2250e12, 180 * 2**30),
}


def chip(device, devices=()):
    """Returns the `Chip` that is one device of jax, or None where it is not known.

    Args:
      devices: all devices. Where two cores of a chip are two of them, as those of a v4 when
        compiled ahead and always those of a TPU7x, each has half of the chip.
    """
    whole = CHIPS.get(device.device_kind)
    if whole is None:
        return None
    place = getattr(device, "coords", None)
    parts = sum(getattr(other, "coords", None) == place for other in devices if place is not None)
    parts = max(parts, whole.devices)
    return whole._replace(peak=whole.peak / parts, memory=whole.memory / parts, devices=1)
