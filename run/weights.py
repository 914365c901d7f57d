"""Weights of any origin: loading, choosing a set, beginning with them, placing on devices."""

import logging
from typing import Any, NamedTuple

import numpy as np

from formats import (
    hugging_face,
    published,
    published_cifar,
    published_imf,
    published_pmf,
    sit,
    start,
)
from models import conditions, dit
from run import astray, checkpoint, layout, snapshots
from utils import averages, files, moments, sharding, trees

SD_FACTOR = [(), ()]  # latents times 0.18215: no mean and no standard deviation by channel


class Weights(NamedTuple):
    """Weights of a network, and what is known of them; trees are nested dicts."""

    step: int
    params: Any  # None where there are averages alone
    ema_params: dict[str, Any]  # averages by name (utils/averages.py); `ema` of an unknown decay
    ema: str  # the name of the first of them, which `ema` stands for
    opt_state: dict | None = None  # see utils/moments.py; where stored and asked for
    config: dict | None = None  # the options of the run, nested; None: not told
    identity: dict = {}  # what the run was made from, see run/checkpoint.py; {}: not told
    latents: list = SD_FACTOR  # mean and standard deviation by channel that latents have
    workdir: Any = None  # of the run
    configs: tuple[str, ...] = ()  # files of configs/ that weights without options may belong to


# Reading --------------------------------------------------------------------------------------


def of_run(workdir, step=None, optimizer=False):
    """Reads the `Weights` of a run, without its model or devices, as numpy arrays.

    Args:
      workdir: the folder of the run.
      step: which checkpoint; the newest that is whole by default.
      optimizer: whether to read the moments of the optimizer too.

    Raises:
      FileNotFoundError: there is no checkpoint.
      DamagedError: there is, but none that is whole.
    """
    available = layout.steps(workdir)
    if not available or (step is not None and step not in available):
        wanted = "a checkpoint" if step is None else f"checkpoint {step}"
        raise FileNotFoundError(
            f"{layout.folder(workdir)} does not hold {wanted} (found: {available})"
        )
    damage = None
    for candidate in [step] if step is not None else reversed(available):
        try:
            return _of_checkpoint(workdir, candidate, optimizer)
        except checkpoint.DamagedError as error:
            logging.warning("%s", error)
            damage = damage or error
    raise damage


def _of_checkpoint(workdir, step, optimizer):
    items = checkpoint.ARRAYS if optimizer else ("params", "ema_params")
    plain = checkpoint.read_plain(workdir, step)
    training = plain["config"].get("training", {})
    names = averages.of_options(training)
    arrays = checkpoint.read_arrays(workdir, step, dict.fromkeys(items), names)
    checkpoint.verify(workdir, step, arrays, plain)
    return Weights(
        step, arrays["params"], arrays["ema_params"], ema=names[0],
        opt_state=moments.find(arrays["progress"]) if optimizer else None,
        config=plain["config"], identity=plain["identity"],
        latents=_latents(plain["config"]), workdir=workdir,
    )  # fmt: skip


def _latents(saved):
    data = saved.get("dataset", {})
    return [tuple(data.get(name, ())) for name in ("latent_mean", "latent_std")]


def _exported(path, optimizer):
    content = hugging_face.load(hugging_face.find(path))
    options, name, tree = content["options"], content["weights"], content["tree"]
    names = averages.of_options(options.get("training", {})) if name == "ema" else ()
    ema = (*names, "ema")[0]
    return Weights(
        content["step"], tree if name == "params" else None, {ema: tree}, ema,
        config=options, identity=content["identity"], latents=_latents(options),
    )  # fmt: skip


def _improved(path, optimizer):
    content = published_imf.load(published_imf.find(path), optimizer)
    latents = [published_imf.LATENT_MEAN, published_imf.LATENT_STD]
    return _published(content, latents=latents, configs=("imf_b2", "imf_m2", "imf_l2", "imf_xl2"))


def _pixel(path, optimizer):
    found = published_pmf.load(published_imf.find(path), optimizer)
    halves = {f"{averages.HALF_LIFE}{half}": tree for half, tree in found["ema_params"].items()}
    configs = tuple(f"pmf_{size}" for size in ("b16", "b32", "l16", "l32", "h16", "h32"))
    # Which one is best differs from network to network; the longest is that of most.
    ema = list(halves)[-1]
    return Weights(**found | {"ema_params": halves}, ema=ema, configs=configs)


def _meanflow(path, optimizer):
    configs = ("run_b4", "run_b2", "run_m2", "run_l2", "run_xl2")
    return _published(published.load(path), configs=configs)


def _cifar(path, optimizer):
    content = published_cifar.load(path)
    names = averages.names(published_cifar.AVERAGES.values())
    ema_params = dict(zip(names, content["ema_params"], strict=True))
    configs = ("cifar10_unet",)
    return Weights(content["step"], content["params"], ema_params, names[0], configs=configs)


def _published(content, **more):
    """Returns the `Weights` of a published checkpoint, whose one average has an unknown decay."""
    return Weights(**content | {"ema_params": {"ema": content["ema_params"]}}, ema="ema", **more)


# (recognises(path), read(path, optimizer) -> `Weights`), tried in order; the last one raises the
# error for a path that none recognises.
READERS = (
    (layout.steps, lambda path, optimizer: of_run(path, None, optimizer)),
    (hugging_face.find, _exported),
    (published_pmf.find, _pixel),
    (published_imf.find, _improved),
    (published_cifar.is_published, _cifar),
    (lambda path: True, _meanflow),
)


def read(path, optimizer=False, step=None):
    """Reads `Weights` as `load` does, but without a model; `step`: the checkpoint of a run."""
    path = _here(path)
    astray.check(path)
    if step is not None:
        return of_run(path, step, optimizer)
    return next(reader(path, optimizer) for recognises, reader in READERS if recognises(path))


def _here(path):
    """Copies weights in a bucket to this machine; runs are read from where they are."""
    return files.local(path) if files.is_remote(path) and not layout.steps(path) else path


def options(path):
    """Reads the options of weights, nested; None where they tell none. Needs no devices."""
    if layout.steps(path):
        return layout.options(path)
    exported = hugging_face.find(path)
    return hugging_face.read_config(exported)["options"] if exported else None


def load(path, shapes, data, optimizer=False, may_lack=()):
    """Reads the `Weights` of a run or of a published checkpoint, for a network of these `shapes`.

    Args:
      path: a run's workdir, a published checkpoint (its file, or the folder that holds it), or
        what was exported in the Hugging Face layout.
      shapes: the tree of the network's parameters as `ShapeDtypeStruct`.
      data: the options `dataset`, which have to agree with what is known of the weights.
      optimizer: whether to read the moments of the optimizer too.
      may_lack: first names of parameters that may be missing, all of them together.

    Raises:
      FileNotFoundError, ValueError: nothing there, or weights of another network or data.
    """
    return checked(read(path, optimizer), path, shapes, data, may_lack)


def checked(weights, path, shapes, data, may_lack=()):
    """Returns the `Weights` that `read` gives of a path; raises where `load` would."""
    check_latents(path, weights.latents, data)
    for name, tree in (("params", weights.params), ("ema_params", choose(weights, "ema"))):
        if name == "params" and tree is None:  # a published file of averages alone
            continue
        check_parameters(f"{name} of {path}", shapes, tree, may_lack)
    return weights


def check_parameters(where, shapes, tree, may_lack):
    """Raises ValueError where a tree is not one of the network's parameters; see `load`."""
    there = shapes if may_lack and tree.keys() & set(may_lack) else without(shapes, may_lack)
    trees.check_tree(there, tree, f"{where}: not the weights of the configured model")


def without(tree, names):
    """Returns a tree without the entries of these first names."""
    return {name: part for name, part in tree.items() if name not in names}


def check_latents(path, latents, data):
    """Raises ValueError where weights were trained on latents of another normalisation.

    Args:
      latents: per-channel mean and standard deviation of the weights; empty: the factor 0.18215.
      data: the options `dataset`.
    """
    asked = [tuple(data.latent_mean), tuple(data.latent_std)]
    if data.vae != "none" and asked != latents:
        described = [f"latent_mean {a} and latent_std {b}" if a else "the factor 0.18215"
                     for a, b in (latents, asked)]  # fmt: skip
        raise ValueError(
            f"{path} holds weights for latents normalised by {described[0]}, and dataset asks for "
            f"{described[1]}"
        )


def begin(path, data, module, fresh, name="ema", kind=""):
    """Reads the parameters that a run begins with from the weights of another one.

    Args:
      path: of the weights, the option `init_from`.
      data: the options `dataset`.
      module: `models.network.Network`.
      fresh: its fresh parameters, a nested dict of numpy arrays.
      name, kind: the options `init_weights` and `init_format`.

    Returns:
      The parameters, and a line that says what was taken, what is new and what was left over.

    Raises:
      FileNotFoundError, ValueError: nothing there, or weights that do not fit, each by name.
    """
    path = _here(path)
    if sit.recognises(path) or (kind and files.path(path).is_file()):
        found, latents = sit.load(path, name, kind), SD_FACTOR
        _check_positions(found.positions, path)
    elif kind:
        raise ValueError(f"init_format: {path} is no .pt file: leave it empty")
    else:
        weights = read(path)
        latents, chosen = weights.latents, choose(weights, name, "init_weights")
        arrays = {k: np.asarray(v) for k, v in trees.flatten(chosen).items()}
        found = start.Start(arrays, fresh=tuple(f"{part}/" for part in module.only_for_training))
    check_latents(path, latents, data)
    found = found._replace(fresh=(*found.fresh, f"{conditions.NAME}/"))
    return start.merge(fresh, found, module.label_table, f"init_from {path}")


def _check_positions(positions, path):
    """Raises ValueError where the positions of a file are not those that the network computes."""
    _, tokens, width = np.shape(positions)
    side = round(tokens**0.5)
    ours = dit.position_embedding(width, side, side)
    if ours.shape != positions.shape[1:] or not np.allclose(ours, positions[0], atol=1e-4):
        raise ValueError(f"{path}: pos_embed is not the fixed embedding of sines and cosines")


# Choosing -------------------------------------------------------------------------------------


def choose(weights, name, option="fid.weights"):
    """Returns one set of weights by its name: `params`, `ema` or an average as `Weights` names it.

    A power-function average `ema_sigmaS` is reconstructed where it was not tracked.

    Args:
      weights: `Weights`, from `place` where one has to be reconstructed.

    Raises:
      ValueError: there is no such set; `option` asked for it.
    """
    check_name(weights, name, option)
    sigma = averages.sigma_of(name)
    if sigma is None:
        return _sets(weights)[name]
    tracked = profiles(weights)
    if sigma in tracked:
        return tracked[sigma]
    return snapshots.reconstruct(weights.workdir, weights.step, tracked, sigma)


def check_name(weights, name, option="fid.weights"):
    """Raises ValueError where there is no such set of weights; `option` asked for it."""
    if averages.sigma_of(name) is not None:
        if not profiles(weights):
            raise ValueError(
                f"{option}: {name} needs a run that tracked such averages (training.ema_sigma)"
            )
    elif name not in _sets(weights):
        raise ValueError(f"{option}: {name!r} is none of {', '.join(_sets(weights))}")


def _sets(weights):
    params = {} if weights.params is None else {"params": weights.params}
    decays = {k: tree for k, tree in weights.ema_params.items() if averages.sigma_of(k) is None}
    return params | {"ema": weights.ema_params[weights.ema]} | decays


def profiles(weights):
    """Returns the power-function averages that were tracked: sigma_rel -> tree."""
    by_sigma = {averages.sigma_of(name): tree for name, tree in weights.ema_params.items()}
    return {sigma: tree for sigma, tree in by_sigma.items() if sigma is not None}


def place(weights, mesh):
    """Returns the `Weights` with parameters and averages on the devices."""

    def on_devices(tree):
        return sharding.place(tree, sharding.by_parameter(mesh, tree))

    params, ema_params = map(on_devices, (weights.params, weights.ema_params))
    return weights._replace(params=params, ema_params=ema_params)
