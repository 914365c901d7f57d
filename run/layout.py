"""What a run's folder holds, by name, and how it is read without jax.

WORKDIR/checkpoints/STEP   see run/checkpoint.py
        ema_snapshots      a folder like a run's, see run/snapshots.py
        best               the same, see run/best.py
        samples            pictures, see grids.py and sample.py
        metrics.jsonl      a line of numbers for each log period; events.* beside it
        results.json       of evaluations, see run/results.py; results.png
        config.yml         all options, and requirements.lock, all versions, of the last start
        evaluation         the log of evaluations that are jobs of their own
        compiled, profile  of jax
"""

import json
import re

from utils import files

CHECKPOINTS = "checkpoints"
SNAPSHOTS = "ema_snapshots"
BEST = "best"
BEST_NOTE = "best.json"  # in BEST
SAMPLES = "samples"
REAL = "real.png"  # in SAMPLES
METRICS = "metrics.jsonl"
RESULTS = "results.json"
PLOT = "results.png"
CONFIG = "config.yml"
VERSIONS = "requirements.lock"
OUTPUT = "output.log"  # what launch.sh writes down
EVALUATION = "evaluation"
COMPILED = "compiled"
PROFILE = "profile"
WANDB = "wandb_id.txt"
LOCK = ".lock"
SHARED = ".shared"  # by which processes see that they have one folder
NO_RENAMES = ".no-renames"  # the file system cannot rename folders
COMMITTED = "commit_success.txt"  # orbax writes it last into a checkpoint
SHOWN = (SAMPLES, CHECKPOINTS, SNAPSHOTS, RESULTS, METRICS)  # told at the end of a run

NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")  # name of a checkpoint: its step
GRID = re.compile(r"(grid|steps|guidance)_(\d{8,10})(?:_(.+))?\.png")  # see grids.py


def folder(workdir):
    """Returns where the checkpoints of a run lie."""
    return files.path(workdir) / CHECKPOINTS


def snapshots(workdir):
    """Returns where the snapshots of a run lie: a folder like a run's own."""
    return files.path(workdir) / SNAPSHOTS


def checkpoint_path(workdir, step):
    """Returns the folder of one checkpoint."""
    return files.absolute(folder(workdir) / str(step))


def damaged_path(workdir, step):
    """Returns a free name for a checkpoint that is damaged."""
    path = folder(workdir) / f"damaged-{step}"
    while path.exists():
        path = path.with_name(f"{path.name}-again")
    return path


def steps(workdir):
    """Lists the steps of complete checkpoints, ascending; [] where there is no run."""
    path = folder(workdir)
    if not path.is_dir():
        return []
    folders = [p for p in path.iterdir() if NUMBER.fullmatch(p.name)]
    if ends_by_file(workdir):
        folders = [p for p in folders if (p / COMMITTED).exists()]
    return sorted(int(p.name) for p in folders)


def ends_by_file(workdir):
    """Tells whether a checkpoint is complete when a file says so, not when it has its name.

    So in a bucket, and where run/workdirs.py saw that folders cannot be renamed; the note of that
    holds for the folders of a run's form within, too.
    """
    workdir = files.path(workdir)
    notes = (folder / NO_RENAMES for folder in (workdir, workdir.parent))
    return files.is_remote(workdir) or any(note.exists() for note in notes)


def options(workdir):
    """Reads the options of a run, nested, from its newest checkpoint; or None."""
    for step in reversed(steps(workdir)):
        try:
            saved = json.loads((checkpoint_path(workdir, step) / "config" / "metadata").read_text())
        except (OSError, ValueError):
            continue  # whoever reads the weights says what is wrong
        if isinstance(saved, dict):
            return saved
    return None


def metric_lines(workdir):
    """Reads the lines of metrics.jsonl, and counts those that are none.

    Of two lines of one step that have the same name the later counts, as whoever reads them in
    order finds. A run that writes, or that was killed, may have a half-written last line.

    Returns:
      A list of dicts {"step": int, name: float or None}, and the number of other lines.

    Raises:
      OSError: the file cannot be read.
    """
    path = files.path(workdir) / METRICS
    lines, broken = [], 0
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:  # also what is no UTF-8
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int and line["step"] >= 0:
            lines.append(line)
        else:
            broken += 1
    return lines, broken


def grids(workdir):
    """Lists the sample grids of a run: {what is special, mostly "": {step: path}}."""
    pictures = {}
    for path in sorted((files.path(workdir) / SAMPLES).glob("*.png")):
        if match := GRID.fullmatch(path.name):
            name, step, suffix = match.groups()
            kind = suffix or ("" if name == "grid" else f"by {name}")
            pictures.setdefault(kind, {})[int(step)] = path
    return pictures
