"""Reads the text of a compiled program (HLO): instructions, how often each runs, exchanges."""

import re
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
IDLE = set("parameter constant tuple get-tuple-element bitcast iota after-all partition-id".split())
MOVES = {"copy", "transpose", "slice", "concatenate", "reshape", "convert", "pad", "bitcast",
         "dynamic-slice", "dynamic-update-slice", "broadcast"}  # fmt: skip
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "f64": 8}
LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
CALLS = r"(?:calls|to_apply|called_computations=\{)=?%?([\w.-]+)"


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    result: str  # its type
    operation: str
    operands: list
    text: str
    is_root: bool

    @property
    def source(self):
        """Returns the operation of the project's code that it comes from, or ""."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match.group(1) if match else ""

    def called(self, role):
        """Returns the name of the computation that it calls as its `role`."""
        return re.search(rf"{role}=%?([\w.-]+)", self.text).group(1)


class Program(NamedTuple):
    """The instructions of each computation by its name, in the order in which they run."""

    computations: dict[str, list[Instruction]]
    main: str

    def inside(self, instruction):
        """Returns the instructions of what a fusion calls, of those that it calls too."""
        instructions = []
        for name in re.findall(CALLS, instruction.text):
            for inner in self.computations.get(name, []):
                instructions += [inner, *self.inside(inner)]
        return instructions


def parse(text):
    """Returns the `Program` of a compiled program's text."""
    computations, main, name = {}, None, None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name = header.group(2)
            computations[name] = []
            main = name if header.group(1) else main
        elif line == "}":
            name = None
        elif name and (match := LINE.match(re.sub(r"/\*index=\d+\*/", "", line))):
            root, own, result, operation, rest = match.groups()
            operands = re.findall(r"%([\w.-]+)", rest[: closing(rest)])
            computations[name].append(
                Instruction(own, result, operation, operands, rest, bool(root))
            )
    return Program(computations, main)


def closing(text):
    """Returns where the parenthesis that is open at the beginning closes."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    return len(text)


def walk(program, name=None, runs=1):
    """Yields (instruction, name of its computation, runs) of all that runs, loops and calls apart.

    The body of a loop runs as often as the loop. What a fusion consists of is not yielded.
    """
    name = name or program.main
    for i in program.computations[name]:
        if i.operation == "while":
            yield from walk(program, i.called("body"), runs * trip_count(program, i))
        elif i.operation in ("call", "conditional", "async-start"):
            for inner in re.findall(CALLS, i.text):
                yield from walk(program, inner, runs)
        else:
            yield i, name, runs


def trip_count(program, loop):
    """Returns how often a loop runs: as its text says, or the bound of its counter."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known.group(1))
    condition = program.computations[loop.called("condition")]
    condition = [*condition, *(inner for i in condition for inner in program.inside(i))]
    bounds = [
        int(i.text[: closing(i.text)]) for i in condition
        if i.operation == "constant" and re.match(r"[su]\d+\[\]", i.result)
    ]  # fmt: skip
    return max(bounds, default=1)


def array_bytes(text):
    """Returns the bytes of each array in an XLA type, like `(f32[8,4]{1,0}, bf16[2])`."""
    kinds = re.findall(r"\b([a-z]+\d*)\[", text)
    pairs = zip(kinds, shapes(text), strict=True)
    return [BYTES.get(kind, 4) * int(np.prod(shape)) for kind, shape in pairs]


def shapes(text):
    """Returns the dimensions of all arrays of an XLA type."""
    texts = re.findall(r"\b[a-z]+\d*\[([\d,]*)\]", text)
    return [[int(n) for n in dims.split(",") if n] for dims in texts]


def collectives(program):
    """Returns the exchanges between the devices: {kind: (how often, bytes)} of one run, per device.

    Bytes are those of the results.
    """
    totals, seen = {}, set()
    for top, _, runs in walk(program):
        for i in (top, *program.inside(top)):
            kind = i.operation.removesuffix("-start")
            # One exchange may be cut into pieces, to go on beside other work: all of one channel.
            channel = re.search(r"channel_id=(\d+)", i.text)
            if kind not in COLLECTIVES or (channel and channel.group(1) in seen):
                continue
            sizes = array_bytes(i.result)
            count, size = totals.get(kind, (0, 0))
            # What is started holds operand and result, and the result is not the smaller one.
            size += runs * (max(sizes) if i.operation.endswith("-start") else sum(sizes))
            totals[kind] = (count + runs, size)
            seen.update(channel.groups() if channel else ())
    return totals
