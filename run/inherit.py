"""Takes over the options that belong to weights, where they are sampled from or evaluated.

A run notes its options in every checkpoint. Those that say what the network is and what it was
trained for are not a choice of whoever draws from it: they are taken from there, which makes
`load_from` enough on the command line, and what contradicts them is refused. A published
checkpoint tells no options; its shapes are compared, and the rest is taken on trust.
"""

import logging

from configs import load_config, saved
from configs.default import OPTIONS
from configs.option import OF_RECORDS, Role
from run import weights as weights_of
from utils import identity


def belongs(name):
    """Says whether an option belongs to the weights."""
    return name.startswith(("dataset.", "model.", "method.")) and not OPTIONS[name].may_change


def digest(options):
    """Makes one short text of the `options` from `saved.flat` that belong to the weights."""
    return identity.of_arrays({}, sorted(item for item in options.items() if belongs(item[0])))


def adopt(config, workdir, given, sampling=False):
    """Takes the options of the weights that a config is to sample from or to evaluate.

    Args:
      config: locked, as from `load_config.from_command_line`; not changed.
      workdir: the run's folder, which holds the weights where `load_from` names none.
      given: from `load_config.given`.
      sampling: whether to take its preferences in sampling too; a job has its own.

    Returns:
      A locked config; the same one where it trains, or the weights tell no options.

    Raises:
      ValueError: an option on the command line contradicts the weights.
    """
    if not (config.eval_only or config.sample_only):
        return config
    where = config.load_from or workdir
    nested = weights_of.options(where)
    if nested is None:
        return config
    theirs, taken, told = saved.of_run(nested), {}, []
    for name, value in saved.flat(config).items():
        roles = OPTIONS[name].roles
        prefers = Role.PREFERENCE in roles and (sampling or not name.startswith("sampling."))
        if theirs[name] == value or not (belongs(name) or Role.PLACE in roles or prefers):
            continue
        source = given.get(name) or (given.get("dataset.name") if name == "dataset.root" else None)
        explicit = source == "command line" and value != OF_RECORDS
        if (Role.PLACE in roles and source) or (prefers and explicit):
            continue
        if explicit:
            _refuse(where, {name: (theirs[name], value)})
        told.append(f"{name} {theirs[name]}" + (f" (not {value}, {source})" if source else ""))
        taken[name] = tuple(theirs[name]) if isinstance(theirs[name], list) else theirs[name]
    if not taken:
        return config
    logging.info("as the weights of %s have it: %s", where, ", ".join(told))
    return load_config.make(load_config.options(config) | taken)


def check(options, weights, where):
    """Raises ValueError where weights from `weights.load` belong to other options.

    Where they do not tell, a line says that the options are taken on trust.

    Args:
      options: those of now, from `saved.flat`.
      where: the path of the weights.
    """
    if weights.config is None:
        logging.info("%s does not tell its options: those of the config are taken on trust", where)
        return
    theirs = saved.of_run(weights.config)
    _refuse(where, {
        name: (theirs[name], value)
        for name, value in options.items() if belongs(name) and theirs[name] != value
    })  # fmt: skip


def check_autoencoder(made_of, autoencoder, where):
    """Raises ValueError where weights are known to be for latents of another autoencoder.

    Args:
      made_of: `identity` of the `Weights`.
    """
    now, then = autoencoder.identity, made_of.get("autoencoder", {})
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
