"""From options and the axes of a network's parameters to an optimizer and its schedule."""

import optax


def make_optimizer(training, total_steps, steps_per_epoch=0, axes=None):
    """Makes the optimizer: AdamW as published (b1 0.9, b2 0.95, eps 1e-8, no decay, constant rate).

    Args:
      training: the options `training`.
      total_steps: length of the run, where the cosine ends.
      steps_per_epoch: in which `training.warmup_epochs` counts.
      axes: `models.network.Network.axes`, for an optimizer that knows matrices; AdamW treats all
        arrays alike.

    Returns:
      An optax transformation, and the function step -> learning rate.
    """
    rate = make_schedule(training, total_steps, steps_per_epoch)
    adamw = optax.adamw(
        rate, training.adam_b1, training.adam_b2, weight_decay=training.weight_decay
    )
    clip = [optax.clip_by_global_norm(training.grad_clip)] if training.grad_clip else []
    return optax.chain(*clip, adamw), rate


def make_schedule(training, total_steps, steps_per_epoch=0):
    """Makes the function step -> learning rate: a linear warmup, then constant or a cosine."""
    rate = training.learning_rate
    warmup = training.warmup_steps or training.warmup_epochs * steps_per_epoch
    if training.lr_schedule == "cosine":
        after = optax.cosine_decay_schedule(rate, max(total_steps - warmup, 1))
    else:
        after = optax.constant_schedule(rate)
    before = optax.linear_schedule(training.warmup_init, rate, warmup)
    return optax.join_schedules([before, after], [warmup])
