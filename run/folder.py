"""The folder of a run at the start of a job: made, held by it alone, the same on all hosts."""

import contextlib
import os
import socket
import time

import jax

from run import layout
from utils import files, processes

SHARED_TIMEOUT = 20.0  # seconds in which a new file must be seen by all processes


def make(workdir):
    """The folder of a run, made if need be.

    Raises:
      ValueError: it cannot be written to, or is no folder of a file system.
    """
    if "://" in workdir:
        raise ValueError(
            f"--workdir {workdir}: a run needs a folder of a file system; for several machines "
            "take a shared one (NFS, Filestore), or mount the bucket (docs/pods.md)"
        )
    path = files.path(workdir)
    try:
        files.make_folder(path)
    except ValueError as error:
        raise ValueError(f"--workdir {error}") from error
    return path


@contextlib.contextmanager
def hold(workdir):
    """Holds a run's folder for this job alone; makes sure that all processes see the same folder.

    Raises:
      ValueError: another job has it, or this process does not see what the writer wrote there.
    """
    path = files.path(workdir) / layout.LOCK
    me = f"process {os.getpid()} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with _lock(path, me) if processes.is_writer() else contextlib.nullcontext():
        _check_shared(path, processes.from_writer(me))
        yield


@contextlib.contextmanager
def _lock(path, me):
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.alone(path, me))
        except files.InUseError as error:
            raise ValueError(
                f"--workdir {path.parent} is in use: a run goes on there ({error.owner}); wait for "
                "its end, stop it, or take another folder"
            ) from error
        yield


def _check_shared(path, expected):
    until = time.monotonic() + SHARED_TIMEOUT
    while not path.is_file() or path.read_text(encoding="utf-8") != expected:
        if time.monotonic() > until:
            raise ValueError(
                f"process {jax.process_index()} on {socket.gethostname()} does not see what "
                f"process 0 wrote to {path.parent}: take a --workdir that all machines share"
            )
        time.sleep(0.2)
