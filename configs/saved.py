"""Reads options as a run has saved them."""

import json

from configs import default, load_config


def flat(config):
    """Returns the options of a config as JSON has them: {"section.option": value}."""
    return json.loads(json.dumps(load_config.options(config)))


def of_run(saved):
    """Returns the nested options of a checkpoint as `flat` does; a missing one had its default."""
    options = flat(default.get_config())
    for name, part in saved.items():
        if isinstance(part, dict):
            options |= {f"{name}.{key}": value for key, value in part.items()}
        else:
            options[name] = part
    return options
