"""Parts of the project with the options of `configs/default.py`, changed where a test says so."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

import parts
from configs import default, load_config
from models import attention, hardware, network
from run import checkpoint, weights
from utils import averages

PIXELS = ["dataset.image_size=4", "dataset.image_channels=1", "dataset.num_classes=3"]
PIXELS += ["dataset.vae=none"]
SIZES = ["model.depth=1", "model.hidden_size=16", "model.num_heads=2", "model.patch_size=2"]
NETWORKS = {
    "DiT": ["model.cls=DiT", *SIZES],
    "imfDiT": ["model.cls=imfDiT", *SIZES, "model.depth=2", "model.aux_head_depth=1",
               "method.name=improved", "sampling.omega=2", "sampling.t_min=0.3"],
    "UNet": ["model.cls=UNet", "model.model_channels=8", "model.channel_mult=1",
             "model.num_blocks=1", "model.attn_resolutions=4", "model.augment_dim=0"],
    "flow": ["model.cls=DiT", *SIZES, "method.name=flow"],
}  # fmt: skip


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


def params(module, image_shape, scale=0.1):
    """Random parameters none of which is zero, as some of fresh ones are."""
    shapes = network.param_shapes(module, image_shape)
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda p: scale * draw.standard_normal(p.shape, np.float32), shapes)


def as_on_a_card(monkeypatch):
    """From here on all is as a card takes it, but for its attention: options of a network."""
    plain = attention._values
    monkeypatch.setattr(attention, "_values", lambda q, k, v, *_: plain(q, k, v, False))
    monkeypatch.setattr(hardware, "platform", lambda: "gpu")
    monkeypatch.setattr(hardware, "memory", lambda: 1e9)
    return {"half_residual": True, "fused_attention": True, "unroll": 0}


def run(workdir, *words, steps=(20,)):
    """Writes a run without training, its parameters random; (config, params of the average)."""
    options = config(*PIXELS, *words)
    weights = params(parts.make(options).module, parts.image_shape(options.dataset), 0.2)
    with checkpoint.Checkpointer(workdir) as checkpointer:
        for step in steps:
            checkpointer.save(
                step,
                params=jax.tree.map(lambda a, step=step: a + np.float32(step / 1000), weights),
                ema_params=dict.fromkeys(averages.names(options.training.ema_val), weights),
                progress={"step": np.int32(step)},
                data={},
                config=options.to_dict(),
            )
    return options, weights


def begin(config, module, fresh):
    """What a run of a config begins with, by `weights.begin`."""
    how = config.init_weights, config.init_format
    return weights.begin(config.init_from, config.dataset, module, fresh, *how)


class State(NamedTuple):
    """What `resume` knows of a state."""

    step: int
    params: dict
    ema_params: dict
    opt_state: tuple
