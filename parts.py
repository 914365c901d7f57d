"""Chooses the parts of a run by its options: the one place that does.

A new backbone is a module of models/ with NAMES, OPTIONS and `build`, and a line in BACKBONES; a
new objective is a file of methods/ and a line in OBJECTIVES (docs/extending.md).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from configs.default import OPTIONS
from methods import (
    alphaflow,
    consistency,
    flow,
    improved,
    lagrangian,
    meanflow,
    objective,
    pixel,
    shortcut,
    soflow,
    splitmeanflow,
    tim,
)
from methods.sampler import SAMPLERS, check_times
from metrics import evaluators, kernels
from models import codec, dit, imf_dit, network, pmf_dit, unet, vae
from models.frozen import FROZEN
from utils import averages, conditions, dataset, sharding

BACKBONES = (dit, imf_dit, pmf_dit, unet)
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
    "lagrangian": lagrangian.Lagrangian,
    "pixel": pixel.Pixel,
}


class Parts(NamedTuple):
    """What a run is made of. Nothing here holds weights."""

    mesh: object  # `jax.sharding.Mesh`, or `sharding.NOWHERE`
    module: network.Network
    net: Callable  # the module as `models.network.function` gives it
    gather: Callable  # parameters as `net` takes them: in the type of products, on every device
    method: objective.Objective
    codec: codec.Codec
    image_shape: tuple[int, int, int]  # (h, w, c) of what the network sees
    num_classes: int

    @property
    def frozen(self):
        """Returns the frozen networks that the objective asks for: {name: `Frozen`}."""
        return {name: FROZEN[name] for name in self.method.frozen}

    def param_shapes(self):
        """Tells the parameters of the network, a tree of `ShapeDtypeStruct`s."""
        return network.param_shapes(self.module, self.image_shape)

    def step_flops(self, batch_size):
        """Counts the FLOPs of the products that a step needs, by image; None: not known."""
        if self.module.flops(self.image_shape) is None:
            return None
        both = self.method.passes_of_both(batch_size)
        flops = (self.method.passes(batch_size) - both) * self.module.flops(self.image_shape)
        flops += both * self.module.flops(self.image_shape, both=True) if both else 0
        return flops + sum(frozen.flops for frozen in self.frozen.values())


def make(config, mesh=None):
    """Makes the parts of a config.

    Args:
      config: the whole config.
      mesh: devices; None: all there are, divided as `mesh.fsdp` says.

    Raises:
      ValueError: an option that the chosen network, objective or codec does not have or take.
    """
    data = config.dataset
    shape, dtype = image_shape(data), network_dtype(config.training)
    module = make_module(config.model, shape, data.num_classes, dtype)
    records_codec, method = make_codec(data), make_method(config.method, data.num_classes)
    if not data.num_classes and all(one.kept for one in records_codec.given):
        method.check_unguided()
    told = (*method.conditions, *records_codec.conditions)
    module = module.serving(told, method.needs_v).taking(records_codec.given)
    mesh = mesh or sharding.make_mesh(config.mesh.fsdp)
    whole = sharding.gather(mesh)
    return Parts(
        mesh=mesh,
        module=module,
        net=network.function(module),
        gather=lambda params: whole(module.cast(params)),
        method=method,
        codec=records_codec,
        image_shape=shape,
        num_classes=data.num_classes,
    )


def load_frozen(parts):
    """Loads the parameters of the frozen networks: name -> a tree of numpy arrays."""
    return {name: frozen.load() for name, frozen in parts.frozen.items()}


def open_records(data, batch_size):
    """Opens the training records.

    Args:
      data: the options `dataset`.
      batch_size: images per step.

    Raises:
      ValueError, FileNotFoundError: nothing there, or records that do not fit the options.
    """
    records = dataset.open_records(data.root, stage=data.stage)
    channels = data.image_channels * (2 if records.key == "moments" else 1)
    expected = {
        "shape": (*network.sides(data.image_size), channels),
        "num_classes": data.num_classes or records.num_classes,
        "key": "values" if data.float_values else "image" if data.vae == "none" else "moments",
    }
    for name, value in expected.items():
        theirs = getattr(records, name)
        if theirs != value:
            raise ValueError(
                f"dataset.root {records.root} holds records of {name} {theirs}, the config asks "
                f"for {value}; see image_size, image_channels, num_classes, vae and float_values"
            )
    if data.use_flip and records.key == "moments" and not records.has_flipped:
        raise ValueError(
            f"dataset.use_flip: {records.root} holds no moments_flipped; prepare them, or switch "
            "dataset.use_flip off"
        )
    records = conditions.choose(
        records, conditions.of_options(data, image_shape(data)[:2]), data.use_flip
    )
    if records.num_records < batch_size:
        raise ValueError(
            f"training.batch_size {batch_size} is more than the {records.num_records} records of "
            f"{records.root}"
        )
    return records


def check(config):
    """Raises ValueError in a line about options that do not fit; asks for no device.

    What joins sections without jax is checked before, by configs/checks.py.
    """
    parts = make(config, sharding.NOWHERE)
    check_network(parts, config.model.cls, config.method.name)
    check_parts_of_batch(parts.method, config.training.batch_size, config.training.grad_accum_steps)
    check_sampling(parts.method, config.sampling, config.method.name)
    check_evaluation(config.fid, config.training)


def check_network(parts, cls, name):
    """Raises ValueError where the network `cls` does not fit the objective `name` or the codec."""
    module, method = parts.module, parts.method
    origins = (
        (method.conditions, f"method.name {name}"),
        (parts.codec.conditions, "dataset.augment_prob"),
    )
    for names, origin in origins:
        lacking = [name for name in names if name not in module.conditions]
        if lacking:
            raise ValueError(
                f"model.cls: {cls} does not take {', '.join(lacking)}, which {origin} gives to the "
                "network"
            )
    if method.needs_v and not module.predicts_v:
        raise ValueError(
            f"model.cls: {cls} predicts no instantaneous velocity beside the average one, which "
            f"method.name {name} trains"
        )
    if method.needs_through and not module.takes_through:
        raise ValueError(
            f"model.cls: {cls} has no gradient through the tangent of a JVP, which method.name "
            f"{name} needs"
        )
    if method.instantaneous and not module.takes_t:
        raise ValueError(
            f"model.cls: {cls} is told h = t - r and not t, and h is 0 throughout with method.name "
            f"{name}: it would not know the time"
        )


def check_sampling(method, sampling, name):
    """Raises ValueError where the options `sampling` do not fit the objective `name`."""
    for sampler in sampling.method:
        if sampler not in SAMPLERS:
            raise ValueError(f"sampling.method is of {' | '.join(SAMPLERS)}, not {sampler!r}")
    if sampling.sampling_timesteps:
        check_times(sampling.sampling_timesteps)
    if sampling.omega and not method.guided_at_sampling:
        raise ValueError(
            f"sampling.omega: the guidance of method.name {name} is trained in (method.omega); "
            "leave it empty"
        )
    if "omega" in method.conditions:  # the guidance is an input of the network
        if sampling.channels:
            raise ValueError(f"sampling.channels: method.name {name} guides all channels: leave 0")
        if min(sampling.omega, default=1) <= 0:
            raise ValueError(f"sampling.omega must be above 0, got {list(sampling.omega)}")


def check_evaluation(fid, training):
    """Raises ValueError where the options `fid` or the profiles of averages name what is not."""
    metrics = evaluators.fill(fid).metrics
    if "kid" in metrics:
        kernels.check_subsets(fid.num_samples, "generated samples (fid.num_samples)")
    best = training.keep_best
    known = [name for metric in metrics for name in evaluators.METRICS.get(metric, (metric,))]
    given = any(evaluators.gives(metric, best) for metric in metrics)
    if best and not (given and fid.on_training):
        raise ValueError(
            f"training.keep_best: {best!r} is not measured in training: fid.metrics give "
            f"{', '.join(known)}, with fid.on_training"
        )
    profiles = {f"training.ema_sigma {sigma:g}": sigma for sigma in training.ema_sigma}
    named = [name for name in fid.weights if name.startswith("ema_sigma")]
    profiles |= {f"fid.weights {name}": float(name.removeprefix("ema_sigma")) for name in named}
    for name, sigma in profiles.items():
        averages.check(name, sigma)


def check_parts_of_batch(method, batch_size, count):
    """Raises ValueError where a batch cannot be computed in `count` parts of equal layout."""
    groups = method.groups(batch_size)
    if batch_size % count or groups % count or method.groups(batch_size // count) * count != groups:
        raise ValueError(
            f"training.grad_accum_steps: a batch of {batch_size} with "
            f"{method.equal_count(batch_size)} rows of r = t has {groups} groups, which "
            f"cannot be divided into {count} parts"
        )


def image_shape(data):
    """Returns (h, w, c) of what the network sees, by the options `dataset`."""
    return (*network.sides(data.image_size), data.image_channels)


def network_dtype(training):
    """Returns the name of the type of the network's products, by the options `training`."""
    return "bfloat16" if training.half_precision else "float32"


def make_module(model, image_shape, num_classes, dtype):
    """Makes the network that `model.cls` names.

    Args:
      model: the options `model`.
      image_shape: (h, w, c) of what it sees.
      num_classes: number of labels; 0: it is told none.
      dtype: name of the type of its products.
    """
    backbones = {name: backbone for backbone in BACKBONES for name in backbone.NAMES}
    if model.cls not in backbones:
        raise ValueError(f"model.cls: unknown network {model.cls!r}; known: {', '.join(backbones)}")
    backbone = backbones[model.cls]
    return backbone.build(
        model.cls,
        image_shape=image_shape,
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
        **own_options("model", model, backbone.OPTIONS, chosen_by="cls"),
    )


def make_method(method, num_classes):
    """Makes the objective that `method.name` names, with its options, of the options `method`."""
    if method.name not in OBJECTIVES:
        raise ValueError(f"method.name: {method.name!r} is not one of {' | '.join(OBJECTIVES)}")
    chosen = OBJECTIVES[method.name]
    names = [field.name for field in dataclasses.fields(chosen) if field.name != "num_classes"]
    return chosen(num_classes=num_classes, **own_options("method", method, names, chosen_by="name"))


def own_options(section, values, names, chosen_by):
    """Returns the options `names` of a section as a dict.

    Args:
      section: its name.
      values: its options.
      names: those that the chosen part has.
      chosen_by: the name of the option that chooses the part.

    Raises:
      ValueError: another option of the section, which the chosen part does not have, is set.
    """
    for name in values:
        changed = values[name] != OPTIONS[f"{section}.{name}"].default
        if changed and name not in (*names, chosen_by):
            raise ValueError(
                f"{section}.{name} is no option of {section}.{chosen_by} {values[chosen_by]}, "
                f"which has {', '.join(names)}"
            )
    return {name: values[name] for name in names}


def make_codec(data):
    """Makes what turns records into the network's inputs, by the options `dataset`."""
    return codec.Codec(
        normalisation=make_normalisation(data),
        flip=data.use_flip,
        labelled=data.num_classes > 0,
        augment_prob=data.augment_prob,
        given=conditions.of_options(data, image_shape(data)[:2]),
    )


def make_normalisation(data):
    """Makes the normalisation of latents or values, by the options `dataset`."""
    default = codec.AS_IT_IS if data.float_values else codec.SD_NORMALISATION
    return codec.normalisation(data.latent_mean, data.latent_std, data.image_channels, default)


def load_autoencoder(data, dtype):
    """Loads the autoencoder that the options `dataset` name, its weights too.

    Args:
      data: the options `dataset`.
      dtype: name of the type of the decoder's products.
    """
    if data.float_values:
        return vae.of_values(make_normalisation(data), data.value_range)
    return vae.load(data.vae, make_normalisation(data), dtype)
