"""Chooses how long XLA may compile on a CPU, and where compiled programs are kept.

What is chosen for the train step on cards and TPUs stands in models/hardware.py.
"""

import os
import zlib
from pathlib import Path

import jax

SMALL = 10**7  # parameters
PROCESSOR = Path("/proc/cpuinfo")


def quick(mesh):
    """Returns XLA's options for programs that run seldom, and for steps of small networks.

    On a CPU they compile in half the time then. A step of the digits takes as long as ever, one
    with 10^8 parameters a fifth longer.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return {}
    options = {"xla_backend_optimization_level": 1}
    if jax.__version_info__ < (0, 11):  # later ones have lost the choice
        options["xla_cpu_use_fusion_emitters"] = False
    own = os.environ.get("XLA_FLAGS", "")  # what the user sets there counts
    return {name: value for name, value in options.items() if name not in own}


def is_small(params):
    """Tells whether the network of a tree of parameters, or of their shapes, is small."""
    return sum(x.size for x in jax.tree.leaves(params)) < SMALL


def keep(folder):
    """Keeps compiled programs in a folder, so that a restarted run need not wait for them.

    A folder that the user gives jax (JAX_COMPILATION_CACHE_DIR) comes first. What is compiled for
    one CPU may not run on the next, so each kind has a folder of its own, where it can be told.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    if jax.default_backend() == "cpu":
        if not (kind := cpu()):
            return
        folder = folder / kind
    jax.config.update("jax_compilation_cache_dir", str(folder))


def cpu():
    """Returns a digest of the CPU's name and instructions; "" where the system does not tell."""
    if not PROCESSOR.exists():
        return ""
    lines = PROCESSOR.read_text().split("\n\n")[0].splitlines()  # of its first core
    told = ("vendor", "model", "cpu family", "stepping", "flags", "CPU ", "Features")
    text = "".join(line for line in lines if line.startswith(told))
    return f"cpu-{zlib.crc32(text.encode()):08x}"
