"""Speed, FLOPs and memory of the train step, with made-up data."""

import tempfile
import time
from functools import partial

import jax
import numpy as np

import parts
import train
from benchmarks import costs, plain, trace
from models import network
from utils import chips, sharding


def add_arguments(parser):
    """The options of `run`."""
    parser.add_argument("--against", action="append", choices=["plain"], default=[])
    parser.add_argument("--steps", type=int, default=10, help="steps of a measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements; the median counts")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first one")
    parser.add_argument("--profile", action="store_true", help="also the time of each kernel")


def plain_step(recipe, key, state, batch, frozen=None):
    """A step as published: all rows alike, by `plain.loss`. 6 F."""
    key_x, key_draw = jax.random.split(jax.random.fold_in(key, state.step))
    x, given = recipe.codec.encode(batch, key_x)
    draws = recipe.method.draw(key_draw, x.shape, state.step)

    def of_params(params):
        return plain.loss(recipe.net, recipe.gather(params), x, given["y"], draws, recipe.method)

    grads, _ = jax.grad(of_params, has_aux=True)(state.params)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p + u, state.params, updates)
    averages = {
        name: jax.tree.map(
            lambda e, p, d=decay: d * e + (1 - d) * p, state.ema_params[name], params
        )
        for name, decay in zip(recipe.averages, recipe.ema_vals, strict=True)
    }
    return train.TrainState(state.step + 1, params, averages, opt_state, state.sums)


class Candidate:
    """A step to be measured: `compile`, then `place` a state and a batch, then `run`."""

    def __init__(self, config, mesh, is_plain=False, count=True):
        key = jax.random.key(0)
        if is_plain:
            config = config.copy_and_resolve_references()
            config.update({"training": {"half_precision": False}, "model": {"remat": False}})
        model = parts.make(config, mesh)
        if is_plain:
            module = model.module.unrolled()
            model = model._replace(module=module, net=network.function(module))
        self.model, self.batch_size = model, config.training.batch_size
        self.recipe, _ = train.make_recipe(config.training, model, 1)
        self.frozen = sharding.place_everywhere(mesh, parts.load_frozen(model))
        self.shapes = shapes = (
            costs.state_shapes(model, self.recipe), costs.batch_shapes(config), self.frozen
        )  # fmt: skip
        self.shardings = (
            sharding.by_parameter(mesh, shapes[0]), sharding.by_row(mesh), sharding.replicated(mesh)
        )  # fmt: skip
        self.flops = None
        if count:
            counted = costs.countable(self.recipe, model)
            step = plain_step if is_plain else train.train_step
            self.flops = costs.counted_flops(partial(step, counted, key), *shapes)
        if is_plain:
            jitted = jax.jit(
                partial(plain_step, self.recipe, key),
                in_shardings=self.shardings, out_shardings=self.shardings[0],
            )  # fmt: skip
        else:
            jitted = train.make_step(self.recipe, key, mesh, self.shardings[0])
        self.lowered = jitted.lower(*shapes)
        self.seconds = []

    def compile(self):
        """Compiles; may be called in a thread beside others. Returns itself."""
        begin = time.perf_counter()
        self.step = self.lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        self.bytes = costs.peak_bytes(self.step)
        init = partial(train.init_state, self.recipe, self.model.module, self.model.image_shape)
        init = jax.jit(init, out_shardings=self.shardings[0])
        self.init = init.lower(jax.random.key(0)).compile()
        return self

    def place(self):
        """Puts a state and a batch on the devices."""
        of_rows = self.shardings[1]
        self.state = self.init(jax.random.key(0))
        rng = np.random.RandomState(0)
        batch = jax.tree.map(lambda x: rng.uniform(0, 2, x.shape).astype(x.dtype), self.shapes[1])
        self.batch = sharding.place(batch, jax.tree.map(lambda _: of_rows, batch))

    def free(self):
        """Gives the memory on the devices back."""
        self.state = self.batch = self.step = self.init = self.lowered = None

    def run(self, steps):
        """Takes `steps` steps and notes the seconds per step."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.state = self.step(self.state, self.batch, self.frozen)
        jax.block_until_ready(self.state)
        self.seconds.append((time.perf_counter() - begin) / max(steps, 1))


def run(config, args):
    """Measures the step, and beside it the plain one; returns the results as a dict."""
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch("training.batch_size", config.training.batch_size, mesh)
    names = ["this project", *args.against]
    candidates = {name: Candidate(config, mesh, is_plain=name == "plain") for name in names}
    for candidate in candidates.values():
        candidate.compile().place()
    measure(candidates.values(), args)
    ours = candidates["this project"]
    needed = ours.model.step_flops(ours.batch_size)
    results = {name: figures(c, needed, mesh) for name, c in candidates.items()}
    if len(results) > 1:
        first, plain = results.values()
        results["ratio"] = {
            key: value / plain[key] for key, value in first.items() if value and plain[key]
        }
    device = jax.devices()[0]
    print(f"{config.model.cls}, batch {ours.batch_size}, {jax.device_count()} x "
          f"{device.device_kind}, jax {jax.__version__}")  # fmt: skip
    print_table(results)
    if args.profile:
        results["kernels"] = profile(ours, args.steps)
    return results


def measure(candidates, args):
    """`args.rounds` measurements of each, in turn."""
    for candidate in candidates:  # the first steps are slower
        candidate.run(args.warmup)
        candidate.seconds.clear()
    for _ in range(args.rounds):
        for candidate in candidates:
            candidate.run(args.steps)


def figures(candidate, needed, mesh):
    """What was measured, under the names of the table; `needed`: FLOPs of an image by hand."""
    seconds, batch = float(np.median(candidate.seconds)), candidate.batch_size
    device = mesh.devices.flat[0]
    chip = chips.chip(device)
    in_use = (device.memory_stats() or {}).get("peak_bytes_in_use")
    counted, memory = candidate.flops, candidate.bytes
    return {
        "ms/step": 1e3 * seconds,
        "images/s": batch / seconds,
        "GFLOP/image, XLA": counted / batch / 1e9 if counted else None,
        "GFLOP/image, needed": needed / 1e9 if needed else None,
        "MFU": batch * needed / seconds / (chip.peak * mesh.size) if chip and needed else None,
        "GB/device, compiler": memory / 1e9 if memory else None,
        "GB/device, peak of the process": in_use / 1e9 if in_use else None,
        "compile s": candidate.compile_seconds,
    }


def profile(candidate, steps):
    """Prints where the time of a step goes, by kernel; returns it."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            candidate.run(steps)
        kernels = trace.kernels(folder)
    summary = trace.summary(kernels, steps)
    trace.report(summary)
    return summary


def print_table(results):
    """Columns of figures: {column: {row: number or None}}."""
    rows = next(iter(results.values()))
    width = max(len(row) for row in rows)
    print(" " * width, *(f"{name:>14}" for name in results))
    for row in rows:
        values = [column.get(row) for column in results.values()]
        print(f"{row:{width}}", *(f"{'-' if v is None else f'{v:.4g}':>14}" for v in values))
