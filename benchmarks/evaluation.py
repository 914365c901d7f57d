"""Speed of the evaluation by stage, with made-up weights."""

import time

import jax
import numpy as np

import parts
from benchmarks import stand_ins
from utils import sharding


def add_arguments(parser):
    """Adds the options of `run`."""
    parser.add_argument("--rounds", type=int, default=5, help="measurements; the median counts")


def run(config, args):
    """Measures, prints a table; returns {stage: images per second}."""
    made = parts.make(config)
    evaluator = stand_ins.evaluator(config, made)
    batch_size = evaluator.score.batch_size
    results = rates(
        {name: Stage(*stage) for name, stage in stand_ins.stages(evaluator).items()},
        batch_size,
        args.rounds,
    )
    kind = jax.devices()[0].device_kind
    print(f"{config.model.cls}, {made.mesh.size} x {kind}, images per second")
    for name, rate in results.items():
        print(f"  {name:24} {rate:10.2f}   {rate / results['whole']:8.2f} x the whole")
    return results


def rates(stages, batch_size, rounds):
    """Returns the images per second of each `Stage`, measured in turn; the median of `rounds`."""
    measured = {name: [] for name in stages}
    for _ in range(rounds):
        for name, stage in stages.items():
            measured[name].append(batch_size / stage.seconds())
    return {name: float(np.median(rate)) for name, rate in measured.items()}


class Stage:
    """A compiled function that has run once, and arguments for it on the devices."""

    def __init__(self, function, arguments):
        shardings = jax.tree.map(lambda x: getattr(x, "sharding", None), arguments)
        self.function = function
        self.values = jax.tree.map(
            lambda x, s: x if s is None else sharding.place(x, s),
            stand_ins.random_values(arguments), shardings, is_leaf=lambda x: x is None,
        )  # fmt: skip
        self.seconds()

    def seconds(self):
        """Runs it; returns how long that took."""
        begin = time.perf_counter()
        result = jax.block_until_ready(self.function(*self.values))
        seconds = time.perf_counter() - begin
        if isinstance(result, tuple):  # of the whole, whose statistics are used up
            self.values = (result[0], *self.values[1:])
        return seconds
