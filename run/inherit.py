"""Options that belong to weights, and come with them where they are sampled from or evaluated.

A run notes its options in every checkpoint. Those that say what the network is and what it was
trained for are not a choice of whoever draws from it: they are taken from there, which makes
`load_from` enough on the command line, and what contradicts them is refused. A published
checkpoint tells no options; its shapes are compared, and the rest is taken on trust.
"""

import logging

from configs import checks
from run import resume
from run import weights as weights_of
from utils import identity

# Taken from the run as well: places on a machine, where nothing else says what to take, and what is
# one's own choice on the command line.
PLACES = ("dataset.vae", "dataset.root", "dataset.name")
CHOICES = ("training.half_precision", "training.ema_val")


def belongs(option):
    """Whether an option belongs to the weights."""
    return option.startswith(("dataset.", "model.", "method.")) and not resume.may_change(option)


def digest(config):
    """One short text that stands for all options that belong to the weights."""
    found = {name: value for name, value in resume.flat(config).items() if belongs(name)}
    return identity.of_arrays({}, sorted(found.items()))


def adopt(config, workdir, given, own=()):
    """A config with the options of the weights that it is to sample from or to evaluate.

    Args:
      config: locked, as from `load_config.from_command_line`; not changed.
      workdir: the run's folder, which holds the weights where `load_from` names none.
      given: from `load_config.given`.
      own: options that are taken from the weights too, where nothing else sets them.

    Returns:
      A locked config; the same one where it trains, or the weights tell no options.

    Raises:
      ValueError: an option on the command line contradicts the weights.
    """
    if not (config.eval_only or config.sample_only):
        return config
    where = config.load_from or workdir
    saved = weights_of.options(where)
    if saved is None:
        return config
    saved, now, taken = resume.of_run(saved), resume.flat(config), {}
    choices = (*CHOICES, *own)
    for name, value in now.items():
        if not (belongs(name) or name in (*PLACES, *choices)) or saved[name] == value:
            continue
        source = given.get(name) or (given.get("dataset.name") if name == "dataset.root" else None)
        explicit = source == "command line" and value != -1  # -1: as the records say
        if (name in PLACES and source) or (name in choices and explicit):
            continue
        if explicit:
            _refuse(where, {name: (saved[name], value)})
        taken[name] = f"{name} {saved[name]}" + (f" (not {value}, {source})" if source else "")
        now[name] = saved[name]
    if not taken:
        return config
    logging.info("as the weights of %s have it: %s", where, ", ".join(taken.values()))
    adopted = config.copy_and_resolve_references()
    with adopted.unlocked():
        for name in taken:
            *parents, key = name.split(".")
            section = adopted[parents[0]] if parents else adopted
            value = saved[name]
            section[key] = tuple(value) if isinstance(value, list) else value
    checks.validate(adopted)
    return adopted.lock()


def check(config, weights, where):
    """Raises ValueError where weights from `weights.load` belong to other options than a config's.

    Where they do not tell, a line says that the options are taken on trust.
    """
    if weights["config"] is None:
        logging.info("%s does not tell its options: those of the config are taken on trust", where)
        return
    saved, now = resume.of_run(weights["config"]), resume.flat(config)
    _refuse(where, {
        name: (saved[name], value)
        for name, value in now.items() if belongs(name) and saved[name] != value
    })  # fmt: skip


def check_autoencoder(weights, autoencoder, where):
    """Raises ValueError where weights are known to be for latents of another autoencoder."""
    made_of, now = weights["identity"], autoencoder.identity
    then = made_of.get("autoencoder", {})
    records = made_of.get("records", {})
    if "encoder" in then and "encoder" not in records:
        records = records | {"encoder": then["encoder"], "vae": then["name"]}
    identity.check_autoencoder(records, now, where)
    if "decoder" in identity.differences(then, now):
        logging.info("%s was sampled with another decoder in training, %s", where, then["name"])


def _refuse(where, contradictions):
    if contradictions:
        pairs = [f"{name} {theirs}, not {ours}" for name, (theirs, ours) in contradictions.items()]
        raise ValueError(
            f"the weights of {where} belong to {', '.join(pairs)}; leave such options out: they "
            "come with the weights"
        )
