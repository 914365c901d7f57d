"""What a train step costs: FLOPs by XLA, collectives, memory."""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import parts
import train
from configs import load_config
from models import network
from utils import conditions


def config_without_data(argv):
    """Returns the config of a command line and the rest of it; needs no data and no reference."""
    unneeded = ["--config.dataset.root=none", "--config.fid.on_training=false"]
    return load_config.from_command_line([*unneeded, *argv])


# FLOPs by XLA ---------------------------------------------------------------------------------


def batch_shapes(config):
    """Returns a batch of raw records of a config, as `ShapeDtypeStruct`s."""
    B, (h, w, c) = config.training.batch_size, parts.image_shape(config.dataset)
    batch = {"label": jax.ShapeDtypeStruct((B,), jnp.int32)}
    for one in conditions.of_options(config.dataset, (h, w)):
        dtype = jnp.float32 if one.latent else one.dtype
        batch[one.feature] = jax.ShapeDtypeStruct((B, *one.shape), dtype)
    if config.dataset.vae == "none":
        key, dtype = (
            ("values", jnp.float32) if config.dataset.float_values else ("image", jnp.uint8)
        )
        return batch | {key: jax.ShapeDtypeStruct((B, h, w, c), dtype)}
    moments = jax.ShapeDtypeStruct((B, h, w, 2 * c), jnp.float32)
    flipped = {"moments_flipped": moments} if config.dataset.use_flip else {}
    return batch | {"moments": moments} | flipped


def state_shapes(made, recipe):
    """Returns a `train.TrainState` of `parts.Parts`, as `ShapeDtypeStruct`s."""
    init = partial(train.init_state, recipe, made.module, made.image_shape)
    return jax.eval_shape(init, jax.random.key(0))


def frozen_shapes(made):
    """Returns the parameters of the frozen networks of `parts.Parts` as `ShapeDtypeStruct`s."""
    return {name: frozen.shapes() for name, frozen in made.frozen.items()}


def counted_flops(step, *arguments):
    """Counts FLOPs of a step over all devices, by XLA, in the program that is handed to it.

    Args:
      step: pure, without shardings, and of a network without a loop (`Network.unrolled`), since
        XLA counts the body of a loop once.

    Returns:
      None where XLA does not tell: accelerators do not, so a CPU beside them is asked.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None
    with jax.default_device(cpu):
        counted = jax.jit(step).lower(*arguments).cost_analysis()
    return counted["flops"] if counted else None


def countable(recipe, made):
    """Returns a recipe for `counted_flops`: without loops, its parameters where they are."""
    net = network.function(made.module.unrolled())
    frozen = {name: frozen.unrolled or frozen.apply for name, frozen in made.frozen.items()}
    return dataclasses.replace(recipe, net=net, gather=made.module.cast, frozen=frozen)


def peak_bytes(compiled):
    """Returns the bytes per device that a compiled function needs, arguments and results included.

    None where the compiler does not tell.
    """
    m = compiled.memory_analysis()
    if m is None:
        return None
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.argument_size_in_bytes + results + m.temp_size_in_bytes


def check_writable(path):
    """Raises OSError, before anything is measured, where `path` (or None) cannot be written."""
    if path and not os.access(Path(path).parent, os.W_OK):
        raise OSError(f"--json={path}: there is no such folder, or it cannot be written to")


def write_json(path, results):
    """Writes the figures to `path`, or nowhere for None."""
    if path:
        Path(path).write_text(json.dumps(results, indent=1) + "\n")
