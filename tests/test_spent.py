"""Where the time of a run goes, over all its starts."""

import json
import time

import pytest
from jobs import STEPS_ALONE, Jobs

from run import spent
from scripts.compare import runs
from utils import iterator


def line(step, **seconds):
    return {"step": step, "loss": 1.0} | spent.metrics(dict.fromkeys(spent.KINDS, 0.0) | seconds)


def test_each_second_counts_once():
    now = [10.0]
    watch = spent.Stopwatch(lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    wait(3)
    watch.turn("steps")
    for waited in (5, 1):  # the device computes for two of these seconds
        with watch.of("data", but=2):
            wait(waited)
    with watch.of("looking"):
        wait(10)
        with watch.of("saving"):
            wait(20)
    wait(0.5)
    watch.go_on(dict.fromkeys(spent.KINDS, 0.0) | {"starting": 100, "lost": 7})
    taken = {kind: seconds for kind, seconds in watch.seconds().items() if seconds}
    assert taken == {
        "steps": 3.5, "starting": 103, "data": 3, "looking": 10, "saving": 20, "lost": 7
    }  # fmt: skip


@pytest.mark.parametrize(
    "step, lost", [(0, 60), (100, 40), (150, 30), (200, 20), (300, 0), (350, 0)]
)
def test_steps_behind_the_checkpoint_are_lost(step, lost):
    lines = [line(100, steps=20, starting=5), {"step": 100, "fid": 3.0}]
    lines += [line(200, steps=40, starting=5), line(300, steps=60, starting=5, lost=1)]
    sums = spent.before(lines, step)
    assert sums["steps"] == pytest.approx(60 - lost) and sums["lost"] == pytest.approx(1 + lost)
    assert sums["starting"] == 5 and sum(sums.values()) == 66


def test_a_log_without_times_counts_from_now():
    assert sum(spent.before([{"step": 5, "loss": 1.0}], 3).values()) == 0
    assert sum(spent.before([], 0).values()) == 0


def test_all_starts_of_a_run_are_counted(tmp_path):
    """The time of a start that came to no line of its own is not forgotten."""
    jobs = Jobs(tmp_path / "jobs")
    options = STEPS_ALONE | {"training.checkpoint_per_step": 4}
    run = tmp_path / "run"
    draw = iterator.RecordIterator.__next__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            iterator.RecordIterator, "__next__", lambda self: (time.sleep(0.2), draw(self))[1]
        )
        jobs.run_here(run, options | {"training.num_steps": 8})
    path = run / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    first = spent.of_lines(lines)
    assert 0.2 * 4 < first["data"] < 0.2 * 10
    assert all(first[kind] > 0 for kind in ("steps", "starting", "compiling", "saving"))
    # As if it had been killed at step 14, and its time were 100 times as long.
    lines[-1] |= spent.metrics({kind: 100 * seconds for kind, seconds in first.items()})
    lines += [lines[-1] | {"step": 14, "seconds/steps": lines[-1]["seconds/steps"] + 1000}]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    jobs.run_here(run, options | {"training.num_steps": 12})
    assert runs.read(run, "run").facts["lost, % of time"] > 0
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    last = spent.of_lines(lines)
    assert last["lost"] == pytest.approx(1000) and last["restoring"] > 0
    assert last["starting"] > 100 * first["starting"]
    (kept,) = [line for line in lines if line["step"] == 8]  # were this start killed by now
    assert kept["seconds/lost"] == pytest.approx(1000) and kept["seconds/restoring"] > 0
    assert lines[-1]["goodput"] == pytest.approx(last["steps"] / sum(last.values()))
