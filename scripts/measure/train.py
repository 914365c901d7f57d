"""Speed, FLOPs and memory of the train step, with made-up data."""

import time
from functools import partial

import jax
import numpy as np

import parts
import train
from scripts.measure import costs, plain
from utils import chips, sharding


def add_arguments(parser):
    """The options of `run`."""
    parser.add_argument("--against", action="append", choices=["plain"], default=[])
    parser.add_argument("--steps", type=int, default=10, help="steps of a measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements; the median counts")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first one")


def plain_step(recipe, key, state, batch):
    """A step as published: all rows alike, by `plain.loss`. 6 F."""
    key_x, key_draw = jax.random.split(jax.random.fold_in(key, state.step))
    x, given = recipe.codec.encode(batch, key_x)
    draws = recipe.method.draw(key_draw, x.shape, state.step)

    def of_params(params):
        return plain.loss(recipe.net, params, x, given["y"], draws, recipe.method)

    grads, _ = jax.grad(of_params, has_aux=True)(state.params)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p + u, state.params, updates)
    averages = tuple(
        jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, average, params)
        for decay, average in zip(recipe.ema_vals, state.ema_params, strict=True)
    )
    return train.TrainState(state.step + 1, params, averages, opt_state, state.sums)


class Candidate:
    """A step to be measured: compiled, with a state and a batch on the devices."""

    def __init__(self, config, mesh, is_plain):
        key = jax.random.key(0)
        if is_plain:
            config = config.copy_and_resolve_references()
            config.update({"training": {"half_precision": False}, "model": {"remat": False}})
            config.model.fused_attention = False
        model = parts.make(config, mesh)
        unrolled = costs.unrolled(model)
        recipe, _ = train.make_recipe(config, unrolled if is_plain else model, 1)
        state, batch = costs.state_shapes(model, recipe), costs.batch_shapes(config)
        shardings = sharding.by_parameter(mesh, state)
        if is_plain:
            step = partial(plain_step, recipe, key)
            rows = sharding.by_row(mesh)
            jitted = jax.jit(step, in_shardings=(shardings, rows), out_shardings=shardings)
        else:
            jitted = train.make_step(recipe, key, mesh, shardings)
            step = partial(train.train_step, train.make_recipe(config, unrolled, 1)[0], key)
        self.flops = costs.counted_flops(step, state, batch)
        lowered = jitted.lower(state, batch)
        begin = time.perf_counter()
        self.step = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        self.bytes = costs.peak_bytes(self.step)
        init = partial(train.init_state, recipe, model.module, model.image_shape)
        self.state = jax.jit(init, out_shardings=shardings)(key)
        rng = np.random.RandomState(0)
        self.batch = jax.tree.map(lambda x: rng.uniform(0, 2, x.shape).astype(x.dtype), batch)
        self.batch = sharding.place(
            self.batch, jax.tree.map(lambda _: sharding.by_row(mesh), batch)
        )
        self.seconds = []

    def run(self, steps):
        """Takes `steps` steps and notes the seconds per step."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.state = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        self.seconds.append((time.perf_counter() - begin) / max(steps, 1))


def run(config, args):
    """Measures the step, and beside it the plain one; returns the results as a dict."""
    model = parts.make(config)
    mesh = model.mesh
    sharding.check_batch("training.batch_size", config.training.batch_size, mesh)
    names = ["this project", *args.against]
    candidates = {name: Candidate(config, mesh, is_plain=name == "plain") for name in names}
    for candidate in candidates.values():  # the first steps are slower
        candidate.run(args.warmup)
        candidate.seconds.clear()
    for _ in range(args.rounds):
        for candidate in candidates.values():
            candidate.run(args.steps)
    batch = config.training.batch_size
    needed = model.step_flops(batch)
    results = {name: figures(c, batch, needed, mesh) for name, c in candidates.items()}
    if len(results) > 1:
        ours, plain = results.values()
        results["ratio"] = {
            key: value / plain[key] for key, value in ours.items() if value and plain[key]
        }
    device = jax.devices()[0]
    print(f"{config.model.cls}, batch {batch}, {jax.device_count()} x {device.device_kind}, "
          f"jax {jax.__version__}")  # fmt: skip
    print_table(results)
    return results


def figures(candidate, batch, needed, mesh):
    """What was measured, under the names of the table; `needed`: FLOPs of an image by hand."""
    seconds = float(np.median(candidate.seconds))
    device = mesh.devices.flat[0]
    chip = chips.chip(device)
    in_use = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "ms/step": 1e3 * seconds,
        "images/s": batch / seconds,
        "GFLOP/image, XLA": candidate.flops / batch / 1e9,
        "GFLOP/image, needed": needed / 1e9,
        "MFU": batch * needed / seconds / (chip.peak * mesh.size) if chip else None,
        "GB/device, compiler": candidate.bytes / 1e9,
        "GB/device, peak of the process": in_use / 1e9 if in_use else None,
        "compile s": candidate.compile_seconds,
    }


def print_table(results):
    """Columns of figures: {column: {row: number or None}}."""
    rows = next(iter(results.values()))
    width = max(len(row) for row in rows)
    print(" " * width, *(f"{name:>14}" for name in results))
    for row in rows:
        values = [column.get(row) for column in results.values()]
        print(f"{row:{width}}", *(f"{'-' if v is None else f'{v:.4g}':>14}" for v in values))
