"""What a run tells about itself: TensorBoard events, metrics.jsonl and the progress line.

Everything is on disk when a call returns, so a killed run loses nothing that it had written. A
resumed run takes back what was written after the step it resumes from.
"""

import datetime
import json
import math
import re
import socket
import sys
import time
from shutil import get_terminal_size

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from run import layout, spent
from utils import files

EVENTS = re.compile(r"\.tfevents\.(\d{1,10})\.")  # in the name of a file of events
SHOWN = ("loss", "raw_loss/r=t", "raw_loss/r<t")  # in the progress line, where they are given


class MetricWriter:
    """Writes the metrics of a run into its workdir.

    Args:
      workdir: folder of the run; made if need be.
      resume_step: steps done before. Points of later steps, left by an interrupted run, are taken
        out of metrics.jsonl and hidden from TensorBoard. None: nothing is taken out.
      finished: nothing is left to do, and metrics.jsonl says nothing of the time of this start.
      enabled: False on all hosts but one; every method then does nothing.
      wandb_project: project of Weights & Biases that gets the same numbers and pictures; or empty.

    Raises:
      ValueError: a project is named, and the package wandb is not installed.
    """

    def __init__(self, workdir, resume_step=None, finished=False, enabled=True, wandb_project=""):
        self._enabled = enabled
        self._start = resume_step or 0
        self._open_line = False
        if not enabled:
            return
        workdir = files.absolute(files.path(workdir))
        files.make_folder(workdir)
        self._wandb = _start_wandb(wandb_project, workdir) if wandb_project else None
        _cut(workdir, resume_step, finished)
        self._jsonl = files.append(workdir / layout.METRICS).open("a", encoding="utf-8")
        self._events = RecordWriter(str(files.append(_next_events(workdir))))
        self._write(self._start, file_version="brain.Event:2")
        if resume_step is not None:
            # Each START hides what the files before it hold from its step on. The first one of a
            # run hides nothing, but has to be there for the second to count.
            self._write(resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step, metrics):
        """Logs {name: number} at a step. In metrics.jsonl a number that is not finite is null."""
        if not self._enabled:
            return
        metrics = {name: float(value) for name, value in metrics.items()}
        finite = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        with files.writing(self._jsonl.name):
            self._jsonl.write(json.dumps({"step": int(step), **finite}) + "\n")
            self._jsonl.flush()
        # Not summary.scalar: it would write the names r=t and r<t both as r_t.
        values = [Summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
        self._write(step, summary=Summary(value=values))
        if self._wandb:
            self._wandb.log(metrics, step=int(step))

    def image(self, step, name, image):
        """Logs a picture: uint8 (H, W, 1 or 3)."""
        if self._enabled:
            image = np.asarray(image)
            if image.dtype != np.uint8 or image.ndim != 3:
                raise ValueError(
                    f"{name}: expected uint8 (H, W, C), got {image.dtype} {image.shape}"
                )
            if image.shape[-1] == 1:
                image = np.repeat(image, 3, axis=-1)
            self._write(step, summary=summary.image(name, image, dataformats="HWC"))
            if self._wandb:
                self._wandb.log({name: _wandb_module().Image(image)}, step=int(step))

    def text(self, name, text):
        """Logs a text, shown as it is (TensorBoard would take it for Markdown)."""
        if self._enabled:
            indented = "".join(f"    {line}\n" for line in text.splitlines())
            self._write(self._start, summary=summary.text(name, indented))

    def hparams(self, options, metrics=()):
        """Logs {name: value} for TensorBoard's table of runs, beside the metrics of these names."""
        if self._enabled:
            plain = (bool, int, float, str)
            options = {k: v if isinstance(v, plain) else str(v) for k, v in options.items()}
            experiment, session, _ = summary.hparams(options, dict.fromkeys(metrics, 0))
            self._write(self._start, summary=experiment)
            self._write(self._start, summary=session)
            if self._wandb:
                self._wandb.config.update(options, allow_val_change=True)

    def progress(self, step, total_steps, steps_per_second, metrics):
        """Shows the progress: on a terminal in one line that is rewritten, else line by line."""
        if not self._enabled:
            return
        line = progress_line(step, total_steps, steps_per_second, metrics)
        if sys.stdout.isatty():
            width = get_terminal_size().columns - 1
            print(f"\r{line[:width]}\033[K", end="", flush=True)
            self._open_line = True
        else:
            print(line, flush=True)

    def flush(self):
        """Makes sure that all is on disk, even where the machine goes down next."""
        if self._enabled:
            files.sync(self._jsonl)
            self._events.flush()

    def close(self):
        """Ends the files and the progress line. Closing twice does no harm."""
        if not self._enabled:
            return
        self.flush()
        self._jsonl.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish()
        if self._open_line:
            print(flush=True)
        self._enabled = False

    def _write(self, step, **content):
        event = Event(step=int(step), wall_time=time.time(), **content)
        with files.writing(self._events.path):
            self._events.write(event.SerializeToString())
            self._events.flush()


def _next_events(workdir):
    """Names a new file of events, behind all others: they are read in the order of their names.

    The names begin with a second by custom. Clocks differ between machines and are set back, so
    the second is at least the one after the last.
    """
    seconds = [int(m[1]) for p in workdir.glob("*.tfevents.*") if (m := EVENTS.search(p.name))]
    second = max(int(time.time()), max(seconds, default=0) + 1)
    return workdir / f"events.out.tfevents.{second:010d}.{socket.gethostname()}"


def _wandb_module():
    try:
        import wandb  # optional, and slow to import
    except ImportError:
        raise ValueError(
            "training.wandb: the package wandb is not installed; pip install wandb, or leave the "
            "option empty"
        ) from None
    return wandb


def _start_wandb(project, workdir):
    """Starts or resumes the run of Weights & Biases of a workdir, whose id is kept there."""
    wandb, path = _wandb_module(), workdir / layout.WANDB
    known = path.read_text() if path.exists() else None
    place = None if files.is_remote(workdir) else str(workdir)
    run = wandb.init(project=project, name=workdir.name, id=known, resume="allow", dir=place)
    files.write_text(path, run.id)
    return run


def progress_line(step, total_steps, steps_per_second, metrics):
    """Returns "step 200/1000 (20 %)  12.3 steps/s  0:01:05 left  loss 0.9 ..."; no line break.

    launch.sh knows the line by its first word.
    """
    share = 100 * step // max(total_steps, 1)
    parts = [f"step {step}/{total_steps} ({share} %)", f"{steps_per_second:.3g} steps/s"]
    if steps_per_second > 0:
        left = round((total_steps - step) / steps_per_second)
        parts.append(f"{datetime.timedelta(seconds=left)} left")
    parts += [f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics]
    if skipped := metrics.get("skipped_steps"):
        parts.append(f"{skipped:.0f} steps left out: not finite")
    return "  ".join(parts)


def _cut(workdir, last_step, finished):
    """Takes the lines after `last_step` out of a metrics.jsonl, and a half-written last one.

    The last that stays notes the time up to now, for starts that come to no line of their own.
    """
    lines, broken = layout.metric_lines(workdir)
    before = [line for line in lines if last_step is None or line["step"] <= last_step]
    if last_step is not None:
        spent.go_on(spent.before(lines, last_step))
        if before and spent.GOODPUT in before[-1] and not finished:
            before[-1] |= spent.metrics(spent.seconds())
    if lines or broken:
        text = "".join(f"{json.dumps(line)}\n" for line in before)
        files.write_text(files.path(workdir) / layout.METRICS, text)
