"""From options and the axes of a network's parameters to an optimizer and its schedule."""

import jax
import jax.numpy as jnp
import optax


def make_optimizer(training, total_steps, steps_per_epoch=0, axes=None, past=(0, 0)):
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
      past: see `make_schedule`.

    Returns:
      An optax transformation, and the function step -> learning rate.
    """
    rate = make_schedule(training, total_steps, steps_per_epoch, past)
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


def at_step(opt_state, step):
    """Sets the counts of schedules in the state of an optimizer to the steps that a run has done.

    Optax counts updates, which are fewer where steps were left out or moments began anew. An
    optimizer of a constant rate has no such count.
    """

    def of_schedule(path, _):
        return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"

    if not optax.tree.get_all_with_path(opt_state, "count", of_schedule):
        return opt_state
    return optax.tree.set(opt_state, of_schedule, count=step)


def make_schedule(training, total_steps, steps_per_epoch=0, past=(0, 0)):
    """Makes the function step -> learning rate: a linear warmup, then constant or a cosine.

    Lengths in epochs count records. After a change of the batch size steps and records go apart;
    the rate then goes on from where it was, the warmup and the cosine each by its own measure.

    Args:
      total_steps: length of the run.
      past: the steps done, and how many of the present batch size their records make.
    """
    done, seen = past
    lag = done - seen  # of records behind steps, in steps
    rate, by_records = training.learning_rate, not training.warmup_steps
    warmup = training.warmup_steps or training.warmup_epochs * steps_per_epoch
    begin, start = lag * by_records, lag * (not training.num_steps)  # of warmup and of cosine
    end = warmup  # of the warmup, as the cosine counts
    if begin != start:
        over = done - begin >= warmup
        end = warmup * (done - start) / (done - begin) if over else warmup + begin - start
    if training.lr_schedule == "cosine":
        after = optax.cosine_decay_schedule(rate, max(total_steps - start - end, 1))
    else:
        after = optax.constant_schedule(rate)
    before = optax.linear_schedule(training.warmup_init, rate, warmup)
    if not lag:
        return optax.join_schedules([before, after], [warmup])

    def schedule(step):
        warm = step - begin < warmup
        return jnp.where(warm, before(step - begin), after(jnp.maximum(step - start - end, 0)))

    return schedule
