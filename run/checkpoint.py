"""Saving and restoring a run with orbax. The layout is this module's alone:

    WORKDIR/checkpoints/STEP/params       the weights
                            /ema_params   their averages by name
                            /progress     step, optimizer, sums of the metrics
                            /data         the place in the data (JSON)
                            /config       the options of the run (JSON)
                            /identity     of records, autoencoder, environment (JSON; or absent)
                            /checksums    of the six above (JSON)
                       /damaged-STEP      one that was found damaged, kept for people to look at

A checkpoint appears under its number only when all of it is written: orbax writes into a folder
with another name, and renames it. WORKDIR/best (run/best.py) is laid out alike.
"""

import contextlib
import dataclasses
import inspect
import logging
import re
import sys
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp

# The one that needs no renames of folders has no public name.
from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath

from run import layout
from run.layout import checkpoint_path as _path
from run.layout import folder
from utils import files, processes
from utils.checksums import begin, checksums

KEPT = 3  # newest checkpoints
ARRAYS = ("params", "ema_params", "progress")
PLAIN = ("data", "config", "identity")


class DamagedError(ValueError):
    """A checkpoint that cannot be read, or does not hold what was written."""


# Writing --------------------------------------------------------------------------------------


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step):
        # train.py asks, once per step. Asked from here too, jax would take the number of the step
        # for the number of the question, and the processes could agree on one that is over.
        return False


class _LateHandler(ocp.JsonCheckpointHandler):
    async def _save_fn(self, x, directory):
        await super()._save_fn(x(), directory)


@ocp.args.register_with_handler(_LateHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _LateSave(ocp.args.CheckpointArgs):
    """JSON that is computed while it is written, in the background."""

    item: Callable  # () -> its value


class Checkpointer:
    """Writes checkpoints in the background, and keeps the newest of them, or all (None).

    What an interrupted job left half-written is removed at the start, so one job at a time.
    `identity` says what the run is made from, see the module, and goes into every checkpoint.
    """

    def __init__(self, workdir, kept=KEPT, identity=None):
        self._identity = identity or {}
        _hush()  # whatever fails in the background is raised here
        by_file = processes.from_writer(layout.ends_by_file(workdir))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=kept,
            cleanup_tmp_directories=True,
            temporary_path_class=CommitFileTemporaryPath if by_file else None,
        )
        self._manager = _Manager(files.absolute(folder(workdir)), options=options)
        self._saving = None

    def save(self, step, *, params, ema_params, progress, data, config):
        """Does `write` for the items of a run."""
        arrays = {"params": params, "ema_params": ema_params, "progress": progress}
        self.write(step, arrays, {"data": data, "config": config, "identity": self._identity})

    def write(self, step, arrays, plain):
        """Starts to write trees of arrays and JSON values; returns when they are on the host.

        Raises:
          OSError: this or the last checkpoint could not be written, in one line.
        """
        self.wait()
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items |= {name: ocp.args.JsonSave(value) for name, value in plain.items()}
        items["checksums"] = _LateSave(begin(arrays, plain))
        self._saving = step
        with self._explained():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def check(self):
        """Raises OSError where the checkpoint that was being written could not be; never waits."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self):
        """Returns when everything is on disk.

        Raises:
          OSError: it could not be written, in one line.
        """
        with self._explained():
            self._manager.wait_until_finished()
        self._saving = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Waits, and ends the threads; an error that is on its way goes first, a stop does not:
        it says that the last step is saved."""
        try:
            self.wait()
            self._manager.close()
        except OSError as own:
            if error is None or isinstance(error, processes.Preempted):
                raise
            logging.warning("%s", own)

    @contextlib.contextmanager
    def _explained(self):
        step = self._saving
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds
            self._saving = None
            reason = files.system_reason(error) or _reason(error)
            raise OSError(
                f"checkpoint {step} could not be written ({reason}); the ones before are whole, "
                "and the same command goes on from there"
            ) from error


# Reading --------------------------------------------------------------------------------------


def read_plain(workdir, step):
    """Reads the items of a checkpoint that are JSON: `data`, `config`, `identity`, `checksums`.

    `identity` is {} where the checkpoint is of before there was one.

    Raises:
      DamagedError: it cannot be read.
    """
    with _damage(workdir, step):
        path = _path(workdir, step)
        read = ocp.JsonCheckpointHandler().restore
        found = {"identity": {}, "checksums": dict(read(path / "checksums"))}
        names = [name for name in PLAIN if name != "identity" or name in found["checksums"]]
        return found | {name: dict(read(path / name)) for name in names}


def read_arrays(workdir, step, targets, averages=()):
    """Reads items of a checkpoint that are trees of arrays, by this process for itself.

    Args:
      targets: name -> tree of `ShapeDtypeStruct` with shardings, or None: numpy arrays, in
        whatever tree was written, its tuples as lists.
      averages: names of the averages in the order of their options, by which `ema_params` that
        were written as a list, until 2026-11-30, become a dict too.

    Raises:
      DamagedError: it cannot be read.
    """
    # Without these options the processes would wait for one that found damage.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None,
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process_{jax.process_index()}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    found = {}
    reader = ocp.Checkpointer(handler, multiprocessing_options=alone)
    with _damage(workdir, step), contextlib.closing(reader):
        for name, target in targets.items():
            path = _path(workdir, step) / name
            metadata = reader.metadata(path).item_metadata
            if metadata is None:
                raise ValueError(f"no metadata of {name}")
            listed = averages and name == "ema_params" and isinstance(metadata.tree, list)
            if target is None:
                numpy = ocp.RestoreArgs(restore_type=np.ndarray)
                restore_args = jax.tree.map(lambda _, numpy=numpy: numpy, metadata.tree)
                args = ocp.args.PyTreeRestore(restore_args=restore_args)
            else:
                target = [target[key] for key in averages] if listed else target
                restore_args = ocp.checkpoint_utils.construct_restore_args(target)
                args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
            found[name] = reader.restore(path, args=args)
            if listed:
                found[name] = dict(zip(averages, found[name], strict=True))
    return found


def verify(workdir, step, arrays, plain):
    """Raises DamagedError where items that were read are not those that were written.

    Args:
      arrays, plain: from `read_arrays` and `read_plain`. All processes have to ask.
    """
    for name, value in checksums(arrays, plain).items():
        if value != plain["checksums"].get(name, value if name == "identity" else None):
            raise DamagedError(f"{folder(workdir) / str(step)}: {name} does not match its checksum")


def set_aside(workdir, step):
    """Renames a damaged checkpoint, so that no one takes it for whole; returns its new path."""
    return files.move(_path(workdir, step), layout.damaged_path(workdir, step))


@contextlib.contextmanager
def _damage(workdir, step):
    """Turns what goes wrong while reading into a DamagedError, or the system's OSError."""
    _hush()
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise many kinds
        if reason := files.system_reason(error):
            raise OSError(f"{_path(workdir, step)} cannot be read: {reason}") from error
        reason = _reason(error)
        raise DamagedError(f"{_path(workdir, step)} cannot be read ({reason})") from error


def _hush():
    """Keeps orbax from printing what it raises, once for each array that it concerns."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable_hook


def _unraisable_hook(unraisable):
    # The coroutines are orbax's: this project has none, and what fails in them is raised too.
    late = inspect.iscoroutine(unraisable.object)
    if not late and "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _reason(error):
    """Says in a line what an exception does: of tensorstore's chain of causes the last."""
    line = files.first_line(error)
    return line if len(line) < 200 else re.sub(r" \[\w+=.*", "", line.split(": ")[-1])[-200:]
