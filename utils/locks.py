"""A lock between processes around what reads a file and writes it anew."""

import contextlib
import fcntl
import logging
from pathlib import Path


@contextlib.contextmanager
def alone(path):
    """Waits until no other process, of this or another machine, is in here for the same `path`.

    The lock is the file .NAME.lock beside it, and ends with the process that holds it. Where the
    file system has no locks, a line says so, and the block runs all the same.
    """
    path = Path(path)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logging.warning("cannot lock %s (%s): let one job at a time write it", path, error)
        yield
