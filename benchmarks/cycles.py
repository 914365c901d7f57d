"""Adds up the cycles that the compiler for TPUs expects of a compiled program.

libtpu notes at each instruction how many cycles it estimates for it; loops count as often as they
run. It notes none for copies and exchanges that go on beside other work, nor for custom kernels:
one of these counts as the longer of its products at the peak and its bytes at the rate of the
memory, by the `cost_estimate` that it was written with. Nothing here has been measured on a chip.
"""

import collections
import re
from typing import NamedTuple

from benchmarks import hlo

# Cycles and bytes of memory a second of one device; the former reckoned from the peak and the
# products that its units start in a cycle, the latter of the data sheets.
CLOCKS = {"v4": (1.05e9, 1.2e12), "v5e": (1.5e9, 0.82e12), "v5p": (1.75e9, 2.77e12),
          "v6e": (1.75e9, 1.64e12), "7x": (2.2e9, 3.7e12)}  # fmt: skip
LARGEST = 20

# Parts of a train step by the names that its operations have from jax, the first that fits.
PARTS = {
    "data": r"/data/",  # records to x, and what is drawn
    "perceptual": r"perceptual",  # the frozen networks of pixel MeanFlow, forward and backward
    "casts": r"\.cast\)",
    "backward": r"transpose\(",
    "forward": r"jvp\(jvp\(",  # with its tangent
    "guidance": r"jvp\(\w+\.",  # what has no gradient; where nothing has a tangent: forward
    "objective": r"jvp\(",
    "optimizer and averages": r"jit\(train_step\)",
}


class Row(NamedTuple):
    """An instruction and the cycles of all its runs."""

    cycles: float
    runs: int
    kind: str
    part: str
    name: str
    result: str
    source: str


def rows(program, chip):
    """Returns a `Row` of each instruction of an `hlo.Program` that has an estimate.

    Args:
      chip: `utils.chips.Chip` that it is compiled for.
    """
    every = [i for instructions in program.computations.values() for i in instructions]
    loops = {i.called("body"): i.source for i in every if i.operation == "while"}
    found = []
    for i, name, runs in hlo.walk(program):
        if cycles := cycles_of(i, chip):
            kind, source = kind_of(program, i), i.source or loops.get(name, "")
            found.append(Row(cycles * runs, runs, kind, "", i.name, i.result, source))
    has_tangents = any(re.search(PARTS["forward"], row.source) for row in found)
    return [row._replace(part=part_of(row.source, has_tangents)) for row in found]


def cycles_of(i, chip):
    """Returns the cycles of one run of an instruction, 0 where there is no estimate."""
    if noted := re.search(r'"estimated_cycles":"?(\d+)', i.text):
        return int(noted.group(1))
    if not is_custom(i):
        return 0
    costs = {key: int(n) for key, n in re.findall(r'"(flops|bytes_accessed)":"?(\d+)', i.text)}
    clock, bandwidth = CLOCKS[chip.name]
    seconds = costs.get("flops", 0) / chip.peak, costs.get("bytes_accessed", 0) / bandwidth
    return clock * max(seconds)


def is_custom(i):
    """Tells whether an instruction is a kernel that someone wrote."""
    return i.operation == "custom-call" and "tpu_custom_call" in i.text


def kind_of(program, i):
    """Returns what an instruction mostly does."""
    operations = {x.operation for x in (i, *program.inside(i))} - hlo.IDLE - {"fusion"}
    if is_custom(i):
        return "custom kernels"
    if operations & {"convolution", "dot"}:
        return "products"
    if operations <= hlo.MOVES | {"constant", "copy-start"}:
        return "copies"
    return "sums" if operations & {"reduce", "reduce-window"} else "elementwise"


def part_of(source, has_tangents):
    """Returns the part of the train step that an operation belongs to."""
    part = next((part for part, name in PARTS.items() if re.search(name, source)), "other")
    return "forward" if part == "guidance" and not has_tangents else part


def windowed(program):
    """Returns the bodies of the loops over the pieces of a product, beside which they are sent."""
    return {
        i.called("body")
        for instructions in program.computations.values()
        for i in instructions
        if i.operation == "while" and i.source.endswith("dot_general")
    }


def alone(program):
    """Returns the exchanges beside which nothing goes on: {name of the result: runs}."""
    found, begun, done = collections.Counter(), {}, 0
    for i, _, runs in hlo.walk(program):
        kind = i.operation.removesuffix("-start").removesuffix("-done")
        if i.operation.endswith("-start"):
            begun[i.name] = done
        elif i.operation.endswith("-done") and kind in hlo.COLLECTIVES:
            if begun.get(i.operands[0]) == done:
                found[f"{kind} {i.result}"] += runs
        elif kind in hlo.COLLECTIVES:
            found[f"{kind} {i.result}"] += runs
        done += "estimated_cycles" in i.text
    return dict(found)


def summary(program, chip):
    """Returns the figures of a program: cycles in all, by part and by kind, the largest, exchanges.

    Args:
      program: `hlo.Program`.
      chip: `utils.chips.Chip` that it is compiled for.
    """
    table, loops = rows(program, chip), windowed(program)
    total = sum(row.cycles for row in table)
    of_part, of_kind = collections.Counter(), collections.Counter()
    for row in table:
        of_part[row.part] += row.cycles
        of_kind[row.kind] += row.cycles
    in_loops = sum(
        runs * cycles_of(i, chip) for i, name, runs in hlo.walk(program) if name in loops
    )
    largest = sorted(table, reverse=True)[:LARGEST]
    return {
        "cycles": total,
        "seconds": total / CLOCKS[chip.name][0],
        "parts": dict(of_part.most_common()),
        "kinds": dict(of_kind.most_common()),
        "windowed": in_loops / max(total, 1),
        "largest": [row._asdict() for row in largest],
        "alone": alone(program),
    }


def report(found):
    """Prints a `summary` for people."""
    total, ms = found["cycles"], 1e3 * found["seconds"]
    print(f"  cycles       {total / 1e6:8.2f} million ({ms:.1f} ms)")
    print(f"  in loops of pieces of an exchange beside a product: {found['windowed']:.1%}")
    for what in ("parts", "kinds"):
        for name, cycles in found[what].items():
            print(f"    {name:24} {cycles / 1e6:8.3f} {cycles / total:6.1%}")
    print("  the largest, million cycles in all:")
    for row in found["largest"]:
        source = row["source"].removeprefix("jit(train_step)/")
        print(f"    {row['cycles'] / 1e6:8.3f} {row['runs']:4d} x  {row['kind']:12} "
              f"{row['result'].split('{')[0]:24} {source[-70:]}")  # fmt: skip
    for name, runs in found["alone"].items():
        print(f"  nothing goes on beside {runs} x {name[:70]}")
