"""Files of a run: their paths, how they are written, and what the system says of them.

Whatever lies below a run's folder is named by run/layout.py and touched through this module.
`complete`: appears under its name whole or not at all. `append`: what grows. `alone`: for one
process at a time. `link`: again under another name, in no more room. `local`: what libraries read
that know files of this machine alone.

A path on a file system is a `pathlib.Path`, one in a bucket (gs://) an `etils.epath.Path`, which
has the same methods. The latter is not used for both: its `stat` fails for a user without a name,
as there are in pods, and its `iterdir` leaves files out.
"""

import contextlib
import errno
import fcntl
import logging
import os
import resource
import shutil
import socket
import tempfile
from pathlib import Path

from utils import buckets, file_systems, leases, mirrors

# What a system says that has nothing to do with what a file holds: limits, rights, connections.
SYSTEM = (
    errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
    errno.EFBIG, errno.ENOMEM, errno.EIO, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT,
    errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO, errno.ENOLCK,
)  # fmt: skip


ROOM = (errno.ENOSPC, errno.EDQUOT)  # too little of it


# Paths ----------------------------------------------------------------------------------------


def path(name):
    """Returns the path of a file or folder on a file system, or in a bucket: gs://BUCKET/...

    Raises:
      ValueError: an address of another kind; or gcsfs is not installed.
    """
    text = os.fspath(name)
    return buckets.path(text) if buckets.is_address(text) else Path(text)


def check_arguments(args):
    """Raises ValueError where `path` would, of all arguments of a command, {name: value}."""
    for name, value in args.items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and buckets.is_address(text, f"--{name} "):
                buckets.path(text)


def is_remote(path):
    """Tells whether a path, from `path`, is in a bucket."""
    return str(path).startswith(buckets.SCHEME)


def user_path(name):
    """Expands `~` in a path as a user writes it, where it is known whose home that is."""
    return path(os.path.expanduser(name))


def absolute(path):
    """Makes a path independent of the folder in which the process runs."""
    return path if is_remote(path) else path.absolute()


def cache_folder():
    """Returns where copies are kept: `meanflow` in $XDG_CACHE_HOME, else in ~/.cache.

    A user without a home has no such folder: the path then begins with `~`, and nothing is kept.
    """
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "meanflow"


def local(name, folder=None, wanted=lambda name: True, progress=None):
    """Brings a file or folder onto this machine: the path itself, or a copy from a bucket.

    The copy is made once for all processes of a machine, and again where the bucket has another
    object; see `buckets.stage`.

    Args:
      folder: below which copies lie; None: `cache_folder()`, or a temporary one without a home.
      wanted, progress: see `buckets.stage`.
    """
    source = path(name)
    if not is_remote(source):
        return source
    folder = path(folder) if folder else cache_folder() / "buckets"
    if str(folder).startswith("~"):
        folder = Path(tempfile.gettempdir()) / f"meanflow-buckets-{os.getuid()}"
    target = folder / str(source).removeprefix(buckets.SCHEME)
    make_folder(target.parent)
    with alone(target.with_name(f".{target.name}.lock")):
        buckets.stage(source, target, wanted, progress)
    return target


def make_folder(path):
    """Makes a folder, and those above it, where there is none; a bucket needs none.

    Raises:
      ValueError: it cannot be made, or not be written to.
    """
    if is_remote(path):
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"{path} cannot be written to")


def check_writable(path):
    """Raises OSError or ValueError where a folder cannot be made and written to, in one line."""
    make_folder(path)
    if is_remote(path):
        buckets.check(path)


def names(folder):
    """Returns the names in a folder, a set, empty where there is none."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def size(path):
    """Returns the bytes of a file."""
    return path.stat().length if is_remote(path) else path.stat().st_size


def free(folder):
    """Returns the bytes that can still be written into a folder."""
    return float("inf") if is_remote(folder) else shutil.disk_usage(folder).free


def remove(path):
    """Removes a file or a folder with all that is in it; nothing where there is none."""
    if is_remote(path):
        buckets.remove(path)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move(source, target):
    """Gives a folder another name, which is free; returns it. In a bucket its parts are copied."""
    if is_remote(source):
        buckets.copy(source, target)
        buckets.remove(source)
    else:
        file_systems.rename(source, target)
    return target


# Writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def complete(path):
    """Gives a path for what is unfinished, which takes the place of `path` at the end.

    It lies beside `path`, or on this machine where that is in a bucket. Where the block fails, what
    it wrote is removed and `path` stays as it was. What a killed process leaves begins with
    `unfinished-NAME-`.

    Raises:
      OSError: with `path` in its line, where the system refuses to write (a full disk).
    """
    if is_remote(path):
        with buckets.outgoing(buckets.path(str(path))) as unfinished:
            yield unfinished
        return
    path = Path(path)
    unfinished = path.with_name(f"unfinished-{path.name}-{socket.gethostname()}-{os.getpid()}")
    try:
        with writing(path):
            yield unfinished
            file_systems.rename(unfinished, path)
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


@contextlib.contextmanager
def outgoing(name):
    """Gives the folder to write into what is to lie in the folder `name`, on this machine.

    What was written for a bucket is put there at the end, and replaces nothing.

    Raises:
      FileExistsError: there is something of the same name.
    """
    target = path(name)
    if not is_remote(target):
        yield target
        return
    buckets.check(target)
    with buckets.outgoing(target, fresh=True) as here:
        yield here


def append(path):
    """Returns the file to open for what grows at `path`, or the folder: it lies on this machine.

    For a bucket it is put there every minute and by `sync`; what is there already is fetched.
    """
    return mirrors.add(path) if is_remote(path) else path


def follow(file, path):
    """Has a file of this machine that grows put into a bucket, too, at `path`."""
    if is_remote(path):
        mirrors.add(path, Path(file))


def name_again(file, other):
    """Makes `other` a link to a file beside it, unless it is a file of its own."""
    if other.exists() and not other.is_symlink():
        return
    with complete(other) as unfinished:
        unfinished.symlink_to(Path(file).name)


def sync(file):
    """Sees to it that what was written into an opened file is on disk, or in the bucket."""
    file.flush()
    os.fsync(file.fileno())
    mirrors.put()


finish = mirrors.finish  # the last `sync` of a job
sync_soon = mirrors.soon  # without waiting for it
line = buckets.line


def link(source, target):
    """Gives a folder a second name, whole or not at all; its files take no more room, where
    the file system has second names for one file."""
    if is_remote(target):
        return buckets.copy(source, target)
    with complete(target) as unfinished:
        file_systems.copy(source, unfinished, file_systems.link)


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
    if is_remote(path):
        with leases.hold(path, owner):
            yield
        return
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if owner else 0))
        except BlockingIOError as error:
            file.seek(0)
            raise leases.InUseError(path, file.read().strip()) from error
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
    """Returns what the system said, if an exception comes of that and not of a file; or "".

    Libraries put it into exceptions of their own, as a cause or as words.
    """
    if said := buckets.reason(error):
        return said
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
