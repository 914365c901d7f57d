"""Training: the state, the step, and the loop.

One step is one compiled function over the mesh: raw records -> x -> draws -> loss and gradient ->
AdamW -> averages of the weights -> sums of the metrics. It is a pure function of the state and the
batch: every random number comes from `fold_in(key, step)`. The loop around it only feeds records,
and hands out metrics, samples, checkpoints and evaluations.
"""

import dataclasses
import logging
import pathlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import observe
import sample
from models import dit, meanflow, vae
from utils import checkpoint, dataset, sharding, train_metrics


class TrainState(NamedTuple):
    """All that a step changes. Everything but `step` and `sums` is sharded over `fsdp`."""

    step: jax.Array  # int32 (), steps done
    params: Any
    ema_params: tuple[Any, ...]  # one average for each decay of training.ema_val
    opt_state: Any
    sums: dict[str, jax.Array]  # of the metrics, since the last line of the log


# The step -------------------------------------------------------------------------------------


def make_optimizer(training, total_steps):
    """AdamW as published (b1 0.9, b2 0.95, eps 1e-8, no decay, constant rate), and its schedule.

    Args:
      training: the options `training`.
      total_steps: length of the run, where the cosine ends.

    Returns:
      An optax transformation, and the function step -> learning rate.
    """
    rate, warmup = training.learning_rate, training.warmup_steps
    if training.lr_schedule == "cosine":
        after = optax.cosine_decay_schedule(rate, max(total_steps - warmup, 1))
    elif training.lr_schedule == "const":
        after = optax.constant_schedule(rate)
    else:
        raise ValueError(f"training.lr_schedule: {training.lr_schedule!r} is not const | cosine")
    schedule = optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])
    adamw = optax.adamw(
        schedule, training.adam_b1, training.adam_b2, weight_decay=training.weight_decay
    )
    clip = [optax.clip_by_global_norm(training.grad_clip)] if training.grad_clip else []
    return optax.chain(*clip, adamw), schedule


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step is made of, all of it fixed for a run."""

    net: Any  # function (params, z, t, h, y) -> u
    net_jvp: Any  # the same, in a form that has a JVP
    method: meanflow.MeanFlow
    optimizer: optax.GradientTransformation
    ema_vals: tuple[float, ...]
    num_classes: int
    normalisation: vae.Normalisation = vae.SD_NORMALISATION
    use_flip: bool = False
    grad_accum_steps: int = 1
    skip_nonfinite: bool = False
    log_per_step: int = 100


def init_state(recipe, net, image_shape, key):
    """A fresh state; the averages begin as copies of the weights. Pure, for `jit`."""
    params = dit.init_params(net, key, image_shape)
    averages = tuple(jax.tree.map(jnp.copy, params) for _ in recipe.ema_vals)
    opt_state = recipe.optimizer.init(params)
    return TrainState(jnp.int32(0), params, averages, opt_state, train_metrics.zero_sums())


def gradients(recipe, params, x, y, draws):
    """Loss, errors by row and gradient of a batch, in `grad_accum_steps` parts of equal layout."""
    num_equal = meanflow.equal_count(len(x), recipe.method.data_proportion)
    parts = recipe.grad_accum_steps
    groups = np.gcd(len(x), num_equal)
    if groups % parts:
        raise ValueError(
            f"training.grad_accum_steps: a batch of {len(x)} with {num_equal} rows of r = t has "
            f"{groups} equal groups, which cannot be divided into {parts} parts"
        )

    @partial(jax.value_and_grad, argnums=0, has_aux=True)
    def loss(params, x, y, draws):
        return meanflow.loss(
            recipe.net, params, x, y, draws, recipe.method,
            null_label=recipe.num_classes, num_equal=num_equal // parts, net_jvp=recipe.net_jvp,
        )  # fmt: skip

    if parts == 1:
        return loss(params, x, y, draws)

    def split(a):  # group g of the batch goes to part g mod parts
        a = a.reshape(groups // parts, parts, -1, *a.shape[1:])
        return jnp.moveaxis(a, 1, 0).reshape(parts, -1, *a.shape[3:])

    def join(a):  # the inverse, (parts, B / parts) -> (B,)
        return jnp.moveaxis(a.reshape(parts, groups // parts, -1), 0, 1).reshape(-1)

    def add(total, part):
        (value, rows), grads = loss(params, *part)
        return jax.tree.map(jnp.add, total, (value, grads)), rows

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, rows = jax.lax.scan(add, zero, jax.tree.map(split, (x, y, draws)))
    value, grads = jax.tree.map(lambda a: a / parts, total)
    return (value, jax.tree.map(join, rows)), grads


def train_step(recipe, key, state, batch):
    """One step. Pure.

    Args:
      recipe: `Recipe`.
      key: key of the run; the draws come from `fold_in(key, state.step)`.
      state: `TrainState`.
      batch: raw records, see `models.vae.to_x`, with `label` int32 (B,).

    Returns:
      The next `TrainState`.
    """
    key_x, key_draw = jax.random.split(jax.random.fold_in(key, state.step))
    x = vae.to_x(batch, key_x, flip=recipe.use_flip, normalisation=recipe.normalisation)
    draws = meanflow.draw(key_draw, x.shape, recipe.method)
    return update(recipe, state, x, batch["label"], draws)


def update(recipe, state, x, y, draws):
    """The part of a step that is not random: x (B, h, w, c), y (B,) -> the next `TrainState`."""
    (loss, rows), grads = gradients(recipe, state.params, x, y, draws)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = tuple(
        jax.tree.map(lambda ema, p, decay=decay: decay * ema + (1 - decay) * p, average, params)
        for decay, average in zip(recipe.ema_vals, state.ema_params, strict=True)
    )
    norms = {
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
        "param_norm": optax.tree.norm(params),
    }
    finite = jnp.isfinite(loss) & jnp.isfinite(norms["grad_norm"])
    changed = (params, ema_params, opt_state)
    if recipe.skip_nonfinite:
        kept = (state.params, state.ema_params, state.opt_state)
        changed = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)

    fresh = state.step % recipe.log_per_step == 0
    zero = train_metrics.zero_sums()
    sums = jax.tree.map(lambda zero, s: jnp.where(fresh, zero, s), zero, state.sums)
    scalars = {"loss": loss, "v_loss": jnp.mean(rows["v_loss"]), **norms}
    sums = train_metrics.add(
        sums, state.step, scalars, rows["error"], draws.t, draws.r, finite, recipe.skip_nonfinite
    )
    return TrainState(state.step + 1, *changed, sums)


# A run ----------------------------------------------------------------------------------------


def make_recipe(config, net, total_steps):
    """The `Recipe` that a config describes, and its learning rate as a function of the step."""
    optimizer, schedule = make_optimizer(config.training, total_steps)
    recipe = Recipe(
        net=dit.as_function(net),
        net_jvp=dit.as_function(net.clone(fused_attention=False)),
        method=meanflow.MeanFlow(**config.method),
        optimizer=optimizer,
        ema_vals=tuple(config.training.ema_val),
        num_classes=config.dataset.num_classes,
        normalisation=vae.normalisation(config.dataset.latent_mean, config.dataset.latent_std),
        use_flip=config.dataset.use_flip,
        grad_accum_steps=config.training.grad_accum_steps,
        skip_nonfinite=config.training.skip_nonfinite,
        log_per_step=config.training.log_per_step,
    )
    return recipe, schedule


def open_dataset(config):
    """The training records.

    Raises:
      ValueError, FileNotFoundError: nothing there, or records that do not fit the config.
    """
    records, data = dataset.open_records(config.dataset.root), config.dataset
    channels = data.image_channels * (2 if records.key == "moments" else 1)
    expected = {
        "shape": (data.image_size, data.image_size, channels),
        "num_classes": data.num_classes,
        "key": "image" if data.vae == "none" else "moments",
    }
    for name, value in expected.items():
        found = getattr(records, name)
        if found != value:
            raise ValueError(
                f"dataset.root {records.root} holds records of {name} {found}, the config asks "
                f"for {value}; see dataset.image_size, image_channels, num_classes and vae"
            )
    if data.use_flip and records.key == "moments" and not records.has_flipped:
        raise ValueError(
            f"dataset.use_flip: {records.root} holds no moments_flipped; prepare them, or switch "
            "dataset.use_flip off"
        )
    if records.num_records < config.training.batch_size:
        raise ValueError(
            f"training.batch_size {config.training.batch_size} is more than the "
            f"{records.num_records} records of {records.root}"
        )
    return records


def start(config, workdir, mesh, net, recipe, checkpointer):
    """The state to begin with: the newest checkpoint of the run, `load_from`, or fresh weights.

    Returns:
      The state on the devices, its shardings, and the place in the data (None: by the step).
    """
    key, shape = jax.random.key(config.training.seed), sample.image_shape(config)
    init = partial(init_state, recipe, net, shape)
    shapes = jax.eval_shape(init, key)
    shardings = sharding.by_parameter(mesh, shapes)
    if checkpoint.steps(workdir):
        targets = sharding.with_shardings(shapes, shardings)
        state, place = restore(checkpointer, checkpoint.steps(workdir)[-1], targets)
        return state, shardings, place
    state = jax.jit(init, out_shardings=shardings)(key)
    if config.load_from:
        weights = sample.load_weights(config.load_from, shapes.params)
        state = from_weights(state, weights, shardings)
        logging.info("starting from %s, step %d", config.load_from, weights["step"])
    return state, shardings, None


def restore(checkpointer, step, targets):
    """A checkpoint of a run -> its `TrainState` and its place in the data."""
    progress = {"step": targets.step, "opt_state": targets.opt_state, "sums": targets.sums}
    found = checkpointer.restore(
        step, params=targets.params, ema_params=targets.ema_params, progress=progress
    )
    state = TrainState(params=found["params"], ema_params=found["ema_params"], **found["progress"])
    return state, found["data"]


def save(checkpointer, state, place, config):
    """Starts to write a checkpoint; refuses one with numbers that are not finite."""
    train_metrics.check_finite(jax.device_get(state.sums))
    progress = {"step": state.step, "opt_state": state.opt_state, "sums": state.sums}
    checkpointer.save(
        int(state.step),
        params=state.params,
        ema_params=state.ema_params,
        progress=progress,
        data=place,
        config=config.to_dict(),
    )


def from_weights(state, weights, shardings):
    """A fresh state with the weights, the step and, where given, the Adam moments of `weights`.

    Averages for which there is none begin as the first one.
    """
    emas = weights["ema_params"]
    emas = [emas[min(i, len(emas) - 1)] for i in range(len(state.ema_params))]
    opt_state = state.opt_state
    if weights["opt_state"]:
        moments = weights["opt_state"]
        opt_state = optax.tree_utils.tree_set(opt_state, **moments)
    new = state._replace(
        step=np.int32(weights["step"]),
        params=weights["params"],
        ema_params=tuple(emas),
        opt_state=opt_state,
    )
    return jax.tree.map(
        lambda x, s: x if isinstance(x, jax.Array) else sharding.place(x, s), new, shardings
    )


def train_job(config, workdir):
    """Trains the run in `workdir` to its end, from wherever it stopped. Returns the last state."""
    workdir = pathlib.Path(workdir)
    training = config.training
    records = open_dataset(config)
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch("training.batch_size", training.batch_size, mesh)
    steps_per_epoch = records.num_records // training.batch_size
    total = training.num_steps or training.num_epochs * steps_per_epoch
    net = sample.make_net(config)
    recipe, schedule = make_recipe(config, net, total)
    # Whatever sampling and evaluation need is asked for before the first step, not after hours.
    observer = observe.Observer(
        config, workdir, mesh, net, records, schedule, steps_per_epoch, total
    )

    checkpointer = checkpoint.Checkpointer(workdir)
    state, shardings, place = start(config, workdir, mesh, net, recipe, checkpointer)
    first = int(state.step)
    observer.begin(first)
    batches = dataset.RecordIterator(
        records, training.batch_size, training.seed, jax.process_index(), jax.process_count(),
        num_workers=config.dataset.num_workers, prefetch=config.dataset.prefetch_factor,
        flipped=config.dataset.use_flip,
    )  # fmt: skip
    batches.set_state(place or batches.get_state() | {"position": first * training.batch_size})

    key = jax.random.key(training.seed)
    step_fn = jax.jit(
        partial(train_step, recipe, key),
        in_shardings=(shardings, sharding.by_row(mesh)),
        out_shardings=shardings,
        donate_argnums=0,
    )
    batch = sharding.to_global(mesh, next(batches)) if first < total else None
    for step in range(first + 1, total + 1):
        state = step_fn(state, batch)
        place = batches.get_state()
        if step < total:  # the next batch is on its way while the device computes
            batch = sharding.to_global(mesh, next(batches))
        if observer.due(step, training.checkpoint_per_epoch):
            save(checkpointer, state, place, config)
        observer.after_step(step, state)
    checkpointer.wait()
    checkpointer.close()
    batches.close()
    observer.end(int(state.step))
    return state
