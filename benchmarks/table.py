"""The table of docs/speed.md on the accelerator at hand, in a few minutes.

    python -m benchmarks table [--rows run_b4 run_b2 run_xl2] [--json FILE]

All programs are compiled side by side first, which takes most of the time, and then measured one
after the other. What is not compiled within `--compile_seconds` is left out and said.
"""

import concurrent.futures
import os
import sys
import time

import jax

import parts
from benchmarks import costs, evaluation, stand_ins, train
from benchmarks.train import Candidate
from utils import sharding

# name -> the options by which a row differs from its config
VARIANTS = {
    "": (),
    "loop": ("model.unroll=1",),
    "plain attention": ("model.fused_attention=false",),
}
EVALUATION = ("fid.device_batch_size=128", "sampling.vae_dtype=bfloat16")


def add_arguments(parser):
    """The options of `run`."""
    rows = ["run_b4", "run_b4:loop", "run_b2", "run_xl2", "run_xl2:loop"]
    parser.add_argument("--rows", nargs="*", default=rows, help="CONFIG or CONFIG:VARIANT, of "
                        f"{', '.join(filter(None, VARIANTS))}")  # fmt: skip
    parser.add_argument("--evaluation", default="run_b4", help="its config; empty: not measured")
    parser.add_argument("--compile_seconds", type=float, default=240, help="at most, all together")
    parser.add_argument("--steps", type=int, default=10, help="steps of a measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements; the median counts")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first one")
    parser.add_argument("--profile", action="store_true", help="also the time of each kernel")


def read(config, options=()):
    """A config by name with options."""
    words = [f"--config.{option}" for option in options]
    return costs.config_without_data([f"--config=configs/load_config.py:{config}", *words])[0]


def run(args):
    """Measures, prints the rows as soon as they are known; returns {row: figures}."""
    begin = time.perf_counter()
    mesh = sharding.make_mesh(1)
    device = mesh.devices.flat[0]
    print(f"{mesh.size} x {device.device_kind}, jax {jax.__version__}, batch and products as in "
          "the configs")  # fmt: skip
    pool, waiting = concurrent.futures.ThreadPoolExecutor(16), {}
    for name in args.rows:
        config, _, variant = name.partition(":")
        candidate = Candidate(read(config, VARIANTS[variant]), mesh, count=False)
        waiting[pool.submit(candidate.compile)] = name
        said(begin, f"lowered {name}")
    stages = {}
    if args.evaluation:
        evaluator = evaluator_of(args.evaluation)
        for name, stage in stand_ins.stages(evaluator).items():
            stages[name] = pool.submit(evaluation.Stage, *stage)
    left = args.compile_seconds - (time.perf_counter() - begin)
    concurrent.futures.wait([*waiting, *stages.values()], timeout=max(left, 0))
    said(begin, "compiled")
    print("| config | ms/step | images/s | MFU | GB | compile s |\n|---|---|---|---|---|---|")
    results = {}
    for future, name in waiting.items():
        results[name] = figures = row(future, name, mesh, args)
        costs.write_json(args.json, results)
        print(line(name, figures), flush=True)
    if stages:
        done = {name: future.result() for name, future in stages.items() if future.done()}
        results["evaluation"] = evaluation.rates(done, evaluator.score.batch_size, args.rounds)
        costs.write_json(args.json, results)
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in results["evaluation"].items())
        print(f"evaluation of {args.evaluation}, images/s: {rates}", flush=True)
    said(begin, "measured")
    if not all(future.done() for future in [*waiting, *stages.values()]):
        sys.stdout.flush()
        os._exit(0)  # a compiler at work cannot be asked to stop
    return results


def said(begin, what):
    """A line on stderr with the seconds since `begin`."""
    print(f"[{time.perf_counter() - begin:5.0f} s] {what}", file=sys.stderr, flush=True)


def row(future, name, mesh, args):
    """The figures of a compiled step, or in a word why there are none."""
    if not future.done():
        return {"failed": "not compiled in time"}
    try:
        candidate = future.result()
        candidate.place()
        train.measure([candidate], args)
        needed = candidate.model.step_flops(candidate.batch_size)
        figures = train.figures(candidate, needed, mesh)
        if args.profile:
            print(f"\n{name}")
            figures["kernels"] = train.profile(candidate, 3)
        candidate.free()
    except jax.errors.JaxRuntimeError as error:  # most likely it does not fit
        return {"failed": str(error).splitlines()[0][:100]}
    return figures


def line(name, figures):
    """A row of the table."""
    if "failed" in figures:
        return f"| `{name}` | {figures['failed']} | | | | |"
    mfu, memory = figures["MFU"], figures["GB/device, compiler"]
    return (
        f"| `{name}` | {figures['ms/step']:.1f} | {figures['images/s']:,.0f} | "
        f"{f'{mfu:.3f}' if mfu else '-'} | {f'{memory:.1f}' if memory else '-'} | "
        f"{figures['compile s']:.0f} |"
    )


def evaluator_of(name):
    """The evaluator of a config, without weight files."""
    config = read(name, EVALUATION)
    return stand_ins.evaluator(config, parts.make(config))
