"""What a compiled GPU program does: its kernels, the bytes and FLOPs of each, and ms to expect.

Read from the text of the program (HLO). Loops count as often as they run. A kernel reads each of
its operands once and writes its result once; of an operand that is only sliced it reads the slice,
and of a result that is updated in place it writes the update.
"""

import collections
import math
import re
from typing import NamedTuple

from benchmarks.costs import array_bytes, computations, trip_count

IDLE = set("parameter constant tuple get-tuple-element bitcast iota after-all partition-id".split())
SLICES = {"dynamic-slice", "slice", "gather"}
MOVES = {"copy", "transpose", "slice", "concatenate", "reshape", "convert", "pad", "bitcast",
         "dynamic-slice", "dynamic-update-slice", "broadcast"}  # fmt: skip

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
        """Of all its runs, by the factors above."""
        rate = ATTENTION if self.kind == "attention" else PRODUCTS
        return FACTORS[self.kind] * self.runs * max(self.bytes / MEMORY, self.flops / rate)


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    result: str  # its type
    operation: str
    operands: list
    text: str
    is_root: bool


LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")


def instructions(lines):
    """The lines of a computation, parsed."""
    found = []
    for line in lines:
        match = LINE.match(re.sub(r"/\*index=\d+\*/", "", line))
        if match:
            root, name, result, operation, rest = match.groups()
            operands = re.findall(r"%([\w.-]+)", rest[: closing(rest)])
            found.append(Instruction(name, result, operation, operands, rest, bool(root)))
    return found


def closing(text):
    """Where the parenthesis that is open at the beginning closes."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    return len(text)


def kernels(text):
    """All kernels in the text of a compiled GPU program."""
    lines, main = computations(text)
    parsed = {name: instructions(of) for name, of in lines.items()}
    found = []

    def visit(name, runs):
        here = {i.name: i for i in parsed[name]}
        for i in parsed[name]:
            if i.operation in IDLE or i.operation.endswith("-done"):
                continue
            if i.operation == "while":
                condition = called(i, "condition")
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', i.text)
                times = int(known.group(1)) if known else trip_count(lines[condition])
                visit(called(i, "body"), runs * times)
            elif i.operation in ("call", "conditional", "async-start"):
                for inner in re.findall(r"(?:to_apply|calls)=%?([\w.-]+)", i.text):
                    visit(inner, runs)
            else:
                found.append(kernel(i, here, parsed, runs))

    visit(main, 1)
    return found


def called(instruction, role):
    """The computation that an instruction calls as its `role`."""
    return re.search(rf"{role}=%?([\w.-]+)", instruction.text).group(1)


def kernel(i, here, parsed, runs):
    """The `Kernel` of an instruction that is one."""
    inside = parsed[called(i, "calls")] if "fusion" in i.operation else []
    nested = [x for x in inside if x.operation == "fusion"]  # what a memcpy was made of
    if nested and len(inside) <= len(nested) + sum(x.operation in IDLE for x in inside):
        inside = parsed[called(nested[0], "calls")]
    defined = {x.name: x for x in inside} or here
    flops = sum(product_flops(x, defined) for x in inside or [i])
    if inside:
        size = fusion_bytes(inside)
    else:
        size = sum(total(here[name].result) for name in i.operands if name in here)
        size += total(i.result)
    kind, extra = kind_of(i, inside, flops)
    source = re.search(r'op_name="([^"]*)"', i.text)
    return Kernel(i.name, kind, runs, size, flops + extra, source.group(1) if source else "")


def kind_of(i, inside, flops):
    """Which of FACTORS, and FLOPs that only the kernel's target tells."""
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
    operations = {x.operation for x in inside or [i]} - IDLE
    if operations <= MOVES or i.operation in ("copy", "copy-start", "fusion-start"):
        return "copies", 0
    return ("sums" if "reduce" in operations else "elementwise"), 0


def total(text):
    """Bytes of all arrays of a type."""
    return sum(array_bytes(text))


def shapes(text):
    """The dimensions of all arrays of a type."""
    found = re.findall(r"\b[a-z]+\d*\[([\d,]*)\]", text)
    return [[int(n) for n in dims.split(",") if n] for dims in found]


def product_flops(i, defined):
    """FLOPs of a matrix product or a convolution, 0 for anything else."""
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
    """FLOPs of one of cuDNN's convolutions y = w * x, or of its derivative by x or w."""
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
    """What a fusion reads and writes."""
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
    """{kind: {"kernels", "GB", "TFLOP", "ms"}} of one run of a program, and of all kinds."""
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
