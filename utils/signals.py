"""Ends that are asked for from outside, and readers of the output that go away. Knows no jax."""

import errno
import os
import signal
import sys
import threading

RESTART = 75  # exit status (EX_TEMPFAIL): start the same command again, and the job goes on
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAID = "stopped as asked, before anything was begun; the same command begins again"


def end_at_once(status):
    """Lets SIGTERM, Ctrl-C and a hang-up end the process with one line, up to `listen_to`.

    A thread of its own does it, as the main one may wait in jax for minutes. What is ignored, as
    a hang-up is under nohup, stays ignored.

    Args:
      status: exit status.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def wait():
        os.read(reading, 1)
        print(SAID, file=sys.stderr, flush=True)
        os._exit(status)

    threading.Thread(target=wait, daemon=True).start()
    signal.set_wakeup_fd(writing)
    _handle(STOP, lambda number, frame: None)


def listen_to(numbers, handler):
    """Lets `handler` (number, frame) hear of signals from here on, in the main thread."""
    signal.set_wakeup_fd(-1)
    _handle(numbers, handler)


def ignore():
    """Ignores further stop signals: the run is saved and about to exit."""
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)


def _handle(numbers, handler):
    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def outlive_readers():
    """Makes a reader of the output that goes away (`| head`, a closed terminal) no error.

    Nor are a full disk below it, and names that are not text.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Outliving):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Outliving(stream))


class _Outliving:
    """A text stream whose writes never fail."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self):
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error):
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # there may be room again
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
