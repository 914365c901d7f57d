"""Where the wall time of a run goes, over all its starts: into training steps, and into what else.

Process 0 counts. The sums stand in the lines of metrics.jsonl, and a start goes on from the last
of them. Not known, and left out, are the time between two starts and what a start that was killed
did after its last line.
"""

import contextlib
import math
import time

PREFIX = "seconds/"  # of the sums in metrics.jsonl
GOODPUT = "goodput"  # there: the share of `STEPS`
STEPS, LOST = "steps", "lost"  # steps that were done, and done again after a kill
KINDS = (STEPS, "starting", "restoring", "compiling", "data", "looking", "saving", LOST)


class Stopwatch:
    """Adds up the time of a process by kind; one kind at a time."""

    def __init__(self, clock=time.perf_counter):
        self._clock = clock
        self.begin()

    def begin(self):
        """Starts anew, with the time of starting."""
        self._sums, self._kind, self._since = dict.fromkeys(KINDS, 0.0), "starting", self._clock()

    def turn(self, kind, but=0.0):
        """Counts what follows as `kind`; of what was before, `but` seconds as that too."""
        now = self._clock()
        self._sums[self._kind] += now - self._since - but
        self._sums[kind] += but
        self._kind, self._since = kind, now

    @contextlib.contextmanager
    def of(self, kind, but=0.0):
        """Counts the block as `kind`, save its first `but` seconds (which may be all of it)."""
        before, began = self._kind, self._clock()
        self.turn(kind)
        try:
            yield
        finally:
            self.turn(before, min(but, self._clock() - began))

    def seconds(self):
        """Returns the sums so far, {kind: seconds}."""
        self.turn(self._kind)
        return dict(self._sums)

    def go_on(self, sums):
        """Adds the sums of earlier starts."""
        for kind in KINDS:
            self._sums[kind] += sums[kind]


def of_lines(lines):
    """Returns the sums of the last line of metrics.jsonl that has them; else all are 0."""
    last = next((line for line in reversed(lines) if PREFIX + STEPS in line), {})
    return {kind: _number(last, kind) for kind in KINDS}


def _number(line, kind):
    value = line.get(PREFIX + kind)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def before(lines, step):
    """Returns the sums of earlier starts, for a start that goes on from a checkpoint.

    Args:
      lines: all lines of metrics.jsonl, in order, those after the checkpoint too.
      step: of the checkpoint. Of steps between two lines as many are lost as lie behind it.
    """
    sums = of_lines(lines)
    lines = [line for line in lines if PREFIX + STEPS in line] or [{"step": 0}]
    end, kept, done = lines[-1]["step"], 0, 0.0
    for line in lines:
        if line["step"] <= step:
            kept, done = line["step"], _number(line, STEPS)
    if end > step:
        lost = max(sums[STEPS] - done, 0) * (end - step) / (end - kept)
        sums[STEPS], sums[LOST] = sums[STEPS] - lost, sums[LOST] + lost
    return sums


def shares(sums):
    """Returns {kind: share} of sums, of all kinds that took any time, `STEPS` first."""
    total = sum(sums.values())
    return {kind: sums[kind] / total for kind in KINDS if sums[kind]}


def metrics(sums):
    """Returns sums as they are logged: {name: number}."""
    named = {PREFIX + kind: seconds for kind, seconds in sums.items() if seconds}
    return {GOODPUT: shares(sums).get(STEPS, 0.0)} | named


def told(sums):
    """Returns sums in a line for people."""
    parts = {kind: f"{100 * share:.3g} %" for kind, share in shares(sums).items()}
    steps = parts.pop(STEPS, "0 %")
    rest = ", ".join(f"{kind} {share}" for kind, share in parts.items())
    return f"{GOODPUT} {steps} of {sum(sums.values()):,.0f} s in all starts; {rest}"


_watch = Stopwatch()
begin, turn, of, seconds, go_on = (
    _watch.begin, _watch.turn, _watch.of, _watch.seconds, _watch.go_on
)  # fmt: skip
