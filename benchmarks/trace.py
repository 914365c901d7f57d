"""Where the time of a step goes: the kernels in a trace of jax's profiler, by kind."""

import collections
import re
from pathlib import Path

import jax

# By the name of a kernel, the first that fits. XLA names its own after what is in them; `fusion_12`
# without more is a fusion along rows (norms, softmax), which Triton computes.
KINDS = {
    "attention": r"fmha|sdpa|flash|attention",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|matmul|splitk|dot|conv(?!ert)",
    "copies": r"memcpy|memset|copy|transpose|concatenate|slice|broadcast",
    "sums": r"reduce|softmax|^fusion|^triton",
    "elementwise": r"",
}


def kind(name):
    """Returns which of KINDS a kernel is of."""
    return next(kind for kind, words in KINDS.items() if re.search(words, name.lower()))


def kernels(folder):
    """Returns the kernels of the first device in a trace.

    Args:
      folder: what `jax.profiler.trace` wrote into.

    Returns:
      [(name, seconds)], one for each run of a kernel.

    Raises:
      ValueError: no trace, or nothing of a device in it.
    """
    files = sorted(Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise ValueError(f"{folder} holds no trace of jax's profiler (*.xplane.pb)")
    planes = list(jax.profiler.ProfileData.from_file(str(files[-1])).planes)
    for plane in planes:
        if plane.name.startswith(("/device:GPU", "/device:TPU")):
            lines = [line for line in plane.lines if is_of_kernels(line.name)]
            return [(e.name, e.duration_ns / 1e9) for line in lines for e in line.events]
    # A CPU's operations stand among the events of its host's threads.
    found = [
        (event.name, event.duration_ns / 1e9)
        for plane in planes
        for line in plane.lines
        for event in line.events
        if any(key == "hlo_op" for key, _ in event.stats)
        and not re.match(r"while|call|conditional", event.name)  # what they run stands beside them
    ]
    if not found:
        raise ValueError(f"{files[-1]} tells nothing of a device")
    return found


def is_of_kernels(line):
    """Tells whether a line of a device's plane holds its kernels; others repeat them."""
    return line.startswith("Stream") or line == "XLA Ops"


def summary(kernels, steps):
    """Returns ms of a step: {"by kind": {kind: ms}, "largest": [(name, ms, runs of a step)]}."""
    of_kind, of_name = collections.Counter(), collections.defaultdict(list)
    for name, seconds in kernels:
        of_kind[kind(name)] += 1e3 * seconds / steps
        of_name[name].append(1e3 * seconds / steps)
    largest = sorted(of_name.items(), key=lambda item: -sum(item[1]))[:20]
    return {
        "by kind": {name: of_kind[name] for name in KINDS},
        "kernels of a step": len(kernels) / steps,
        "largest": [(name, sum(times), len(times) / steps) for name, times in largest],
    }


def report(summary):
    """Prints a `summary` for people."""
    total = sum(summary["by kind"].values())
    count = summary["kernels of a step"]
    print(f"kernels: {total:.2f} ms of a step, {count:.0f} of them")
    for name, ms in summary["by kind"].items():
        print(f"  {name:12} {ms:9.2f} ms {ms / max(total, 1e-9):6.1%}")
    print("the largest:")
    for name, ms, runs in summary["largest"]:
        print(f"  {ms:9.3f} ms {runs:6.0f} x  {kind(name):12} {name[:80]}")
