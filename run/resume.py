"""Where a run begins and what it leaves behind: fresh weights, `load_from`, or its own checkpoint.

The state is known here only as a named tuple with the fields of `train.TrainState`.
"""

import logging
import os

import jax
import numpy as np
import optax

from configs.default import OPTIONS
from configs.saved import flat, of_run
from run import checkpoint, weights
from utils import environment, processes, sharding, train_metrics
from utils import identity as identities


def made_from(records, autoencoder):
    """What a run is made from, as `checkpoint.Checkpointer` takes it; the same in all processes.

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


def start(config, workdir, mesh, module, init, identity=None):
    """The state to begin with.

    Args:
      config: the whole config.
      workdir: folder of the run. Its newest whole checkpoint comes first, then `load_from` with
        its step, then `init_from` at step 0.
      mesh: devices.
      module: `models.network.Network`.
      init: pure function key -> a fresh state.
      identity: what the run is made from now, as `checkpoint.Checkpointer` takes it; what only
        the checkpoint knows is added to it.

    Returns:
      The state on the devices, its shardings, and the place in the data, or None where the run
      has no checkpoint yet.

    Raises:
      ValueError: the run was made with other options, or none of its checkpoints is whole.
    """
    training = config.training
    key = jax.random.key(training.seed)
    shapes = jax.eval_shape(init, key)
    shardings = sharding.by_parameter(mesh, shapes)
    found = restore(config, workdir, sharding.with_shardings(shapes, shardings), identity)
    if found:
        return found[0], shardings, found[1]
    state = jax.jit(init, out_shardings=shardings)(key)
    if config.load_from:
        found = weights.load(config.load_from, shapes.params, config, optimizer=True)
        check_network(found["config"], config)
        theirs, ours = found["identity"].get("records", {}), (identity or {}).get("records", {})
        for line in identities.differences(theirs, ours, ["encoder"]).values():
            logging.warning("load_from %s learned other latents: %s", config.load_from, line)
        state = from_weights(state, found, shardings, training.ema_val, training.ema_sigma)
        logging.info("starting from %s, step %d", config.load_from, found["step"])
    if config.init_from:
        # All of it on each host, whatever the sharding, to be joined with what a file holds.
        fresh = jax.device_get(jax.jit(lambda key: init(key).params)(key))
        params, line = weights.begin(config, module, fresh)
        found = {"step": 0, "params": params, "ema_params": (params,), "ema_vals": ()}
        found |= {"ema_sigmas": (), "opt_state": None}
        state = from_weights(state, found, shardings, training.ema_val, training.ema_sigma)
        logging.info("%s", line)
    return state, shardings, None


def save(checkpointer, state, place, config):
    """Starts to write a checkpoint; refuses one with numbers that are not finite."""
    train_metrics.check_finite(jax.device_get(state.sums))
    checkpointer.save(int(state.step), **_items(state), data=place, config=config.to_dict())


def _items(state):
    """The trees of a checkpoint."""
    progress = {"step": state.step, "opt_state": state.opt_state, "sums": state.sums}
    return {"params": state.params, "ema_params": state.ema_params, "progress": progress}


def restore(config, workdir, targets, identity=None):
    """The newest checkpoint of a run that is whole: (state, place in the data), or None.

    Damaged ones are renamed, but only where an older one is whole: a file system that fails for
    a moment must not cost a run.

    Args:
      targets: the state as `ShapeDtypeStruct` with shardings.
      identity: see `start`.
    """
    available = processes.from_writer(checkpoint.steps(workdir))
    damaged = {}
    for step in reversed(available):
        found, damage = _try_step(config, workdir, step, targets, identity)
        if processes.all_true(damage is None):
            break
        damaged[step] = damage or f"another process cannot read checkpoint {step}"
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
    progress = found["progress"]
    state = targets._replace(params=found["params"], ema_params=found["ema_params"], **progress)
    return state, found["data"]


def _try_step(config, workdir, step, targets, identity):
    """Reads one checkpoint: (its items, None), or (None, what is wrong with it)."""
    found = damage = None
    try:
        plain = checkpoint.read_plain(workdir, step)
    except checkpoint.DamagedError as error:
        plain, damage = None, error
    if not processes.all_true(plain):
        return None, damage
    check_options(plain["config"], config, workdir)
    if identity is not None:
        identities.check_run(plain["identity"], identity, f"{workdir}: checkpoint {step}")
    try:
        found = checkpoint.read_arrays(workdir, step, _items(targets))
    except checkpoint.DamagedError as error:
        damage = error
    if not processes.all_true(found):
        return None, damage
    try:
        checkpoint.verify(workdir, step, found, plain)
    except checkpoint.DamagedError as error:
        return None, error
    if (says := int(found["progress"]["step"])) != step:
        return None, checkpoint.DamagedError(f"{workdir}: checkpoint {step} is that of step {says}")
    return found | plain, None


def check_options(saved, config, workdir):
    """Compares the options of a checkpoint with those of now; says what changed.

    Args:
      saved: the options as a nested dict; one that is missing had its default.

    Raises:
      ValueError: an option changed that makes it another run; names all of them.
    """
    now, before = flat(config), of_run(saved)
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
        logging.info("changed: %s%s", described[name], _consequence(name, config))


def check_network(saved, config):
    """Raises ValueError where the weights of `load_from` belong to another network.

    Args:
      saved: the options they were trained with, nested; None where they do not tell.
    """
    before, now = of_run(saved or config.to_dict()), flat(config)
    refused = [
        f"{name} {before[name]}, not {now[name]}"
        for name in now
        if name.startswith("model.") and not OPTIONS[name].may_change and before[name] != now[name]
    ]
    if refused:
        raise ValueError(f"the weights of {config.load_from} belong to {', '.join(refused)}")


def _consequence(name, config):
    if name == "training.batch_size":
        return (
            ": steps done keep their number and the data goes on at its place; lengths in epochs "
            "count the records seen; the learning rate goes on from where it was"
        )
    if name in ("training.num_epochs", "training.num_steps"):
        if config.training.lr_schedule == "cosine":
            return ": the learning rate falls towards the new end from here on"
        if not config.method.alpha_end:
            return ": a schedule of alpha that lasts as long as the run goes by the new end"
    return ""


def from_weights(state, found, shardings, ema_vals, ema_sigmas=()):
    """A fresh state with the weights, the step and, where given, the Adam moments of `found`.

    Averages of a decay in `ema_vals` that `found` does not have begin as their first one, those of
    a profile in `ema_sigmas` as the weights, as if these had stood still so far. Where `found`
    holds an average alone, the weights are that.
    """
    params = found["ema_params"][0] if found["params"] is None else found["params"]
    known = dict(zip(found["ema_vals"], found["ema_params"], strict=False))
    emas = [known.get(decay, found["ema_params"][0]) for decay in ema_vals]
    known = weights.profiles(found)
    emas += [known.get(sigma, params) for sigma in ema_sigmas]
    opt_state = state.opt_state
    if found["opt_state"]:
        opt_state = optax.tree.set(opt_state, **found["opt_state"])
    new = state._replace(
        step=np.int32(found["step"]),
        params=params,
        ema_params=tuple(emas),
        opt_state=opt_state,
    )
    return jax.tree.map(
        lambda x, s: x if isinstance(x, jax.Array) else sharding.place(x, s), new, shardings
    )
