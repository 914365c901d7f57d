"""Reads options as a run has saved them."""

import json

from configs.default import OPTIONS


def flat(config):
    """Returns the options of a config as JSON has them: {"section.option": value}."""
    return of_run(config.to_dict())


def of_run(saved):
    """Returns the nested options of a checkpoint as `flat` does; a missing one had its default."""
    options = {name: option.default for name, option in sorted(OPTIONS.items())}
    for name, part in saved.items():
        if isinstance(part, dict):
            options |= {f"{name}.{key}": value for key, value in part.items()}
        else:
            options[name] = part
    return json.loads(json.dumps(options))
