"""Options as a run has saved them."""

import json

from configs import default, load_config


def flat(config):
    """The options of a config as JSON has them: {"section.option": value}."""
    return json.loads(json.dumps(load_config.options(config)))


def of_run(saved):
    """The options of a checkpoint, nested, as `flat` gives them; a missing one had its default."""
    found = flat(default.get_config())
    for name, part in saved.items():
        if isinstance(part, dict):
            found |= {f"{name}.{key}": value for key, value in part.items()}
        else:
            found[name] = part
    return found
