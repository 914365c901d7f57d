"""Measures speed, FLOPs and memory of the train step, with made-up data."""

import time
from functools import partial

import jax
import numpy as np

import parts
import train
from benchmarks import costs
from utils import chips, sharding


def add_arguments(parser):
    """Adds the options of `run`."""
    parser.add_argument("--steps", type=int, default=10, help="steps of a measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements; the median counts")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first one")


class Step:
    """The compiled train step of a config, with a state and a batch on the devices."""

    def __init__(self, config, mesh):
        key = jax.random.key(0)
        self.made, self.batch_size = parts.make(config, mesh), config.training.batch_size
        recipe, _ = train.make_recipe(config.training, self.made, 1)
        shapes = costs.state_shapes(self.made, recipe), costs.batch_shapes(config)
        shapes += (costs.frozen_shapes(self.made),)
        counted = partial(train.train_step, costs.countable(recipe, self.made), key)
        self.flops = costs.counted_flops(counted, *shapes)
        of_state, of_rows = sharding.by_parameter(mesh, shapes[0]), sharding.by_row(mesh)
        lowered = train.make_step(recipe, key, mesh, of_state).lower(*shapes)
        begin = time.perf_counter()
        self.step = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        self.bytes = costs.peak_bytes(self.step)
        init = partial(train.init_state, recipe, self.made.module, self.made.image_shape)
        self.state = jax.jit(init, out_shardings=of_state)(key)
        rng = np.random.RandomState(0)
        batch = jax.tree.map(lambda x: rng.uniform(0, 2, x.shape).astype(x.dtype), shapes[1])
        self.batch = sharding.place(batch, jax.tree.map(lambda _: of_rows, batch))
        self.frozen = sharding.place_everywhere(mesh, parts.load_frozen(self.made))

    def run(self, steps):
        """Takes `steps` steps; returns the seconds of one."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.state = self.step(self.state, self.batch, self.frozen)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - begin) / max(steps, 1)


def run(config, args):
    """Measures the step; prints and returns {row: figure}."""
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch("training.batch_size", config.training.batch_size, mesh)
    step = Step(config, mesh)
    step.run(args.warmup)  # the first steps are slower
    seconds = float(np.median([step.run(args.steps) for _ in range(args.rounds)]))
    results = figures(step, seconds, mesh)
    device = jax.devices()[0]
    print(f"{config.model.cls}, batch {step.batch_size}, {jax.device_count()} x "
          f"{device.device_kind}, jax {jax.__version__}")  # fmt: skip
    for name, value in results.items():
        print(f"{name:32} {'-' if value is None else f'{value:.4g}':>14}")
    return results


def figures(step, seconds, mesh):
    """Returns what was measured of a `Step`: {row: figure}."""
    batch, device = step.batch_size, mesh.devices.flat[0]
    needed = step.made.step_flops(batch)  # of an image, by hand
    chip = chips.chip(device, mesh.devices.flat)
    in_use = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "ms/step": 1e3 * seconds,
        "images/s": batch / seconds,
        "GFLOP/image, XLA": step.flops / batch / 1e9 if step.flops else None,
        "GFLOP/image, needed": needed / 1e9 if needed else None,
        "MFU": batch * needed / seconds / (chip.peak * mesh.size) if chip and needed else None,
        "GB/device, compiler": step.bytes / 1e9 if step.bytes else None,
        "GB/device, peak of the process": in_use / 1e9 if in_use else None,
        "compile s": step.compile_seconds,
    }
