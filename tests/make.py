"""Parts of the project with the options of `configs/default.py`, changed where a test says so."""

import dataclasses

import parts
from configs import default, load_config


def config(*words, name="default"):
    """A checked config: `config("model.depth=1")`; sets what needs no data and no reference."""
    unneeded = ["dataset.root=none", "fid.on_training=false"]
    argv = [f"--config=configs/load_config.py:{name}", *(f"--config.{w}" for w in unneeded)]
    return load_config.from_command_line([*argv, *(f"--config.{word}" for word in words)])[0]


def method(name="meanflow", num_classes=3, **options):
    """An objective."""
    cls, defaults = parts.OBJECTIVES[name], default.get_config().method.to_dict()
    fields = {field.name for field in dataclasses.fields(cls)} - {"num_classes"}
    chosen = {field: defaults[field] for field in fields} | options
    return cls(num_classes=num_classes, **chosen)


def as_net(function):
    """A function (params, z, t, h, y) -> u as `models.network.function` would give it."""
    from models.network import Velocity

    def net(params, *batches, jvp=None, key=None):
        return tuple(Velocity(function(params, z, c["t"], c["h"], c["y"])) for z, c in batches)

    return net
