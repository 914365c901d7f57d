"""Saving and restoring a run with orbax. The layout is this module's alone:

    WORKDIR/checkpoints/STEP/params       the weights
                            /ema_params   their averages, one for each decay
                            /progress     step, optimizer, sums of the metrics
                            /data         the place in the data (JSON)
                            /config       the options of the run (JSON)
                            /checksums    of the five above (JSON)
                       /damaged-STEP      one that was found damaged, kept for people to look at

A checkpoint appears under its number only when all of it is written: orbax writes into a folder
with another name, and renames it. WORKDIR/best is laid out alike. Builds on utils/files.py.
"""

import contextlib
import inspect
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from utils import files

KEPT = 3  # newest checkpoints
ARRAYS = ("params", "ema_params", "progress")
PLAIN = ("data", "config")


class DamagedError(ValueError):
    """A checkpoint that cannot be read, or does not hold what was written."""


def folder(workdir):
    """Where the checkpoints of a run lie."""
    return pathlib.Path(workdir) / "checkpoints"


def steps(workdir):
    """Steps at which there is a complete checkpoint, ascending; [] where there is no run."""
    path = folder(workdir)
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit())


# Writing --------------------------------------------------------------------------------------


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step):
        # train.py asks, once per step. Asked from here too, jax would take the number of the step
        # for the number of the question, and the processes could agree on one that is over.
        return False


class Checkpointer:
    """Writes checkpoints in the background, and keeps the newest of them, or all (None).

    What an interrupted job left half-written is removed at the start, so one job at a time.
    """

    def __init__(self, workdir, kept=KEPT):
        _hush()  # whatever fails in the background is raised here
        options = ocp.CheckpointManagerOptions(max_to_keep=kept, cleanup_tmp_directories=True)
        self._manager = _Manager(folder(workdir).absolute(), options=options)
        self._saving = None

    def save(self, step, *, params, ema_params, progress, data, config):
        """`write` for the items of a run."""
        arrays = {"params": params, "ema_params": ema_params, "progress": progress}
        self.write(step, arrays, {"data": data, "config": config})

    def write(self, step, arrays, plain):
        """Starts to write trees of arrays and JSON values; returns when they are on the host.

        Raises:
          OSError: this or the last checkpoint could not be written, in one line.
        """
        self.wait()
        plain["checksums"] = checksums(arrays, plain)
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items |= {name: ocp.args.JsonSave(value) for name, value in plain.items()}
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
        """Waits, and ends the threads; an error that is on its way goes first."""
        try:
            self.wait()
            self._manager.close()
        except OSError as own:
            if error is None:
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


HIGHER_IS_BETTER = ("inception_score", "precision", "recall")


def keep_best(workdir, step, metric, value):
    """Keeps a checkpoint that is on disk as the best one, where `value` is better than any before.

    It goes to WORKDIR/best, a folder like a run's own; the former best one is removed, and
    best.json there says what it is.
    """
    best = pathlib.Path(workdir) / "best"
    about = {"metric": metric, "value": float(value), "step": step}
    file = best / "best.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    if known.get("metric") == metric and not sign * value < sign * known["value"]:
        return
    folder(best).mkdir(parents=True, exist_ok=True)
    if step not in steps(best):
        with files.complete(folder(best) / str(step)) as unfinished:
            shutil.copytree(_path(workdir, step), unfinished, copy_function=_link)
    files.write_text(file, json.dumps(about) + "\n")
    for old in steps(best):
        if old != step:
            shutil.rmtree(folder(best) / str(old))


def _link(source, target):
    """A second name for a file, which takes no room, or a copy where there can be none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _sums_of_bits(tree):
    # Sums modulo 2**32 depend neither on an order nor on how the arrays lie on devices.
    kinds = {2: "uint16", 4: "uint32"}
    return [x.view(kinds[x.dtype.itemsize]).sum(dtype="uint32") for x in jax.tree.leaves(tree)]


_sums_on_device = jax.jit(_sums_of_bits)


def checksums(arrays, plain):
    """Checksums of the items of a checkpoint: name -> int.

    Args:
      arrays: trees of arrays of 16 or 32 bits per number, all on devices or all numpy.
      plain: what JSON holds.
    """
    on_host = isinstance(jax.tree.leaves(arrays)[0], np.ndarray)
    sums_of = _sums_of_bits if on_host else _sums_on_device
    sums = {name: sum(map(int, sums_of(tree))) % 2**32 for name, tree in arrays.items()}
    texts = {name: json.dumps(plain[name], sort_keys=True) for name in PLAIN if name in plain}
    return sums | {name: zlib.crc32(text.encode()) for name, text in texts.items()}


# Reading --------------------------------------------------------------------------------------


def read_plain(workdir, step):
    """The items of a checkpoint that are JSON: a dict of `data`, `config` and `checksums`.

    Raises:
      DamagedError: it cannot be read.
    """
    with _damage(workdir, step):
        path = _path(workdir, step)
        read = ocp.JsonCheckpointHandler().restore
        return {name: read(path / name) for name in (*PLAIN, "checksums")}


def read_arrays(workdir, step, targets):
    """Items of a checkpoint that are trees of arrays, read by this process for itself.

    Args:
      targets: name -> tree of `ShapeDtypeStruct` with shardings, or None: numpy arrays, in
        whatever tree was written, its tuples as lists.

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
            if target is None:
                metadata = reader.metadata(path).item_metadata
                if metadata is None:
                    raise ValueError(f"no metadata of {name}")
                tree = metadata.tree
                numpy = ocp.RestoreArgs(restore_type=np.ndarray)
                restore_args = jax.tree.map(lambda _, numpy=numpy: numpy, tree)
                args = ocp.args.PyTreeRestore(restore_args=restore_args)
            else:
                restore_args = ocp.checkpoint_utils.construct_restore_args(target)
                args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
            found[name] = reader.restore(path, args=args)
    return found


def verify(workdir, step, arrays, plain):
    """Raises DamagedError where items that were read are not those that were written.

    Args:
      arrays, plain: from `read_arrays` and `read_plain`. All processes have to ask.
    """
    for name, value in checksums(arrays, plain).items():
        if value != plain["checksums"][name]:
            raise DamagedError(f"{folder(workdir) / str(step)}: {name} does not match its checksum")


def set_aside(workdir, step):
    """Renames a damaged checkpoint, so that no one takes it for whole; returns its new path."""
    path = folder(workdir) / f"damaged-{step}"
    while path.exists():
        path = path.with_name(f"{path.name}-again")
    return _path(workdir, step).rename(path)


def restore_weights(workdir, step=None, optimizer=False):
    """The weights of a run, without its model or devices: numpy trees.

    Args:
      workdir: the folder of the run.
      step: which checkpoint; the newest that is whole by default.
      optimizer: whether to read the moments of Adam too.

    Returns:
      A dict of `step`, `params`, `ema_params` (tuple of trees, one for each decay), `config` and,
      with `optimizer`, `opt_state`: {"count": int32 (), "mu": tree, "nu": tree}, or None.

    Raises:
      FileNotFoundError: there is no checkpoint.
      DamagedError: there is, but none that is whole.
    """
    available = steps(workdir)
    if not available or (step is not None and step not in available):
        wanted = "a checkpoint" if step is None else f"checkpoint {step}"
        raise FileNotFoundError(f"{folder(workdir)} does not hold {wanted} (found: {available})")
    damage = None
    for candidate in [step] if step is not None else reversed(available):
        try:
            return _read_weights(workdir, candidate, optimizer)
        except DamagedError as error:
            logging.warning("%s", error)
            damage = damage or error
    raise damage


def _read_weights(workdir, step, optimizer):
    names = ARRAYS if optimizer else ("params", "ema_params")
    arrays, plain = read_arrays(workdir, step, dict.fromkeys(names)), read_plain(workdir, step)
    verify(workdir, step, arrays, plain)
    weights = {"step": step, "params": arrays["params"], "ema_params": tuple(arrays["ema_params"])}
    weights["config"] = plain["config"]
    if optimizer:
        weights["opt_state"] = _find_adam(arrays["progress"])
    return weights


def _find_adam(tree):
    """The part of a tree of dicts and lists that holds the moments of Adam; or None."""
    if isinstance(tree, dict):
        if {"count", "mu", "nu"} <= tree.keys():
            return {name: tree[name] for name in ("count", "mu", "nu")}
        tree = list(tree.values())
    found = [_find_adam(part) for part in tree] if isinstance(tree, list) else []
    return next((part for part in found if part), None)


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


def _path(workdir, step):
    return (folder(workdir) / str(step)).absolute()


def _reason(error):
    """What an exception says, in a line: of tensorstore's chain of causes the last."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) < 200 else re.sub(r" \[\w+=.*", "", line.split(": ")[-1])[-200:]
