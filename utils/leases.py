"""Locks in a bucket: an object that says who has it, written only where nobody else has written.

tensorstore writes under a condition. Two traps: a write that loses raises nothing, and its
generation is empty; and an empty generation as the condition is none at all.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from utils import buckets

RENEWED = 20  # seconds between two signs of life
EXPIRED = 300  # seconds without one until a lease may be taken over


class InUseError(ValueError):
    """Another process has the lock; `owner` is what it says of itself."""

    def __init__(self, path, owner):
        super().__init__(f"{path}: in use by {owner}")
        self.owner = owner


@contextlib.contextmanager
def hold(path, owner=None):
    """Holds a lease for the block; see `utils.files.alone`.

    Raises:
      InUseError: another process has it, and there is an `owner`.
    """
    lease = Lease(path, owner or f"process {os.getpid()} on {socket.gethostname()}")
    if holder := lease.take(wait=not owner):
        raise InUseError(path, holder)
    try:
        yield
    finally:
        lease.give_back()


class Lease:
    """A lock by an object that says who has it, written only where none else has written.

    Whoever holds it renews it every `RENEWED` seconds. One that was not renewed for `EXPIRED`
    seconds is taken over, with a line; at once, where it is of a process of this machine that is
    gone.

    Args:
      path: of the object.
      owner: who asks, for people.
    """

    def __init__(self, path, owner):
        import tensorstore

        bucket, _, self._key = str(path).removeprefix(buckets.SCHEME).partition("/")
        self._store = tensorstore.KvStore.open({"driver": "gcs", "bucket": bucket}).result()
        self._id, self.path, self._owner = uuid.uuid4().hex, path, owner
        self._generation, self._ended, self._writing = None, threading.Event(), threading.Lock()

    def take(self, wait):
        """Takes it; returns the owner of a lease that is held instead, or None.

        Args:
          wait: whether to wait until it is free.
        """
        seen = None  # (generation, until when it holds if nobody renews it)
        while True:
            value, generation = self._read()
            if value and not self._is_gone(value):
                if seen is None or seen[0] != generation:
                    if not wait and (seen or _is_local(value)):  # renewed: somebody is there
                        return value["owner"]
                    if seen is None:
                        logging.info("%s: waiting for %s", self.path, value["owner"])
                    age = max(time.time() - value["time"], 0)  # clocks differ: never that alone
                    seen = generation, time.monotonic() + max(EXPIRED - age, 2 * RENEWED)
                if time.monotonic() < seen[1]:
                    time.sleep(min(1, RENEWED / 4))
                    continue
                logging.warning("%s: taken over from %s", self.path, value["owner"])
            if self._write(generation):
                threading.Thread(target=self._renew, daemon=True).start()
                return None

    def give_back(self):
        """Ends it."""
        self._ended.set()
        with self._writing, contextlib.suppress(Exception):  # it runs out by itself
            self._store.write(self._key, None, if_equal=self._generation).result()

    def _read(self):
        with buckets.explained(self.path):
            found = self._store.read(self._key).result()
        value = {}
        with contextlib.suppress(ValueError):
            value = json.loads(found.value or b"{}")
        return value, found.stamp.generation

    def _write(self, generation):
        """Writes it over one generation of it; returns whether it was that one."""
        about = {"owner": self._owner, "id": self._id, "time": time.time(), **_process(os.getpid())}
        with buckets.explained(self.path):
            text = json.dumps(about).encode()
            written = self._store.write(self._key, text, if_equal=generation).result().generation
        if not written:  # lost; or its answer was, and this is tensorstore's second attempt
            value, written = self._read()
            if value.get("id") != self._id:
                return False
        self._generation = written
        return True

    def _is_gone(self, value):
        """Tells whether the process that holds it ran on this machine and does not any more."""
        now = _process(value.get("process"))
        return value.get("host") == now["host"] and value.get("began") != now["began"]

    def _renew(self):
        while not self._ended.wait(RENEWED):
            try:
                with self._writing:
                    lost = not (self._ended.is_set() or self._write(self._generation))
            except OSError as error:
                logging.warning("%s cannot be renewed (%s)", self.path, error)
                continue
            if lost:
                logging.error("error: %s was taken over by another job; this one ends", self.path)
                os._exit(1)


def _is_local(value):
    return value.get("host") == socket.gethostname()


def _process(number):
    """Names a process of this machine: by its host, its number and its beginning."""
    began = None
    with contextlib.suppress(OSError, IndexError):
        began = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    return {"host": socket.gethostname(), "process": number, "began": began}
