"""Snapshots of the power-function averages of a run, from which any profile is reconstructed.

    WORKDIR/ema_snapshots/checkpoints/STEP   laid out as a run's checkpoints, run/checkpoint.py

Float16, as EDM2 stores them: half the place, and an error of 1e-4 to 5e-4 of the largest value.
"""

import logging

import jax
import jax.numpy as jnp

from run import checkpoint, layout
from utils import averages


@jax.jit
def _halved(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float16), tree)


class Writer(checkpoint.Checkpointer):
    """Writes snapshots in the background, and keeps all of them.

    Args:
      workdir: of the run.
      sigmas: sigma_rel of the averages.
      step: where the run goes on; later snapshots are removed, as it will come by again.
    """

    def __init__(self, workdir, sigmas, step):
        super().__init__(layout.snapshots(workdir), kept=None)
        self.folder, self.sigmas = layout.snapshots(workdir), list(sigmas)
        for later in layout.steps(self.folder):
            if later > step:
                self._manager.delete(later)

    def save(self, step, ema_params):
        """Starts to write the averages after a step; does nothing where that is done already.

        Args:
          ema_params: averages by name, those of the sigmas among them, float32.

        Raises:
          OSError: this or the last snapshot could not be written, in one line.
        """
        if step not in layout.steps(self.folder):
            plain = {"data": {}, "config": {"ema_sigma": self.sigmas}}
            tracked = {name: ema_params[name] for name in averages.names((), self.sigmas)}
            self.write(step, {"ema_params": _halved(tracked)}, plain)


def reconstruct(workdir, step, tracked, sigma):
    """Reconstructs the average of the profile `sigma` at a step of a run, a tree on the devices.

    Args:
      workdir: of the run, whose snapshots before `step` are used.
      step: of the tracked averages.
      tracked: sigma_rel -> a tree on the devices, float32.

    Raises:
      DamagedError: a snapshot cannot be read.
    """
    root = layout.snapshots(workdir)
    known = [time for time in layout.steps(root) if 0 < time < step]
    inputs = [(time, s) for time in known for s in _sigmas(root, time)]
    inputs += [(step, s) for s in tracked]
    factors = averages.coefficients(*zip(*inputs, strict=True), step, sigma)
    logging.info(
        "sigma_rel %g from %d snapshots of %s: sum of the absolute coefficients %.1f",
        sigma, len(inputs), sorted({s for _, s in inputs}), abs(factors).sum(),
    )  # fmt: skip
    total, place, now = None, 0, list(tracked.values())
    for time in [*known, step]:
        trees = now if time == step else _read(root, time, now[0])
        weights = jnp.array(factors[place : place + len(trees)], jnp.float32)
        total = _add(total, weights, tuple(trees))
        place += len(trees)
    return total


@jax.jit
def _add(total, weights, trees):
    def add(*leaves):
        parts = [w * x.astype(jnp.float32) for w, x in zip(weights, leaves, strict=True)]
        return sum(parts)

    part = jax.tree.map(add, *trees)
    return part if total is None else jax.tree.map(jnp.add, total, part)


def _sigmas(root, time):
    return checkpoint.read_plain(root, time)["config"]["ema_sigma"]


def _read(root, time, like):
    """Reads the averages of a snapshot as a list, in the order of `_sigmas`."""
    plain = checkpoint.read_plain(root, time)
    names = averages.names((), plain["config"]["ema_sigma"])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16, sharding=x.sharding), like
    )
    arrays = checkpoint.read_arrays(root, time, {"ema_params": dict.fromkeys(names, target)}, names)
    checkpoint.verify(root, time, arrays, plain)
    return [arrays["ema_params"][name] for name in names]
