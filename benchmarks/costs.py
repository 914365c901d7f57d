"""What a train step costs: FLOPs by XLA, collectives, memory."""

import dataclasses
import json
import os
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import parts
import train
from configs import load_config
from models import network


def config_without_data(argv):
    """The config of a command line and the rest of it; needs no data and no reference."""
    unneeded = ["--config.dataset.root=none", "--config.fid.on_training=false"]
    return load_config.from_command_line([*unneeded, *argv])


# FLOPs by XLA ---------------------------------------------------------------------------------


def batch_shapes(config):
    """A batch of raw records of a config, as `ShapeDtypeStruct`s."""
    B, (h, w, c) = config.training.batch_size, parts.image_shape(config.dataset)
    batch = {"label": jax.ShapeDtypeStruct((B,), jnp.int32)}
    if config.dataset.vae == "none":
        return batch | {"image": jax.ShapeDtypeStruct((B, h, w, c), jnp.uint8)}
    moments = jax.ShapeDtypeStruct((B, h, w, 2 * c), jnp.float32)
    flipped = {"moments_flipped": moments} if config.dataset.use_flip else {}
    return batch | {"moments": moments} | flipped


def state_shapes(model, recipe):
    """A `train.TrainState` of `parts.Parts`, as `ShapeDtypeStruct`s."""
    init = partial(train.init_state, recipe, model.module, model.image_shape)
    return jax.eval_shape(init, jax.random.key(0))


def frozen_shapes(model):
    """Returns the parameters of the frozen networks of `parts.Parts` as `ShapeDtypeStruct`s."""
    return jax.eval_shape(partial(parts.load_frozen, model))


def counted_flops(step, *arguments):
    """FLOPs of a step over all devices, counted by XLA in the program that is handed to it.

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


def countable(recipe, model):
    """A recipe for `counted_flops`: its network without loops, its parameters where they are."""
    net = network.function(model.module.unrolled())
    return dataclasses.replace(recipe, net=net, gather=model.module.cast)


# Compiled programs ----------------------------------------------------------------------------

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "f64": 8}


def array_bytes(text):
    """Bytes of each array in the text of an XLA type, like `(f32[8,4]{1,0}, bf16[2])`."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    return [
        BYTES.get(kind, 4) * int(np.prod([int(n) for n in dims.split(",") if n]))
        for kind, dims in arrays
    ]


def computations(text):
    """The text of a compiled program -> {name of a computation: its lines}, and the main one."""
    found, main, name = {}, None, None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name = header.group(2)
            found[name] = []
            main = name if header.group(1) else main
        elif line == "}":
            name = None
        elif name:
            found[name].append(line)
    return found, main


def collectives(text):
    """Exchanges between the devices in the text of a compiled program.

    Returns:
      {kind: (how often, bytes)} of one run, per device; bytes are those of the results. The body
      of a loop counts as often as the loop runs.
    """
    found, main = computations(text)
    totals, seen = {}, set()

    def visit(name, times):
        for line in found.get(name, []):
            operation = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([\w-]+)\(", line)
            if not operation:
                continue
            result, kind = operation.groups()
            started = kind.endswith("-start")
            kind = kind.removesuffix("-start")
            # One exchange may be cut into pieces, to go on beside other work: all of one channel.
            channel = re.search(r"channel_id=(\d+)", line)
            known = channel and channel.group(1) in seen
            if kind in COLLECTIVES and not known:
                sizes = array_bytes(result)
                count, size = totals.get(kind, (0, 0))
                # What is started holds operand and result, and the result is not the smaller one.
                size += times * (max(sizes) if started else sum(sizes))
                totals[kind] = (count + times, size)
                seen.update(channel.groups() if channel else ())
            inner = times
            if kind == "while":
                inner *= trip_count(found[re.search(r"condition=%?([\w.-]+)", line).group(1)])
            for called in re.findall(r"(?:body|calls|called_computations=\{)=?%?([\w.-]+)", line):
                visit(called, inner)

    visit(main, 1)
    return totals


def trip_count(condition):
    """How often a loop with this condition runs: the bound that its counter is compared with."""
    bounds = [int(n) for n in re.findall(r"s32\[\][^=]* constant\((\d+)\)", "\n".join(condition))]
    return max(bounds, default=1)


def peak_bytes(compiled):
    """Bytes per device that a compiled function needs at most, arguments and results included.

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
