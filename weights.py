"""Weights of any origin: loading, choosing a set, placing on devices."""

from formats import published, published_cifar, published_imf
from utils import checkpoint, sharding, trees


def load(path, shapes, config, optimizer=False, may_lack=()):
    """The weights of a run or of a published checkpoint, as numpy trees of the model's `shapes`.

    Args:
      path: a run's workdir, or a published checkpoint (its file, or the folder that holds it).
      shapes: the tree of the model's parameters as `ShapeDtypeStruct`.
      config: the whole config, which has to agree with what is known of the weights.
      optimizer: whether to read Adam's moments too.
      may_lack: first names of parameters that may be missing, all of them together.

    Returns:
      A dict of `step`, `params`, `ema_params` (a tuple, one tree for each decay), `ema_vals` (their
      decays, empty where the file does not say), `opt_state` ({"count", "mu", "nu"} of Adam where
      asked for and stored, else None), `config` (the options of the run, nested, or None) and
      `identity` (what the run was made from, see utils/checkpoint.py; {} where it does not say).

    Raises:
      FileNotFoundError, ValueError: nothing there, or weights of another model or data.
    """
    imf = published_imf.find(path)
    if checkpoint.steps(path):
        weights = {"opt_state": None} | checkpoint.restore_weights(path, optimizer=optimizer)
        saved = weights["config"]
        weights["ema_vals"] = saved.get("training", {}).get("ema_val", ())
        data = saved.get("dataset", {})
        latents = [tuple(data.get(name, ())) for name in ("latent_mean", "latent_std")]
    elif published_cifar.is_published(path):
        weights, latents = published_cifar.load(path), [(), ()]
    else:
        if imf:
            weights = published_imf.load(imf, optimizer)
            latents = [published_imf.LATENT_MEAN, published_imf.LATENT_STD]
        else:
            weights, latents = published.load(path), [(), ()]
        weights["ema_params"], weights["ema_vals"] = (weights["ema_params"],), ()
    weights = {"config": None, "identity": {}} | weights
    check_latents(path, latents, config.dataset)
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


def choose(weights, name):
    """One set of weights by its name: `params`, `ema` (the first average) or `ema_DECAY`."""
    averages = weights["ema_params"]
    names = {"params": weights["params"], "ema": averages[0]}
    names |= {
        f"ema_{decay}": ema for decay, ema in zip(weights["ema_vals"], averages, strict=False)
    }
    if name not in names:
        raise ValueError(f"fid.weights: {name!r} is none of {', '.join(names)}")
    return names[name]


def place(weights, mesh):
    """The trees of `load` on the devices."""

    def on_devices(tree):
        return sharding.place(tree, sharding.by_parameter(mesh, tree))

    return weights | {name: on_devices(weights[name]) for name in ("params", "ema_params")}
