"""The device mesh, and how arrays lie on it.

One mesh with the axes `data` and `fsdp`. A batch is split over all devices; parameters, averages
and optimizer are split over `fsdp` and copied along `data`. Devices are ordered by process, so row
block p of a global batch belongs to process p.
"""

import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

SMALLEST_SHARDED = 2**14  # elements; below, a copy costs less than gathering the shards
SUBLANES = 8  # rows of a tile in a TPU's memory
NEIGHBOURS = {"tpu": 16, "gpu": 8, "cuda": 8}  # devices that are quick to exchange, by platform
NOWHERE = AbstractMesh((1, 1), ("data", "fsdp"))  # a mesh for shapes alone, of no devices


def make_mesh(fsdp, devices=None):
    """Makes a mesh (data, fsdp) over `devices` (default: all devices of all processes).

    Args:
      fsdp: 0: see `best_fsdp`.

    Raises:
      ValueError: the devices cannot be divided into groups of `fsdp`.
    """
    devices = jax.devices() if devices is None else list(devices)
    fsdp = best_fsdp(devices) if fsdp == 0 else fsdp
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(
            f"mesh.fsdp: {len(devices)} devices cannot be divided into groups of {fsdp}; "
            "choose a divisor"
        )
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices).reshape(-1, fsdp), ("data", "fsdp"))


def best_fsdp(devices):
    """Returns over how many devices to split parameters where that is left open.

    All neighbours, on accelerators: they exchange about as much (gradients summed in parts and
    weights gathered, instead of gradients summed for each), and each reads and keeps only its part
    of averages and optimizer. CPU devices share one memory: 1.
    """
    return math.gcd(len(devices), NEIGHBOURS.get(devices[0].platform, 1))


def check_batch(name, size, mesh):
    """Raises ValueError where a global batch cannot be divided equally over the devices."""
    if size < 1 or size % mesh.size:
        raise ValueError(
            f"{name}: {size} rows cannot be divided over {mesh.size} devices; "
            f"choose a multiple of {mesh.size}"
        )


def replicated(mesh):
    """Returns the sharding of a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh):
    """Returns the sharding that splits the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def by_parameter(mesh, shapes):
    """Returns shardings for a tree of parameters, or of anything shaped like them.

    A kernel is split over `fsdp` along the axis before its last: gathered, it then lies in memory
    as products take it, where parts of rows would have to be copied into their place. Other arrays
    are split along their longest axis that can be divided; small ones are copied.

    Args:
      shapes: a tree of arrays or `ShapeDtypeStruct`.
    """
    fsdp = mesh.shape["fsdp"]

    def sharding(x):
        axes = [axis for axis, size in enumerate(x.shape) if size % fsdp == 0]
        if fsdp == 1 or not axes or np.prod(x.shape) < SMALLEST_SHARDED:
            return replicated(mesh)
        split = len(x.shape) - 2
        if split < 0 or x.shape[split] % (SUBLANES * fsdp):
            split = max(axes, key=lambda axis: x.shape[axis])
        spec = [None] * len(x.shape)
        spec[split] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, shapes)


def gather(mesh):
    """Makes a function that brings a tree of parameters together: whole on every device.

    Their gradient is split again as `by_parameter` says. Used before the products, so that these
    are split by row alone: left to itself the compiler splits them by features too where the
    parameters are, and sends activations back and forth.
    """

    @jax.custom_vjp
    def whole(tree):
        # Split where they are rounded too: on GPUs XLA would gather them in float32 and then round.
        tree = jax.lax.with_sharding_constraint(tree, by_parameter(mesh, tree))
        return jax.lax.with_sharding_constraint(tree, replicated(mesh))

    def forward(tree):
        return whole(tree), None

    def backward(_, grads):
        return (jax.lax.with_sharding_constraint(grads, by_parameter(mesh, grads)),)

    whole.defvjp(forward, backward)
    return whole


def to_global(mesh, batch):
    """Turns a tree of this process's rows (numpy) into global arrays, split by row."""
    sharding = by_row(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def place(tree, shardings):
    """Places a tree of host arrays, equal on all processes: global arrays of these shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(
            np.shape(x), sharding, lambda index: np.asarray(x)[index]
        ),
        tree,
        shardings,
    )


def place_everywhere(mesh, tree):
    """Places a tree of host arrays, equal on all processes: a copy on every device."""
    return place(tree, jax.tree.map(lambda x: replicated(mesh), tree))


def on_host(leaves):
    """Returns arrays as numpy's without copying them, where CPUs hold all of them; else None.

    They stay as they are when the array on the device is given away (donated).
    """

    def here(x):
        if not isinstance(x, jax.Array):
            return True
        on_cpu = all(device.platform == "cpu" for device in x.sharding.device_set)
        return on_cpu and (x.is_fully_addressable or x.is_fully_replicated)

    return [np.asarray(x) for x in leaves] if all(map(here, leaves)) else None


def hold_back(mesh, tree):
    """Waits for a tree of arrays where there are several CPU devices; elsewhere does nothing.

    To be called before each step of a loop: CPU devices wait for each other on the threads of one
    small pool, which a queue of steps would fill, so that they would wait for ever.
    """
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(tree)


def with_shardings(shapes, shardings):
    """Gives a tree of `ShapeDtypeStruct` its shardings, as orbax wants to restore into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
