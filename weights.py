"""Weights of any origin: loading, choosing a set, placing on devices."""

from formats import published
from utils import checkpoint, sharding, snapshots, trees


def load(path, shapes, optimizer=False):
    """The weights of a run or of a published checkpoint, as numpy trees of the model's `shapes`.

    Args:
      path: a run's workdir, or a published checkpoint (its file, or the folder that holds it).
      shapes: the tree of the model's parameters as `ShapeDtypeStruct`.
      optimizer: whether to read Adam's moments too.

    Returns:
      A dict of `step`, `params`, `ema_params` (a tuple, a tree for each decay, then for each
      profile), `ema_vals` (the decays, empty where the file does not say), `ema_sigmas` (the
      profiles), `workdir` (of the run) and `opt_state` ({"count", "mu", "nu"} of Adam where asked
      for and stored, else None).

    Raises:
      FileNotFoundError, ValueError: nothing there, or weights of another model.
    """
    if checkpoint.steps(path):
        weights = {"opt_state": None} | checkpoint.restore_weights(path, optimizer=optimizer)
        training = weights.pop("config").get("training", {})
        weights["ema_vals"] = training.get("ema_val", ())
        weights["ema_sigmas"] = training.get("ema_sigma", ())
    else:
        weights = published.load(path)
        weights["ema_params"], weights["ema_vals"] = (weights["ema_params"],), ()
        weights["ema_sigmas"] = ()
    weights["workdir"] = path
    for name, tree in (("params", weights["params"]), ("ema_params", weights["ema_params"][0])):
        where = f"{name} of {path}: not the weights of the configured model"
        trees.check_tree(shapes, tree, where)
    return weights


def choose(weights, name):
    """One set of weights by its name: `params`, `ema` (the first average), `ema_DECAY`, or
    `ema_sigmaS` for a power-function average, which is reconstructed where it was not tracked.

    Args:
      weights: from `place`.
    """
    if name.startswith("ema_sigma"):
        return _profile(weights, float(name.removeprefix("ema_sigma")))
    averages = weights["ema_params"]
    names = {"params": weights["params"], "ema": averages[0]}
    names |= {
        f"ema_{decay}": ema for decay, ema in zip(weights["ema_vals"], averages, strict=False)
    }
    if name not in names:
        raise ValueError(f"fid.weights: {name!r} is none of {', '.join(names)}")
    return names[name]


def profiles(weights):
    """The power-function averages that were tracked: sigma_rel -> tree."""
    count = len(weights["ema_sigmas"])
    averages = weights["ema_params"][-count:] if count else ()
    return dict(zip(weights["ema_sigmas"], averages, strict=True))


def _profile(weights, sigma):
    known = profiles(weights)
    if not known:
        raise ValueError(
            f"fid.weights: ema_sigma{sigma:g} needs a run that tracked such averages "
            "(training.ema_sigma)"
        )
    if sigma in known:
        return known[sigma]
    sigmas, averages = zip(*known.items(), strict=True)
    return snapshots.reconstruct(weights["workdir"], weights["step"], sigmas, averages, sigma)


def place(weights, mesh):
    """The trees of `load` on the devices."""

    def on_devices(tree):
        return sharding.place(tree, sharding.by_parameter(mesh, tree))

    return weights | {name: on_devices(weights[name]) for name in ("params", "ema_params")}
