"""From a config to the parts of a run: the one place that chooses networks and objectives.

A new backbone is a module of models/ with NAMES, OPTIONS and `build`, and a line in BACKBONES; a
new objective is a file of methods/ and a line in OBJECTIVES (docs/extending.md).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from configs import default
from methods import (
    alphaflow,
    consistency,
    flow,
    improved,
    meanflow,
    objective,
    shortcut,
    soflow,
    splitmeanflow,
    tim,
)
from methods.sampler import SAMPLERS, check_times
from metrics import evaluators, kernels
from models import codec, dit, imf_dit, network, unet, vae
from utils import averages, dataset, sharding

BACKBONES = (dit, imf_dit, unet)
OBJECTIVES = {
    "meanflow": meanflow.MeanFlow,
    "improved": improved.Improved,
    "flow": flow.Flow,
    "trajectory": alphaflow.Trajectory,
    "alphaflow": alphaflow.AlphaFlow,
    "soflow": soflow.SoFlow,
    "splitmeanflow": splitmeanflow.SplitMeanFlow,
    "consistency": consistency.Consistency,
    "shortcut": shortcut.Shortcut,
    "central_difference": tim.Difference,
    "tim": tim.TiM,
}


class Parts(NamedTuple):
    """What a run is made of. Nothing here holds weights."""

    mesh: object  # `jax.sharding.Mesh`
    module: network.Network
    net: Callable  # the module as `models.network.function` gives it
    method: objective.Objective
    codec: codec.Codec
    image_shape: tuple[int, int, int]  # (h, w, c) of what the network sees
    num_classes: int

    def param_shapes(self):
        """The parameters of the network as a tree of `ShapeDtypeStruct`s."""
        return network.param_shapes(self.module, self.image_shape)

    def step_flops(self, batch_size):
        """FLOPs of the products that a step needs, by image; None: not known."""
        if self.module.flops(self.image_shape) is None:
            return None
        both = self.method.passes_of_both(batch_size)
        flops = (self.method.passes(batch_size) - both) * self.module.flops(self.image_shape)
        return flops + (both * self.module.flops(self.image_shape, both=True) if both else 0)


def make(config, mesh=None):
    """The parts of a config; `mesh` is all devices, divided as `mesh.fsdp` says, by default.

    Raises:
      ValueError: an option that the chosen network, objective or codec does not have or take.
    """
    mesh = mesh or sharding.make_mesh(config.mesh.fsdp)
    module = make_module(config)
    return Parts(
        mesh=mesh,
        module=module,
        net=network.function(module, sharding.gather(mesh)),
        method=make_method(config),
        codec=make_codec(config),
        image_shape=image_shape(config),
        num_classes=config.dataset.num_classes,
    )


def settle(config):
    """Fills in what the config leaves to the records: `dataset.num_classes`.

    Raises:
      ValueError, FileNotFoundError: there are no records.
    """
    if config.dataset.num_classes < 0:
        found = dataset.open_records(config.dataset.root).num_classes
        with config.unlocked():
            config.dataset.num_classes = found


def open_records(config):
    """The training records.

    Raises:
      ValueError, FileNotFoundError: nothing there, or records that do not fit the config.
    """
    records, data = dataset.open_records(config.dataset.root), config.dataset
    channels = data.image_channels * (2 if records.key == "moments" else 1)
    expected = {
        "shape": (data.image_size, data.image_size, channels),
        "num_classes": data.num_classes or records.num_classes,
        "key": "image" if data.vae == "none" else "moments",
    }
    for name, value in expected.items():
        found = getattr(records, name)
        if found != value:
            raise ValueError(
                f"dataset.root {records.root} holds records of {name} {found}, the config asks "
                f"for {value}; see dataset.image_size, image_channels, num_classes and vae"
            )
    if data.use_flip and records.key == "moments" and not records.has_flipped:
        raise ValueError(
            f"dataset.use_flip: {records.root} holds no moments_flipped; prepare them, or switch "
            "dataset.use_flip off"
        )
    if records.num_records < config.training.batch_size:
        raise ValueError(
            f"training.batch_size {config.training.batch_size} is more than the "
            f"{records.num_records} records of {records.root}"
        )
    return records


def check(config):
    """Raises ValueError in a line about options that do not fit; asks for no device.

    What joins sections without jax is checked before, by configs/checks.py.
    """
    module, method = make_module(config), make_method(config)
    origins = (
        (method.conditions, f"method.name {config.method.name}"),
        (make_codec(config).conditions, "dataset.augment_prob"),
    )
    for conditions, origin in origins:
        lacking = [name for name in conditions if name not in module.conditions]
        if lacking:
            raise ValueError(
                f"model.cls: {config.model.cls} does not take {', '.join(lacking)}, which {origin} "
                "gives to the network"
            )
    if method.needs_v and not module.predicts_v:
        raise ValueError(
            f"model.cls: {config.model.cls} predicts no instantaneous velocity beside the average "
            f"one, which method.name {config.method.name} trains"
        )
    if method.instantaneous and not module.takes_t:
        raise ValueError(
            f"model.cls: {config.model.cls} is told h = t - r and not t, and h is 0 throughout "
            f"with method.name {config.method.name}: it would not know the time"
        )
    check_parts_of_batch(method, config.training.batch_size, config.training.grad_accum_steps)
    sampling = config.sampling
    for method_name in sampling.method:
        if method_name not in SAMPLERS:
            raise ValueError(f"sampling.method is of {' | '.join(SAMPLERS)}, not {method_name!r}")
    if sampling.sampling_timesteps:
        check_times(sampling.sampling_timesteps)
    if sampling.omega and not method.guided_at_sampling:
        raise ValueError(
            f"sampling.omega: the guidance of method.name {config.method.name} is trained in "
            "(method.omega); leave it empty"
        )
    if "omega" in method.conditions:  # the guidance is an input of the network
        if sampling.channels:
            raise ValueError(
                f"sampling.channels: method.name {config.method.name} guides all channels: leave 0"
            )
        if min(sampling.omega, default=1) <= 0:
            raise ValueError(f"sampling.omega must be above 0, got {list(sampling.omega)}")
    check_evaluation(config)


def check_evaluation(config):
    """Raises ValueError where the options `fid` or the profiles of averages name what is not."""
    metrics = evaluators.fill(config.fid).metrics
    if "kid" in metrics:
        kernels.check_subsets(config.fid.num_samples, "generated samples (fid.num_samples)")
    best = config.training.keep_best
    known = [name for metric in metrics for name in evaluators.METRICS[metric]]
    if best and (best not in known or not config.fid.on_training):
        raise ValueError(
            f"training.keep_best: {best!r} is not measured in training: fid.metrics give "
            f"{', '.join(known)}, with fid.on_training"
        )
    profiles = {f"training.ema_sigma {sigma:g}": sigma for sigma in config.training.ema_sigma}
    named = [name for name in config.fid.weights if name.startswith("ema_sigma")]
    profiles |= {f"fid.weights {name}": float(name.removeprefix("ema_sigma")) for name in named}
    for name, sigma in profiles.items():
        averages.check(name, sigma)


def check_parts_of_batch(method, batch_size, parts):
    """Raises ValueError where a batch cannot be computed in so many parts of equal layout."""
    groups = method.groups(batch_size)
    if batch_size % parts or groups % parts or method.groups(batch_size // parts) * parts != groups:
        raise ValueError(
            f"training.grad_accum_steps: a batch of {batch_size} with "
            f"{method.equal_count(batch_size)} rows of r = t has {groups} equal groups, which "
            f"cannot be divided into {parts} parts"
        )


def image_shape(config):
    """(h, w, c) of what the network sees."""
    return (config.dataset.image_size, config.dataset.image_size, config.dataset.image_channels)


def network_dtype(config):
    """The type of the network's products, by name."""
    return "bfloat16" if config.training.half_precision else "float32"


def make_module(config):
    """The network that `model.cls` names."""
    backbones = {name: backbone for backbone in BACKBONES for name in backbone.NAMES}
    name = config.model.cls
    if name not in backbones:
        raise ValueError(f"model.cls: unknown network {name!r}; known: {', '.join(backbones)}")
    backbone = backbones[name]
    module = backbone.build(
        name,
        image_shape=image_shape(config),
        num_classes=config.dataset.num_classes,
        dtype=jnp.dtype(network_dtype(config)),
        **own_options(config, "model", backbone.OPTIONS, chosen_by="cls"),
    )
    method = method_class(config)
    return module.serving(method.conditions, method.needs_v)


def method_class(config):
    """The class of the objective that `method.name` names."""
    name = config.method.name
    if name not in OBJECTIVES:
        raise ValueError(f"method.name: {name!r} is not one of {' | '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def make_method(config):
    """The objective that `method.name` names, with its options."""
    fields = [field.name for field in dataclasses.fields(method_class(config))]
    options = own_options(
        config, "method", [field for field in fields if field != "num_classes"], chosen_by="name"
    )
    return method_class(config)(num_classes=config.dataset.num_classes, **options)


def own_options(config, section, names, chosen_by):
    """The options `names` of a section as a dict.

    Raises:
      ValueError: another option of the section, which the chosen part does not have, is set.
    """
    values, defaults = config[section], default.get_config()[section]
    for name in values:
        if name not in (*names, chosen_by) and values[name] != defaults[name]:
            raise ValueError(
                f"{section}.{name} is no option of {section}.{chosen_by} {values[chosen_by]}, "
                f"which has {', '.join(names)}"
            )
    return {name: values[name] for name in names}


def make_codec(config):
    """What turns records into the network's inputs."""
    data = config.dataset
    return codec.Codec(
        normalisation=make_normalisation(config),
        flip=data.use_flip,
        labelled=data.num_classes > 0,
        augment_prob=data.augment_prob,
    )


def make_normalisation(config):
    """How latents are normalised."""
    data = config.dataset
    return codec.normalisation(data.latent_mean, data.latent_std, data.image_channels)


def load_autoencoder(config):
    """The autoencoder that a config names, with its weights."""
    return vae.load(config.dataset.vae, make_normalisation(config), config.sampling.vae_dtype)
