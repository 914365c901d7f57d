"""What grows, beside a bucket: files of this machine that are put there whole, again and again."""

import atexit
import contextlib
import logging
import shutil
import tempfile
import threading
from pathlib import Path

from utils import buckets

EVERY = 60  # seconds


class _Mirror:
    """Puts files and folders of this machine into a bucket, whenever they have changed."""

    def __init__(self):
        self._known = {}  # remote: (local, what stands in the bucket before it)
        self._put = {}  # remote: what was put last, by size and time
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._folder = None

    def add(self, remote, local=None):
        """Returns the file or folder in the place of `remote`; fetches first what is there.

        Args:
          remote: an `etils.epath` path.
          local: a file that grows already, of which what is in the bucket may be an earlier part.
        """
        with self._lock:
            if remote in self._known:
                return self._known[remote][0]
            if self._folder is None:
                self._folder = tempfile.mkdtemp(prefix="unfinished-logs-")
                threading.Thread(target=self._run, daemon=True).start()
                atexit.register(self._end)
            with buckets.explained(remote):
                there = remote.read_bytes() if remote.is_file() else b""
            before = b""
            if local is None:
                local = Path(self._folder, str(remote).removeprefix(buckets.SCHEME))
                local.parent.mkdir(parents=True, exist_ok=True)
                if there:
                    local.write_bytes(there)
            elif not (local.is_file() and local.read_bytes().startswith(there)):
                before = there
            self._known[remote] = local, before
            return local

    def soon(self):
        """Has everything put soon, in the background."""
        self._wake.set()

    def put(self):
        """Puts everything that has changed. Raises OSError where the bucket refuses."""
        with self._lock:
            for remote, (local, before) in self._known.items():
                folder = local.is_dir()
                files = [p for p in local.rglob("*") if p.is_file()] if folder else [local]
                for file in files:
                    target = remote / file.relative_to(local).as_posix() if folder else remote
                    self._put_file(file, target, before)

    def _put_file(self, file, target, before):
        with contextlib.suppress(FileNotFoundError):
            about = file.stat()
            now = about.st_size, about.st_mtime_ns
            if self._put.get(target) != now:
                with buckets.explained(target):
                    target.write_bytes(before + file.read_bytes())
                self._put[target] = now

    def _run(self):
        while True:
            self._wake.wait(EVERY)
            self._wake.clear()
            try:
                self.put()
            except OSError as error:
                logging.warning("%s; it is tried again", error)

    def finish(self):
        """Puts everything a last time. Before Python ends: then it starts no thread any more."""
        try:
            self.put()
        except OSError as error:
            logging.warning("%s; what the log says last is lost", error)
        with self._lock:
            self._known, self._put = {}, {}

    def _end(self):
        shutil.rmtree(self._folder, ignore_errors=True)


_mirror = _Mirror()
add, soon, put, finish = _mirror.add, _mirror.soon, _mirror.put, _mirror.finish
