"""What a run leaves behind to go on from: checkpoints, snapshots of averages, the best checkpoint.

All is written in the background; what goes wrong there is raised by the next call.
"""

import contextlib

import jax

from metrics import evaluators
from run import best, checkpoint, results, resume, snapshots, spent
from utils import processes


class Saver(contextlib.ExitStack):
    """Writes into the folder of a run; a context, which waits at its end until all is on disk.

    Args:
      workdir: the folder.
      options: those of the run, nested, which go into every checkpoint.
      identity: what the run is made from, see run/checkpoint.py.
      cadence: of the snapshots, `run.cadence.Cadence`.
      step: where the run begins or goes on.
    """

    def __init__(self, workdir, options, identity, cadence, step):
        super().__init__()
        self.workdir, self.options, self.cadence = workdir, options, cadence
        self.checkpoints = self.enter_context(checkpoint.Checkpointer(workdir, identity=identity))
        self.snapshots = None
        if cadence.on:
            writer = snapshots.Writer(workdir, options["training"]["ema_sigma"], step)
            self.snapshots = self.enter_context(writer)

    def __exit__(self, *error):
        with spent.of("saving"):
            return super().__exit__(*error)

    def save(self, state, place):
        """Starts to write a checkpoint of a state and its place in the data."""
        jax.block_until_ready(state)  # the steps so far are not the time of saving
        with spent.of("saving"):
            resume.save(self.checkpoints, state, place, self.options)

    def check(self, step, state):
        """Starts to write a snapshot where one is due, never twice.

        Raises:
          OSError: what is being written could not be, in one line.
        """
        if self.snapshots and step and self.cadence.due(step):
            self.snapshots.save(step, state.ema_params)
        for writer in filter(None, (self.snapshots, self.checkpoints)):
            writer.check()

    def keep_best(self, result):
        """Keeps the checkpoint of an evaluation, where this is the best by `training.keep_best`."""
        if metric := self.options["training"]["keep_best"]:
            with spent.of("saving"):
                self.checkpoints.wait()
            if processes.is_writer():
                higher = evaluators.rises(metric)
                step = result["checkpoint_step"]
                how = f"{results.metric_name(result)}, {results.measure(result, metric)}"
                best.keep_best(self.workdir, step, metric, result[metric], higher, how)
