"""Files of a run: their paths, how they are written, and what the system says of them.

Whatever lies below a run's folder is named by run/layout.py and touched through this module.
`complete`: appears under its name whole or not at all. `append`: what grows. `alone`: for one
process at a time. `link`: again under another name, in no more room.
"""

import contextlib
import errno
import fcntl
import logging
import os
import resource
import shutil
import socket
from pathlib import Path

# What a system says that has nothing to do with what a file holds: limits, rights, connections.
SYSTEM = (
    errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
    errno.EFBIG, errno.ENOMEM, errno.EIO, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT,
    errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO, errno.ENOLCK,
)  # fmt: skip


ROOM = (errno.ENOSPC, errno.EDQUOT)  # too little of it


class InUseError(ValueError):
    """Another process has the lock; `owner` is what it says of itself."""

    def __init__(self, path, owner):
        super().__init__(f"{path}: in use by {owner}")
        self.owner = owner


# Paths ----------------------------------------------------------------------------------------


def path(name):
    """The path of a file or folder, as `pathlib.Path` has it."""
    return Path(name)


def user_path(name):
    """A path as a user writes it, `~` expanded where it is known whose home that is."""
    return Path(os.path.expanduser(name))


def make_folder(path):
    """Makes a folder, and those above it, where there is none.

    Raises:
      ValueError: it cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"{path} cannot be written to")


def remove(path):
    """Removes a file or a folder with all that is in it; nothing where there is none."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def complete(path):
    """Gives a path beside `path` for what is unfinished, which takes its place at the end.

    Where the block fails, what it wrote is removed and `path` stays as it was. What a killed
    process leaves begins with `unfinished-NAME-`.

    Raises:
      OSError: with `path` in its line, where the system refuses to write (a full disk).
    """
    path = Path(path)
    unfinished = path.with_name(f"unfinished-{path.name}-{socket.gethostname()}-{os.getpid()}")
    try:
        with writing(path):
            yield unfinished
            os.replace(unfinished, path)
    finally:
        remove(unfinished)


@contextlib.contextmanager
def writing(path):
    """Names `path` in what the system says in the block (a full disk), where it names no file."""
    try:
        yield
    except OSError as error:
        named = error.filename is not None and f"unfinished-{Path(path).name}-" not in str(error)
        if error.errno not in SYSTEM or named:
            raise
        raise OSError(f"{path} cannot be written: {system_reason(error)}") from error


def write_text(path, text):
    """Writes a text file that is there whole or not at all."""
    with complete(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def append(path):
    """The file to open for what grows at `path`: it lies on this machine."""
    return path


def sync(file):
    """Sees to it that all that was written into an opened file is on disk."""
    file.flush()
    os.fsync(file.fileno())


def link(source, target):
    """A folder again under another name, whole or not at all; its files take no more room, where
    the file system has second names for one file."""
    with complete(target) as unfinished:
        shutil.copytree(source, unfinished, copy_function=_link_file)


def _link_file(source, target):
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextlib.contextmanager
def alone(path, owner=None):
    """Keeps other processes, of this and of other machines, out of the block; `path` is the lock.

    It ends with the process that holds it, however that ends; nothing is left to remove. Where the
    file system has no locks, a line says so, and the block runs all the same.

    Args:
      owner: who asks, a text for those who come later. Without it the block waits for its turn.

    Raises:
      InUseError: another process has it, and there is an `owner`.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if owner else 0))
        except BlockingIOError as error:
            file.seek(0)
            raise InUseError(path, file.read().strip()) from error
        except OSError as error:
            logging.warning("cannot lock %s (%s): run one job at a time there", path, error)
        if owner:
            file.truncate(0)
            file.write(owner)
            file.flush()
        yield


# What the system says -------------------------------------------------------------------------


def first_line(error):
    """Returns the first line of what an exception says, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def system_reason(error):
    """What the system said, where an exception comes of that and not of what a file holds; or "".

    Libraries put it into exceptions of their own, as a cause or as words.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError):
            return "the memory is full"
        for number in SYSTEM:
            if getattr(error, "errno", None) == number or os.strerror(number) in text:
                return os.strerror(number) + _hint(number)
        error = error.__cause__ or error.__context__
    return ""


@contextlib.contextmanager
def reading(path, otherwise):
    """Makes one line of whatever a library raises in the block about the file at `path`.

    Raises:
      OSError: what the system said; ValueError: anything else, with the words `otherwise`.
    """
    try:
        yield
    except Exception as error:
        if reason := system_reason(error):
            raise OSError(f"{path} cannot be read: {reason}") from error
        reason = first_line(error)
        raise ValueError(f"{path}: {otherwise} ({reason})") from error


def _hint(number):
    if number == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f" (this process may have {soft}, at most {hard}: see ulimit -n)"
    return "; make room, and go on" if number in ROOM else ""


def allow_open_files(count):
    """Raises the limit of this process so that `count` files more can be open, where it may.

    Returns how many may be, which is fewer where the hard limit is lower.
    """
    used = _open_now()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    wanted = used + count
    if soft != endless and soft < wanted:
        soft = wanted if hard == endless else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):  # refused: it stays as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return count if soft == endless else max(min(count, soft - used), 0)


def _open_now():
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:  # none are left to look with, or no such folder
        return 64
