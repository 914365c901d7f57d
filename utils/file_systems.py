"""Folders of file systems that cannot do everything: renames, second names of files."""

import errno
import os
import shutil
import socket

from utils import buckets

NO_RENAMES = (errno.EMFILE, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP)  # of folders


def link(source, target):
    """Gives a file a second name, which takes no room; or copies it, where there can be none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def rename(source, target):
    """Renames, or copies a folder where the file system cannot rename it: buckets as mounted."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in NO_RENAMES or not source.is_dir():
            raise
        copy(source, target)
        shutil.rmtree(source)


def copy(source, target, file=shutil.copy2):
    """Copies a folder, file by file with `file`; what makes it complete last."""
    within = {p.relative_to(source).as_posix(): p.is_dir() for p in source.rglob("*")}
    for name in ("", *(name for name, is_folder in within.items() if is_folder)):
        (target / name).mkdir(parents=True, exist_ok=True)
    plain = (name for name, is_folder in within.items() if not is_folder)
    for name in sorted(plain, key=buckets.last):
        file(source / name, target / name)


def renames_folders(folder):
    """Tells whether the file system of a folder can rename one that is not empty."""
    probe = folder / f"unfinished-probe-{socket.gethostname()}-{os.getpid()}"
    renamed = probe.with_name(f"{probe.name}-renamed")
    try:
        probe.mkdir()
        (probe / "file").write_text("x")
        probe.rename(renamed)
    except OSError:
        return False
    finally:
        for path in (probe, renamed):
            shutil.rmtree(path, ignore_errors=True)
    return True
