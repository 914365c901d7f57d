"""From options and the axes of a network's parameters to an optimizer and its schedule."""

import jax
import optax


def make_optimizer(training, total_steps, steps_per_epoch=0, axes=None):
    """Makes the optimizer that `training.optimizer` names.

    `adamw`: as published by MeanFlow (b1 0.9, b2 0.95, eps 1e-8, no decay, constant rate). `muon`
    (Jordan et al., as in arXiv 2601.22158): orthogonalised momentum for every matrix, NAdam for all
    other arrays, at the same rate.

    Args:
      training: the options `training`.
      total_steps: length of the run, where the cosine ends.
      steps_per_epoch: in which `training.warmup_epochs` counts.
      axes: () -> the tree of `models.network.Network.axes`, which tells what is a matrix; asked by
        Muon alone.

    Returns:
      An optax transformation, and the function step -> learning rate.
    """
    rate = make_schedule(training, total_steps, steps_per_epoch)
    decay, betas = training.weight_decay, (training.adam_b1, training.adam_b2)
    if training.optimizer == "muon":
        change = optax.contrib.muon(
            rate, weight_decay=decay, adam_b1=betas[0], adam_b2=betas[1], adam_weight_decay=decay,
            muon_weight_dimension_numbers=matrices(axes()),
        )  # fmt: skip
    else:
        change = optax.adamw(rate, *betas, weight_decay=decay)
    clip = [optax.clip_by_global_norm(training.grad_clip)] if training.grad_clip else []
    return optax.chain(*clip, change), rate


def matrices(axes):
    """Tells Muon what is a matrix: a tree of `MuonDimensionNumbers`, None for any other array.

    A matrix has one axis that goes in and one that goes out; all other axes count several of them
    (blocks; q, k and v), each of which is orthogonalised by itself. Convolutions have more.
    """

    def matrix(a):
        return optax.contrib.MuonDimensionNumbers(a.into, a.out) if len(a.into) == 1 else None

    return jax.tree.map(matrix, axes, is_leaf=lambda a: isinstance(a, tuple))


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
