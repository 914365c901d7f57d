"""The best checkpoint of a run, kept beside the newest."""

import json
import os
import pathlib
import shutil

from run import checkpoint
from utils import files


def keep_best(workdir, step, metric, value, higher_is_better=False):
    """Keeps a checkpoint that is on disk as the best one, where `value` is better than any before.

    It goes to WORKDIR/best, a folder like a run's own; the former best one is removed, and
    best.json there says what it is.
    """
    best = pathlib.Path(workdir) / "best"
    about = {"metric": metric, "value": float(value), "step": step}
    file = best / "best.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    sign = -1 if higher_is_better else 1
    if known.get("metric") == metric and not sign * value < sign * known["value"]:
        return
    checkpoint.folder(best).mkdir(parents=True, exist_ok=True)
    if step not in checkpoint.steps(best):
        with files.complete(checkpoint.folder(best) / str(step)) as unfinished:
            shutil.copytree(checkpoint.folder(workdir) / str(step), unfinished, copy_function=_link)
    files.write_text(file, json.dumps(about) + "\n")
    for old in checkpoint.steps(best):
        if old != step:
            shutil.rmtree(checkpoint.folder(best) / str(old))


def _link(source, target):
    """A second name for a file, which takes no room, or a copy where there can be none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
