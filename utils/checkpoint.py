"""Saving and restoring a run with orbax. The layout is this module's alone:

    WORKDIR/checkpoints/STEP/params       the weights
                            /ema_params   their averages, one for each decay
                            /progress     step, optimizer, sums of the metrics
                            /data         the place in the data (JSON)
                            /config       the options of the run (JSON)

A checkpoint appears under its number only when all of it is written.
"""

import pathlib

import jax
import orbax.checkpoint as ocp

KEPT = 3  # newest checkpoints


def folder(workdir):
    """Where the checkpoints of a run lie."""
    return pathlib.Path(workdir) / "checkpoints"


def steps(workdir):
    """Steps at which there is a complete checkpoint, ascending; [] where there is no run."""
    path = folder(workdir)
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit())


class Checkpointer:
    """Writes checkpoints in the background, and keeps the newest three."""

    def __init__(self, workdir):
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(folder(workdir).absolute(), options=options)

    def save(self, step, *, params, ema_params, progress, data, config):
        """Starts to write; returns as soon as the arrays are copied to the host."""
        self.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                ema_params=ocp.args.StandardSave(ema_params),
                progress=ocp.args.StandardSave(progress),
                data=ocp.args.JsonSave(data),
                config=ocp.args.JsonSave(config),
            ),
        )

    def restore(self, step, *, params, ema_params, progress):
        """Restores one checkpoint; the arguments are trees of `ShapeDtypeStruct` with shardings.

        Returns:
          A dict of `params`, `ema_params`, `progress`, `data` and `config`.
        """
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                ema_params=ocp.args.StandardRestore(ema_params),
                progress=ocp.args.StandardRestore(progress),
                data=ocp.args.JsonRestore(),
                config=ocp.args.JsonRestore(),
            ),
        )
        return dict(restored.items())

    def wait(self):
        """Returns when everything is on disk; raises what went wrong in the background."""
        self.manager.wait_until_finished()

    def close(self):
        self.manager.close()


def restore_weights(workdir, step=None):
    """The weights of a run, without its model or devices: numpy trees.

    Args:
      workdir: the folder of the run.
      step: which checkpoint; the newest by default.

    Returns:
      A dict of `step`, `params`, `ema_params` (tuple of trees, one for each decay) and `config`.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    available = steps(workdir)
    if not available or (step is not None and step not in available):
        wanted = "a checkpoint" if step is None else f"checkpoint {step}"
        raise FileNotFoundError(f"{folder(workdir)} does not hold {wanted} (found: {available})")
    step = available[-1] if step is None else step
    path = (folder(workdir) / str(step)).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        trees = {}
        for name in ("params", "ema_params"):
            item = checkpointer.metadata(path / name).item_metadata
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), item.tree)
            trees[name] = checkpointer.restore(path / name, shapes)
    return {"step": step, **jax.device_get(trees)}
