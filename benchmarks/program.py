"""What a compiled GPU program does: its kernels, the bytes and FLOPs of each, and ms to expect.

Read from the text of the program (HLO). Loops count as often as they run. A kernel reads each of
its operands once and writes its result once; of an operand that is only sliced it reads the slice,
and of a result that is updated in place it writes the update.
"""

import collections
import math
import re
from typing import NamedTuple

from benchmarks import hlo
from benchmarks.hlo import array_bytes, shapes

SLICES = {"dynamic-slice", "slice", "gather"}

# Measured on one H200 (jax 0.11.2, 2026-11-26): an 8192^3 product in bfloat16, a copy of 8 GB. The
# factors make the programs of that day come out as they ran; others may be off by a tenth. Neither
# convolutions nor float32 were among them.
PRODUCTS, ATTENTION, MEMORY = 790e12, 350e12, 4.3e12  # FLOP/s, FLOP/s, bytes/s
FACTORS = {"products": 1.12, "attention": 1.0, "copies": 1.6, "sums": 1.35, "elementwise": 1.4}


class Kernel(NamedTuple):
    """A kernel of a program."""

    name: str
    kind: str  # of FACTORS
    runs: int  # in one run of the program
    bytes: int  # of one run of it
    flops: float
    source: str  # the operation of the network that it comes from

    @property
    def seconds(self):
        """Returns the seconds of all its runs, by the factors above."""
        rate = ATTENTION if self.kind == "attention" else PRODUCTS
        return FACTORS[self.kind] * self.runs * max(self.bytes / MEMORY, self.flops / rate)


def kernels(program):
    """Returns all kernels of a compiled GPU program, an `hlo.Program`."""
    return [
        kernel(i, {x.name: x for x in program.computations[name]}, program, runs)
        for i, name, runs in hlo.walk(program)
        if i.operation not in hlo.IDLE and not i.operation.endswith("-done")
    ]


def kernel(i, here, program, runs):
    """Returns the `Kernel` of an instruction that is one."""
    inside = program.computations[i.called("calls")] if "fusion" in i.operation else []
    nested = [x for x in inside if x.operation == "fusion"]  # what a memcpy was made of
    if nested and len(inside) <= len(nested) + sum(x.operation in hlo.IDLE for x in inside):
        inside = program.computations[nested[0].called("calls")]
    defined = {x.name: x for x in inside} or here
    flops = sum(product_flops(x, defined) for x in inside or [i])
    if inside:
        size = fusion_bytes(inside)
    else:
        size = sum(total(here[name].result) for name in i.operands if name in here)
        size += total(i.result)
    kind, extra = kind_of(i, inside, flops)
    return Kernel(i.name, kind, runs, size, flops + extra, i.source)


def kind_of(i, inside, flops):
    """Returns which of FACTORS, and FLOPs that only the kernel's target tells."""
    target = re.search(r'custom_call_target="([^"]*)"', i.text)
    if target and "fmha" in target.group(1):
        B, a, b, d = next(s for s in shapes(i.result) if len(s) == 4)
        heads, tokens = sorted((a, b))
        passes = 10 if "Backward" in target.group(1) else 4
        return "attention", passes * B * heads * tokens**2 * d
    if target and "triton" in target.group(1):
        B, tokens, heads, d = next(s for s in shapes(i.result) if len(s) == 4)
        return "attention", 12 * B * heads * tokens**2 * d
    if flops:
        return "products", 0
    operations = {x.operation for x in inside or [i]} - hlo.IDLE
    if operations <= hlo.MOVES or i.operation in ("copy", "copy-start", "fusion-start"):
        return "copies", 0
    return ("sums" if "reduce" in operations else "elementwise"), 0


def total(text):
    """Returns the bytes of all arrays of a type."""
    return sum(array_bytes(text))


def product_flops(i, defined):
    """Counts FLOPs of a matrix product or a convolution, 0 for anything else."""
    if "__cudnn$conv" in i.text:
        return convolution_flops(i, defined)
    is_call = i.operation == "custom-call" and re.search("matmul|gemm", i.text)
    if i.operation != "dot" and not is_call:
        return 0
    summed = re.search(r'lhs_contracting_dim\w*"?[=:][\[{]([\d",]*)[\]}]', i.text)
    left = shapes(defined[i.operands[0]].result)[0]
    summed = [int(n) for n in re.findall(r"\d+", summed.group(1))] if summed else []
    return 2 * math.prod(left[n] for n in summed) * math.prod(shapes(i.result)[0])


def convolution_flops(i, defined):
    """Counts FLOPs of a convolution of cuDNN, y = w * x, or of its derivative by x or w."""
    arrays = [shapes(defined[name].result)[0] for name in i.operands[:2]]
    result = shapes(i.result)[0]
    y, w = result, arrays[1]
    if "BackwardInput" in i.text:
        y = arrays[0]
    elif "BackwardFilter" in i.text:
        y, w = arrays[1], result
    labels = re.search(r"dim_labels=\w+->(\w+)", i.text).group(1)
    return 2 * math.prod(y) // y[labels.index("f")] * math.prod(w)


def fusion_bytes(inside):
    """Returns the bytes that a fusion reads and writes."""
    by_name, users = {i.name: i for i in inside}, collections.defaultdict(list)
    for i in inside:
        for name in i.operands:
            users[name].append(i)

    def read(name, most):
        size = 0
        for user in users[name]:
            if user.operation in SLICES:
                size += total(user.result)
            elif user.operation == "bitcast":
                size += read(user.name, most)
            elif user.operation != "dynamic-update-slice" or user.operands[0] != name:
                return most
        return min(size, most)

    def written(i):
        if i.operation == "tuple":
            return sum(written(by_name[name]) for name in i.operands)
        while i.operation == "bitcast" and i.operands:
            i = by_name[i.operands[0]]
        if i.operation == "dynamic-update-slice":
            return total(by_name[i.operands[1]].result)
        return sum(size for size in array_bytes(i.result))

    parameters = [i for i in inside if i.operation == "parameter"]
    root = next(i for i in inside if i.is_root)
    return sum(read(p.name, total(p.result)) for p in parameters) + written(root)


def summary(found):
    """Returns {kind, or "all": {"kernels", "GB", "TFLOP", "ms"}} of one run of a program."""
    table = {}
    for kind in [*FACTORS, "all"]:
        chosen = [k for k in found if kind in (k.kind, "all")]
        table[kind] = {
            "kernels": sum(k.runs for k in chosen),
            "GB": sum(k.runs * k.bytes for k in chosen) / 1e9,
            "TFLOP": sum(k.runs * k.flops for k in chosen) / 1e12,
            "ms": 1e3 * sum(k.seconds for k in chosen),
        }
    return table
