"""Compiles a config for accelerators that are not at hand: does it fit, and what does it cost?

    python -m benchmarks compile --config=configs/load_config.py:NAME --topology v5e:4x4
    python -m benchmarks compile --config=configs/load_config.py:NAME --topology h200

Options of the config follow as for main.py (`--config.mesh.fsdp=16`). What is compiled is the train
step of train.py and the evaluation step, as they would run on every chip; nothing is run. For a TPU
slice (v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4, tpu7x:2x2x1; requirements-tpu-compile.txt) it tells
the cycles that the compiler expects, by part of the step (benchmarks/cycles.py). For NVIDIA cards
(h100, h200, h200:8; `pip install "jax[cuda13]"`, Python 3.12) the kernels are counted, and their
time is predicted, to about a tenth. `--against FILE` shows the change from figures that `--json
FILE` wrote. Exit status: 0 all fits, 1 it does not, 2 wrong options.
"""

import json
import os
import re
import time
from functools import partial
from pathlib import Path

import jax
from jax.experimental import topologies

import parts
import train
from benchmarks import costs, cycles, gpu_target, hlo, program, stand_ins
from models import hardware
from utils import chips, files, sharding

# The compiler would otherwise ask the machine for its TPU.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # nobody else is kept from compiling
}


def add_arguments(parser):
    """Adds the options of `run`."""
    parser.add_argument("--topology", required=True, help="like v5e:4x4, h200 or h200:8")
    parser.add_argument("--steps", nargs="+", choices=["train", "eval"], default=["train", "eval"])
    parser.add_argument("--against", help="a file of --json, to show the change from")


def devices_of(topology):
    """Returns the devices of a topology by its name.

    Raises:
      ValueError: no compiler for it, or no such topology.
    """
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    try:
        if gpu_target.is_card(topology):
            gpu_target.believe()
            return gpu_target.devices(topology)
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # jax and its compilers raise several kinds
        raise ValueError(
            f"--topology {topology}: {files.first_line(error)} (topologies are named like "
            "v4:2x2x4, v5e:4x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1, for which libtpu is in "
            "requirements-tpu-compile.txt, and h100, h200, h200:8, for which pip install "
            '"jax[cuda13]")'
        ) from error


def train_step(config, made):
    """Returns the jitted step of training, the shapes of its arguments, and FLOPs per chip."""
    mesh, key = made.mesh, jax.random.key(config.training.seed)
    sharding.check_batch("training.batch_size", config.training.batch_size, mesh)
    recipe, _ = train.make_recipe(config.training, made, 1)
    state, batch = costs.state_shapes(made, recipe), costs.batch_shapes(config)
    frozen = costs.frozen_shapes(made)
    step = train.make_step(recipe, key, mesh, sharding.by_parameter(mesh, state))
    # Counted on this machine's CPU, so without the slice's mesh.
    counted = partial(train.train_step, costs.countable(recipe, made), key)
    flops = costs.counted_flops(counted, state, batch, frozen)
    return step, (state, batch, frozen), flops / mesh.size


def evaluation_step(config, made):
    """Returns the same for a batch of the evaluation: its two functions as one."""
    step, arguments = stand_ins.stages(stand_ins.evaluator(config, made))["whole"]
    return jax.jit(step, donate_argnums=0), arguments, None


def compile_step(step, arguments, flops, chip, is_gpu):
    """Compiles; returns figures per chip, most of them None where it ran out of memory."""
    lowered = step.lower(*arguments)
    begin = time.perf_counter(), time.process_time()
    figures = {"flops": flops, "temporaries": None, "collectives": None}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return figures | {"fits": False, "needed": needed(str(error))}
    seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
    memory, parsed = costs.peak_bytes(compiled), hlo.parse(compiled.as_text())
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
    if is_gpu:
        figures["kernels"] = program.summary(program.kernels(parsed))
        accessed = 1e9 * figures["kernels"]["all"]["GB"]
        figures["seconds"] = figures["kernels"]["all"]["ms"] / 1e3
    else:
        figures["cycles"] = cycles.summary(parsed, chip)
        figures["seconds"] = figures["cycles"]["seconds"]
    return figures | {
        "bytes": accessed,
        "needed": memory,
        "arguments": compiled.memory_analysis().argument_size_in_bytes,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "fits": memory <= chip.memory,
        "collectives": hlo.collectives(parsed),
        "compile_seconds": seconds[0],
        "compile_cpu_seconds": seconds[1],
    }


def needed(message):
    """Returns the bytes that the compiler says it would have needed."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of|temporaries \(([\d.]+)([KMGT])\)", message)
    number, unit = [group for group in found.groups() if group] if found else ("nan", "G")
    return float(number) * 1024 ** (1 + "KMGT".index(unit))


def report(name, figures, chip):
    """Prints a step's figures for people."""
    verdict = "fits" if figures["fits"] else "DOES NOT FIT"
    print(f"{name}: {verdict}, {figures['needed'] / 2**30:.2f} of {chip.memory / 2**30:.0f} GiB")
    if figures["temporaries"] is None:
        return
    print(f"  arguments    {figures['arguments'] / 2**30:8.2f} GiB")
    print(f"  temporaries  {figures['temporaries'] / 2**30:8.2f} GiB")
    if figures["flops"]:
        least = figures["flops"] / chip.peak
        print(f"  FLOPs        {figures['flops']:8.3g} ({1e3 * least:.1f} ms at the chip's peak)")
    if figures["bytes"]:
        print(f"  bytes moved  {figures['bytes'] / 1e9:8.1f} GB")
    for kind, row in figures.get("kernels", {}).items():
        print(f"  {kind:12} {row['kernels']:6d} kernels {row['GB']:9.1f} GB {row['TFLOP']:8.2f} "
              f"TFLOP {row['ms']:8.1f} ms predicted")  # fmt: skip
    for kind, (count, size) in figures["collectives"].items():
        print(f"  {kind:<20} {count:4d} times, {size / 2**20:.1f} MiB")
    if "cycles" in figures:
        cycles.report(figures["cycles"])
    print(
        f"  compiled in {figures['compile_seconds']:.0f} s "
        f"({figures['compile_cpu_seconds']:.0f} s of CPU)"
    )


def run(config, args):
    """Compiles the steps by name for a topology, prints and returns the figures."""
    topology, steps = args.topology, args.steps
    before = json.loads(Path(args.against).read_text()) if args.against else None
    devices = devices_of(topology)
    chip = chips.chip(devices[0], devices)
    if chip is None:
        raise ValueError(
            f"--topology {topology}: the memory of a {devices[0].device_kind} is not known here "
            "(utils/chips.py)"
        )
    is_gpu = gpu_target.is_card(topology)
    kind = devices[0].device_kind
    hardware.compile_for("gpu" if is_gpu else "tpu", chip.memory, len(devices), kind)
    mesh = sharding.make_mesh(config.mesh.fsdp, devices)
    made = parts.make(config, mesh)
    hosts = 1 if is_gpu else len({device.process_index for device in devices})
    batch = config.training.batch_size
    print(
        f"{config.model.cls}, batch {batch}, compiled for {topology}: {len(devices)} devices on "
        f"{hosts} hosts, data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}; all per device"
    )
    makers = {"train": train_step, "eval": evaluation_step}
    results = {"topology": topology, "devices": len(devices), "hosts": hosts}
    for name in steps:
        results[name] = compile_step(*makers[name](config, made), chip, is_gpu)
        report(name, results[name], chip)
    if "train" in steps:
        of_train, passes = results["train"], made.method.passes(batch)
        needed = made.step_flops(batch) * batch / len(devices)
        of_train["flops_by_hand"] = needed
        print(f"  FLOPs needed, by hand: {needed:.3g} ({passes:g} F)")
        if "seconds" in of_train:
            of_train["MFU"] = needed / chip.peak / of_train["seconds"]
            print(f"  MFU predicted: {of_train['MFU']:.3f}")
    if before:
        compare(before, results, steps)
    return results | {"fits": all(results[name]["fits"] for name in steps)}


def compare(before, results, steps):
    """Prints each figure of the steps that changed by a hundredth: before, now, ratio."""
    for step in steps:
        old, new = (dict(flat(figures.get(step, {}))) for figures in (before, results))
        for name in old.keys() & new.keys():
            a, b = old[name], new[name]
            if a and b and abs(b / a - 1) > 0.01:
                print(f"  {step} {name:32} {a:12.5g} -> {b:12.5g}  ({b / a:.3f})")


def flat(figures, prefix=""):
    """Yields (name, number) of all numbers in nested dicts."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name} ")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value
