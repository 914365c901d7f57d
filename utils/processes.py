"""Several processes that run one job: they join, agree, and end together.

Nothing else knows how processes find or tell each other anything. In a single process every
function here is the obvious one, and `jax.distributed` is not touched.

A process that fails leaves a note in the coordinator's key-value store; each process looks there
once a second and ends too, with the same line. A process that is killed leaves none: the others
notice by a broken collective, or by its missing heartbeats.
"""

import functools
import itertools
import json
import logging
import os
import signal
import sys
import threading
import time

import jax
import numpy as np

# jax has no public name for its key-value store; orbax reaches it this way too.
from jax._src import distributed
from jax.experimental import multihost_utils
from tqdm import tqdm

from utils import cluster, files, signals

RESTART = signals.RESTART
HEARTBEAT_TIMEOUT = 60  # seconds until a silent process counts as dead
ANSWER_TIMEOUT = 600  # seconds in which the writer has to answer the others
GRACE = 3.0  # seconds in which the others read the note of a process that fails
SAME_SIGNAL = 2.0  # seconds in which a second signal counts as the first
NOTE = "meanflow/failure"
LOST_PEER = ("Gloo", "UNAVAILABLE", "heartbeat", "Connection closed", "coordination service")


class Preempted(Exception):
    """The job was asked to stop, and has: all that is done is saved."""


# Joining --------------------------------------------------------------------------------------


def join(
    coordinator_address=None,
    num_processes=None,
    process_id=None,
    timeout=300,
    shutdown_timeout=HEARTBEAT_TIMEOUT,
):
    """Joins the processes of this job, where there are several; before any other use of jax.

    Without arguments jax finds a TPU slice, SLURM or Open MPI by itself; elsewhere there is
    nothing to join. `num_processes` 1 alone is a job that joins nothing wherever it is.

    Args:
      coordinator_address: HOST:PORT of process 0, reachable from all.
      num_processes: how many processes there are.
      process_id: the number of this one, 0 <= process_id < num_processes.
      timeout: seconds to wait for the others. When they are over, the process ends with one line
        and the exit status `RESTART`: jax itself would abort with a stack trace.
      shutdown_timeout: seconds in which the others may come to their end after this process.

    Raises:
      ValueError: only some of the three are given, or they do not fit together; or the port of
        process 0 is in use.
    """
    flags = (coordinator_address, num_processes, process_id)
    cluster.check_flags(*flags)
    if num_processes == 1:
        return
    end = functools.partial(_end, status=RESTART)
    with cluster.alarm(timeout, f"looked for the other processes for {timeout} s in vain", end):
        announced = cluster.find(timeout, described=num_processes is not None)
    job = announced if num_processes is None else cluster.Job(*flags, None, "")
    if job is None or job.count == 1:
        return
    if job.name:
        logging.info("%s", cluster.announcement(job, timeout))
    me = f"process {job.index} of {job.count}"
    cluster.check_port(job)
    # Where the CPU is the device, as in tests; other devices have collectives of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    line = f"{me} waited {timeout} s at {job.address}, and the others did not all come; is each "
    line += "started, and with the same address?"
    try:
        with cluster.alarm(timeout, line, end), cluster.without_proxies():
            jax.distributed.initialize(
                job.address, job.count, job.index,
                local_device_ids=announced and announced.local_devices,
                cluster_detection_method="deactivate",
                initialization_timeout=timeout + 60,  # the alarm comes first
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=shutdown_timeout,
            )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"{me} cannot join at {job.address}: {files.first_line(error)}") from error
    threading.Thread(target=_watch, daemon=True).start()


def is_writer():
    """Tells whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


# Agreeing -------------------------------------------------------------------------------------


def progress(iterable, total, unit, name=None, shown=True):
    """Shows a bar with speed and time left; in a log file a line every half minute."""
    terminal = sys.stderr.isatty()
    return tqdm(
        iterable, name, total, unit=f" {unit}", smoothing=0.05, leave=name is None,
        mininterval=0.5 if terminal else 30, delay=0 if terminal else 30, disable=not shown,
    )  # fmt: skip


_questions = itertools.count()


def from_writer(value):
    """Returns the writer's `value`, in all processes, which all have to ask.

    Args:
      value: anything that JSON can hold; that of other processes does not count.
    """
    if jax.process_count() == 1:
        return json.loads(json.dumps(value))
    client, key = distributed.global_state.client, f"meanflow/question_{next(_questions)}"
    if is_writer():
        client.key_value_set(key, json.dumps(value))
    return json.loads(client.blocking_key_value_get(key, 1000 * ANSWER_TIMEOUT))


def all_true(value):
    """Tells whether `value` is true in every process. All processes have to ask."""
    if jax.process_count() == 1:
        return bool(value)
    return bool(np.all(multihost_utils.process_allgather(np.asarray(bool(value)))))


def total(values):
    """Returns the sum of an int32 array over all processes. All processes have to ask."""
    if jax.process_count() == 1:
        return values
    return multihost_utils.process_allgather(values).sum(0)


def check_same(name, value):
    """Raises ValueError where a process has another `value`, a dict, than the writer has."""
    expected = from_writer(value)
    value = json.loads(json.dumps(value))
    names = [key for key in expected if value.get(key) != expected[key]]
    if names:
        pairs = [f"{key} {value.get(key)!r} (process 0: {expected[key]!r})" for key in names]
        raise ValueError(
            f"process {jax.process_index()} was started with another {name} than process 0: "
            f"{', '.join(pairs)}"
        )


# Stopping -------------------------------------------------------------------------------------

_asked = None  # when the first signal came (single process)
_stopping = False  # and all processes have agreed to stop
_calls = 0


def listen():
    """Lets SIGTERM, Ctrl-C and a hang-up ask the job to stop; a second one ends it at once.

    One signal may come twice: from a scheduler that sends it to every process, and from launch.sh.
    Of several processes jax listens to SIGTERM in each, and tells the others.
    """

    def ask(number, frame):
        global _asked
        if _asked is None:
            _asked = time.monotonic()
        elif time.monotonic() - _asked > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    if jax.process_count() == 1:
        signals.listen_to(signals.STOP, ask)
    else:
        signals.listen_to([signal.SIGINT], signal.default_int_handler)
        signals.listen_to([signal.SIGHUP], lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def stop_requested():
    """Tells whether to stop, in all processes from the same call on; all ask equally often."""
    global _stopping, _calls
    _calls += 1
    if jax.process_count() == 1:
        _stopping = _asked is not None
    elif not _stopping:
        _stopping = multihost_utils.reached_preemption_sync_point(_calls)
    return _stopping


def check_stop():
    """Raises Preempted where the job is asked to stop; for work that is begun anew later."""
    if stop_requested():
        raise Preempted("stopped as asked; the same command goes on")


# Ending ---------------------------------------------------------------------------------------

at_exit = []  # what a process does before it ends in the middle of a job
_leaving = threading.Event()
_last_word = threading.Lock()  # who has it ends the process


def fail(error, status):
    """Says in one line what is wrong; tells the other processes, and then does not return.

    Args:
      error: the exception or the line.
      status: exit status.

    Returns:
      The exit status, in a single process.
    """
    if jax.process_count() == 1:
        print(f"error: {error}", file=sys.stderr)
        return status
    _last_word.acquire()  # where `_watch` has it, it ends this process with the reason for this
    index = jax.process_index()
    print(f"error: process {index}: {error}", file=sys.stderr)
    try:
        note = json.dumps({"process": index, "line": str(error), "status": status})
        distributed.global_state.client.key_value_set(NOTE, note)
    except RuntimeError:
        pass  # another was first, or the coordinator is gone
    if status != RESTART or is_writer():  # where it is for others to read, or to reach
        time.sleep(GRACE)
    _exit(status)


def leave():
    """Ends the part of this process in a job that all processes have finished."""
    if jax.process_count() > 1:
        # Until all are here, `_watch` still ends this process where another one fails.
        distributed.global_state.client.wait_at_barrier("meanflow/end", 1000 * ANSWER_TIMEOUT)
        _leaving.set()
        jax.distributed.shutdown()


def lost_peer(error):
    """Tells whether an exception says that another process is gone, not a fault here."""
    said = []
    while error is not None:  # what was raised for it, such as that a checkpoint was not written
        said.append(str(error))
        error = error.__cause__ or error.__context__
    return jax.process_count() > 1 and any(word in text for text in said for word in LOST_PEER)


def _watch():
    """Looks for the note of a process that failed, and ends this one too."""
    while not _leaving.wait(1):
        try:
            note = distributed.global_state.client.key_value_try_get(NOTE)
        except RuntimeError:
            continue  # there is none; or the coordinator is gone, and jax ends this process
        if _leaving.is_set() or not _last_word.acquire(blocking=False):
            return
        if is_writer():
            time.sleep(GRACE + 2)  # as coordinator it ends last: without it the others abort
        note = json.loads(note)
        _end(f"process {note['process']} failed: {note['line']}", note["status"])


def _end(line, status):
    print(f"error: {line}", file=sys.stderr)
    _exit(status)


def _exit(status):
    for end in at_exit:
        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        thread.join(GRACE)
    # Not sys.exit: jax would wait at exit for processes that wait for this one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
