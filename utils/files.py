"""Files that appear under their name only when they are complete."""

import contextlib
import os
import shutil
import socket
from pathlib import Path


@contextlib.contextmanager
def complete(path):
    """Gives a path beside `path` for what is unfinished, which takes its place at the end.

    Where the block fails, what it wrote is removed and `path` stays as it was. What a killed
    process leaves begins with `unfinished-NAME-`.
    """
    path = Path(path)
    unfinished = path.with_name(f"unfinished-{path.name}-{socket.gethostname()}-{os.getpid()}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        else:
            unfinished.unlink(missing_ok=True)


def write_text(path, text):
    """Writes a text file that is there whole or not at all."""
    with complete(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
