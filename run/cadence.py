"""When a run does what: pure functions of its options and of the number of a step.

Lengths in epochs count the records that the run has seen. After a change of the batch size these
lag behind the steps, or run ahead of them.
"""

import math
from typing import NamedTuple


class Cadence(NamedTuple):
    """Tells after which steps something is done: every `period`-th (0: none), and the last."""

    period: int
    total: int  # steps of the run
    on: bool = True  # whether it is done at all
    lag: float = 0  # steps by which the period begins later

    def due(self, step):
        """Tells whether it is done after `step` steps."""
        now, before = step - self.lag, step - 1 - self.lag
        regular = self.period > 0 and now // self.period > before // self.period
        return self.on and (regular or step == self.total)


class Cadences(NamedTuple):
    """The lengths of a run, and the `Cadence` of all that it does beside its steps."""

    steps_per_epoch: int
    total: int  # steps of the run
    metrics: Cadence
    checkpoint: Cadence
    grid: Cadence
    evaluation: Cadence
    snapshot: Cadence
    lag: float = 0  # of the records seen behind the steps done, in steps

    def epoch(self, step):
        """Returns the epochs that are done after `step` steps, a fraction."""
        return (step - self.lag) / self.steps_per_epoch

    def saves(self, step):
        """Tells whether a checkpoint is due: in its cadence and before an evaluation, which takes
        long."""
        return self.checkpoint.due(step) or self.evaluation.due(step)


def of_run(training, evaluates, num_records, past=(0, 0)):
    """Returns the `Cadences` of a run.

    Args:
      training: the options `training`.
      evaluates: whether the run is evaluated while it trains.
      num_records: images of an epoch.
      past: the steps done, and how many of the present batch size their records make.

    Raises:
      ValueError: more steps than are counted.
    """
    steps_per_epoch = num_records // training.batch_size
    done, seen = past
    lag = done - seen
    total = training.num_steps
    if not total:
        total = max(math.ceil(training.num_epochs * steps_per_epoch + lag), done)
    if total >= 2**31:
        raise ValueError(f"training.num_epochs: {total} steps are more than 32 bits can count")

    def cadence(steps, epochs, on=True):
        return Cadence(steps or epochs * steps_per_epoch, total, bool(on), 0 if steps else lag)

    return Cadences(
        steps_per_epoch, total, metrics=cadence(training.log_per_step, 0),
        checkpoint=cadence(training.checkpoint_per_step, training.checkpoint_per_epoch),
        grid=cadence(
            training.sample_per_step, training.sample_per_epoch, training.sample_on_training
        ),
        evaluation=cadence(training.fid_per_step, training.fid_per_epoch, evaluates),
        snapshot=cadence(0, training.ema_snapshot_per_epoch, training.ema_sigma),
        lag=lag,
    )  # fmt: skip
