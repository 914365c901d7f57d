"""Runs in a bucket that fails, stalls and is slow, and runs that are killed: nothing is lost."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bucket
import pytest
from jobs import ROOT, STEPS_ALONE, Jobs, checkpoints, metrics, wait

OPTIONS = STEPS_ALONE | {"training.checkpoint_per_step": 3, "training.num_steps": 12}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def unbroken(jobs):
    jobs.run_here(jobs.folder / "unbroken", OPTIONS)
    return jobs.folder / "unbroken"


def send(jobs, url):
    """Puts the records into the bucket; nothing of them is on this machine."""
    shutil.rmtree(jobs.folder / "cache", ignore_errors=True)
    for path in jobs.records.rglob("*"):
        if path.is_file():
            bucket.put(url, f"records/{path.relative_to(jobs.records)}", path.read_bytes())


def start(jobs, url, options=OPTIONS, count=1):
    """Starts a job from and to the bucket at `url`, its output in a file of this machine."""
    jobs.env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | bucket.environment(url)
    jobs.env["XDG_CACHE_HOME"] = str(jobs.folder / "cache")
    options = options | {"dataset.root": f"gs://{bucket.BUCKET}/records"}
    words = jobs.command(f"gs://{bucket.BUCKET}/run", options)[1:]
    return jobs.start(jobs.folder / "bucket", count=count, words=words)


def copy(url, folder):
    """The run in the bucket as a folder of this machine."""
    for name in bucket.names(url, "run/"):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bucket.get(url, name))
    return Path(folder, "run")


def assert_same(unbroken, run):
    """The checkpoints of a run are those of the unbroken one, bit for bit, and so is its log."""
    one, other = checkpoints(unbroken), checkpoints(run)
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = value == other[key]
        assert same if isinstance(value, dict) else same.all(), key
    assert metrics(unbroken) == metrics(run)


FAULTS = {
    "503 and 429 in bursts": lambda n: ("503", "429")[n % 2] if n % 40 < 6 else "",
    "answers that end half-way": lambda n: "cut" if n % 9 == 0 else "",
    "20 s of silence": lambda n: "silence" if n in (20, 120) else "",
    "1 MB/s": lambda n: "slow",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_run_comes_to_its_end_over_a_bad_connection(jobs, unbroken, name, tmp_path):
    """It goes on, and nothing is lost."""
    log = jobs.folder / "bucket.log.0"
    with bucket.through() as url:
        send(jobs, url)
        bucket.Proxy.fault = staticmethod(FAULTS[name])
        assert wait(start(jobs, url), 400) == [0], log.read_text()[-3000:]
        bucket.Proxy.fault = staticmethod(lambda n: "")
        assert_same(unbroken, copy(url, tmp_path))


def torture(jobs, unbroken, kills, seed, count, folder):
    """Kills a run in a bucket at random moments, then lets it come to its end."""
    rng, longest = random.Random(seed), 0.0
    log = jobs.folder / "bucket.log.0"
    with bucket.started() as url:
        send(jobs, url)
        for _ in range(kills):
            length, began = log.stat().st_size if log.exists() else 0, time.monotonic()
            if rng.random() < 0.5:  # another machine, which has no copy of the data
                shutil.rmtree(jobs.folder / "cache", ignore_errors=True)
            started = start(jobs, url, count=count)
            if longest and rng.random() < 0.3:
                time.sleep(rng.uniform(0, longest))
            else:
                while "compiling" not in log.read_text()[length:]:
                    assert started[0].poll() is None, log.read_text()[-2000:]
                    time.sleep(0.02)
                longest = time.monotonic() - began
                time.sleep(rng.uniform(0, 6))
            for victim in rng.sample(started, rng.randint(1, count)):
                victim.kill()
            wait(started, 200)
        assert wait(start(jobs, url, count=count), 300) == [0] * count, log.read_text()[-3000:]
        assert_same(unbroken, copy(url, folder))


def test_three_kills_in_a_bucket_leave_no_trace(jobs, unbroken, tmp_path):
    torture(jobs, unbroken, kills=3, seed=0, count=1, folder=tmp_path)


@pytest.mark.slow
def test_twenty_kills_of_two_processes_in_a_bucket_leave_no_trace(jobs, tmp_path):
    jobs.train(tmp_path / "unbroken", OPTIONS, count=2)
    torture(jobs, tmp_path / "unbroken", kills=20, seed=1, count=2, folder=tmp_path / "copy")


@pytest.mark.slow
def test_operations_are_counted(jobs):
    """How many requests a run makes in all, and each checkpoint: docs/pods.md has the figures."""
    counts = []
    for steps in (3, 12):
        with bucket.through() as url:
            send(jobs, url)
            assert wait(start(jobs, url, OPTIONS | {"training.num_steps": steps}), 300) == [0]
            counts.append(dict(bucket.Proxy.counts))
    each = {k: (n - counts[0].get(k, 0)) / 3 for k, n in counts[1].items()}
    print("start, one checkpoint and end:", counts[0], "each further checkpoint:", each)
    assert sum(each.values()) < 400


def killed(code, url, folder, rng, kills, longest):
    """Runs a piece of Python again and again, killed at random moments after its first line."""
    env = os.environ | bucket.environment(url) | {"XDG_CACHE_HOME": str(folder)}
    for kill in range(kills + 1):
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "begun\n"
        if kill < kills:
            time.sleep(rng.uniform(0, longest))
            process.kill()
        rest, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return rest


COPIES = """
from utils import files
source = files.path("gs://bucket/set")
print("begun", flush=True)
print(files.local(source))
"""


@pytest.mark.slow
def test_kills_in_the_middle_of_a_copy_leave_no_trace(tmp_path):
    rng = random.Random(2)
    sent = {f"set/{i}/data": rng.randbytes(300_000) for i in range(12)}
    with bucket.through(lambda n: "slow") as url:
        for name, content in sent.items():
            bucket.put(url, name, content)
        local = Path(killed(COPIES, url, tmp_path, rng, kills=20, longest=0.6).strip())
    there = {f"set/{p.relative_to(local)}": p for p in local.rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in there.items()} == sent


GROWS = """
import time
from utils import files, mirrors
mirrors.EVERY = 0.01
here = files.append(files.path("gs://bucket/log"))
print("begun", flush=True)
done = len(here.read_text().splitlines()) if here.exists() else 0
with here.open("a") as file:
    for i in range(done, done + 300):
        file.write(f"{i} {'x' * 1000}\\n")
        file.flush()
        time.sleep(0.005)
files.finish()
"""


@pytest.mark.slow
def test_kills_in_the_middle_of_a_mirror_lose_the_end_alone(tmp_path):
    with bucket.through(lambda n: "slow") as url:
        killed(GROWS, url, tmp_path, random.Random(3), kills=20, longest=1.0)
        lines = bucket.get(url, "log").decode().splitlines()
    assert lines == [f"{i} {'x' * 1000}" for i in range(len(lines))] and len(lines) > 300
