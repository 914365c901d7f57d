"""What lies around a job and changes its numbers: settings of jax, its version, the device.

jax takes its settings from variables of the shell too, where a recipe for another program may have
left them. Those that the numbers of this project rest on are pinned, the others are recorded.
"""

import logging
import os

import jax

# Setting -> its value here, and what rests on it.
PINNED = {
    "jax_default_prng_impl": ("threefry2x32", "an image depends on the seed and its number alone"),
    "jax_threefry_partitionable": (True, "draws do not depend on the number of devices"),
    "jax_random_seed_offset": (0, "a seed is what the option says"),
    "jax_enable_x64": (False, "parameters and optimizer are float32"),
    "jax_numpy_dtype_promotion": ("standard", "the code is written for it"),
    "jax_numpy_rank_promotion": ("allow", "the code is written for it"),
    "jax_legacy_prng_key": ("allow", "libraries use such keys"),
    "jax_softmax_custom_jvp": (False, "the JVP of attention is that of its formula"),
    "jax_transfer_guard": ("allow", "images and metrics are fetched"),
    "jax_transfer_guard_host_to_device": ("allow", "images and metrics are fetched"),
    "jax_transfer_guard_device_to_device": ("allow", "images and metrics are fetched"),
    "jax_transfer_guard_device_to_host": ("allow", "images and metrics are fetched"),
}
# Of what `describe` tells: what makes other numbers, not only other rounding.
MATTERS = ("generator", "partitionable", "seed_offset", "float64", "matmul_precision")


def pin():
    """Sets jax as this project needs it, before anything is computed; says what that overrules."""
    for name, (value, reason) in PINNED.items():
        found = getattr(jax.config, name, value)  # another version may not have it
        if found not in (value, None):
            jax.config.update(name, value)
            logging.warning("%s=%s is not used, but %s: %s", name.upper(), found, value, reason)


def describe():
    """What the numbers of this process depend on beside options and data: a dict for JSON."""
    return {
        "generator": str(jax.config.jax_default_prng_impl),
        "partitionable": bool(getattr(jax.config, "jax_threefry_partitionable", True)),
        "seed_offset": int(getattr(jax.config, "jax_random_seed_offset", 0)),
        "float64": bool(jax.config.jax_enable_x64),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "tf32_override": os.environ.get("NVIDIA_TF32_OVERRIDE", ""),
    }
