"""Ends that are nobody's wish: readers that go away, hang-ups, signals in the first second."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stub_repository import Repository

from run import metric_writer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


# The first second of main.py -------------------------------------------------------------------

MAIN = [sys.executable, "main.py", "--workdir=/nonexistent/run"]
MAIN += ["--config=configs/load_config.py:digits"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_before_anything_is_begun_asks_to_begin_again(name):
    process = subprocess.Popen(MAIN, cwd=ROOT, stdout=-1, stderr=-1, text=True)
    caught = Path(f"/proc/{process.pid}/status")
    until = time.monotonic() + 60
    while not has_handler(caught.read_text(), getattr(signal, name)):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and not out
    (line,) = err.splitlines()
    assert line.startswith("stopped as asked")


def has_handler(status, number):
    """Whether the lines of /proc/PID/status say that a signal is caught, and SIGHUP, the last."""
    line = next(x for x in status.splitlines() if x.startswith("SigCgt:"))
    mask = int(line.split()[1], 16)
    return all(mask >> (n - 1) & 1 for n in (number, signal.SIGHUP))


def test_what_is_ignored_stays_ignored():
    """A hang-up under nohup."""
    code = """
import os, signal, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from utils import signals
signals.end_at_once(75)
os.kill(os.getpid(), signal.SIGHUP)
time.sleep(0.3)
signals.listen_to(signals.STOP, lambda *_: print("asked"))
os.kill(os.getpid(), signal.SIGHUP)
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "asked\n", "")


# Readers ---------------------------------------------------------------------------------------

TALKS = """
import logging, sys
from utils import signals
signals.outlive_readers()
logging.basicConfig(level=logging.INFO)
print(sys.stdin.readline(), flush=True)
for i in range(20):
    print("caf\\udce9" * 1000, flush=True)
    logging.info("x")
    print("x", file=sys.stderr)
raise SystemExit(7)
"""


def test_readers_that_go_away_are_no_error():
    process = subprocess.Popen(
        [sys.executable, "-c", TALKS], cwd=ROOT, stdin=-1, stdout=-1, stderr=-1, text=True
    )
    process.stdout.close()
    process.stderr.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 7
    done = subprocess.run(
        [sys.executable, "-c", TALKS], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1
    )
    assert done.returncode == 7 and b"caf\\udce9" in done.stdout  # what is no text is no error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_below_the_output_is_no_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", TALKS], cwd=ROOT, stdin=subprocess.DEVNULL,
            stdout=full, stderr=full,
        )  # fmt: skip
    assert done.returncode == 7


CHATTY = """
for i in range(3000):
    print("line", i, flush=True)
print("the end", flush=True)
sys.exit(5)
"""


def test_the_log_outlives_who_reads_the_output(repository):
    repository.main(CHATTY)
    process = repository.start("scripts/launch.sh", "job")
    assert process.stdout.readline() == "hello from main\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 5
    assert repository.log().endswith("line 2999\nthe end\n")
    assert "Broken pipe" not in process.stderr.read()


def test_preparing_data_outlives_its_reader(tmp_path):
    """The last line of prepare_data.sh, which has the same pipe."""
    text = (ROOT / "scripts" / "prepare_data.sh").read_text()
    (pipe,) = [line for line in text.splitlines() if "tee -a" in line]
    command = f"set -euo pipefail; seq 100000 {pipe.replace('2>&1', '')}"
    process = subprocess.Popen(
        ["bash", "-c", command], stdout=-1, stderr=-1,
        env={**os.environ, "log_folder": str(tmp_path), "IMAGE_SIZE": "8"},
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    process.stderr.read()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "prepare_data_8.log").read_text().endswith("\n99999\n100000\n")


# launch.sh -------------------------------------------------------------------------------------

WAITS = """
def leave(*_):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
print("waiting", flush=True)
time.sleep(30)
"""


def test_a_hang_up_takes_the_job_along(repository):
    repository.main(WAITS)
    process = repository.start("scripts/launch.sh", "job", MAX_RESTARTS="3")
    while process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    process.stdout.close()  # the terminal is gone
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 75
    assert repository.log().endswith("waiting\nsaved\n")
    assert len(repository.runs()) == 1


def test_a_job_under_nohup_does_not_hear_of_it(repository):
    repository.main("print('waiting', flush=True)\ntime.sleep(1)\nprint('done', flush=True)")
    process = subprocess.Popen(
        ["bash", "-c", f"trap '' HUP; exec bash {repository.folder}/scripts/launch.sh job"],
        cwd=repository.elsewhere, env=repository.env, stdout=-1, stderr=-1, text=True,
        start_new_session=True,
    )  # fmt: skip
    while process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0 and repository.log().endswith("done\n")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_job_that_dies_of_a_signal_in_its_first_moment_may_begin_again(repository, sent):
    repository.main("print('waiting', flush=True)\ntime.sleep(30)")  # it does not listen
    process = repository.start("scripts/launch.sh", "job", MAX_RESTARTS="3")
    while process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == 75 and len(repository.runs()) == 1


def test_a_signal_while_it_waits_to_start_again_ends_it_at_once(repository):
    repository.main("sys.exit(75)")
    process = repository.start("scripts/launch.sh", "job", MAX_RESTARTS="3", RESTART_DELAY="30")
    while "restart 1" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75 and len(repository.runs()) == 1


@pytest.mark.parametrize(
    "name, value, good",
    [
        ("MAX_RESTARTS", "08", False),
        ("MAX_RESTARTS", "-1", False),
        ("MAX_RESTARTS", "99999999999999999999", False),
        ("RESTART_DELAY", "5min", False),
        ("RESTART_DELAY", "", True),
        ("RESTART_DELAY", "0.5", True),
        ("RESTART_DELAY", "5m", True),
    ],
)
def test_settings_of_restarts_are_checked_at_the_start(repository, name, value, good):
    repository.main("")
    done = repository.run("scripts/launch.sh", "job", **{name: value})
    if good:
        assert done.returncode == 0
    else:
        assert done.returncode == 2 and f"{name}={value} is not" in done.err
        assert len(done.err.splitlines()) == 1 and not repository.runs()


# The order of what is logged -------------------------------------------------------------------


def test_event_files_follow_each_other_whatever_the_clock_says(tmp_path, monkeypatch):
    for step, clock in enumerate((2_000_000_000.0, 1_700_000_000.0, 1_700_000_000.0)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        writer = metric_writer.MetricWriter(tmp_path, resume_step=step)
        writer.scalars(step, {"x": step})
        writer.close()
    written = sorted(tmp_path.glob("*tfevents*"), key=lambda path: path.stat().st_mtime_ns)
    assert len(written) == 3 and written == sorted(written, key=lambda path: path.name)
