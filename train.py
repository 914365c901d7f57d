"""Training: the state, the step, and the loop.

One step is one compiled function over the mesh: raw records -> x -> draws -> loss and gradient ->
AdamW -> averages of the weights -> sums of the metrics. It is a pure function of the state and the
batch: every random number comes from `fold_in(key, step)`. The loop around it only feeds records,
and hands out metrics, samples, checkpoints and evaluations.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import observe
from configs import load_config
from methods import objective
from models import codec, hardware, network
from optimizer import at_step, make_optimizer
from parts import load_frozen, open_records
from parts import make as make_parts
from run import cadence, report, resume, spent, workdirs
from run.saver import Saver
from utils import averages, compiling, files, iterator, processes, sharding, train_metrics

DROPOUT = 2  # number of the key of dropout beside those of x and of the draws


class TrainState(NamedTuple):
    """All that a step changes. Everything but `step` and `sums` is sharded over `fsdp`."""

    step: jax.Array  # int32 (), steps done
    params: Any
    ema_params: dict[str, Any]  # averages by name, see utils/averages.py
    opt_state: Any
    sums: dict[str, jax.Array]  # of the metrics, since the last line of the log


# The step -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step is made of, all of it fixed for a run."""

    net: Callable  # from `models.network.function`
    method: objective.Objective
    codec: codec.Codec
    optimizer: optax.GradientTransformation
    ema_vals: tuple[float, ...]
    ema_sigmas: tuple[float, ...] = ()
    ema_half_lives: tuple[float, ...] = ()
    ema_period: int = 1
    grad_accum_steps: int = 1
    frozen: dict[str, Callable] = dataclasses.field(default_factory=dict)  # (params, *inputs)
    gather: Callable = lambda params: params  # see `parts.Parts`; once for all passes of a step
    skip_nonfinite: bool = False
    log_per_step: int = 100
    small: bool = False  # whether the network is, see utils/compiling.py

    @property
    def averages(self):
        """Returns the names of the averages; the first is the one objectives are given."""
        return averages.names(self.ema_vals, self.ema_sigmas, self.ema_half_lives)


def init_state(recipe, module, image_shape, key):
    """Makes the `TrainState` of fresh weights. Pure, for `jit`."""
    return fresh_state(recipe, network.init_params(module, key, image_shape))


def fresh_state(recipe, params):
    """Makes the `TrainState` of a run that begins with `params`; the averages are copies of it."""
    ema_params = {name: jax.tree.map(jnp.copy, params) for name in recipe.averages}
    opt_state = recipe.optimizer.init(params)
    sums = train_metrics.zero_sums(recipe.method.rows)
    return TrainState(jnp.int32(0), params, ema_params, opt_state, sums)


def gradients(recipe, params, x, given, draws, held, key):
    """Computes ((loss, values by row), gradient) of a batch."""

    @partial(jax.value_and_grad, argnums=0, has_aux=True)
    def loss(params, x, given, draws, key):
        params = recipe.gather(params)
        return recipe.method.loss(partial(recipe.net, key=key), params, x, given, draws, held)

    if recipe.grad_accum_steps == 1:
        return loss(params, x, given, draws, key)
    return accumulated(loss, recipe, params, x, given, draws, key)


def accumulated(loss, recipe, params, x, given, draws, key):
    """Computes what `gradients` does in `grad_accum_steps` parts of the batch of equal layout."""
    count, groups = recipe.grad_accum_steps, recipe.method.groups(len(x))

    def split(a):  # group g of the batch goes to part g mod count
        a = a.reshape(groups // count, count, -1, *a.shape[1:])
        return jnp.moveaxis(a, 1, 0).reshape(count, -1, *a.shape[3:])

    def join(a):  # the inverse, (count, B / count) -> (B,)
        return jnp.moveaxis(a.reshape(count, groups // count, -1), 0, 1).reshape(-1)

    def add(total, part):
        (value, rows), grads = loss(params, *part)
        return jax.tree.map(jnp.add, total, (value, grads)), rows

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    of_parts = jax.tree.map(split, (x, given, draws))
    total, rows = jax.lax.scan(add, zero, (*of_parts, jax.random.split(key, count)))
    value, grads = jax.tree.map(lambda a: a / count, total)
    return (value, jax.tree.map(join, rows)), grads


def train_step(recipe, key, state, batch, frozen=None):
    """Takes one step. Pure.

    Args:
      recipe: `Recipe`.
      key: key of the run; the draws come from `fold_in(key, state.step)`.
      state: `TrainState`.
      batch: raw records, see `models.codec.Codec.encode`.
      frozen: parameters of the networks of `recipe.frozen`, by name.

    Returns:
      The next `TrainState`.
    """
    key = jax.random.fold_in(key, state.step)
    key_x, key_draw = jax.random.split(key)
    with jax.named_scope("data"):  # one of the parts that benchmarks/cycles.py tells apart
        x, given = recipe.codec.encode(batch, key_x)
        draws = recipe.method.draw(key_draw, x.shape, state.step)
    return update(recipe, state, x, given, draws, jax.random.fold_in(key, DROPOUT), frozen)


def make_step(recipe, key, mesh, shardings):
    """Compiles `train_step` over the mesh, (state, batch, frozen) -> state; uses the state up."""
    return jax.jit(
        partial(train_step, recipe, key),
        in_shardings=(shardings, sharding.by_row(mesh), sharding.replicated(mesh)),
        out_shardings=shardings,
        donate_argnums=0,
        compiler_options=hardware.compiler_options(mesh, recipe.small),
    )


def make_steps(recipe, key, mesh, shardings, total):
    """Makes the steps of a run, (steps done, state, batch, frozen) -> state.

    Each is from `make_step`, for the objective that holds then. Most objectives are one from
    beginning to end. Where one becomes another (`Objective.phase`), that is known from the number
    of the step alone, so each has a program of its own, without branches; it is compiled when it is
    reached.
    """

    @functools.cache
    def step_of(method):
        return make_step(dataclasses.replace(recipe, method=method), key, mesh, shardings)

    def step(done, state, batch, frozen):
        return step_of(recipe.method.phase(done, total))(state, batch, frozen)

    return step


def update(recipe, state, x, given, draws, key, frozen=None):
    """Takes the step of a batch x (B, h, w, c) with its draws; returns the next `TrainState`.

    Args:
      given: what comes with x, see `methods.objective.Objective.loss`.
      key: of the network's dropout, where it has one.
      frozen: see `train_step`.
    """
    held = {name: partial(apply, frozen[name]) for name, apply in recipe.frozen.items()}
    held["ema_params"] = recipe.gather(state.ema_params[recipe.averages[0]])
    (loss, rows), grads = gradients(recipe, state.params, x, given, draws, held, key)
    opt_state = at_step(state.opt_state, state.step)
    updates, opt_state = recipe.optimizer.update(grads, opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = averages.after_step(
        state.ema_params, params, state.step + 1, recipe.ema_vals, recipe.ema_period,
        recipe.ema_sigmas, recipe.ema_half_lives, images=len(x),
    )  # fmt: skip
    norm = partial(hardware.norm, small=recipe.small)
    scalars, finite = train_metrics.measure(loss, grads, state.params, params, ema_params, norm)
    after = (params, ema_params, opt_state)
    if recipe.skip_nonfinite:
        before = (state.params, state.ema_params, state.opt_state)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    fresh = state.step % recipe.log_per_step == 0
    sums = train_metrics.begin_period(state.sums, fresh, recipe.method.rows)
    sums = train_metrics.add(
        sums, state.step, scalars, rows, draws.t, draws.r, finite, recipe.skip_nonfinite
    )
    return TrainState(state.step + 1, *after, sums)


# A run ----------------------------------------------------------------------------------------


def plan(training, evaluates, parts, records, past=(0, 0)):
    """Returns the `Cadences` of a run, its `Recipe`, and the function step -> learning rate."""
    when = cadence.of_run(training, evaluates, records.num_records, past)
    return when, *make_recipe(training, parts, when.total, when.steps_per_epoch, past)


def make_recipe(training, parts, total_steps, steps_per_epoch=0, past=(0, 0)):
    """Makes the `Recipe` of the options `training` and `parts.Parts`, and its learning rate.

    Args:
      total_steps, steps_per_epoch, past: see `optimizer.make_schedule`.

    Returns:
      `Recipe`, and the function step -> learning rate.
    """
    optimizer, schedule = make_optimizer(
        training, total_steps, steps_per_epoch,
        axes=lambda: parts.module.axes(parts.param_shapes()), past=past,
    )  # fmt: skip
    recipe = Recipe(
        net=parts.net,
        method=parts.method,
        codec=parts.codec,
        optimizer=optimizer,
        ema_vals=tuple(training.ema_val),
        ema_sigmas=tuple(training.ema_sigma),
        ema_half_lives=tuple(training.ema_half_life),
        ema_period=training.ema_period,
        grad_accum_steps=training.grad_accum_steps,
        frozen={name: frozen.apply for name, frozen in parts.frozen.items()},
        gather=parts.gather,
        skip_nonfinite=training.skip_nonfinite,
        log_per_step=training.log_per_step,
        small=compiling.is_small(parts.param_shapes()),
    )
    return recipe, schedule


def train_job(config, workdir):
    """Trains the run in `workdir` to its end, from wherever it stopped. Returns the last state.

    Raises:
      Preempted: asked to stop; the last step is saved.
      ValueError, OSError, FloatingPointError: in one line, what is wrong.
    """
    with workdirs.hold(workdir):
        return train(config, files.path(workdir))


def train(config, workdir):
    """Does what `train_job` does, in a folder that no other job uses."""
    training, data = config.training, config.dataset
    records = open_records(data, training.batch_size)
    parts = make_parts(config)
    sharding.check_batch("training.batch_size", training.batch_size, parts.mesh)
    planned = partial(plan, training, config.fid.on_training, parts, records)
    when, recipe, schedule = planned()
    views = observe.open_views(config, workdir, parts, records, when)
    observer = observe.Observer(training, workdir, parts, schedule, when, views)
    rows = report.training(config.model.cls, parts, records, training, when)
    report.tell(rows + ([("pictures", views.grids.describe())] if views.grids else []))
    init = partial(init_state, recipe, parts.module, parts.image_shape)
    identity = resume.made_from(records, views.autoencoder)
    state, place, identity = resume.start(config, workdir, parts.mesh, parts.module, init, identity)
    step = int(state.step)
    if place is not None or config.load_from:
        resume.check_moments(state.opt_state)
    if place is not None and place["position"] != step * training.batch_size:
        when, recipe, schedule = planned((step, place["position"] / training.batch_size))
        observer.go_by(when, schedule)
    if place is None and config.load_from and step >= when.total:
        raise ValueError(
            f"load_from {config.load_from} has done {step} steps, and the run ends at "
            f"{when.total}: raise training.num_epochs or training.num_steps"
        )
    if processes.is_writer():
        report.note(workdir, load_config.text(config))
    observer.begin(step, load_config.options(config))
    with Saver(workdir, config.to_dict(), identity, when.snapshot, step) as saver:
        if place is not None and (result := observer.catch_up(step, state)):
            saver.keep_best(result)
        batches = open_batches(data, training, records, step, place)
        shardings = sharding.by_parameter(parts.mesh, state)
        frozen = sharding.place_everywhere(parts.mesh, load_frozen(parts))
        key = jax.random.key(training.seed)
        step_fn = partial(make_steps(recipe, key, parts.mesh, shardings, when.total), frozen=frozen)
        saver.check(step, state)
        observer.compiling(step)
        with contextlib.closing(batches), batches.blaming(step):
            state = loop(state, step_fn, batches, parts.mesh, when, observer, saver)
    observer.end(int(state.step))
    return state


def open_batches(data, training, records, step, place):
    """Opens the iterator over this process's rows, at its place (None: where `step` steps lead)."""
    size, seed = training.batch_size, training.seed
    batches = iterator.RecordIterator(
        records, size, seed, jax.process_index(), jax.process_count(),
        num_workers=data.num_workers, prefetch=data.prefetch_factor, flipped=data.use_flip,
    )  # fmt: skip
    batches.set_state(place or batches.get_state() | {"position": step * size})
    return batches


def loop(state, step_fn, batches, mesh, when, observer, saver):
    """Steps to the end of the run; returns the last state.

    Raises:
      Preempted: asked to stop; the last step is being saved.
    """
    first, total = int(state.step), when.total
    busy = math.inf  # seconds of a step on the device, in which waiting for data costs nothing
    with spent.of("data"):
        batch = sharding.to_global(mesh, next(batches)) if first < total else None
    for step in range(first + 1, total + 1):
        sharding.hold_back(mesh, state)
        begun = time.perf_counter()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state = step_fn(step - 1, state, batch)
        if step == first + 2:  # the first one compiles
            jax.block_until_ready(state)
            busy = time.perf_counter() - begun
        place = batches.get_state()
        if step < total:  # the next batch is on its way while the device computes
            with spent.of("data", but=busy):
                batch = sharding.to_global(mesh, next(batches))
        observer.log(step, state)
        saver.check(step, state)
        stopping = processes.stop_requested()
        if stopping or when.saves(step):
            observer.flush()  # a checkpoint never comes before the lines of the log that lead to it
            files.sync_soon()
            saver.save(state, place)
        if stopping:
            raise processes.Preempted(f"stopped as asked at step {step} of {total}, which is saved")
        if result := observer.look(step, state):
            saver.keep_best(result)
    return state


if __name__ == "__main__":
    raise SystemExit(report.not_a_command(__file__))
