"""Several processes: the numbers of one, and an end together whatever happens to one of them."""

import json
import time

import numpy as np
import pytest
from jobs import STEPS_ALONE, Jobs, assert_equal_runs, metrics, outputs, results, wait

from run import layout
from utils import processes

ENDLESS = {"training.num_steps": 10**6, "training.log_per_step": 1, **STEPS_ALONE}
UNSAVED = {"training.checkpoint_per_epoch": 10**6, **STEPS_ALONE}  # steps alone notice a signal

# Runs several jobs in one set of processes, as starting them takes longest. The last arguments
# are those that join, the first is a JSON list of the command lines.
PAIR = """
import json, pathlib, sys
from configs import load_config
from utils import processes
from run import workdirs
import main
flags = main.parse_flags(["--workdir=-", *sys.argv[2:]])
processes.join(flags.coordinator_address, flags.num_processes, flags.process_id)
import evaluate, sample, train
for words in json.loads(sys.argv[1]):
    config, rest = load_config.from_command_line(words)
    workdir = workdirs.make(main.parse_flags(rest).workdir)
    if config.eval_only:
        evaluate.evaluate_job(config, workdir)
    elif config.sample_only:
        sample.sample_job(config, workdir)
    else:
        train.train_job(config, workdir)
processes.leave()
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("jobs"))


def lives(jobs, name, count):
    """Trains, trains to the end after a break, evaluates and samples, in `count` processes."""
    folder = jobs.folder / name
    folder.mkdir()
    run, per_device = folder / "run", {"fid.device_batch_size": 16 // count}
    look = {"load_from": run, "sampling.num_images": 6, "sampling.format": "npz", **per_device}
    all_jobs = [
        (run, {"training.num_steps": 10, **per_device}),
        (run, STEPS_ALONE),
        (folder / "evaluation", {"eval_only": True, "fid.weights": "params", **look}),
        (folder / "samples", {"sample_only": True, **look}),
    ]
    if count == 1:
        for job in all_jobs:
            jobs.run_here(*job)
        return folder
    code = json.dumps([jobs.command(*job)[2:] for job in all_jobs])
    started = jobs.start(folder / "pair", count=count, words=["-c", PAIR, code])
    statuses = wait(started, 300)
    assert statuses == [0] * count, "\n".join(outputs(folder / "pair", count))
    return folder


def assert_equal_lives(one, other):
    # Weights whose true gradient is zero (the bias of the keys) hold rounding noise that Adam makes
    # into steps: compared is what comes of the weights.
    for name in ("run", "evaluation"):
        pairs = zip(results(one / name), results(other / name), strict=True)
        for a, b in pairs:
            assert abs(a["fid"] - b["fid"]) <= 1e-5 * a["fid"]
            assert a["checkpoint_step"] == b["checkpoint_step"]
    for a, b in zip(metrics(one / "run"), metrics(other / "run"), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for key, value in a.items():
            assert abs(value - b[key]) <= 1e-5 * abs(value), (a["step"], key, value, b[key])
    name = "samples/samples/step_24/samples.npz"
    with np.load(one / name) as a, np.load(other / name) as b:
        # A rounding error may carry a value over the edge between two bytes.
        difference = np.abs(a["arr_0"].astype(int) - b["arr_0"])
        assert difference.max() <= 1 and difference.mean() <= 0.01
        np.testing.assert_array_equal(a["arr_1"], b["arr_1"])


@pytest.fixture(scope="module")
def alone(jobs):
    return lives(jobs, "alone", 1)


def test_two_processes_give_the_numbers_of_one(jobs, alone):
    assert_equal_lives(alone, lives(jobs, "two", 2))
    text = outputs(jobs.folder / "two" / "pair", 2)[1]
    assert "step " not in text and "fid" not in text  # one host logs


@pytest.mark.slow
def test_four_processes_give_the_numbers_of_one(jobs, alone):
    assert_equal_lives(alone, lives(jobs, "four", 4))


def until(condition, started, timeout=120):
    end = time.monotonic() + timeout
    while not condition():
        assert all(process.poll() is None for process in started), "a process ended early"
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def preempted(jobs):
    """A run of two processes that stopped since one of them was asked to."""
    workdir = jobs.folder / "preempted"
    started = jobs.start(workdir, {**ENDLESS, **UNSAVED}, count=2)
    until(lambda: "step 5/" in outputs(workdir)[0], started)
    asked = time.monotonic()
    started[1].terminate()
    assert wait(started) == [processes.RESTART] * 2, outputs(workdir, 2)
    assert time.monotonic() - asked < 30
    return workdir


def test_sigterm_to_one_stops_all_at_the_same_step(preempted):
    step = layout.steps(preempted)[-1]
    logged = [line["step"] for line in metrics(preempted) if "loss" in line]
    assert logged == list(range(1, step + 1))
    assert "Traceback" not in "".join(outputs(preempted, 2))


@pytest.mark.slow
def test_another_number_of_processes_goes_on(jobs, preempted):
    # The step is by chance: without a break, one process does as many.
    steps = layout.steps(preempted)[-1] + 2
    same = {"training.num_steps": steps, "training.log_per_step": 1, **UNSAVED}
    jobs.run_here(preempted, same)
    jobs.run_here(jobs.folder / "unbroken", same)
    pairs = [
        [line for line in metrics(jobs.folder / name) if "loss" in line]
        for name in ("preempted", "unbroken")
    ]
    for a, b in zip(*pairs, strict=True):
        for key, value in a.items():
            # To rounding, which steps amplify: 1e-5 was seen after 400, and fast machines do many.
            assert abs(value - b[key]) <= 1e-4 * abs(value), (a["step"], key)


def test_a_signal_that_comes_twice_at_once_counts_once(jobs):
    """A scheduler sends it to every process, and launch.sh passes it on. Later it would kill."""
    workdir = jobs.folder / "twice"
    started = jobs.start(workdir, ENDLESS)
    until(lambda: "step 5/" in outputs(workdir)[0], started)
    for _ in range(20):  # while the job saves and leaves
        started[0].terminate()
        time.sleep(0.02)
    assert wait(started) == [processes.RESTART], outputs(workdir)
    assert layout.steps(workdir)[-1] >= 5


# Process 1 alone finds a shard damaged, after a few batches.
DAMAGED = """
import sys, time
import main
from utils import dataset, record_files
read = dataset.Records.read
reads = []
def damaged(self, *arguments, **keywords):
    reads.append(time.monotonic())
    if len(reads) > 6 and "--process_id=1" in sys.argv:
        raise ValueError(record_files.damaged(self.shard_paths[1], "cannot be opened"))
    return read(self, *arguments, **keywords)
dataset.Records.read = damaged
sys.exit(main.main(sys.argv[1:]))
"""


def test_a_shard_that_one_cannot_read_ends_all_with_its_name(jobs):
    workdir = jobs.folder / "damaged"
    words = ["-c", DAMAGED, *jobs.command(workdir, ENDLESS)[2:]]
    started = jobs.start(workdir, count=2, words=words)
    assert wait(started) == [1, 1]
    first, second = outputs(workdir, 2)
    name = "records-train.array_record-00001-of-00002: cannot be opened"
    assert f"error: process 1: damaged shard {jobs.records}/{name}" in second
    assert f"error: process 1 failed: damaged shard {jobs.records}/{name}" in first
    assert "Traceback" not in first + second


def test_a_process_that_is_killed_ends_the_others(jobs):
    workdir = jobs.folder / "killed"
    started = jobs.start(workdir, ENDLESS, count=2)
    until(lambda: "step 3/" in outputs(workdir)[0], started)
    started[1].kill()
    assert wait(started, 90)[0] == processes.RESTART
    assert "error: process 0: lost another process" in outputs(workdir)[0]


def test_a_lost_process_is_known_by_any_cause_of_an_error(monkeypatch):
    """As where a checkpoint cannot be written for it, and the line says only the system's word."""
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    try:
        try:
            raise RuntimeError("Gloo AllGather failed: [external/gloo] reset by peer")
        except RuntimeError as cause:
            raise OSError("checkpoint 4 could not be written (connection reset)") from cause
    except OSError as error:
        assert processes.lost_peer(error)
    assert not processes.lost_peer(OSError("checkpoint 4 could not be written (no space left)"))


@pytest.mark.parametrize("part", [0, 1])
def test_a_missing_process_is_waited_for_and_then_told(jobs, part):
    workdir = jobs.folder / f"missing{part}"
    flags = ["--join_timeout=3"]
    statuses = wait(jobs.start(workdir, count=2, flags=flags, parts=[part]))
    assert statuses == [processes.RESTART]
    (line,) = [x for x in outputs(workdir, 2)[part].splitlines() if x.startswith("error: ")]
    assert f"process {part} of 2 waited 3 s at localhost:" in line
    assert not workdir.exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ((None, 2, None), "go together"),
        (("host:1", 2, None), "go together"),
        (("host", 2, 0), "expected HOST:PORT"),
        (("host:1", 2, 2), "is not in 0..1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        processes.join(*flags)


@pytest.mark.parametrize("variables", [{}, {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}])
def test_a_single_process_joins_nothing(run_python, variables):
    code = """
from utils import processes

processes.join()
assert processes.is_writer() and processes.from_writer((1, None)) == [1, None]
assert processes.all_true(1) is True and processes.all_true([]) is False
"""
    run_python(code, devices=1, env=variables)


def test_equal_runs_are_told_from_others(alone, tmp_path):
    """The comparison that these tests rest on sees a difference."""
    assert_equal_runs(alone / "run", alone / "run")
    path = alone / "run" / "metrics.jsonl"
    kept = path.read_text()
    path.write_text(kept.replace('"loss": 0.99', '"loss": 0.98', 1))
    changed = metrics(alone / "run")
    path.write_text(kept)
    assert changed != metrics(alone / "run")
