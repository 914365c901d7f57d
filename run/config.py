"""The config that weights are drawn from in Python: theirs, or the one that their shapes tell."""

import parts
from configs import load_config
from models import network
from run import inherit, weights


def of_weights(name, options, source):
    """Makes the config `name` with `options`, and with those of the weights of `source`.

    Args:
      name: of a file of configs/, or a path that ends in .yml.
      options: texts "section.option=value".
      source: a run's folder, a published or an exported checkpoint.

    Raises:
      ValueError: an option that is none, or that contradicts the weights.
    """
    file = name if str(name).endswith(".yml") else f"configs/load_config.py:{name}"
    argv = [f"--config={file}", "--config.sample_only=True"]
    argv += ["--config.dataset.root=none", *(f"--config.{option}" for option in options)]
    config, rest = load_config.from_command_line(argv)
    if rest:
        raise ValueError(f"options: {rest[0]!r} is not 'section.option=value'")
    return inherit.adopt(config, source, load_config.given(argv), sampling=True)


def published(source, found, options):
    """Finds the config whose network has the shapes of published weights, by its name.

    Args:
      found: the weights of `source`, from `weights.read`.

    Raises:
      ValueError: there is none.
    """
    for name in found["configs"]:
        config = of_weights(name, options, source)
        module = parts.make_module(config)
        shapes = network.param_shapes(module, parts.image_shape(config))
        try:
            weights.check_parameters("", shapes, found["ema_params"][0], module.only_for_training)
        except ValueError:
            continue
        return name
    raise ValueError(
        f"{source} does not tell its options, and its shapes are those of none of "
        f"{', '.join(found['configs'])}: name one of configs/ that fits, load(..., config=NAME)"
    )
