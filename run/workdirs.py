"""The folder of a run at the start of a job: made, held by it alone, the same on all hosts."""

import contextlib
import logging
import os
import socket
import time

import jax

from run import layout
from utils import file_systems, files, leases, processes

OUTPUT = "MEANFLOW_OUTPUT"  # the variable in which launch.sh names its output.log
SHARED_TIMEOUT = 60.0  # seconds in which a new file must be seen by all processes


def make(workdir):
    """Makes the folder of a run, if need be, and returns it.

    Raises:
      ValueError: it cannot be made or written to, in one line.
    """
    path = files.path(workdir)
    try:
        files.check_writable(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"--workdir {error}") from error
    return path


def follow_output(workdir):
    """Sees to what launch.sh writes down of this process's output.

    Beside a run in a bucket it is put by the number that jax gives the process; in a folder,
    output.log becomes another name of the file of process 0.
    """
    index, output = jax.process_index(), os.environ.get(OUTPUT)
    if not output:
        return
    if files.is_remote(workdir):
        name = f"output.{index}.log" if index else layout.OUTPUT
        files.follow(output, workdir / name)
    elif not index and os.path.basename(output) != layout.OUTPUT:
        files.name_again(output, files.path(output).with_name(layout.OUTPUT))


@contextlib.contextmanager
def hold(workdir):
    """Holds a run's folder for this job alone; makes sure that all processes see the same folder.

    Raises:
      ValueError: another job has it, or this process does not see what the writer wrote there.
    """
    workdir = files.path(workdir)
    me = f"process {os.getpid()} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with contextlib.ExitStack() as stack:
        if processes.is_writer():
            try:
                stack.enter_context(files.alone(workdir / layout.LOCK, me))
            except leases.InUseError as error:
                raise ValueError(
                    f"--workdir {workdir} is in use: a run goes on there ({error.owner}); wait for "
                    "its end, stop it, or take another folder"
                ) from error
        if jax.process_count() > 1:
            check_shared(workdir, me)
        if processes.is_writer():
            note_renames(workdir)
        yield


def note_renames(workdir):
    """Notes in a run's folder, with a line, where its file system cannot rename folders.

    orbax ends a checkpoint by such a rename, which a bucket mounted by gcsfuse refuses.
    """
    note = workdir / layout.NO_RENAMES
    if files.is_remote(workdir) or note.exists() or file_systems.renames_folders(workdir):
        return
    files.write_text(note, "checkpoints here are complete when commit_success.txt is in them\n")
    logging.warning(
        "%s: folders cannot be renamed there (a mounted bucket?): a checkpoint is complete when "
        "%s is in it", workdir, layout.COMMITTED,
    )  # fmt: skip


def check_shared(workdir, me):
    """Raises ValueError where this process does not see what the writer writes into the folder.

    That is a file of its own: others may see a file only when it is closed (a mounted bucket), or
    when its pages are written (NFS, up to 30 s).
    """
    path = workdir / layout.SHARED
    if processes.is_writer():
        with files.complete(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            file.write(me)
            files.sync(file)
    expected, until = processes.from_writer(me), time.monotonic() + SHARED_TIMEOUT
    while not path.is_file() or path.read_text(encoding="utf-8") != expected:
        if time.monotonic() > until:
            raise ValueError(
                f"process {jax.process_index()} on {socket.gethostname()} does not see what "
                f"process 0 wrote to {workdir}: take a --workdir that all machines share"
            )
        time.sleep(0.2)
