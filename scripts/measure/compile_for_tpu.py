"""Compiles a config for a TPU slice on a machine that has none: does it fit, and what does it cost?

    pip install -r requirements-tpu-compile.txt
    python -m scripts.measure.compile_for_tpu --topology v5e:4x4 \\
        --config=configs/load_config.py:NAME

Options of the config follow as for main.py (`--config.mesh.fsdp=16`). What is compiled is the train
step of train.py and the evaluation step, as they would run on every chip of the slice; nothing is
run, so no time is told but the compiler's own. Topologies are named by their chips: v4:2x2x4,
v5e:4x4, v5p:2x2x4, v6e:4x4 and so on. Exit status: 0 all fits, 1 it does not, 2 wrong options.
"""

import argparse
import dataclasses
import os
import re
import sys
import time
from functools import partial

# The compiler would otherwise ask the machine for its TPU.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # nobody else is kept from compiling
}
os.environ.update(ENVIRONMENT)

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

import parts  # noqa: E402
import train  # noqa: E402
from models import network  # noqa: E402
from scripts.measure import costs, stand_ins  # noqa: E402
from utils import chips, environment, sharding  # noqa: E402


def slice_devices(name):
    """The devices of a TPU slice by the name of its topology.

    Raises:
      ValueError: no libtpu, or no such topology.
    """
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # jax and libtpu raise several kinds
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--topology {name}: {reason} (libtpu is in requirements-tpu-compile.txt; topologies "
            "are named like v4:2x2x4, v5e:4x4, v5p:2x2x2, v6e:4x4)"
        ) from error


def train_step(config, model):
    """The compiled function of training and its arguments: function, shapes, FLOPs per chip."""
    mesh, key = model.mesh, jax.random.key(config.training.seed)
    sharding.check_batch("training.batch_size", config.training.batch_size, mesh)
    recipe, _ = train.make_recipe(config, model, 1)
    state, batch = costs.state_shapes(model, recipe), costs.batch_shapes(config)
    step = train.make_step(recipe, key, mesh, sharding.by_parameter(mesh, state))
    # Counted on this machine's CPU, so without the slice's mesh.
    unrolled = model.module.unrolled()
    recipe = dataclasses.replace(recipe, net=network.function(unrolled))
    flops = costs.counted_flops(partial(train.train_step, recipe, key), state, batch)
    return step, (state, batch), flops / mesh.size


def evaluation_step(config, model):
    """The same for a batch of the evaluation."""
    step, arguments = stand_ins.stages(stand_ins.evaluator(config, model))["whole"]
    return step, arguments, None


def compile_step(step, arguments, flops, chip):
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
    memory = costs.peak_bytes(compiled)
    return figures | {
        "needed": memory,
        "arguments": compiled.memory_analysis().argument_size_in_bytes,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "fits": memory <= chip.memory,
        "collectives": costs.collectives(compiled.as_text()),
        "compile_seconds": seconds[0],
        "compile_cpu_seconds": seconds[1],
    }


def needed(message):
    """Bytes that the compiler says it would have needed."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of|temporaries \(([\d.]+)([KMGT])\)", message)
    number, unit = [group for group in found.groups() if group] if found else ("nan", "G")
    return float(number) * 1024 ** (1 + "KMGT".index(unit))


def report(name, figures, chip):
    """A step's figures for people."""
    verdict = "fits" if figures["fits"] else "DOES NOT FIT"
    print(f"{name}: {verdict}, {figures['needed'] / 2**30:.2f} of {chip.memory / 2**30:.0f} GiB")
    if figures["temporaries"] is None:
        return
    print(f"  arguments    {figures['arguments'] / 2**30:8.2f} GiB")
    print(f"  temporaries  {figures['temporaries'] / 2**30:8.2f} GiB")
    if figures["flops"]:
        least = figures["flops"] / chip.peak
        print(f"  FLOPs        {figures['flops']:8.3g} ({1e3 * least:.1f} ms at the chip's peak)")
    for kind, (count, size) in figures["collectives"].items():
        print(f"  {kind:<20} {count:4d} times, {size / 2**20:.1f} MiB")
    print(
        f"  compiled in {figures['compile_seconds']:.0f} s "
        f"({figures['compile_cpu_seconds']:.0f} s of CPU)"
    )


def run(config, topology, steps):
    """Compiles the steps by name for a topology, prints and returns the figures."""
    devices = slice_devices(topology)
    chip, mesh = chips.chip(devices[0]), sharding.make_mesh(config.mesh.fsdp, devices)
    model = parts.make(config, mesh)
    if chip is None:
        raise ValueError(
            f"--topology {topology}: the memory of a {devices[0].device_kind} is not known here "
            "(utils/chips.py: TPU v4, v5e, v5p, v6e)"
        )
    share = len({tuple(device.coords) for device in devices}) / len(devices)  # v4: two cores
    chip = chip._replace(peak=chip.peak * share, memory=chip.memory * share)
    hosts = len({device.process_index for device in devices})
    batch = config.training.batch_size
    print(
        f"{config.model.cls}, batch {batch}, compiled for {topology}: {len(devices)} devices on "
        f"{hosts} hosts, data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}; all per device"
    )
    makers = {"train": train_step, "eval": evaluation_step}
    results = {"topology": topology, "devices": len(devices), "hosts": hosts}
    for name in steps:
        results[name] = compile_step(*makers[name](config, model), chip)
        report(name, results[name], chip)
    if "train" in steps:
        passes, needed = model.method.passes(batch), model.step_flops(batch)
        results["train"]["flops_by_hand"] = needed * batch / len(devices)
        print(f"  FLOPs needed, by hand: {results['train']['flops_by_hand']:.3g} ({passes:g} F)")
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.measure.compile_for_tpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--topology", required=True, help="like v5e:4x4")
    parser.add_argument("--steps", nargs="+", choices=["train", "eval"], default=["train", "eval"])
    parser.add_argument("--json", help="also write the figures to this file")
    environment.pin()
    try:
        config, rest = costs.config_without_data(sys.argv[1:] if argv is None else argv)
        args = parser.parse_args(rest)
        parts.check(config)
        costs.check_writable(args.json)
        results = run(config, args.topology, args.steps)
        costs.write_json(args.json, results)
    except (ValueError, OSError) as error:
        print(f"compile_for_tpu: {error}", file=sys.stderr)
        return 2
    return 0 if all(results[name]["fits"] for name in args.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
