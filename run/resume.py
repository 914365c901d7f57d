"""Where a run begins: its own newest checkpoint, `load_from`, `init_from` or fresh weights.

The state is known here only as a named tuple with the fields of `train.TrainState`.
"""

import logging
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.default import OPTIONS
from configs.saved import of_run
from run import checkpoint, layout, spent
from run import weights as weights_of
from utils import (
    averages,
    compiling,
    environment,
    moments,
    processes,
    sharding,
    train_metrics,
)
from utils import identity as identities


def made_from(records, autoencoder):
    """Returns what a run is made from, for `checkpoint.Checkpointer`; equal in all processes.

    Args:
      records: the training records.
      autoencoder: its identity; {} where none is loaded.

    Raises:
      ValueError: a process sees other records or another autoencoder than the writer does.
    """
    parts = {"records": records.identity, "autoencoder": autoencoder}
    for name, part in parts.items():
        processes.check_same(name, part)
    flags = {"xla_flags": os.environ.get("XLA_FLAGS", "")}  # may differ where numbers do not
    return parts | {"environment": environment.describe() | flags}


class Begin(NamedTuple):
    """Where a run begins, or goes on."""

    state: Any  # `train.TrainState` on the devices
    place: dict | None  # in the data; None: the run has no checkpoint yet
    identity: dict  # what the run is made from, as `checkpoint.Checkpointer` takes it


def start(config, workdir, mesh, module, init, identity):
    """Goes on from the newest whole checkpoint of a run, or begins it; returns `Begin`.

    Args:
      config: the whole config.
      workdir: folder of the run.
      mesh: devices.
      module: `models.network.Network`.
      init: pure function key -> a fresh state.
      identity: what the run is made from now; what only the checkpoint knows comes on top.

    Raises:
      ValueError: the run was made with other options, or none of its checkpoints is whole.
    """
    key, options, data = jax.random.key(config.training.seed), config.to_dict(), config.dataset
    shapes = jax.eval_shape(init, key)
    shardings = sharding.by_parameter(mesh, shapes)
    targets = sharding.with_shardings(shapes, shardings)
    if begin := restore(options, workdir, targets, identity):
        return begin
    options_of_init = compiling.quick(mesh)
    state = jax.jit(init, out_shardings=shardings, compiler_options=options_of_init)(key)
    if config.load_from:
        weights = load(config.load_from, data, state.params, options, identity)
        state = from_weights(state, weights, shardings)
    if config.init_from:
        # All of it on each host, whatever the sharding, to be joined with what a file holds.
        params = jax.device_get(jax.jit(lambda key: init(key).params)(key))
        params, line = weights_of.begin(
            config.init_from, data, module, params, config.init_weights, config.init_format
        )
        weights = weights_of.Weights(0, params, {"ema": params}, "ema")
        state = from_weights(state, weights, shardings)
        logging.info("%s", line)
    return Begin(state, None, identity)


def load(where, data, shapes, options, identity):
    """Reads the `Weights` of `load_from`, which a run begins with, and says what differs."""
    weights = weights_of.load(where, shapes, data, optimizer=True)
    check_network(weights.config or options, options, where)
    theirs, ours = weights.identity.get("records", {}), identity.get("records", {})
    for line in identities.differences(theirs, ours, ["encoder"]).values():
        logging.warning("load_from %s learned other latents: %s", where, line)
    without = "" if weights.opt_state else "; the moments of the optimizer begin anew"
    logging.info("starting from %s, step %d%s", where, weights.step, without)
    return weights


def check_moments(opt_state):
    """Says how many numbers in the state of an optimizer are not finite.

    A weight whose moment is infinite never moves again. No step makes one: its gradient, whose
    square is infinite too, counts as not finite (train.py). Old checkpoints may hold some.
    """
    leaves = jax.tree.leaves(opt_state)
    count = int(_not_finite(sharding.on_host(leaves) or leaves))
    if count:
        logging.warning(
            "%d moments of the optimizer are not finite, and their weights will not move: go on "
            "from an earlier checkpoint, or begin anew with these weights (init_from)",
            count,
        )


def _not_finite(leaves):
    if any(isinstance(leaf, jax.Array) for leaf in leaves):
        return jax.jit(lambda leaves: sum(jnp.sum(~jnp.isfinite(leaf)) for leaf in leaves))(leaves)
    return sum(np.count_nonzero(~np.isfinite(leaf)) for leaf in leaves)


def from_weights(state, weights, shardings):
    """Returns a fresh state with the parameters, the step and the moments of `Weights`.

    A decay that is not stored starts from the first stored average, a profile from the weights.
    Where an average is all there is, the weights are that.
    """
    ema = weights.ema_params[weights.ema]
    params = ema if weights.params is None else weights.params
    ema_params = {
        name: weights.ema_params.get(name, ema if averages.sigma_of(name) is None else params)
        for name in state.ema_params
    }
    opt_state = state.opt_state
    if weights.opt_state:
        opt_state = moments.put(opt_state, weights.opt_state)
        if opt_state is None:
            logging.warning("the moments there are another optimizer's, and begin anew")
            opt_state = state.opt_state
    new = state._replace(
        step=np.int32(weights.step), params=params, ema_params=ema_params, opt_state=opt_state
    )
    return jax.tree.map(
        lambda x, s: x if isinstance(x, jax.Array) else sharding.place(x, s), new, shardings
    )


# Checkpoints ----------------------------------------------------------------------------------


def save(checkpointer, state, place, options):
    """Starts to write a checkpoint; refuses one with numbers that are not finite.

    Args:
      checkpointer: `checkpoint.Checkpointer`.
      state: `train.TrainState`.
      place: in the data.
      options: those of the run, nested.
    """
    train_metrics.check_finite(jax.device_get(state.sums))
    checkpointer.save(int(state.step), **_items(state), data=place, config=options)


def _items(state):
    """Returns the trees of a checkpoint by name."""
    progress = {"step": state.step, "opt_state": state.opt_state, "sums": state.sums}
    return {"params": state.params, "ema_params": state.ema_params, "progress": progress}


def restore(options, workdir, targets, identity):
    """Returns the `Begin` from the newest checkpoint that is whole; None where there is none yet.

    Damaged ones are renamed, but only where an older one is whole: a file system that fails for
    a moment must not cost a run.

    Args:
      options: those of now, nested.
      workdir: folder of the run.
      targets: the state as `ShapeDtypeStruct` with shardings.
      identity: see `start`.
    """
    available = processes.from_writer(layout.steps(workdir))
    damaged = {}
    for step in reversed(available):
        try:
            with spent.of("restoring"):
                begin = _read(options, workdir, step, targets, identity)
            break
        except checkpoint.DamagedError as error:
            damaged[step] = error
    else:
        if not available:
            return None
        raise ValueError(
            f"none of the checkpoints {available} of {workdir} is whole; take them away to begin "
            f"again: {'; '.join(map(str, damaged.values()))}"
        )
    if processes.is_writer():
        for old, damage in damaged.items():
            path = checkpoint.set_aside(workdir, old)
            logging.warning("%s; set aside as %s", damage, path.name)
    logging.info("going on from step %d", step)
    return begin


def _read(options, workdir, step, targets, identity):
    """Reads the `Begin` in one checkpoint; raises DamagedError, in all processes together."""
    plain = _in_all(checkpoint.read_plain, workdir, step)
    check_options(plain["config"], options, workdir)
    where = f"{workdir}: checkpoint {step}"
    more = identities.check_run(plain["identity"], identity, where)
    names = averages.of_options(options["training"])
    arrays = _in_all(checkpoint.read_arrays, workdir, step, _items(targets), names)
    _in_all(checkpoint.verify, workdir, step, arrays, plain)
    progress = arrays.pop("progress")
    if (says := int(progress["step"])) != step:
        raise checkpoint.DamagedError(f"{where} is that of step {says}")
    return Begin(targets._replace(**arrays, **progress), plain["data"], identity | more)


def _in_all(read, workdir, step, *args):
    """Calls a function that reads a checkpoint; raises DamagedError where any process does."""
    content = damage = None
    try:
        content = read(workdir, step, *args)
    except checkpoint.DamagedError as error:
        damage = error
    if not processes.all_true(damage is None):
        line = f"another process cannot read checkpoint {step}"
        raise damage or checkpoint.DamagedError(line)
    return content


# Options --------------------------------------------------------------------------------------


def check_options(saved, options, workdir):
    """Compares the options of a checkpoint with those of now; says what changed.

    Args:
      saved: the options as a nested dict; one that is missing had its default.
      options: those of now, nested.
      workdir: folder of the run.

    Raises:
      ValueError: an option changed that makes it another run; names all of them.
    """
    now, before = of_run(options), of_run(saved)
    changes = [name for name in now if now[name] != before[name]]
    described = {name: f"{name} {before[name]} -> {now[name]}" for name in changes}
    refused = [described[name] for name in changes if not OPTIONS[name].may_change]
    if refused:
        raise ValueError(
            f"the run in {workdir} was made with other options: {', '.join(refused)}; take the "
            "former values, or another --workdir and this run's weights: "
            f"--config.load_from={workdir}"
        )
    for name in changes:
        logging.info("changed: %s%s", described[name], _consequence(name, now))


def check_network(saved, options, where):
    """Raises ValueError where the weights of `load_from` belong to another network.

    Args:
      saved: the options they were trained with, nested.
      options: those of now, nested.
      where: their path.
    """
    before, now = of_run(saved), of_run(options)
    refused = [
        f"{name} {before[name]}, not {now[name]}"
        for name in now
        if name.startswith("model.") and not OPTIONS[name].may_change and before[name] != now[name]
    ]
    if refused:
        raise ValueError(f"the weights of {where} belong to {', '.join(refused)}")


def _consequence(name, now):
    if name == "training.batch_size":
        return (
            ": steps done keep their number and the data goes on at its place; lengths in epochs "
            "count the records seen; the learning rate goes on from where it was"
        )
    if name in ("training.num_epochs", "training.num_steps"):
        if now["training.lr_schedule"] == "cosine":
            return ": the learning rate falls towards the new end from here on"
        if now["method.name"] == "alphaflow" and not now["method.alpha_end"]:
            return ": a schedule of alpha that lasts as long as the run goes by the new end"
    return ""
