"""The best checkpoint of a run, kept beside the newest."""

import json

from run import layout
from utils import files


def keep_best(workdir, step, metric, value, higher_is_better=False, measure=""):
    """Keeps a checkpoint that is on disk as the best one, where `value` is better than any before.

    It goes to WORKDIR/best, a folder like a run's own; the former best one is removed, and
    best.json there says what it is. `measure` is how the value came about: another one, as after
    a change of evaluator, begins anew.
    """
    best = files.path(workdir) / layout.BEST
    about = {"metric": metric, "measure": measure, "value": float(value), "step": step}
    file = best / layout.BEST_NOTE
    known = json.loads(file.read_text()) if file.exists() else {}
    sign = -1 if higher_is_better else 1
    same = known.get("metric") == metric and known.get("measure", measure) == measure
    if same and not sign * value < sign * known["value"]:
        return
    files.make_folder(layout.folder(best))
    if step not in layout.steps(best):
        files.link(layout.folder(workdir) / str(step), layout.folder(best) / str(step))
    files.write_text(file, json.dumps(about) + "\n")
    for old in layout.steps(best):
        if old != step:
            files.remove(layout.folder(best) / str(old))
