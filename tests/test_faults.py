"""A training that is stopped, killed, filled up and doubled ends as one that was left alone."""

import random
import resource
import signal
import time
from pathlib import Path

import pytest
from jobs import (
    OPTIONS,
    Jobs,
    assert_equal_runs,
    checkpoints,
    outputs,
    results,
    until,
    wait,
)

from run import checkpoint, layout
from run import results as stored
from utils import dataset, processes

LAST = OPTIONS["training.num_steps"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def unbroken(jobs):
    """The run to compare with."""
    jobs.run_here(jobs.folder / "unbroken")
    return jobs.folder / "unbroken"


def test_the_life_of_a_run(jobs, unbroken):
    """Preempted, out of space, killed while it writes a checkpoint; and equal in the end."""
    workdir = jobs.folder / "run"
    (process,) = jobs.start(workdir)
    until(lambda: layout.steps(workdir), process)
    process.send_signal(signal.SIGSTOP)
    statuses, (text,) = jobs.run(workdir)  # one more in the same folder
    assert statuses == [1] and process.poll() is None
    (line,) = [line for line in text.splitlines() if "error: " in line]
    assert f"--workdir {workdir} is in use: a run goes on there (process {process.pid}" in line
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    assert wait([process]) == [processes.RESTART]
    (text,) = outputs(workdir)
    assert "stopped as asked" in text and "Traceback" not in text
    before = checkpoints(workdir)
    assert before and layout.steps(workdir)[-1] < LAST

    # No file may grow beyond 40 kB: the log goes on, a checkpoint does not fit.
    (process,) = jobs.start(workdir)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
    assert wait([process]) == [1]
    text = outputs(workdir)[0].rpartition("going on from step")[2]
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "could not be written (File too large); the ones before are whole" in line
    assert "Traceback" not in text
    after = checkpoints(workdir)
    assert after.keys() == before.keys()

    (process,) = jobs.start(workdir)
    folder = workdir / "checkpoints"
    until(lambda: any("tmp" in path.name for path in folder.iterdir()), process)
    process.kill()
    assert wait([process]) == [-signal.SIGKILL]
    jobs.train(workdir)
    assert_equal_runs(unbroken, workdir)
    assert not any("tmp" in path.name for path in folder.iterdir())
    assert list((workdir / "samples").iterdir()) != []
    (text,) = jobs.train(workdir)
    assert f"finished: step {LAST} of {LAST}" in text
    assert_equal_runs(unbroken, workdir)


@pytest.mark.slow
def test_killed_between_two_results_of_an_evaluation(jobs):
    options = {"fid.weights": "ema,params", "fid.num_samples": 4000, "training.num_steps": 8}
    whole, killed = jobs.folder / "evaluated", jobs.folder / "killed_in_evaluation"
    jobs.run_here(whole, options)
    (process,) = jobs.start(killed, options)
    until(lambda: (killed / "results.json").exists(), process)
    process.kill()
    wait([process])
    assert [result["weights"] for result in results(killed)] == ["ema"]
    jobs.train(killed, options)
    assert_equal_runs(whole, killed)
    assert [result["weights"] for result in results(killed)] == ["ema", "params"]


def test_an_evaluation_that_is_repeated_takes_the_place_of_the_first(tmp_path):
    result = {"fid": 1.0, "weights": "ema", "checkpoint_step": 8, "sampling_times": [1.0, 0.0]}
    for change in ({}, {"weights": "params"}, {"fid": 2.0}, {"checkpoint_step": 16}):
        stored.save(tmp_path, result | change)
    stored.save(tmp_path, result | {"fid": 3.0, "weights_checksum": "of others"})
    found = [(r["weights"], r["checkpoint_step"], r["fid"]) for r in results(tmp_path)]
    assert found == [("params", 8, 1.0), ("ema", 8, 2.0), ("ema", 16, 1.0), ("ema", 8, 3.0)]


def torture(jobs, name, count, kills, seed, unbroken):
    """Kills a run of `count` processes `kills` times at moments that `seed` chooses.

    Returns the number of processes that were killed, and how many starts it took.
    """
    rng = random.Random(seed)
    workdir = jobs.folder / name
    killed = starts = 0
    longest = 0.0  # seconds that a start was seen to take to its first new line of the log
    while killed < kills:
        starts += 1
        began = time.monotonic()
        length = log_length(workdir)
        started = jobs.start(workdir, count=count)
        # Half of the kills come anywhere from the start on, half when the run is under way.
        if rng.random() < 0.5 and longest:
            time.sleep(rng.uniform(0, longest))
        else:
            while log_length(workdir) == length and not ended(started):
                time.sleep(0.01)
            longest = max(longest, time.monotonic() - began)
            time.sleep(rng.uniform(0, 1.5))
        victims = rng.sample(started, rng.randint(1, count))
        for victim in victims:
            if victim.poll() is None:
                victim.kill()
        statuses = wait(started)
        assert all(status in (0, 75, -6, -9) for status in statuses), outputs(workdir, count)
        killed += -9 in statuses
        if 0 in statuses and layout.steps(workdir)[-1] == LAST and killed < kills:
            checkpoint_of_the_end(workdir)
    jobs.train(workdir, count=count)
    assert_equal_runs(unbroken, workdir)
    return killed, starts


def checkpoint_of_the_end(workdir):
    """Takes the last checkpoint away, so that there is something left to kill."""
    checkpoint.set_aside(workdir, LAST)


def log_length(workdir):
    path = Path(workdir) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def ended(started):
    return any(process.poll() is not None for process in started)


@pytest.mark.slow
def test_two_kills_leave_no_trace(jobs, unbroken):
    torture(jobs, "tortured", count=1, kills=2, seed=0, unbroken=unbroken)


@pytest.mark.slow
def test_twenty_kills_of_two_processes_leave_no_trace(jobs):
    unbroken = jobs.folder / "unbroken_two"
    jobs.train(unbroken, count=2)
    killed, starts = torture(jobs, "tortured_two", count=2, kills=20, seed=1, unbroken=unbroken)
    print(f"{killed} kills in {starts} starts")


@pytest.mark.slow
def test_a_damaged_shard_is_named(jobs):
    workdir, shard = jobs.folder / "shard", dataset.shard_path(jobs.records, "train", 1, 2)
    whole = shard.read_bytes()
    (process,) = jobs.start(workdir, {"training.num_steps": 10**6})
    try:
        until(lambda: log_length(workdir) > 2, process)
        # In place, as the file is open; what is read ahead is little.
        shard.write_bytes(bytes(len(whole)))
        assert wait([process]) == [1]
    finally:
        shard.write_bytes(whole)
    (text,) = outputs(workdir)
    line = [line for line in text.splitlines() if line.startswith("error: ")][-1]
    assert shard.name in line and "Traceback" not in text
    assert layout.steps(workdir)
