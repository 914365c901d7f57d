"""Weights of any origin: loading, choosing a set, beginning with them, placing on devices."""

import numpy as np

from formats import hugging_face, published, published_cifar, published_imf, sit, start
from models import dit
from run import astray, checkpoint, layout, snapshots
from utils import files, sharding, trees

SD_FACTOR = [(), ()]  # latents times 0.18215: no mean and no standard deviation by channel


def _run(path, optimizer, step=None):
    found = {"opt_state": None} | checkpoint.restore_weights(path, step, optimizer)
    training = found["config"].get("training", {})
    found |= {"ema_vals": training.get("ema_val", ()), "ema_sigmas": training.get("ema_sigma", ())}
    return found | {"latents": _latents(found["config"])}


def _latents(saved):
    data = saved.get("dataset", {})
    return [tuple(data.get(name, ())) for name in ("latent_mean", "latent_std")]


def _exported(path, optimizer):
    found = hugging_face.load(hugging_face.find(path))
    tree, options, name = found.pop("tree"), found.pop("options"), found.pop("weights")
    decays = options.get("training", {}).get("ema_val", ())[:1] if name == "ema" else ()
    return found | {
        "params": tree if name == "params" else None,
        "ema_params": (tree,),
        "ema_vals": decays,
        "opt_state": None,
        "config": options,
        "latents": _latents(options),
    }


def _improved(path, optimizer):
    found = published_imf.load(published_imf.find(path), optimizer)
    latents = [published_imf.LATENT_MEAN, published_imf.LATENT_STD]
    found |= {"ema_params": (found["ema_params"],), "ema_vals": (), "latents": latents}
    return found | {"configs": ("imf_b2", "imf_m2", "imf_l2", "imf_xl2")}


def _meanflow(path, optimizer):
    found = published.load(path)
    found |= {"ema_params": (found["ema_params"],), "ema_vals": (), "latents": SD_FACTOR}
    return found | {"configs": ("run_b4", "run_b2", "run_m2", "run_l2", "run_xl2")}


def _cifar(path, optimizer):
    return published_cifar.load(path) | {"latents": SD_FACTOR, "configs": ("cifar10_unet",)}


# (recognises(path), read(path, optimizer)); the first that recognises a path reads it, and the last
# one says what there might have been. What is read is as from `load`, with `latents` beside it: by
# which mean and standard deviation of each channel they were normalised; and, where it does not
# tell its options, `configs`: the names of those that it may belong to.
READERS = (
    (checkpoint.steps, _run),
    (hugging_face.find, _exported),
    (published_imf.find, _improved),
    (published_cifar.is_published, _cifar),
    (lambda path: True, _meanflow),
)


def read(path, optimizer=False, step=None):
    """`load` without a model: the weights are whatever the path holds; `step`: of a run."""
    path = _here(path)
    astray.check(path)
    if step is not None:
        found = _run(path, optimizer, step)
    else:
        found = next(reader(path, optimizer) for recognises, reader in READERS if recognises(path))
    return {"ema_sigmas": (), "workdir": path, "config": None, "identity": {}} | found


def _here(path):
    """A copy of weights in a bucket on this machine; runs are read from where they are."""
    return files.local(path) if files.is_remote(path) and not layout.steps(path) else path


def options(path):
    """The options that weights bring along, nested; None where they tell none. Without devices."""
    if layout.steps(path):
        return layout.options(path)
    exported = hugging_face.find(path)
    return hugging_face.read_config(exported)["options"] if exported else None


def load(path, shapes, config, optimizer=False, may_lack=()):
    """The weights of a run or of a published checkpoint, as numpy trees of the model's `shapes`.

    Args:
      path: a run's workdir, a published checkpoint (its file, or the folder that holds it), or
        what was exported in the Hugging Face layout.
      shapes: the tree of the model's parameters as `ShapeDtypeStruct`.
      config: the whole config, which has to agree with what is known of the weights.
      optimizer: whether to read Adam's moments too.
      may_lack: first names of parameters that may be missing, all of them together.

    Returns:
      A dict of `step`, `params`, `ema_params` (a tuple, a tree for each decay, then for each
      profile), `ema_vals` (the decays, empty where the file does not say), `ema_sigmas` (the
      profiles), `workdir` (of the run), `opt_state` ({"count", "mu", "nu"} of Adam where asked for
      and stored, else None), `config` (the options of the run, nested, or None) and `identity`
      (what the run was made from, see run/checkpoint.py; {} where it does not say).

    Raises:
      FileNotFoundError, ValueError: nothing there, or weights of another model or data.
    """
    return checked(read(path, optimizer), path, shapes, config, may_lack)


def checked(weights, path, shapes, config, may_lack=()):
    """What `read` gives of a path, held against a model's `shapes` and a config; see `load`."""
    check_latents(path, weights["latents"], config.dataset)
    for name, tree in (("params", weights["params"]), ("ema_params", weights["ema_params"][0])):
        if name == "params" and tree is None:  # a published file of averages alone
            continue
        check_parameters(f"{name} of {path}", shapes, tree, may_lack)
    return weights


def check_parameters(where, shapes, tree, may_lack):
    """Raises ValueError where a tree is not one of the model's; see `load`."""
    there = shapes if may_lack and tree.keys() & set(may_lack) else without(shapes, may_lack)
    trees.check_tree(there, tree, f"{where}: not the weights of the configured model")


def without(tree, names):
    """A tree without the entries of these first names."""
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


def begin(config, module, fresh):
    """Parameters to begin a run with, from the weights of another one.

    Args:
      config: the whole config, of which `init_from`, `init_weights` and `init_format` count.
      module: `models.network.Network`.
      fresh: its fresh parameters, a nested dict of numpy arrays.

    Returns:
      The parameters, and a line that says what was taken, what is new and what was left over.

    Raises:
      FileNotFoundError, ValueError: nothing there, or weights that do not fit, each by name.
    """
    path, name, kind = _here(config.init_from), config.init_weights, config.init_format
    if sit.recognises(path) or (kind and files.path(path).is_file()):
        found, latents = sit.load(path, name, kind), SD_FACTOR
        _check_positions(found.positions, path)
    elif kind:
        raise ValueError(f"init_format: {path} is no .pt file: leave it empty")
    else:
        weights = read(path)
        latents, chosen = weights["latents"], choose(weights, name, "init_weights")
        arrays = {k: np.asarray(v) for k, v in trees.flatten(chosen).items()}
        found = start.Start(arrays, fresh=tuple(f"{part}/" for part in module.only_for_training))
    check_latents(path, latents, config.dataset)
    return start.merge(fresh, found, module.label_table, f"init_from {path}")


def _check_positions(positions, path):
    """Raises ValueError where the positions of a file are not those that the network computes."""
    _, tokens, width = np.shape(positions)
    side = round(tokens**0.5)
    ours = dit.position_embedding(width, side, side)
    if ours.shape != positions.shape[1:] or not np.allclose(ours, positions[0], atol=1e-4):
        raise ValueError(f"{path}: pos_embed is not the fixed embedding of sines and cosines")


def choose(weights, name, option="fid.weights"):
    """One set of weights by its name: `params`, `ema` (the first average), `ema_DECAY`, or
    `ema_sigmaS` for a power-function average, which is reconstructed where it was not tracked.

    Args:
      weights: from `place` where it has to be reconstructed.

    Raises:
      ValueError: there is no such set; `option` asked for it.
    """
    check_name(weights, name, option)
    if name.startswith("ema_sigma"):
        return _profile(weights, float(name.removeprefix("ema_sigma")))
    return _named(weights)[name]


def _named(weights):
    averages = weights["ema_params"]
    decays = zip(weights["ema_vals"], averages, strict=False)
    named = {f"ema_{decay}": average for decay, average in decays}
    params = {} if weights["params"] is None else {"params": weights["params"]}
    return params | {"ema": averages[0], **named}


def check_name(weights, name, option="fid.weights"):
    """Raises ValueError where there is no such set of weights; `option` asked for it."""
    if name.startswith("ema_sigma"):
        if not profiles(weights):
            raise ValueError(
                f"{option}: {name} needs a run that tracked such averages (training.ema_sigma)"
            )
    elif name not in _named(weights):
        raise ValueError(f"{option}: {name!r} is none of {', '.join(_named(weights))}")


def profiles(weights):
    """The power-function averages that were tracked: sigma_rel -> tree."""
    sigmas = weights.get("ema_sigmas", ())
    count = len(sigmas)
    averages = weights["ema_params"][-count:] if count else ()
    return dict(zip(sigmas, averages, strict=True))


def _profile(weights, sigma):
    known = profiles(weights)
    if sigma in known:
        return known[sigma]
    sigmas, averages = zip(*known.items(), strict=True)
    return snapshots.reconstruct(weights["workdir"], weights["step"], sigmas, averages, sigma)


def place(weights, mesh):
    """The trees of `load` on the devices."""

    def on_devices(tree):
        return sharding.place(tree, sharding.by_parameter(mesh, tree))

    return weights | {name: on_devices(weights[name]) for name in ("params", "ema_params")}
