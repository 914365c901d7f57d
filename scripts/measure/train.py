"""Speed of training, evaluation and data on the devices at hand, with made-up data and weights.

    python -m scripts.benchmark train --config=configs/load_config.py:NAME [--against plain]
    python -m scripts.benchmark eval --config=configs/load_config.py:NAME
    python -m scripts.benchmark data

Options of the config follow as for main.py (`--config.training.batch_size=64`); `--json FILE` also
writes what is printed. Times on busy or shared processors mean little; ratios of one run mean more.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

import sample
import train
from models import meanflow, vae
from scripts import benchmark_data, benchmark_eval, costs
from utils import sharding

# The train step -------------------------------------------------------------------------------


def plain_step(recipe, loss, key, state, batch):
    """A step as published: all rows alike, by `loss` of tests/plain_meanflow.py. 6 F."""
    key_x, key_draw = jax.random.split(jax.random.fold_in(key, state.step))
    x = vae.to_x(batch, key_x, flip=recipe.use_flip, normalisation=recipe.normalisation)
    t, r, noise, drop = meanflow.draw(key_draw, x.shape, recipe.method)

    def of_params(params):
        y = batch["label"]
        return loss(recipe.net, params, x, y, t, r, noise, drop, recipe.method, recipe.num_classes)

    grads, _ = jax.grad(of_params, has_aux=True)(state.params)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p + u, state.params, updates)
    averages = tuple(
        jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, average, params)
        for decay, average in zip(recipe.ema_vals, state.ema_params, strict=True)
    )
    return train.TrainState(state.step + 1, params, averages, opt_state, state.sums)


def load_plain_loss():
    """The loss of the tests' oracle, which no part of the project imports."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import plain_meanflow

    return plain_meanflow.loss


class Candidate:
    """A step to be measured: compiled, with a state and a batch on the devices."""

    def __init__(self, config, mesh, plain):
        net, key = sample.make_net(config), jax.random.key(0)
        if plain:
            net = costs.unrolled(net.clone(dtype=np.float32, remat=False, fused_attention=False))
        recipe, _ = train.make_recipe(config, net, 1, mesh)
        state, batch = costs.state_shapes(config, net, recipe), costs.batch_shapes(config)
        shardings = sharding.by_parameter(mesh, state)
        if plain:
            step = partial(plain_step, recipe, load_plain_loss(), key)
            rows = sharding.by_row(mesh)
            jitted = jax.jit(step, in_shardings=(shardings, rows), out_shardings=shardings)
        else:
            jitted = train.make_step(recipe, key, mesh, shardings)
            recipe, _ = train.make_recipe(config, costs.unrolled(net), 1, mesh)
            step = partial(train.train_step, recipe, key)
        self.flops = costs.counted_flops(step, state, batch)
        lowered = jitted.lower(state, batch)
        begin = time.perf_counter()
        self.step = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        self.bytes = costs.peak_bytes(self.step)
        init = partial(train.init_state, recipe, net, sample.image_shape(config))
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


def run_train(config, args):
    """Measures the step, and beside it the plain one; returns the results as a dict."""
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch("training.batch_size", config.training.batch_size, mesh)
    names = ["this project", *args.against]
    candidates = {name: Candidate(config, mesh, plain=name == "plain") for name in names}
    for candidate in candidates.values():  # the first steps are slower
        candidate.run(args.warmup)
        candidate.seconds.clear()
    for _ in range(args.rounds):
        for candidate in candidates.values():
            candidate.run(args.steps)
    batch = config.training.batch_size
    passes = costs.forward_passes(meanflow.MeanFlow(**config.method), batch)
    forward = costs.forward_flops(sample.make_net(config), sample.image_shape(config))
    results = {name: figures(c, batch, passes * forward, mesh) for name, c in candidates.items()}
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
    chip = costs.chip(device)
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


# The command line -----------------------------------------------------------------------------


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="the train step")
    command.add_argument("--against", action="append", choices=["plain"], default=[])
    command.add_argument("--steps", type=int, default=10, help="steps of a measurement")
    command.add_argument("--rounds", type=int, default=5, help="measurements; the median counts")
    command.add_argument("--warmup", type=int, default=3, help="steps before the first one")
    command.add_argument("--json", help="also write the results to this file")
    benchmark_eval.add_arguments(commands.add_parser("eval", help="the evaluation's stages"))
    benchmark_data.add_arguments(commands.add_parser("data", help="the data iterator"))
    try:
        if argv[:1] == ["data"]:
            args = parser.parse_args(argv)
            costs.check_writable(args.json)
            costs.write_json(args.json, benchmark_data.run(args))
            return 0
        config, rest = costs.config_without_data(argv)
        args = parser.parse_args(rest)
        costs.check_writable(args.json)
        results = (run_train if args.command == "train" else benchmark_eval.run)(config, args)
        costs.write_json(args.json, results)
    except (ValueError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
