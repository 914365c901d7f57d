"""Two jobs in one folder of a bucket, against a server that enforces preconditions."""

import json
import os
import subprocess
import sys
import threading
import time

import bucket
import pytest

from utils import files, leases


@pytest.fixture
def lock(monkeypatch):
    """The path of a lock in a bucket whose server enforces preconditions."""
    with bucket.conditional() as url:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        monkeypatch.setattr(leases, "RENEWED", 0.2)
        yield files.path("gs://bucket/run/.lock")


def held_by(lock, **change):
    """A lock as the process of another machine holds it."""
    lease = leases.Lease(lock, "process 7 on elsewhere")
    about = {"owner": lease._owner, "id": "x", "time": time.time(), "host": "elsewhere"}
    text = json.dumps(about | {"process": 7, "began": "1"} | change).encode()
    return lease, text


def test_two_runs_in_one_folder_of_a_bucket(lock):
    with files.alone(lock, "first"):
        with pytest.raises(leases.InUseError) as error, files.alone(lock, "second"):
            pass
        assert error.value.owner == "first"
    with files.alone(lock, "second"):  # given back
        pass


def test_who_comes_at_the_same_time_gets_it_one_after_the_other(lock):
    inside, most = [], []

    def work(number):
        with files.alone(lock):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 4


def test_a_lock_of_another_machine_is_refused_while_it_is_renewed(lock, monkeypatch):
    monkeypatch.setattr(leases, "EXPIRED", 5)
    lease, text = held_by(lock)
    ended = threading.Event()

    def renew():
        for _ in range(50):
            if ended.wait(0.1):
                return
            lease._store.write(lease._key, text).result()

    lease._store.write(lease._key, text).result()
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(leases.InUseError, match="process 7 on elsewhere"):
            with files.alone(lock, "second"):
                pass
    finally:
        ended.set()
        thread.join()


def test_a_lock_that_nobody_renews_is_taken_over(lock, caplog, monkeypatch):
    monkeypatch.setattr(leases, "EXPIRED", 1.5)
    lease, text = held_by(lock)
    lease._store.write(lease._key, text).result()
    began = time.monotonic()
    with files.alone(lock, "second"):
        assert time.monotonic() - began > 1
    assert "taken over from process 7 on elsewhere" in caplog.text


def test_a_lock_of_a_process_of_this_machine_that_is_gone_is_free(lock):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    about = leases._process(os.getpid())
    lease, text = held_by(lock, host=about["host"], process=gone.pid)
    lease._store.write(lease._key, text).result()
    began = time.monotonic()
    with files.alone(lock, "second"):
        assert time.monotonic() - began < 1


def test_a_job_whose_lock_was_taken_ends(lock, monkeypatch, caplog):
    ended = threading.Event()
    monkeypatch.setattr(leases.os, "_exit", lambda status: ended.set())
    with files.alone(lock, "first"):
        lease, text = held_by(lock)
        lease._store.write(lease._key, text).result()
        assert ended.wait(10)
    assert "was taken over by another job; this one ends" in caplog.text
