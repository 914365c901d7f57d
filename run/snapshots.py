"""Snapshots of the power-function averages of a run, from which any profile is reconstructed.

    WORKDIR/ema_snapshots/checkpoints/STEP   laid out as a run's checkpoints, run/checkpoint.py

Float16, as EDM2 stores them: half the place, and an error of 1e-4 to 5e-4 of the largest value.
"""

import logging

import jax
import jax.numpy as jnp

from run import checkpoint
from run.layout import snapshots as folder
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
        super().__init__(folder(workdir), kept=None)
        self.folder, self.sigmas = folder(workdir), list(sigmas)
        for later in checkpoint.steps(self.folder):
            if later > step:
                self._manager.delete(later)

    def save(self, step, tracked):
        """Starts to write the averages after a step; does nothing where that is done already.

        Args:
          tracked: a tree for each of the sigmas, float32.

        Raises:
          OSError: this or the last snapshot could not be written, in one line.
        """
        if step not in checkpoint.steps(self.folder):
            plain = {"data": {}, "config": {"ema_sigma": self.sigmas}}
            self.write(step, {"ema_params": _halved(tuple(tracked))}, plain)


def reconstruct(workdir, step, sigmas, tracked, sigma):
    """The average of the profile `sigma` at a step of a run, a tree float32 on the devices.

    Args:
      workdir: of the run, whose snapshots before `step` are used.
      step: of the tracked averages.
      sigmas: their sigma_rel.
      tracked: a tree on the devices for each of these, float32.

    Raises:
      DamagedError: a snapshot cannot be read.
    """
    root = folder(workdir)
    known = [time for time in checkpoint.steps(root) if 0 < time < step]
    inputs = [(time, s) for time in known for s in _sigmas(root, time)]
    inputs += [(step, s) for s in sigmas]
    found = averages.coefficients(*zip(*inputs, strict=True), step, sigma)
    logging.info(
        "sigma_rel %g from %d snapshots of %s: sum of the absolute coefficients %.1f",
        sigma, len(inputs), sorted({s for _, s in inputs}), abs(found).sum(),
    )  # fmt: skip
    total, place = None, 0
    for time in [*known, step]:
        trees = tracked if time == step else _read(root, time, tracked[0])
        weights = jnp.array(found[place : place + len(trees)], jnp.float32)
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
    plain = checkpoint.read_plain(root, time)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16, sharding=x.sharding), like
    )
    targets = {"ema_params": tuple(target for _ in plain["config"]["ema_sigma"])}
    arrays = checkpoint.read_arrays(root, time, targets)
    checkpoint.verify(root, time, arrays, plain)
    return arrays["ema_params"]
