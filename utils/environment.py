"""What lies around a job and changes its numbers: settings of jax, its version, the device.

jax takes its settings from variables of the shell too, where a recipe for another program may have
left them. Those that the numbers of this project rest on are pinned, the others are recorded.
"""

import contextlib
import importlib.metadata
import logging
import os
import re
from pathlib import Path

import jax

# Setting -> its value here, and what rests on it.
PINNED = {
    "jax_default_prng_impl": ("threefry2x32", "noise depends on the seed and its number alone"),
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

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
DEVICE_PACKAGES = ("jax", "libtpu", "nvidia-")  # what jax[tpu] and jax[cuda13] bring, by beginning


def pin():
    """Sets jax as this project needs it, before anything is computed; says what that overrules."""
    for name, (value, reason) in PINNED.items():
        now = _setting(name)
        if now not in (value, None):
            jax.config.update(name, value)
            logging.warning("%s=%s is not used, but %s: %s", name.upper(), now, value, reason)


@contextlib.contextmanager
def pinned():
    """Has jax as `pin` sets it, and no mesh, within a block; the process's own settings stay.

    Within a trace (`jax.jit`, `jax.grad`) a mesh of the process stays too: jax takes none away.
    """
    with contextlib.ExitStack() as stack:
        for name, (value, _) in PINNED.items():
            if _setting(name) not in (value, None):
                stack.enter_context(_switched(name, value))
        if not jax.sharding.get_abstract_mesh().empty:
            with contextlib.suppress(ValueError):  # within a trace
                stack.enter_context(jax.set_mesh(None))
        yield


def _setting(name):
    return getattr(jax.config, name, PINNED[name][0])  # another version may not have it


@contextlib.contextmanager
def _switched(name, value):
    own = getattr(jax, name.removeprefix("jax_"), None)  # of this thread alone; most have one
    if own is not None:
        with own(value):
            yield
        return
    before = _setting(name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def describe():
    """Tells what numbers depend on beside options and data, as a dict for JSON."""
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


def installed():
    """Returns the versions at work, {name: version}: of the packages that requirements.txt
    names, of all that these need in turn, and of what makes jax run on the devices."""
    # Each time that a distribution is asked for its metadata it reads the file.
    files = [versions.metadata for versions in importlib.metadata.distributions()]
    packages = {normal(metadata["Name"]): metadata for metadata in files if metadata["Name"]}
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    waiting = [line for line in lines if line and not line.startswith("#")]
    waiting += [name for name in packages if name.startswith(DEVICE_PACKAGES)]
    versions = {}
    while waiting:
        name = normal(re.match(r"[\w.-]+", waiting.pop())[0])
        if name in versions or name not in packages:  # one for other systems
            continue
        versions[name] = packages[name]["Version"]
        needs = packages[name].get_all("Requires-Dist", ())
        waiting += [line for line in needs if "extra ==" not in line]
    return dict(sorted(versions.items()))


def normal(name):
    """Spells a package's name as names are compared (packaging.python.org, PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
