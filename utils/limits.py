"""How many files this process may have open."""

import contextlib
import os
import resource


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
