"""Settles the config of a job: what its command line leaves open comes from weights and records."""

import parts
from configs import load_config
from configs.option import OF_RECORDS
from run import inherit, weights
from utils import conditions, dataset, sharding


def settle(config, workdir, given, sampling=False):
    """Settles a config, whose options change no more after this.

    Args:
      config, given: from `load_config.from_command_line` and `load_config.given`.
      workdir: the run's folder.
      sampling: see `inherit.adopt`.

    Returns:
      A checked, locked config; the same one where nothing was left open.

    Raises:
      ValueError, FileNotFoundError: options that contradict the weights or do not fit, no records.
    """
    config = inherit.adopt(config, workdir, given, sampling)
    data, of_records = config.dataset, {}
    counted, shaped = data.num_classes != OF_RECORDS, data.condition_shapes or not data.conditions
    if not (counted and shaped):
        records = dataset.open_records(data.root, stage=data.stage)
        if not counted:
            of_records["dataset.num_classes"] = records.num_classes
        if not shaped:
            shapes = conditions.shapes_of(records, data.conditions)
            of_records["dataset.condition_shapes"] = shapes
        config = load_config.make(load_config.options(config) | of_records)
    parts.check(config)
    return config


def of_weights(name, options, source):
    """Settles the config `name` with `options` for sampling from `source` in Python.

    Args:
      name: of a file of configs/, or a path that ends in .yml.
      options: texts "section.option=value".
      source: a run's folder, a published or an exported checkpoint.

    Raises:
      ValueError: an option that is none, or that contradicts the weights.
    """
    config, given = _command(name, options)
    return settle(config, source, given, sampling=True)


def _command(name, options):
    file = name if str(name).endswith(".yml") else f"configs/load_config.py:{name}"
    argv = [f"--config={file}", "--config.sample_only=True"]
    argv += ["--config.dataset.root=none", *(f"--config.{option}" for option in options)]
    config, rest = load_config.from_command_line(argv)
    if rest:
        raise ValueError(f"options: {rest[0]!r} is not 'section.option=value'")
    return config, load_config.given(argv)


def published(source, found, options):
    """Finds the config whose network has the shapes of published weights, by its name.

    Args:
      found: the weights of `source`, from `weights.read`.

    Raises:
      ValueError: there is none.
    """
    for name in found.configs:
        made = parts.make(_command(name, options)[0], sharding.NOWHERE)
        shapes, may_lack = made.param_shapes(), made.module.only_for_training
        try:
            weights.check_parameters("", shapes, weights.choose(found, "ema"), may_lack)
        except ValueError:
            continue
        return name
    raise ValueError(
        f"{source} does not tell its options, and its shapes are those of none of "
        f"{', '.join(found.configs)}: name one of configs/ that fits, load(..., config=NAME)"
    )
